// Stores a warpgroup's rows of one tile of D; shared by the kernel families.
//
// bfloat16  stages them in the warpgroup's part of shared memory and lets TMA store them; the store runs
//           on under the next tile's main loop and is waited for before the buffer is used again.
// float32   stores from registers.
//
// The named barrier 1 + warpgroup (128 threads) guards the buffer.
#pragma once

#include "epilogue.cuh"
#include "mainloop.cuh"
#include "ptx.cuh"

template <class Tile, int kChunk>
struct TileStore {
    using Element = typename Tile::Element;
    static constexpr int kRows = Tile::kRowsPerConsumer;

    const TensorMap& map_d;
    Element* d;
    long long pitch;
    int n;
    u8* buffer;
    int warpgroup, warp, lane;

    __device__ __forceinline__ TileStore(
        SharedMemory<Tile>& shared, const TensorMap& map, Element* d_, long long pitch_, int n_, int warpgroup_,
        int warp_, int lane_)
        : map_d(map), d(d_), pitch(pitch_), n(n_), buffer(shared.d[Tile::kStaged ? warpgroup_ : 0]),
          warpgroup(warpgroup_), warp(warp_), lane(lane_) {}

    // Rows row .. row_end, at most kRows, and columns column .. n. `foreign`: what lies behind row_end
    // belongs to somebody else; otherwise the matrix ends there and TMA clips.
    __device__ __forceinline__ void store(
        const typename Consumer<Tile>::Total& total, int row, int row_end, int column, bool foreign) {
        if constexpr (Tile::kStaged) {
            if (issuer()) ptx::tma_store_wait_read();
            ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
            for (int wave = 0; wave < Tile::kWaves; ++wave) {
                epilogue::stage_bf16<Tile::kBlockN, kRows, kChunk>(
                    total[wave], ptx::shared_address(buffer), wave * 64 + warp * 16, lane);
            }
            ptx::fence_async_shared();
            ptx::named_barrier(1 + warpgroup, 128);
            if (foreign && row_end - row < kRows) {
                epilogue::copy_staged<Tile::kBlockN, kRows, kChunk>(
                    buffer, d + row * pitch + column, pitch, row_end - row, n - column);
            } else if (issuer()) {
                epilogue::store_staged<Tile::kBlockN, kRows, kChunk>(map_d, buffer, row, column, row_end, n);
            }
        } else {
            const int own_row = row + warp * 16 + lane / 4, own_column = column + 2 * (lane % 4);
#pragma unroll
            for (int wave = 0; wave < Tile::kWaves; ++wave) {
                epilogue::store_direct<Tile::kBlockN>(
                    total[wave], d, pitch, own_row + wave * 64, own_column, row_end, n);
            }
        }
    }

    // Before the block ends: its shared memory may still be read by the copy engine.
    __device__ __forceinline__ void drain() {
        if (Tile::kStaged && issuer()) ptx::tma_store_wait_read();
    }

    __device__ __forceinline__ bool issuer() const { return warp == 0 && lane == 0; }
};
