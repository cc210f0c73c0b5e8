// What ldmatrix and mma.sync do for a warp, from the fragment layouts of the PTX manual (sections on ldmatrix and on
// mma.m16n8k16 with 16-bit operands).
#pragma once

#include "emulation.h"

namespace emulation {

struct LdmatrixLane {
    uint16_t row[8];    // what its address holds
    uint16_t to[4][2];  // of each matrix
};

template <bool kTransposed>
void ldmatrix(uint32_t (&to)[4], const void* row, Place place) {
    access(Access::kRead, row, 16, place);
    LdmatrixLane lane;
    // one load of the lane itself, which the sanitizers see: of a struct TSAN sees nothing
    const auto loaded = *static_cast<const unsigned __int128*>(row);
    memcpy(lane.row, &loaded, sizeof loaded);
    together(kTransposed ? "ldmatrix.trans" : "ldmatrix", &lane,
             [](void* const* of_lanes) {
                 const auto lanes = reinterpret_cast<LdmatrixLane* const*>(of_lanes);
                 for (int l = 0; l < 32; l++)
                     for (int matrix = 0; matrix < 4; matrix++)
                         for (int i = 0; i < 2; i++) {
                             const int along = l / 4, across = l % 4 * 2 + i;
                             lanes[l]->to[matrix][i] = kTransposed ? lanes[8 * matrix + across]->row[along]
                                                                   : lanes[8 * matrix + along]->row[across];
                         }
             },
             place);
    memcpy(to, lane.to, sizeof lane.to);
}

struct MmaLane {
    float a[4][2], b[2][2], c[4];
};

template <typename T>
void halves(uint32_t two, float (&to)[2]) {
    for (int i = 0; i < 2; i++) to[i] = static_cast<float>(bits_as<T>(static_cast<uint16_t>(two >> 16 * i)));
}

// A tensor core cuts off where ordinary units round: towards zero here, of the exact sum.
inline float cut(double exact) {
    const auto v = static_cast<float>(exact);
    if (!(fabs(double{v}) > fabs(exact)) || fabsf(v) == INFINITY) return v;
    return bits_as<float>(bits_as<uint32_t>(v) - 1);
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place) {
    static_assert(sizeof(T) == 2);
    MmaLane lane;
    for (int i = 0; i < 4; i++) halves<T>(a[i], lane.a[i]);
    halves<T>(b0, lane.b[0]);
    halves<T>(b1, lane.b[1]);
    memcpy(lane.c, c, sizeof c);
    together("mma", &lane,
             [](void* const* of_lanes) {
                 const auto lanes = reinterpret_cast<MmaLane* const*>(of_lanes);
                 float A[16][16], B[8][16];
                 for (int l = 0; l < 32; l++)
                     for (int i = 0; i < 2; i++) {
                         const int g = l / 4, t = l % 4 * 2 + i;
                         for (int part = 0; part < 4; part++)
                             A[g + part % 2 * 8][t + part / 2 * 8] = lanes[l]->a[part][i];
                         B[g][t] = lanes[l]->b[0][i];
                         B[g][t + 8] = lanes[l]->b[1][i];
                     }
                 for (int l = 0; l < 32; l++)
                     for (int i = 0; i < 4; i++) {
                         const float *row = A[l / 4 + i / 2 * 8], *column = B[l % 4 * 2 + i % 2];
                         double sum = lanes[l]->c[i];
                         for (int k = 0; k < 16; k++) sum += double{row[k]} * double{column[k]};
                         lanes[l]->c[i] = cut(sum);
                     }
             },
             place);
    memcpy(c, lane.c, sizeof c);
}

}  // namespace emulation
