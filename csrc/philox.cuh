// The random stream of the row ops' dropout: Philox4x32-7 (Salmon et al., SC 2011).
//
// One call serves the columns 8g .. 8g+7 of row m, with the key (seed low, seed high) and the counter (g, m low, m high,
// offset low); column 8g + 2w + h takes half h (low first) of word w. Nothing depends on tiles, strides or the backend:
// a backward pass draws the same mask again and none is stored. About 80 integer operations for 8 columns.
#pragma once

#include "rt.cuh"

struct PhiloxWords {
    uint32_t at[4];
};

__device__ inline PhiloxWords philox4x32_7(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < 7; round++) {
        const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ low;
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ high;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// What a kernel loads of RowDropout once.
struct RowDropoutKey {
    uint64_t key;
    uint32_t offset, threshold;
    float rescale;
};

// dropout.seed is not null.
__device__ inline RowDropoutKey row_dropout_key(const RowDropout& dropout) {
    return {static_cast<uint64_t>(dropout.seed[0]), static_cast<uint32_t>(dropout.seed[1]), dropout.threshold,
            dropout.rescale};
}

// Drops and rescales columns n .. n + kVec - 1 of row m; kVec is 1, 2, 4 or 8 and n a multiple of it.
template <int kVec>
__device__ void drop(const RowDropoutKey& key, int64_t m, int64_t n, float (&v)[kVec]) {
    auto [words] = philox4x32_7(key.key, static_cast<uint32_t>(n / 8), static_cast<uint32_t>(m),
                                static_cast<uint32_t>(m >> 32), key.offset);
    // The words of these columns to the front, by selects: an array indexed at run time would lie in memory.
    if (kVec <= 4 && n & 4) {
        words[0] = words[2];
        words[1] = words[3];
    }
    if (kVec <= 2 && n & 2) words[0] = words[1];
#pragma unroll
    for (int i = 0; i < kVec; i++) {
        const bool high = kVec == 1 ? n & 1 : i % 2;
        const uint32_t draw = high ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
        v[i] = draw >= key.threshold ? v[i] * key.rescale : 0.0f;
    }
}
