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
// why); groups follow one another. With clusters, a unit of columns is kClusterN tiles wide. The rows of a
// group are dealt to its tiles evenly, in waves of 64, and each turn of the blocks starts one block further:
// were the last tile of each group a short one, and the number of blocks a multiple of the tiles of a group,
// the same blocks would get all the short ones.
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
            end = begin + min(__ldg(index + group), m);
        } else if (layout == kOffsets) {
            begin = __ldg(index + group);
            end = __ldg(index + group + 1);
        } else {
            const int before = group == 0 ? 0 : max(min(__ldg(index + group - 1), m), 0);
            begin = (before + kAlignment - 1) / kAlignment * kAlignment;
            end = __ldg(index + group);
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

// Which of two tile heights a kernel takes: one of them for sure, or by the sizes of the groups.
enum GroupForm : int { kBySizes = 0, kTallTiles = 1, kFlatTiles = 2 };

// Row tiles of all earlier groups, for each group. The whole block makes it once, before its roles part: each
// thread reads the sizes of a few groups, all at a time. Only the producer warp uses it afterwards.
template <int kThreads, int kMaxGroups>
struct GroupTable {
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kTurns = (kMaxGroups + kThreads - 1) / kThreads;

    struct Count {
        int tall, flat, balance;  // tiles of either height; see below
    };

    int tiles_before[kMaxGroups + 1];
    Count warps[kTurns * kWarps];

    // Fills the table for tiles of kTallM rows or, when that is the form, kFlatM. Flat tiles of 64 rows suit
    // when nearly all groups that have rows fit into one. Returns whether the form is flat; the table is
    // complete behind the next barrier of the block. Called by all threads.
    template <int kTallM, int kFlatM>
    __device__ __forceinline__ bool fill(const GroupedProblem& problem, GroupForm form) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int groups = problem.layout == kIndices ? 1 : problem.groups;  // all rows count as one group
        Count through[kTurns];  // of the warp's groups up to this thread's
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            if (turn * kThreads >= groups) break;
            const int group = turn * kThreads + static_cast<int>(threadIdx.x);
            int rows = 0;
            if (group < groups) {
                const int2 range = problem.layout == kIndices ? make_int2(0, problem.m) : problem.range(group);
                rows = range.y - range.x;
            }
            const int units = (rows + 63) / 64;
            Count& own = through[turn];
            // 8 for each 64 rows behind a group's first, -1 for each group with rows.
            own = {(rows + kTallM - 1) / kTallM, (rows + kFlatM - 1) / kFlatM, units > 0 ? 8 * (units - 1) - 1 : 0};
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int tall = __shfl_up_sync(0xffffffffu, own.tall, step);
                const int flat = __shfl_up_sync(0xffffffffu, own.flat, step);
                if (lane >= step) {
                    own.tall += tall;
                    own.flat += flat;
                }
            }
            own.balance = __reduce_add_sync(0xffffffffu, own.balance);
            if (lane == 31) warps[turn * kWarps + warp] = own;
        }
        __syncthreads();
        int balance = 0;
        Count before{};
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            if (turn * kThreads >= groups) break;
#pragma unroll
            for (int other = 0; other < kWarps; ++other) {
                if (other == warp) {
                    through[turn].tall += before.tall;
                    through[turn].flat += before.flat;
                }
                const Count count = warps[turn * kWarps + other];
                before.tall += count.tall;
                before.flat += count.flat;
                balance += count.balance;
            }
        }
        const bool flat = form == kBySizes ? balance <= 0 : form == kFlatTiles;
        if (threadIdx.x == 0) tiles_before[0] = 0;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int group = turn * kThreads + static_cast<int>(threadIdx.x);
            if (group < groups) tiles_before[group + 1] = flat ? through[turn].flat : through[turn].tall;
        }
        return flat;
    }
};

template <int kBlockM, int kBlockN, int kClusterN, int kRasterGroup>
struct GroupScheduler {
    // kIndices needs tiles that do not straddle its blocks; the host keeps other heights from it.
    static constexpr bool kTakesIndices = kAlignment % kBlockM == 0 || kBlockM == 2 * kAlignment;

    const GroupedProblem& problem;
    const int* tiles_before;  // GroupTable's
    int lane;
    u32 rank, columns, turn = 0;
    int group = 0;       // of the last tile; tiles are walked forwards
    GroupedTile tile{};  // the present one
    GroupedTile rest{};  // kIndices: the second half of a tile whose halves belong to two groups

    __device__ __forceinline__ GroupScheduler(const GroupedProblem& problem_, const int* table, int lane_, u32 rank_)
        : problem(problem_), tiles_before(table), lane(lane_), rank(rank_) {
        columns = (problem.n + kBlockN * kClusterN - 1) / (kBlockN * kClusterN);
        rest.row_end = -1;
    }

    __device__ __forceinline__ bool advance() {
        if (rest.row_end >= 0) {
            tile = rest;
            rest.row_end = -1;
            return true;
        }
        const int groups = problem.layout == kIndices ? 1 : problem.groups;
        while (true) {
            const u32 blocks = gridDim.x / kClusterN;
            const u32 next = turn * blocks + (blockIdx.x / kClusterN + turn) % blocks;
            const int row_tile = next / columns;
            if (tiles_before[groups] <= row_tile) return false;
            // The first group that ends behind this row tile: first its 32 neighbours, then itself.
            while (tiles_before[min(group + 32, groups)] <= row_tile) group += 32;
            group += __ffs(__ballot_sync(0xffffffffu, tiles_before[min(group + lane + 1, groups)] > row_tile)) - 1;
            const u32 first = tiles_before[group], group_tiles = tiles_before[group + 1] - first;
            const u32 in_group = next - first * columns;
            const u32 raster = in_group / (kRasterGroup * columns);
            const u32 raster_rows = min(group_tiles - raster * kRasterGroup, static_cast<u32>(kRasterGroup));
            const u32 in_raster = in_group - raster * kRasterGroup * columns;
            const u32 column = in_raster / raster_rows;
            const int row_in_group = raster * kRasterGroup + in_raster - column * raster_rows;
            tile.column = (column * kClusterN + (kClusterN > 1 ? rank : 0)) * kBlockN;
            ++turn;
            if (!kTakesIndices || problem.layout != kIndices) {
                const int2 range = problem.range(group);
                const int waves = (range.y - range.x + 63) / 64;
                tile.row = range.x + even_share(waves, row_in_group, group_tiles) * 64;
                tile.row_end = min(range.x + even_share(waves, row_in_group + 1, group_tiles) * 64, range.y);
                tile.group = group;
                return true;
            }
            if (split(row_in_group * kBlockM)) return true;
        }
    }

    // The waves of all earlier ones when `waves` are dealt to `tiles` tiles, at most kBlockM / 64 to each.
    static __device__ __forceinline__ int even_share(int waves, int tile, u32 tiles) {
        const u32 each = waves / tiles, more = waves - each * tiles;
        return each * tile + min(static_cast<u32>(tile), more);
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
