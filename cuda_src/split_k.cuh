// The sum over the blocks of a cluster that share a tile of D and split its K: through distributed shared
// memory, in the order of K, so that every run gives the same bits.
//
// The columns of the tile are dealt to the blocks. Each thread sends its accumulators for a block's columns to
// the same thread of that block, which therefore needs no other layout than wgmma's fragment: slot[s] holds
// what block s sent, 16 bytes for each thread at a time.
#pragma once

#include "ptx.cuh"

template <int kSplits, int kConsumers, int kN>
struct SplitSum {
    static constexpr int kColumns = kN / kSplits;  // that each block finishes
    static constexpr int kValues = kColumns / 2;   // accumulators of a thread for them
    static_assert(kN % kSplits == 0 && kColumns % 8 == 0, "a block finishes whole groups of 8 columns");

    struct Slots {
        float4 values[kSplits][kValues / 4][128 * kConsumers];
    };

    // Called by the consumers; complete behind the cluster's next barrier.
    static __device__ __forceinline__ void send(Slots& slots, const float (&total)[kN / 2], u32 rank) {
#pragma unroll
        for (int to = 0; to < kSplits; ++to) {
#pragma unroll
            for (int i = 0; i < kValues / 4; ++i) {
                const int first = to * kValues + 4 * i;
                ptx::store_cluster(
                    &slots.values[rank][i][threadIdx.x], to,
                    make_float4(total[first], total[first + 1], total[first + 2], total[first + 3]));
            }
        }
    }

    static __device__ __forceinline__ void sum(const Slots& slots, float (&result)[kValues]) {
#pragma unroll
        for (int i = 0; i < kValues / 4; ++i) {
            float4 value = slots.values[0][i][threadIdx.x];
#pragma unroll
            for (int split = 1; split < kSplits; ++split) {
                const float4 more = slots.values[split][i][threadIdx.x];
                value.x += more.x;
                value.y += more.y;
                value.z += more.z;
                value.w += more.w;
            }
            result[4 * i] = value.x;
            result[4 * i + 1] = value.y;
            result[4 * i + 2] = value.z;
            result[4 * i + 3] = value.w;
        }
    }
};
