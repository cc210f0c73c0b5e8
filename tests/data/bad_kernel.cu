// Both kernels are wrong on purpose: test_build_gate.py shows that its gate catches them.

// 1024 threads, two blocks an SM: 32 registers a thread, which do not hold 64 live values.
__global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
    float v[64];
#pragma unroll
    for (int i = 0; i < 64; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) y[(63 - i) * 1024 + threadIdx.x] = v[i] * v[(i + 31) % 64];
}

// Without __launch_bounds__ ptxas does not know the register budget and drops the instruction, with a remark only.
__global__ void reallocates_registers(float* y) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
    y[threadIdx.x] = 1;
}
