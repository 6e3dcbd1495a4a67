// Stores a warpgroup's waves of one tile of D; shared by the kernel families.
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
    static constexpr int kWaveBytes = 64 * Tile::kBlockN * 2;  // of one wave in the staging buffer

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

    // The waves start at rows row, row + kWaveStride, ...; rows from row_end and columns from n on are not
    // stored. `foreign`: rows behind row_end belong to somebody else; otherwise the matrix ends there and
    // TMA clips.
    __device__ __forceinline__ void store(
        const typename Consumer<Tile>::Total& total, int row, int row_end, int column, bool foreign) {
        if constexpr (Tile::kStaged) {
            if (issuer()) ptx::tma_store_wait_read();
            ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
            for (int wave = 0; wave < Tile::kWaves; ++wave) {
                epilogue::stage_bf16<Tile::kBlockN, 64, kChunk>(
                    total[wave], ptx::shared_address(buffer) + wave * kWaveBytes, warp * 16, lane);
            }
            ptx::fence_async_shared();
            ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
            for (int wave = 0; wave < Tile::kWaves; ++wave) {
                const int first = row + wave * Tile::kWaveStride;
                const u8* staged = buffer + wave * kWaveBytes;
                if (foreign && row_end - first < 64) {
                    epilogue::copy_staged<Tile::kBlockN, 64, kChunk>(
                        staged, d + first * pitch + column, pitch, row_end - first, n - column);
                    __syncwarp();  // lanes leave the copy at different times; wgmma needs them together
                } else if (issuer()) {
                    epilogue::store_staged<Tile::kBlockN, 64, kChunk>(map_d, staged, first, column, row_end, n);
                }
            }
        } else {
            const int own_row = row + warp * 16 + lane / 4, own_column = column + 2 * (lane % 4);
#pragma unroll
            for (int wave = 0; wave < Tile::kWaves; ++wave) {
                epilogue::store_direct<Tile::kBlockN>(
                    total[wave], d, pitch, own_row + wave * Tile::kWaveStride, own_column, row_end, n);
            }
        }
    }

    // Before the block ends: its shared memory may still be read by the copy engine.
    __device__ __forceinline__ void drain() {
        if (Tile::kStaged && issuer()) ptx::tma_store_wait_read();
    }

    __device__ __forceinline__ bool issuer() const { return warp == 0 && lane == 0; }
};
