// What single instructions compute, on a GPU or in the emulation: primitives NAME prints the words that its threads leave, in
// hexadecimal; without a name, all of them and what each needs. tests/primitives.py builds both programs and compares.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../ptx.cuh"
#include "primitives_sm90.cuh"

#ifdef FASTATTN_EMULATION
#include "../engine.h"
#endif

namespace {

constexpr int kWords = 2048;  // that a kernel gets, and the most it leaves
constexpr uint32_t kAll = 0xffffffffu;

__global__ void shuffles(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    for (int i = 0; i < 5; i++) out[32 * i + t] = __shfl_xor_sync(kAll, in[t], 1 << i);
    out[160 + t] = __any_sync(kAll, in[t] % 64 == 0);
    out[192 + t] = __any_sync(kAll, in[t] % 2 == 0);
}

// Rounding to 16 bits of any 32: ties among them, numbers too large, too small and none.
__global__ void conversions(const uint32_t* in, uint32_t* out) {
    for (int i = threadIdx.x; i < kWords; i += 32) {
        const float v = __uint_as_float(i % 4 ? in[i] : in[i] & 0xffff8000u | 0x8000u);
        const __half half = from_float<__half>(v);
        const __nv_bfloat16 bfloat = from_float<__nv_bfloat16>(v);
        out[i] = *reinterpret_cast<const uint16_t*>(&half) | *reinterpret_cast<const uint16_t*>(&bfloat) << 16;
    }
}

// 16 bytes at a time, loaded, widened, narrowed and stored.
__global__ void vectors(const uint32_t* in, uint32_t* out) {
    float v[8];
    load<8>(reinterpret_cast<const __nv_bfloat16*>(in) + 8 * threadIdx.x, v);
    store<8>(reinterpret_cast<__nv_bfloat16*>(out) + 8 * threadIdx.x, v);
    store_global<8>(reinterpret_cast<__nv_bfloat16*>(out) + 256 + 8 * threadIdx.x, v);
}

// Of the three kinds, in three groups that arrive one after another; every third of the last kind reads nothing.
__global__ void copies(const uint32_t* in, uint32_t* out) {
    SMEM_DYN(smem, 16);
    auto* const s = reinterpret_cast<uint32_t*>(smem);
    const int t = threadIdx.x;
    ptx::cp_async_16(s + 4 * t, in + 4 * t);
    ptx::cp_async_commit();
    ptx::cp_async_16_cached(s + 256 + 4 * t, in + 256 + 4 * t);
    ptx::cp_async_commit();
    ptx::cp_async_16_or_zeros(s + 512 + 4 * t, t % 3 ? in + 512 + 4 * t : nullptr, t % 3 ? 16 : 0);
    ptx::cp_async_commit();
    const auto show = [&](int group) {
        __syncthreads();
        for (int i = 0; i < 4; i++) out[256 * group + i * 64 + t] = s[256 * group + i * 64 + (t ^ 33)];
    };
    ptx::cp_async_wait<2>();
    show(0);
    ptx::cp_async_wait<1>();
    show(1);
    ptx::cp_async_wait<0>();
    show(2);
}

template <bool kTransposed>
__global__ void matrices(const uint32_t* in, uint32_t* out) {
    SMEM_DYN(smem, 16);
    auto* const s = reinterpret_cast<uint32_t*>(smem);
    const int t = threadIdx.x;
    for (int i = 0; i < 4; i++) s[4 * t + i] = in[4 * t + i];
    __syncwarp();
    uint32_t to[4];
    if (kTransposed)
        ptx::ldmatrix_x4_trans(to, s + (4 * t ^ 20));
    else
        ptx::ldmatrix_x4(to, s + (4 * t ^ 20));
    for (int i = 0; i < 4; i++) out[4 * t + i] = to[i];
}

// Eight products one after another on one accumulator: a (16, 16), b (16, 8), two elements to a word as they come.
template <typename T>
__global__ void products(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    float c[4] = {};
    for (int k = 0; k < 8; k++) {
        uint32_t word[6];
        for (int i = 0; i < 6; i++) {
            // 16 bits to a number in [-8, 8), by a factor of up to 2^14 smaller
            T two[2];
            for (int half = 0; half < 2; half++) {
                const uint32_t bits = in[192 * k + 32 * i + t] >> 16 * half & 0xffffu;
                two[half] = from_float<T>((static_cast<int>(bits) - 32768) * (1.0f / (4096 << bits % 15)));
            }
            word[i] = *reinterpret_cast<const uint32_t*>(two);
        }
        ptx::mma_m16n8k16<T>(c, {word[0], word[1], word[2], word[3]}, word[4], word[5]);
        for (int i = 0; i < 6; i++) out[320 * k + 32 * i + t] = word[i];
        for (int i = 0; i < 4; i++) out[320 * k + 192 + 32 * i + t] = __float_as_uint(c[i]);
    }
}

// Numbers from low to high, and what a function makes of them.
template <typename F>
__device__ void tabulate(const uint32_t* in, uint32_t* out, float low, float high, F f) {
    for (int i = threadIdx.x; i < kWords / 2; i += 32) {
        const float v = low + (high - low) * (static_cast<float>(in[i] >> 8) * 0x1p-24f);
        out[2 * i] = __float_as_uint(v);
        out[2 * i + 1] = __float_as_uint(f(v));
    }
}
__global__ void powers_of_two(const uint32_t* in, uint32_t* out) {
    tabulate(in, out, -160.0f, 127.9f, [](float v) { return ptx::exp2(v); });
}
__global__ void powers_of_two_near_0(const uint32_t* in, uint32_t* out) {
    tabulate(in, out, -1.0f, 0.0f, [](float v) { return ptx::exp2(v); });
}
__global__ void exponentials(const uint32_t* in, uint32_t* out) {
    tabulate(in, out, -80.0f, 80.0f, [](float v) { return expf(v); });
}
__global__ void logarithms(const uint32_t* in, uint32_t* out) {
    tabulate(in, out, 0.0f, 3.0f, [](float v) { return logf(v); });
}
__global__ void logarithms_of_two(const uint32_t* in, uint32_t* out) {
    tabulate(in, out, 0.0f, 3.0f, [](float v) { return log2f(v); });
}
__global__ void quotients(const uint32_t* in, uint32_t* out) {
    tabulate(in, out, 1.0f, 70000.0f, [](float v) { return __fdividef(3.0f, v); });
}
// What a kernel relies on: nothing for -inf, 1 for 0, no number for none.
__global__ void ends_of_powers(const uint32_t*, uint32_t* out) {
    const float at[] = {-INFINITY, INFINITY, 0.0f, -0.0f, NAN, -126.0f, -127.0f, -1e30f, 1e30f, 127.0f, 128.0f};
    for (int i = 0; i < 11; i++) out[i] = __float_as_uint(ptx::exp2(at[i]));
}

struct Primitive {
    const char* name;
    void (*kernel)(const uint32_t*, uint32_t*);
    int threads, words;  // words: that it leaves
    size_t smem;
    const char* needs = "";
    int (*launch)(const uint32_t*, uint32_t*) = nullptr;  // where a kernel needs more than words

    int run(const uint32_t* in, uint32_t* out) const {
        return launch ? launch(in, out) : KLAUNCH(kernel, 1, threads, smem, nullptr, in, out);
    }
};
constexpr char kSm90[] = "sm_90a";
template <bool kAcross, Swizzle kSwizzle>
constexpr auto* wgmma_half = wgmma_shared<__half, kAcross, kSwizzle>;
template <bool kAcross, Swizzle kSwizzle>
constexpr auto* wgmma_bfloat = wgmma_shared<__nv_bfloat16, kAcross, kSwizzle>;
const Primitive primitives[] = {
    {"shuffles", shuffles, 32, 224, 0},
    {"conversions", conversions, 32, kWords, 0},
    {"vectors", vectors, 32, 256, 0},
    {"copies", copies, 64, 768, 3072},
    {"matrices", matrices<false>, 32, 128, 512},
    {"matrices_transposed", matrices<true>, 32, 128, 512},
    {"products_half", products<__half>, 32, 2560, 0},
    {"products_bfloat", products<__nv_bfloat16>, 32, 2560, 0},
    {"powers_of_two", powers_of_two, 32, kWords, 0},
    {"powers_of_two_near_0", powers_of_two_near_0, 32, kWords, 0},
    {"exponentials", exponentials, 32, kWords, 0},
    {"logarithms", logarithms, 32, kWords, 0},
    {"logarithms_of_two", logarithms_of_two, 32, kWords, 0},
    {"quotients", quotients, 32, kWords, 0},
    {"ends_of_powers", ends_of_powers, 1, 11, 0},
    {"mbarriers", mbarriers, 64, 46, 0, kSm90},
    {"named_barriers", named_barriers, 128, 64, 0, kSm90},
    {"registers", registers, 384, 384, 0, kSm90},
    {"load_none", nullptr, 0, 512, 0, kSm90, launch_tensor_load<Swizzle::kNone, 3>},
    {"load_32", nullptr, 0, 128, 0, kSm90, launch_tensor_load<Swizzle::k32, 3>},
    {"load_64", nullptr, 0, 256, 0, kSm90, launch_tensor_load<Swizzle::k64, 3>},
    {"load_128", nullptr, 0, 512, 0, kSm90, launch_tensor_load<Swizzle::k128, 3>},
    {"load_4d", nullptr, 0, 512, 0, kSm90, launch_tensor_load<Swizzle::k128, 4>},
    {"store_none", nullptr, 0, 1376, 0, kSm90, launch_tensor_store<Swizzle::kNone>},
    {"store_128", nullptr, 0, 1376, 0, kSm90, launch_tensor_store<Swizzle::k128>},
    {"wgmma_along_none", wgmma_bfloat<false, Swizzle::kNone>, 128, 2048, 24576, kSm90},
    {"wgmma_across_none", wgmma_half<true, Swizzle::kNone>, 128, 2048, 24576, kSm90},
    {"wgmma_along_32", wgmma_bfloat<false, Swizzle::k32>, 128, 2048, 24576, kSm90},
    {"wgmma_across_32", wgmma_half<true, Swizzle::k32>, 128, 2048, 24576, kSm90},
    {"wgmma_along_64", wgmma_bfloat<false, Swizzle::k64>, 128, 2048, 24576, kSm90},
    {"wgmma_across_64", wgmma_half<true, Swizzle::k64>, 128, 2048, 24576, kSm90},
    {"wgmma_along_128", wgmma_bfloat<false, Swizzle::k128>, 128, 2048, 24576, kSm90},
    {"wgmma_across_128", wgmma_half<true, Swizzle::k128>, 128, 2048, 24576, kSm90},
    {"wgmma_registers_along", wgmma_registers<__half, false, 32>, 128, 2048, 24576, kSm90},
    {"wgmma_registers_across", wgmma_registers<__nv_bfloat16, true, 64>, 128, 4096, 24576, kSm90},
    {"tiles_along_32", nullptr, 0, 2048, 0, kSm90, launch_tiles<__half, false, Swizzle::k32>},
    {"tiles_across_32", nullptr, 0, 2048, 0, kSm90, launch_tiles<__nv_bfloat16, true, Swizzle::k32>},
    {"tiles_along_64", nullptr, 0, 2048, 0, kSm90, launch_tiles<__half, false, Swizzle::k64>},
    {"tiles_across_64", nullptr, 0, 2048, 0, kSm90, launch_tiles<__nv_bfloat16, true, Swizzle::k64>},
    {"tiles_along_128", nullptr, 0, 2048, 0, kSm90, launch_tiles<__half, false, Swizzle::k128>},
    {"tiles_across_128", nullptr, 0, 2048, 0, kSm90, launch_tiles<__nv_bfloat16, true, Swizzle::k128>},
};

#ifdef FASTATTN_EMULATION
const char* run(const Primitive& p, const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
    static std::string said;
    if (p.run(in.data(), out.data()) == 0) return nullptr;
    said = emulation::last_error();
    return said.c_str();
}
#else
const char* run(const Primitive& p, const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
    uint32_t *on_gpu, *left;
    cudaError_t code = cudaMalloc(&on_gpu, in.size() * 4);
    if (!code) code = cudaMalloc(&left, out.size() * 4);
    if (!code) code = cudaMemcpy(on_gpu, in.data(), in.size() * 4, cudaMemcpyHostToDevice);
    if (!code) code = cudaMemset(left, 0xff, out.size() * 4);
    if (!code) code = static_cast<cudaError_t>(p.run(on_gpu, left));
    if (!code) code = cudaMemcpy(out.data(), left, out.size() * 4, cudaMemcpyDeviceToHost);
    return code ? cudaGetErrorString(code) : nullptr;
}
#endif

}  // namespace

int main(int argc, char** argv) {
#ifdef FASTATTN_EMULATION
    if (argc > 3) emulation::schedule(static_cast<emulation::Order>(atoi(argv[2])), atoi(argv[3]));
#endif
    for (const Primitive& p : primitives) {
        if (argc < 2 || p.name != std::string(argv[1])) continue;
        std::vector<uint32_t> in(kWords), out(p.words, 0xffffffffu);
        uint32_t state = 2463534242u;  // xorshift32 (Marsaglia, "Xorshift RNGs", 2003)
        for (uint32_t& word : in) {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            word = state;
        }
        if (const char* error = run(p, in, out)) {
            fprintf(stderr, "%s: %s\n", p.name, error);
            return 1;
        }
        for (uint32_t word : out) printf("%08x ", word);
        return 0;
    }
    for (const Primitive& p : primitives) printf("%s %s\n", p.name, p.needs);
    return 2;
}
