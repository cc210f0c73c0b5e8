// What a CUDA source needs to be an ordinary C++ source: rt.cuh includes this in place of CUDA's own spellings when
// FASTATTN_EMULATION is defined. Each CUDA thread is a fiber, each block runs on one OS thread; engine.cpp has the rest.
//
// Held to: the CUDA programming guide. Lanes named by the mask of a warp function must all come, to the same one;
// __syncthreads waits for all threads that have not exited. Shared memory starts as NaN, between guarded ends. Functions
// that a GPU only approximates are off by as many units in the last place as the guide allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __launch_bounds__
#undef __shared__
#define __launch_bounds__(...)
#define __shared__ shared memory is declared with SMEM_ARRAY or SMEM_DYN

namespace emulation {

// Where in the sources a call stands: a default argument is evaluated at the call.
struct Place {
    const char* file;
    int line;
};
#define EMULATION_HERE \
    ::emulation::Place place = { __builtin_FILE(), __builtin_LINE() }

struct Thread {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
// Of the running fiber. __thread, since a thread_local of another file is read through a function.
extern __thread Thread* here __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

void sync_threads(Place place);
void sync_warp(uint32_t mask, Place place);
uint32_t ballot(uint32_t mask, bool predicate, Place place);
enum class Shuffle { kIndex, kXor, kDown, kUp };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width, Place place);

// All lanes of a warp come, each with something of its own; the last one calls finish with what lanes 0 to 31 brought.
void together(const char* name, void* mine, void (*finish)(void* const* of_lanes), Place place);

// One variable of shared memory: `key` is the address of something that exists once per declaration.
void* shared_array(const void* key, const char* name, size_t bytes, size_t align);
void* shared_dynamic(size_t align);

// Before a load or store of global or shared memory: alignment, and the record that is asked for.
enum class Access { kRead, kWrite };
void access(Access kind, const void* address, size_t bytes, Place place);

// cp.async: copies of one thread to shared memory, in groups that are waited for; `read` bytes of it, then zeros.
void copy_async(void* to, const void* from, size_t read, size_t bytes, Place place);
void copy_commit();
void copy_wait(int pending);

using Body = void (*)(const void* arguments);
int launch(const void* kernel, dim3 grid, dim3 block, size_t smem, Body body, const void* arguments);

template <typename... P, typename... A>
int launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, const void*, A... arguments) {
    const auto call = [=] { kernel(arguments...); };
    return launch(reinterpret_cast<const void*>(kernel), grid, block, smem,
                  [](const void* c) { (*static_cast<decltype(&call)>(c))(); }, &call);
}

template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof to);
    return to;
}

// A number within ulps units in the last place of the exact one, what rounding to fp32 adds included. Which is a function of
// the number alone, as it is on a GPU; exp(0) = 1 is exact.
inline float approximate(double exact, int ulps = 2) {
    const auto v = static_cast<float>(exact);
    if (!(fabsf(v) > 1e-37f && fabsf(v) < 1e38f) || exact == 1) return v;
    uint32_t hash = bits_as<uint32_t>(v) * 2654435769u;
    hash = (hash ^ hash >> 15) * 2246822519u;
    int off = static_cast<int>((hash >> 16) % (2 * ulps + 1)) - ulps;
    const bool rounded_away = fabs(v) > fabs(exact), rounded_in = fabs(v) < fabs(exact);
    if ((off == ulps && rounded_away) || (off == -ulps && rounded_in)) off = 0;
    return bits_as<float>(bits_as<uint32_t>(v) + off);
}

template <typename T>
T shuffle_value(Shuffle kind, uint32_t mask, T value, int operand, int width, Place place) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(kind, mask, bits, operand, width, place);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulation

#define SMEM_ARRAY(T, name, dims)         \
    static const char name##_declared = 0; \
    auto& name = *static_cast<std::remove_reference_t<T dims>*>( \
        ::emulation::shared_array(&name##_declared, #name, sizeof(T dims), alignof(T)))
#define SMEM_DYN(name, align) auto* name = static_cast<unsigned char*>(::emulation::shared_dynamic(align))
#define KLAUNCH(kernel, grid, block, smem, stream, ...) \
    ::emulation::launch_kernel(kernel, grid, block, smem, stream, __VA_ARGS__)

#define READS(address, bytes) ::emulation::access(::emulation::Access::kRead, address, bytes, {__FILE__, __LINE__})
#define WRITES(address, bytes) ::emulation::access(::emulation::Access::kWrite, address, bytes, {__FILE__, __LINE__})

#define threadIdx (::emulation::here->thread)
#define blockIdx (::emulation::here->block)
#define blockDim (::emulation::here->block_dim)
#define gridDim (::emulation::here->grid_dim)

inline void __syncthreads(EMULATION_HERE) { emulation::sync_threads(place); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATION_HERE) { emulation::sync_warp(mask, place); }
template <typename T>
T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, EMULATION_HERE) {
    return emulation::shuffle_value(emulation::Shuffle::kIndex, mask, v, lane, width, place);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32, EMULATION_HERE) {
    return emulation::shuffle_value(emulation::Shuffle::kXor, mask, v, lanes, width, place);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T v, int lanes, int width = 32, EMULATION_HERE) {
    return emulation::shuffle_value(emulation::Shuffle::kDown, mask, v, lanes, width, place);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T v, int lanes, int width = 32, EMULATION_HERE) {
    return emulation::shuffle_value(emulation::Shuffle::kUp, mask, v, lanes, width, place);
}
inline uint32_t __ballot_sync(uint32_t mask, int v, EMULATION_HERE) { return emulation::ballot(mask, v, place); }
inline int __any_sync(uint32_t mask, int v, EMULATION_HERE) { return emulation::ballot(mask, v, place) != 0; }
inline int __all_sync(uint32_t mask, int v, EMULATION_HERE) { return emulation::ballot(mask, !v, place) == 0; }

// Loads and stores with a hint for the caches.
#define EMULATION_LOAD(name)                                                \
    template <typename T>                                                   \
    T name(const T* from, EMULATION_HERE) {                                 \
        ::emulation::access(::emulation::Access::kRead, from, sizeof(T), place); \
        return *from;                                                       \
    }
#define EMULATION_STORE(name)                                              \
    template <typename T>                                                  \
    void name(T* to, T v, EMULATION_HERE) {                                \
        ::emulation::access(::emulation::Access::kWrite, to, sizeof(T), place); \
        *to = v;                                                           \
    }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stcg)
EMULATION_STORE(__stwb)
#undef EMULATION_LOAD
#undef EMULATION_STORE

template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline float __int_as_float(int v) { return emulation::bits_as<float>(v); }
inline float __uint_as_float(uint32_t v) { return emulation::bits_as<float>(v); }
inline int __float_as_int(float v) { return emulation::bits_as<int>(v); }
inline uint32_t __float_as_uint(float v) { return emulation::bits_as<uint32_t>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __frsqrt_rn(float v) { return static_cast<float>(1 / sqrt(static_cast<double>(v))); }

// The errors are those of the guide's appendix on mathematical functions.
inline float rsqrtf(float v) { return emulation::approximate(1 / sqrt(double{v})); }
inline float __fdividef(float a, float b) { return emulation::approximate(double{a} / b); }
inline float __expf(float v) {
    return emulation::approximate(exp(double{v}), 2 + (fabsf(v) < 100 ? static_cast<int>(1.173f * fabsf(v)) : 0));
}
inline float __logf(float v) {
    // an absolute error of 2^-21.41 near 1, 3 ulp elsewhere
    return v > 0.5f && v < 2 ? logf(v) + 3.6e-7f * (emulation::approximate(v) > v ? 1 : -1)
                             : emulation::approximate(log(double{v}), 3);
}
#define expf(v) (::emulation::approximate(::exp(static_cast<double>(v)), 1))
#define exp2f(v) (::emulation::approximate(::exp2(static_cast<double>(v))))
#define logf(v) (::emulation::approximate(::log(static_cast<double>(v)), 1))
#define log2f(v) (::emulation::approximate(::log2(static_cast<double>(v)), 1))
#define log1pf(v) (::emulation::approximate(::log1p(static_cast<double>(v)), 1))
#define sinf(v) (::emulation::approximate(::sin(static_cast<double>(v))))
#define cosf(v) (::emulation::approximate(::cos(static_cast<double>(v))))
inline void emulated_sincosf(float v, float* s, float* c) {
    *s = sinf(v);
    *c = cosf(v);
}
#define sincosf emulated_sincosf
