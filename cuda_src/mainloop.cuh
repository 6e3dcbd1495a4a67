// The main loop of a block-scaled FP8 GEMM: what producer and consumers do for one tile of D.
//
// A kernel chooses a Tile, schedules tiles in its own way and stores them in its own way; between the
// two stands this protocol:
//
//   producer   for each k-block: wait empty | arm full, load A, B, sA by TMA, sB by cp.async
//   consumer   for each k-block: wait full  | per m64 wave: 4 x wgmma k32, wait, promote;
//                                             after the last wave's wait: arrive empty
//
// Arrivals
//   full[s]    1 (producer lane 0, with the bytes of the TMA boxes)
//              + kSegments (one lane per column scale, when its 4-byte cp.async has landed)
//   empty[s]   kCluster * kConsumers * 4 (every consumer warp of every block that the stage goes to)
#pragma once

#include "descriptor.cuh"
#include "pipeline.cuh"
#include "promotion.cuh"
#include "ptx.cuh"

// The wgmma batch for kN columns; a kernel defines the one that it uses (templates/wgmma.j2).
template <int kN>
struct Wgmma;

// The decisions that shape the loop, with what follows from them.
template <
    int kBlockM_, int kBlockN_, int kStages_, int kConsumers_, int kClusterM_, int kClusterN_, int kSegment_,
    int kScaleRows_, int kUnroll_, typename Element_, int kColumnParts_ = 1>
struct TileConfig {
    using Element = Element_;  // of C and D
    static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kBlockK = 128;
    static constexpr int kStages = kStages_;
    static constexpr int kConsumers = kConsumers_;
    static constexpr int kClusterM = kClusterM_;  // 2: the blocks of a cluster share a column tile, B is multicast
    static constexpr int kClusterN = kClusterN_;  // 2: they share a row tile, A is multicast
    static constexpr int kSegment = kSegment_;    // columns that surely share one scale of B
    static constexpr int kSegments = kBlockN / kSegment;
    static constexpr int kScaleRows = kScaleRows_;  // scales of A that a stage has room for, kBlockM at least
    static constexpr int kUnroll = kUnroll_;  // k-blocks of the main loop, where all waves have rows
    static constexpr int kCluster = kClusterM * kClusterN;
    // Consumers share the rows of a tile, or, with as many parts as consumers, its columns.
    static constexpr int kColumnParts = kColumnParts_;
    static constexpr int kRowParts = kConsumers / kColumnParts;
    static constexpr int kWaveN = kBlockN / kColumnParts;  // columns of a consumer's waves
    static constexpr int kWaveSegments = kWaveN / kSegment;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    // Waves of 64 rows go to the consumers in turn, so that a tile with few rows keeps them all at work.
    static constexpr int kWaves = kBlockM / (64 * kRowParts);
    static constexpr int kWaveStride = 64 * kRowParts;  // rows between two waves of one consumer
    static constexpr bool kStaged = sizeof(Element) == 2;  // D goes through shared memory and TMA
    static constexpr u32 kFullArrivals = 1 + kSegments;
    static constexpr u32 kEmptyArrivals = kCluster * kConsumers * 4;
};

// All of a block's shared memory; its size is the launch's dynamic shared memory.
template <class Tile>
struct SharedMemory {
    alignas(1024) u8 a[Tile::kStages][Tile::kBlockM * Tile::kBlockK];
    alignas(1024) u8 b[Tile::kStages][Tile::kBlockN * Tile::kBlockK];
    alignas(1024) u8 d[Tile::kStaged ? Tile::kConsumers : 1]
                      [Tile::kStaged ? Tile::kWaves * 64 * Tile::kWaveN * 2 : 1024];
    alignas(128) float scale_a[Tile::kStages][Tile::kScaleRows];
    float scale_b[Tile::kStages][Tile::kSegments];
    alignas(8) StageRing<Tile::kStages> ring;
};

// Called by all 32 lanes of the producer warp.
template <class Tile>
struct Producer {
    SharedMemory<Tile>& shared;
    const TensorMap *map_a, *map_scale_a, *map_b;
    int row_boxes, box_rows;      // boxes of map_a that a stage takes, and rows in each, with multicast those
                                  // that the blocks of the cluster load together
    int scale_boxes, scale_rows;  // how many boxes of map_scale_a a stage takes, and scales in each
    int lane;
    u32 rank;
    StagePosition<Tile::kStages> position{};

    __device__ __forceinline__ void wait_empty() {
        ptx::mbarrier_wait(&shared.ring.empty[position.stage], position.phase ^ 1);
    }

    // The boxes for rows `row`.. of the m rows of A: one of `whole` with whole_rows, or, for a last tile that is
    // far from full, as many of `tail` with 64 as have rows. A box that hangs far over the end of A is slow; and
    // so are many small ones for every tile.
    __device__ __forceinline__ void fit_boxes(
        int row, int m, const TensorMap& whole, int whole_rows, const TensorMap& tail) {
        const int rows = m - row;
        const bool few = Tile::kBlockM > 64 && m > Tile::kBlockM && rows <= Tile::kBlockM - 64;
        map_a = few ? &tail : &whole;
        box_rows = few ? 64 : whole_rows;
        row_boxes = few ? max(rows + 63, 0) / 64 : 1;
    }

    __device__ __forceinline__ u32 stage_bytes() const {
        return (row_boxes * box_rows + Tile::kBlockN) * Tile::kBlockK +
               scale_boxes * scale_rows * static_cast<int>(sizeof(float));
    }

    // Arms the stages of a block's first tile and loads its rows of B, ahead of everything else: of k-blocks
    // `from` to `to` as many as there are stages. Returns the first one that is left.
    __device__ __forceinline__ int load_early(int column, int from, int to) {
        const int early = min(to - from, Tile::kStages);
        for (int s = 0; s < early && lane == 0; ++s) {
            ptx::mbarrier_arrive_expect_tx(&shared.ring.full[s], stage_bytes());
            load_b(s, (from + s) * Tile::kBlockK, column, &shared.ring.full[s]);
        }
        return from + early;
    }

    // Loads k-blocks `from` to `to` of rows row.. of A and rows column.. of B, of B those before `early`
    // excepted. The scales of A lie at column scale_x, rows scale_y.., of their map; `scale_b` points to this
    // lane's row of column scales. TMA wants the first byte of a box at a multiple of 16: scale_x is a
    // multiple of 4, or the GPU stops with an illegal instruction.
    __device__ __forceinline__ void load(
        int row, int column, int scale_x, int scale_y, const float* scale_b, int from, int to, int early = 0) {
        const u32 bytes = stage_bytes();
#pragma unroll 1
        for (int kb = from; kb < to; ++kb) {
            const int s = position.stage;
            u64* full = &shared.ring.full[s];
            wait_empty();
            if (lane == 0) {
                if (kb >= early) {
                    ptx::mbarrier_arrive_expect_tx(full, bytes);
                    load_b(s, kb * Tile::kBlockK, column, full);
                }
                load_a(s, kb * Tile::kBlockK, row, full);
#pragma unroll 1
                for (int i = 0; i < scale_boxes; ++i) {
                    float* part = shared.scale_a[s] + i * scale_rows;
                    ptx::tma_load_2d(part, map_scale_a, full, scale_x + i * scale_rows, scale_y + kb);
                }
            }
            if (lane < Tile::kSegments) {
                ptx::cp_async_4(&shared.scale_b[s][lane], scale_b + kb);
                ptx::cp_async_arrive(full);
            }
            __syncwarp();
            position.advance();
        }
    }

    // With multicast each block of the cluster loads half of the shared operand, for both.
    __device__ __forceinline__ void load_a(int s, int x, int row, u64* full) {
#pragma unroll 1
        for (int i = 0; i < row_boxes; ++i) {
            if (Tile::kClusterN > 1) {
                const int part = i * box_rows + rank * (box_rows / 2);
                ptx::tma_load_2d_multicast(shared.a[s] + part * Tile::kBlockK, map_a, full, x, row + part, 3);
            } else {
                const int part = i * box_rows;
                ptx::tma_load_2d(shared.a[s] + part * Tile::kBlockK, map_a, full, x, row + part);
            }
        }
    }

    __device__ __forceinline__ void load_b(int s, int x, int column, u64* full) {
        if (Tile::kClusterM > 1) {
            const int part = rank * (Tile::kBlockN / 2);
            ptx::tma_load_2d_multicast(shared.b[s] + part * Tile::kBlockK, map_b, full, x, column + part, 3);
        } else {
            ptx::tma_load_2d(shared.b[s], map_b, full, x, column);
        }
    }
};

// Called by all 128 threads of a consumer warpgroup. `position` is where the present tile starts: a kernel
// moves it on itself, outside of any branch between multiply and skip. Were it moved inside, the compiler
// could not tell that it is equal in all threads, and wgmma's descriptors would leave the uniform registers.
template <class Tile>
struct Consumer {
    using Total = float[Tile::kWaves][Tile::kWaveN / 2];

    SharedMemory<Tile>& shared;
    int first_row;     // of this warpgroup's first wave in the tile
    int first_column;  // of its waves
    int fragment_row;  // of this thread's first element in the tile
    int lane;
    u32 rank;
    u32 low_a, low_b;  // descriptors of stage 0
    StagePosition<Tile::kStages> position{};

    __device__ __forceinline__ Consumer(SharedMemory<Tile>& memory, int warpgroup, int warp, int lane_, u32 rank_)
        : shared(memory), first_row(warpgroup % Tile::kRowParts * 64),
          first_column(warpgroup / Tile::kRowParts * Tile::kWaveN), lane(lane_), rank(rank_) {
        fragment_row = first_row + warp * 16 + lane / 4;
        low_a = descriptor::low_word(shared.a[0] + first_row * Tile::kBlockK);
        low_b = descriptor::low_word(shared.b[0] + first_column * Tile::kBlockK);
    }

    __device__ __forceinline__ void wait_full(const StagePosition<Tile::kStages>& at) {
        ptx::mbarrier_wait(&shared.ring.full[at.stage], at.phase);
    }

    // One tile; the waves behind the first kActive have no rows and are left out. The scale of the tile's
    // first row is number `scale_shift` of the stage.
    template <int kActive = Tile::kWaves>
    __device__ __forceinline__ void multiply(Total& total, int k_blocks, int scale_shift = 0) {
#pragma unroll
        for (int wave = 0; wave < kActive; ++wave) {
#pragma unroll
            for (int i = 0; i < Tile::kWaveN / 2; ++i) total[wave][i] = 0.0f;
        }
        StagePosition<Tile::kStages> at = position;
#pragma unroll (kActive == Tile::kWaves ? Tile::kUnroll : 1)
        for (int kb = 0; kb < k_blocks; ++kb) {
            const int s = at.stage;
            wait_full(at);
            float column_scale[Tile::kWaveSegments];
            const float* column_scales = shared.scale_b[s] + (Tile::kColumnParts > 1 ? first_column / Tile::kSegment : 0);
#pragma unroll
            for (int i = 0; i < Tile::kWaveSegments; ++i) column_scale[i] = column_scales[i];
            const u32 stage_a = low_a + s * (Tile::kBlockM * Tile::kBlockK / 16);
            const u32 stage_b = low_b + s * (Tile::kBlockN * Tile::kBlockK / 16);
#pragma unroll
            for (int wave = 0; wave < kActive; ++wave) {
                const float* row_scales = shared.scale_a[s] + scale_shift + fragment_row + wave * Tile::kWaveStride;
                const float row_scale = row_scales[0], row_scale_8 = row_scales[8];
                float partial[Tile::kWaveN / 2];
                Wgmma<Tile::kWaveN>::k128(
                    partial, descriptor::make(stage_a + wave * Tile::kRowParts * descriptor::kStepRows64), descriptor::make(stage_b));
                if (wave == kActive - 1) release(s);  // all that lies in the stage has been read
                promote<Tile::kWaveN, Tile::kSegment>(total[wave], partial, row_scale, row_scale_8, column_scale);
            }
            at.advance();
        }
    }

    // A tile with one wave more than consumers, of two: this warpgroup multiplies its own wave and half of
    // the columns of the last one.
    __device__ __forceinline__ void multiply_shared(
        float (&total)[Tile::kBlockN / 2], float (&half)[Tile::kBlockN / 4], int k_blocks, int scale_shift) {
        static_assert(Tile::kConsumers != 2 || Tile::kSegments == 1, "both halves of the columns have one scale");
        constexpr int kHalf = Tile::kBlockN / 2;
        const int own = first_row / 64;
        const u32 to_last = (Tile::kConsumers - own) * descriptor::kStepRows64;
        const u32 to_half = own * (kHalf * Tile::kBlockK / 16);
#pragma unroll
        for (int i = 0; i < Tile::kBlockN / 2; ++i) total[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i) half[i] = 0.0f;
        StagePosition<Tile::kStages> at = position;
#pragma unroll 1
        for (int kb = 0; kb < k_blocks; ++kb) {
            const int s = at.stage;
            wait_full(at);
            const float column_scale[1] = {shared.scale_b[s][0]};
            const u32 stage_a = low_a + s * (Tile::kBlockM * Tile::kBlockK / 16);
            const u32 stage_b = low_b + s * (Tile::kBlockN * Tile::kBlockK / 16);
            const float* row_scales = shared.scale_a[s] + scale_shift + fragment_row;
            const float own_scale = row_scales[0], own_scale_8 = row_scales[8];
            const float last_scale = row_scales[Tile::kWaveStride - first_row];
            const float last_scale_8 = row_scales[Tile::kWaveStride - first_row + 8];
            float partial[Tile::kBlockN / 2];
            Wgmma<Tile::kBlockN>::k128(partial, descriptor::make(stage_a), descriptor::make(stage_b));
            promote<Tile::kBlockN, Tile::kBlockN>(total, partial, own_scale, own_scale_8, column_scale);
            float partial_half[kHalf / 2];
            Wgmma<kHalf>::k128(partial_half, descriptor::make(stage_a + to_last), descriptor::make(stage_b + to_half));
            release(s);
            promote<kHalf, kHalf>(half, partial_half, last_scale, last_scale_8, column_scale);
            at.advance();
        }
    }

    // A tile in which this warpgroup has no rows: keeps the ring turning.
    __device__ __forceinline__ void skip(int k_blocks) {
        StagePosition<Tile::kStages> at = position;
#pragma unroll 1
        for (int kb = 0; kb < k_blocks; ++kb) {
            wait_full(at);
            __syncwarp();
            release(at.stage);
            at.advance();
        }
    }

    __device__ __forceinline__ void release(int s) {
        if (Tile::kCluster > 1) {
            // Lane 0 tells its own block, lane 1 the other one.
            if (lane < Tile::kCluster) ptx::mbarrier_arrive_cluster(&shared.ring.empty[s], rank ^ lane);
        } else if (lane == 0) {
            ptx::mbarrier_arrive(&shared.ring.empty[s]);
        }
    }
};

// Everything a block does before its roles part: barriers, visible to the whole cluster.
template <class Tile>
__device__ __forceinline__ void start(SharedMemory<Tile>& shared) {
    if (threadIdx.x == 0) shared.ring.init(Tile::kFullArrivals, Tile::kEmptyArrivals);
    if (Tile::kCluster > 1) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    } else {
        __syncthreads();
    }
}

// No block may leave while its peer can still arrive on its barriers. The cluster's barrier is of the
// aligned kind: the lanes of a warp must have met again.
template <class Tile>
__device__ __forceinline__ void finish() {
    __syncwarp();
    if (Tile::kCluster > 1) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}
