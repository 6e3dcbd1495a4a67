// What a block of a grouped GEMM does once its tile is decided: the producer warp schedules and loads, the
// consumer warpgroups multiply and store. A kernel has one Form, or two of which it takes one on the device.
//
// The producer's lane 0 writes a tile's place before it arms the tile's first stage; consumers read it behind
// full[s]. A tile with row -1 ends the work.
#pragma once

#include "group_scheduler.cuh"
#include "mainloop.cuh"
#include "ptx.cuh"
#include "tile_store.cuh"

// The decisions that shape a block's work, and the shared memory that they need.
template <class Tile_, int kRasterGroup, int kStoreChunk_, int kRowBox_, int kFewBox_, int kFewRows_>
struct GroupedForm {
    using Tile = Tile_;
    using Scheduler = GroupScheduler<Tile::kBlockM, Tile::kBlockN, Tile::kClusterN, kRasterGroup>;
    static constexpr int kStoreChunk = kStoreChunk_;  // columns per TMA store box
    static constexpr int kRowBox = kRowBox_;          // rows of A per box, of all blocks of a cluster together
    static constexpr int kFewBox = kFewBox_;          // rows of the small boxes ...
    static constexpr int kFewRows = kFewRows_;        // ... which serve tiles of up to so many
    static constexpr int kScaleBox = 128;             // scales of A per box
    // Three waves of rows keep two consumers equally busy when they share the third.
    static constexpr bool kSharesWave = Tile::kStaged && Tile::kConsumers == 2 && Tile::kWaves == 2;

    struct Shared {
        SharedMemory<Tile> main;
        TilePlace place[Tile::kStages];  // of the tile whose first k-block lies in the stage
    };
};

// Called by the producer warp. `tiles_before` is GroupTable's, for the form's height of tiles. `kGroup`: the
// consumers are told the group too, in the upper bits of scale_shift.
template <class Form, bool kGroup = false>
__device__ __forceinline__ void grouped_produce(
    typename Form::Shared& shared, const int* tiles_before, const TensorMap& map_a, const TensorMap& map_a_few,
    const TensorMap& map_b, const TensorMap& map_scale_a, const GroupedProblem& problem, const float* scale_b,
    int k_blocks, int lane, u32 rank) {
    using Tile = typename Form::Tile;
    Producer<Tile> producer{
        shared.main, &map_a, &map_scale_a, &map_b, 1, Form::kRowBox, 1, Form::kScaleBox, lane, rank};
    typename Form::Scheduler tiles(problem, tiles_before, lane, rank);
    const int scale_rows = (problem.n + 127) / 128;
    const bool masked = problem.layout == kMasked;
    while (tiles.advance()) {
        const GroupedTile& tile = tiles.tile;
        const int rows = min(tile.row_end - tile.row, Tile::kBlockM);
        const bool few = rows <= Form::kFewRows;
        producer.map_a = few ? &map_a_few : &map_a;
        producer.box_rows = few ? Form::kFewBox : Form::kRowBox;
        producer.row_boxes = (rows + producer.box_rows - 1) / producer.box_rows;
        // Masked, each group's scales are a matrix of their own; boxes start at a multiple of 4.
        const int scale_x = tile.row - (masked ? tile.group * problem.m : 0), shift = scale_x % 4;
        producer.scale_boxes = (shift + rows + Form::kScaleBox - 1) / Form::kScaleBox;
        const int scale_row =
            tile.group * scale_rows + min((tile.column + lane * Tile::kSegment) / 128, scale_rows - 1);
        producer.wait_empty();
        if (lane == 0) {
            shared.place[producer.position.stage] = {
                tile.row, tile.row_end, tile.column, kGroup ? shift | tile.group << 2 : shift};
        }
        producer.load(
            tile.row, tile.group * problem.n + tile.column, scale_x - shift, masked ? tile.group * k_blocks : 0,
            scale_b + static_cast<long long>(scale_row) * k_blocks, 0, k_blocks);
    }
    producer.wait_empty();
    u64* full = &shared.main.ring.full[producer.position.stage];
    if (lane == 0) {
        shared.place[producer.position.stage].row = -1;
        ptx::mbarrier_arrive(full);
    }
    if (lane < Tile::kSegments) ptx::mbarrier_arrive(full);
    ptx::grid_launch_dependents();
}

// Called by the consumer warpgroups of the form. Waves of 64 rows behind a group's end are left out. `Output`
// stores; with an epilogue it is made of `more` too (fused_store.cuh).
template <
    class Form, bool kGroup = false, class Output = TileStore<typename Form::Tile, Form::kStoreChunk>, class... More>
__device__ __forceinline__ void grouped_consume(
    typename Form::Shared& shared, const TensorMap& map_d, typename Form::Tile::Element* d, long long pitch_d, int n,
    int k_blocks, int warpgroup, int warp, int lane, u32 rank, const More&... more) {
    using Tile = typename Form::Tile;
    Consumer<Tile> consumer(shared.main, warpgroup, warp, lane, rank);
    Output output(shared.main, map_d, d, pitch_d, n, warpgroup, more...);
    float total[Tile::kWaves][Tile::kWaveN / 2];

    while (true) {
        consumer.wait_full(consumer.position);
        TilePlace tile = read_place(shared.place[consumer.position.stage], lane);
        if (uniform(tile.row < 0)) break;
        if constexpr (kGroup) {
            output.group = tile.scale_shift >> 2;
            tile.scale_shift &= 3;
        }
        if constexpr (Tile::kColumnParts > 1) tile.column += consumer.first_column;
        const int row = tile.row + consumer.first_row;  // of this warpgroup's first wave
        const int last_row = tile.row + Tile::kWaveStride;
        if (Form::kSharesWave && uniform(last_row < tile.row_end && tile.row_end <= last_row + 64)) {
            if constexpr (Form::kSharesWave) {
                auto& half = reinterpret_cast<float(&)[Tile::kBlockN / 4]>(total[1]);
                consumer.multiply_shared(total[0], half, k_blocks, tile.scale_shift);
                output.store_shared(total[0], half, row, last_row, tile.row_end, tile.column);
            }
        } else if (uniform(row >= tile.row_end)) {
            consumer.skip(k_blocks);
        } else {
            if (Tile::kWaves > 1 && uniform(tile.row_end - row <= Tile::kWaveStride)) {
                consumer.template multiply<1>(total, k_blocks, tile.scale_shift);
            } else {
                consumer.multiply(total, k_blocks, tile.scale_shift);
            }
            output.store(total, row, tile.row_end, tile.column, true);
        }
        consumer.position.advance(k_blocks);
    }
    output.drain();
}
