// What the instructions of ptx_sm90.cuh do. Written from the PTX manual: mbarrier, cp.async.bulk.tensor and the tensors it
// copies, proxies and their fence, barrier, setmaxnreg, and the asynchronous warpgroup-level matrix instructions with their
// fragments, shared memory layouts and descriptors; and from the driver's cuTensorMapEncodeTiled.
//
// What the manual leaves undefined, and what would hang, fails with a sentence. Copies and products are made at once in
// FIFO, as late as they may be in REVERSE, and else at any time between; until then what they write is NaN. Shared memory
// is kept twice, as threads see it and as copies and wgmma do: fence.proxy.async takes all of the one to the other, so
// that a fence which is missing is found, and one by the wrong thread is not. TSAN hears of the barriers and not of copies
// and products, which the orders are for; FASTATTN_RECORD counts neither.
#pragma once

#include "emulation.h"

namespace emulation {

struct alignas(64) TensorMap {
    uint64_t made;  // of the number that tells a map from other bytes
    unsigned char* start;
    int rank, swizzle;              // swizzle: rows of 16 << swizzle bytes turn about
    int64_t size[5], stride[5];     // strides in bytes
    int box[5];
};
// 0, or cudaErrorInvalidValue for what the driver refuses. Elements of 16 bits; strides of all dimensions but the first.
int encode_tensor_map(TensorMap* map, int rank, const void* start, const int64_t* size, const int64_t* stride,
                      const int* box, int swizzle);

void mbarrier_init(uint64_t* barrier, int arrivals, Place place);
void mbarrier_arrive(uint64_t* barrier, int bytes, Place place);
bool mbarrier_try_wait(uint64_t* barrier, int parity, Place place);
void mbarrier_wait(uint64_t* barrier, int parity, Place place);

void fence_proxy_async();
void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, const int* at, int rank, Place place);
void tensor_store(const TensorMap* map, const void* from, const int* at, int rank, Place place);
void tensor_store_commit();
void tensor_store_wait(int pending, bool only_read, Place place);

void named_barrier(int id, int threads, bool waits, Place place);
void set_registers(int count, bool more, Place place);

uint32_t shared_address(const void* p, Place place);

// One lane's part: d (64, n) = a (64, 16) b (16, n), + d where `adds`.
struct Wgmma {
    float* d;
    int n;
    const uint32_t* a_registers;  // or null, and descriptor a
    uint64_t a, b;
    bool a_along_k, b_along_k;
    bool adds;
    bool half;  // else bfloat
    Place place;
};
void wgmma(Wgmma lane);
void wgmma_fence(Place place);
void wgmma_commit(Place place);
void wgmma_wait(int pending, Place place);

}  // namespace emulation
