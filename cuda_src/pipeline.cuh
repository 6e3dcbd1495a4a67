// The ring of shared-memory stages between the producer warp and the consumer warpgroups.
//
// full[s]   the producer arms it with the bytes of the stage; complete when all of them have landed.
// empty[s]  every consumer warp of every block that receives the stage arrives once it has read it.
//
// A position starts at stage 0, phase 0. Consumers wait for full[stage] with `phase`, the producer for
// empty[stage] with `phase ^ 1`, which passes at once on the first round of a fresh barrier.
#pragma once

#include "ptx.cuh"

template <int kStages>
struct StageRing {
    u64 full[kStages];
    u64 empty[kStages];

    __device__ __forceinline__ void init(u32 full_arrivals, u32 empty_arrivals) {
#pragma unroll
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&full[s], full_arrivals);
            ptx::mbarrier_init(&empty[s], empty_arrivals);
        }
        ptx::mbarrier_init_fence();
    }
};

template <int kStages>
struct StagePosition {
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ void advance() {
        const bool wrap = stage == kStages - 1;
        stage = wrap ? 0 : stage + 1;
        phase ^= static_cast<u32>(wrap);
    }

    __device__ __forceinline__ void advance(int steps) {
        const int ahead = stage + steps;
        stage = ahead % kStages;
        phase ^= static_cast<u32>(ahead / kStages) & 1;
    }
};
