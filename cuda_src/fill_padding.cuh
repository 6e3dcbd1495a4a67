// Zeros in the rows of D that belong to no group. Rows of groups are left alone, so that this may run
// beside the tiles. Called by `warps` warps, of which this one is number `warp`.
#pragma once

#include "group_scheduler.cuh"

template <typename Element>
struct PaddingFiller {
    Element* d;
    long long pitch;
    int n, lane, warp, warps;

    __device__ __forceinline__ void zero_row(int row) const {
        uint4* line = reinterpret_cast<uint4*>(d + row * pitch);
        const int units = n * static_cast<int>(sizeof(Element)) / 16;  // n is a multiple of 8
#pragma unroll 1
        for (int i = lane; i < units; i += 32) line[i] = make_uint4(0, 0, 0, 0);
    }

    __device__ __forceinline__ void fill(const GroupedProblem& problem) const {
        if (problem.layout == kIndices) {
#pragma unroll 1
            for (int row = warp; row < problem.m; row += warps) {
                const int group = problem.index[row];
                if (group < 0 || group >= problem.groups) zero_row(row);
            }
            return;
        }
        if (problem.layout == kMasked) return;  // rows behind a group's count are nobody's business
        const int first = problem.range(0).x, last = problem.range(problem.groups - 1).y;
#pragma unroll 1
        for (int row = warp; row < first; row += warps) zero_row(row);
#pragma unroll 1
        for (int row = last + warp; row < problem.rows(); row += warps) zero_row(row);
        if (problem.layout == kEnds) {  // fewer than kAlignment rows between two groups: one warp each
#pragma unroll 1
            for (int group = warp; group + 1 < problem.groups; group += warps) {
                const int end = problem.range(group).y, next = problem.range(group + 1).x;
#pragma unroll 1
                for (int row = end; row < next; ++row) zero_row(row);
            }
        }
    }
};
