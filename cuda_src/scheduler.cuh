// Persistent tile scheduler: cluster c of C works on cluster tiles c, c + C, c + 2 C, ...
//
// A cluster tile is kClusterM x kClusterN block tiles (one of the two is 1). Cluster tiles are numbered
// down groups of kRasterGroup rows of tiles, column by column, so that the tiles in flight at one time
// form a near-square patch whose operands stay in L2.
#pragma once

#include "ptx.cuh"

template <int kBlockM, int kBlockN, int kClusterM, int kClusterN, int kRasterGroup>
struct TileScheduler {
    u32 rows, columns;  // of cluster tiles
    u32 rank;
    u32 next;
    int block_m, block_n;  // this block's tile, in units of tiles; may lie outside the matrix

    __device__ __forceinline__ TileScheduler(u32 m, u32 n, u32 cluster_rank) {
        rows = (m + kBlockM * kClusterM - 1) / (kBlockM * kClusterM);
        columns = (n + kBlockN * kClusterN - 1) / (kBlockN * kClusterN);
        rank = cluster_rank;
        next = blockIdx.x / (kClusterM * kClusterN);
    }

    __device__ __forceinline__ bool advance() {
        if (next >= rows * columns) return false;
        const u32 group = next / (kRasterGroup * columns);
        const u32 first_row = group * kRasterGroup;
        const u32 group_rows = min(rows - first_row, static_cast<u32>(kRasterGroup));
        const u32 in_group = next - first_row * columns;
        const u32 column = in_group / group_rows;
        const u32 row = first_row + in_group - column * group_rows;
        block_m = row * kClusterM + (kClusterM > 1 ? rank : 0);
        block_n = column * kClusterN + (kClusterN > 1 ? rank : 0);
        next += gridDim.x / (kClusterM * kClusterN);
        return true;
    }

    // Whether no tile follows the present one.
    __device__ __forceinline__ bool last() const { return next >= rows * columns; }
};
