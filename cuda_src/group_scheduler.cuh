// Persistent scheduler for groups of rows that share one matrix B each: which rows form which tile.
//
// Only the producer warp schedules; it hands each tile to the consumers together with the tile's first
// stage. Sizes are read on the device, so that one launch serves any routing and a CUDA graph replays
// with new sizes. Four layouts, by what `index` holds:
//
//   kOffsets   groups + 1 values: group g has rows index[g] .. index[g + 1]
//   kEnds      groups values: group g ends at index[g] and starts at index[g - 1] rounded up to 128
//   kMasked    groups values: group g has the first index[g] of its own m rows
//   kIndices   m values: the group of each row, one group per aligned block of 128 rows, -1 = padding
//
// Whatever the values, rows are clamped to the matrix and empty or reversed ranges have no tiles.
//
// Tiles of a group are walked column by column down groups of kRasterGroup row tiles (scheduler.cuh says
// why); groups follow one another. With clusters, a unit of columns is kClusterN tiles wide.
#pragma once

#include "ptx.cuh"

enum GroupLayout : int { kOffsets = 0, kEnds = 1, kMasked = 2, kIndices = 3 };

constexpr int kAlignment = 128;  // rows, of starts in kEnds and of blocks in kIndices

// Rows row .. row_end of A and D, columns column .. of the group's B and of D.
struct GroupedTile {
    int row, row_end, column, group;
};

// What the consumers learn of it; its first row's scale is number scale_shift of those loaded.
struct alignas(16) TilePlace {
    int row, row_end, column, scale_shift;
};

// A warp's copy of a place. Lane 0 alone reads it, being the lane that later frees the stage.
__device__ __forceinline__ TilePlace read_place(const TilePlace& shared_place, int lane) {
    TilePlace place{};
    if (lane == 0) place = shared_place;
    place.row = __shfl_sync(0xffffffffu, place.row, 0);
    place.row_end = __shfl_sync(0xffffffffu, place.row_end, 0);
    place.column = __shfl_sync(0xffffffffu, place.column, 0);
    place.scale_shift = __shfl_sync(0xffffffffu, place.scale_shift, 0);
    return place;
}

// A condition that is equal across the warp, in a form that the compiler knows to be: a branch on it is no
// divergence, behind which wgmma would lose its uniform operands.
__device__ __forceinline__ bool uniform(bool condition) { return __any_sync(0xffffffffu, condition); }

struct GroupedProblem {
    const int* index;
    GroupLayout layout;
    int groups, m, n;  // m: all rows, or those of each group when masked

    __device__ __forceinline__ int rows() const { return layout == kMasked ? groups * m : m; }

    __device__ __forceinline__ int2 range(int group) const {
        int begin, end;
        if (layout == kMasked) {
            begin = group * m;
            end = begin + min(index[group], m);
        } else if (layout == kOffsets) {
            begin = index[group];
            end = index[group + 1];
        } else {
            const int before = group == 0 ? 0 : max(min(index[group - 1], m), 0);
            begin = (before + kAlignment - 1) / kAlignment * kAlignment;
            end = index[group];
        }
        begin = max(min(begin, rows()), 0);
        return make_int2(begin, max(min(end, rows()), begin));
    }

    // Group of the aligned block that starts at `row`, -1 for none, and how many of its rows are valid.
    // Called by a whole warp.
    __device__ __forceinline__ int2 block(int row, int lane) const {
        int own[kAlignment / 32];
#pragma unroll
        for (int i = 0; i < kAlignment / 32; ++i) {
            const int at = row + i * 32 + lane;
            own[i] = at < m ? index[at] : -1;
        }
        int valid = 0;
#pragma unroll
        for (int i = 0; i < kAlignment / 32; ++i) valid += __popc(__ballot_sync(0xffffffffu, own[i] >= 0));
        const int group = __shfl_sync(0xffffffffu, own[0], 0);
        return make_int2(group >= 0 && group < groups ? group : -1, valid);
    }
};

template <int kBlockM, int kBlockN, int kClusterN, int kRasterGroup>
struct GroupScheduler {
    // kIndices needs tiles that do not straddle its blocks; the host keeps other heights from it.
    static constexpr bool kTakesIndices = kAlignment % kBlockM == 0 || kBlockM == 2 * kAlignment;

    const GroupedProblem& problem;
    int* tiles_before;  // shared memory, groups + 1: row tiles of all earlier groups
    int lane;
    u32 rank, columns, next, stride;
    int group = 0;       // of the last tile; tiles are walked forwards
    GroupedTile tile{};  // the present one
    GroupedTile rest{};  // kIndices: the second half of a tile whose two blocks belong to two groups

    // Called by the whole producer warp.
    __device__ __forceinline__ GroupScheduler(const GroupedProblem& problem_, int* table, int lane_, u32 rank_)
        : problem(problem_), tiles_before(table), lane(lane_), rank(rank_) {
        columns = (problem.n + kBlockN * kClusterN - 1) / (kBlockN * kClusterN);
        next = blockIdx.x / kClusterN;
        stride = gridDim.x / kClusterN;
        rest.row_end = -1;
        const int groups = problem.layout == kIndices ? 1 : problem.groups;
        int total = 0;
        for (int base = 0; base < groups; base += 32) {
            int tiles = 0;
            if (problem.layout == kIndices) {
                tiles = lane == 0 ? (problem.m + kBlockM - 1) / kBlockM : 0;
            } else if (base + lane < groups) {
                const int2 range = problem.range(base + lane);
                tiles = (range.y - range.x + kBlockM - 1) / kBlockM;
            }
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int left = __shfl_up_sync(0xffffffffu, tiles, step);
                if (lane >= step) tiles += left;
            }
            if (base + lane < groups) tiles_before[base + lane + 1] = total + tiles;
            total += __shfl_sync(0xffffffffu, tiles, 31);
        }
        if (lane == 0) tiles_before[0] = 0;
        __syncwarp();
    }

    __device__ __forceinline__ bool advance() {
        if (rest.row_end >= 0) {
            tile = rest;
            rest.row_end = -1;
            return true;
        }
        const int groups = problem.layout == kIndices ? 1 : problem.groups;
        while (true) {
            const int row_tile = next / columns;
            // The first group that ends behind this row tile: 32 of them at a time.
            while (true) {
                if (group >= groups) return false;
                const bool behind = group + lane < groups && tiles_before[group + lane + 1] > row_tile;
                const u32 found = __ballot_sync(0xffffffffu, behind);
                if (found != 0) {
                    group += __ffs(found) - 1;
                    break;
                }
                group += 32;
            }
            const u32 first = tiles_before[group], group_tiles = tiles_before[group + 1] - first;
            const u32 in_group = next - first * columns;
            const u32 raster = in_group / (kRasterGroup * columns);
            const u32 raster_rows = min(group_tiles - raster * kRasterGroup, static_cast<u32>(kRasterGroup));
            const u32 in_raster = in_group - raster * kRasterGroup * columns;
            const u32 column = in_raster / raster_rows;
            const int row = (raster * kRasterGroup + in_raster - column * raster_rows) * kBlockM;
            tile.column = (column * kClusterN + (kClusterN > 1 ? rank : 0)) * kBlockN;
            next += stride;
            if (!kTakesIndices || problem.layout != kIndices) {
                const int2 range = problem.range(group);
                tile.row = range.x + row;
                tile.row_end = range.y;
                tile.group = group;
                return true;
            }
            if (split(row)) return true;
        }
    }

    // kIndices: a tile of two aligned blocks is one tile when both belong to one group, otherwise two of
    // half the height, of which those without a group are left out.
    __device__ __forceinline__ bool split(int row) {
        const int2 upper = problem.block(row / kAlignment * kAlignment, lane);
        const int offset = row % kAlignment;  // tiles lower than a block
        tile.row = row;
        tile.group = upper.x;
        tile.row_end = row - offset + upper.y;
        if (kBlockM > kAlignment) {
            const int2 lower = problem.block(row + kAlignment, lane);
            const GroupedTile second{row + kAlignment, row + kAlignment + lower.y, tile.column, lower.x};
            if (upper.x < 0) {
                tile = second;
            } else if (lower.x == upper.x && upper.y == kAlignment) {
                tile.row_end = second.row_end;
            } else if (lower.x >= 0) {
                rest = second;
            }
        }
        return tile.group >= 0 && tile.row_end > tile.row;
    }
};
