// What bindings.cpp calls: one launcher a kernel file, plain pointers and a stream in, a cudaError_t out.
#pragma once

#include <cstdint>

enum Dtype : int { kFloat32, kFloat16, kBFloat16 };

extern "C" {

// x (M, N) with any strides; weight and bias (N,) contiguous or null, both of w_dtype, which is x_dtype or fp32;
// y (M, N) contiguous of x_dtype; mean, rstd (M,) fp32. M and N are at least 1.
int layer_norm_fwd(const void* x, const void* weight, const void* bias, void* y, float* mean, float* rstd,
                   int64_t stride_x_m, int64_t stride_x_n, int64_t M, int64_t N, int x_dtype, int w_dtype, float eps,
                   void* stream);

// Loads every kernel of layer_norm.cu onto the current device, which a first launch inside a graph capture could not.
int layer_norm_prepare();
}
