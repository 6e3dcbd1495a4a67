// Stores a warpgroup's waves of one tile of D; shared by the kernel families.
//
// bfloat16  stages them in the warpgroup's part of shared memory and lets TMA store them; the store runs
//           on under the next tile's main loop and is waited for before the buffer is used again.
// float32   stores from registers; so does bfloat16 for tiles of 64 rows with a few rows in them: one warp
//           has them all, and the way through shared memory takes longer than its narrow stores.
//
// The named barrier 1 + warpgroup (128 threads) guards the buffer.
#pragma once

#include "epilogue.cuh"
#include "mainloop.cuh"
#include "ptx.cuh"

template <class Tile, int kChunk>
struct TileStore {
    using Element = typename Tile::Element;
    static constexpr int kDirectRows = 16;  // those of one warp
    static constexpr int kWaveBytes = 64 * Tile::kWaveN * 2;  // of one wave in the staging buffer

    const TensorMap& map_d;
    Element* d;
    long long pitch;
    int n;
    u8* buffer;
    int warpgroup;

    __device__ __forceinline__ TileStore(
        SharedMemory<Tile>& shared, const TensorMap& map, Element* d_, long long pitch_, int n_, int warpgroup_)
        : map_d(map), d(d_), pitch(pitch_), n(n_), buffer(shared.d[Tile::kStaged ? warpgroup_ : 0]),
          warpgroup(warpgroup_) {}

    // The waves start at rows row, row + kWaveStride, ...; rows from row_end and columns from n on are not
    // stored. `foreign`: rows behind row_end belong to somebody else; otherwise the matrix ends there and
    // TMA clips.
    __device__ __forceinline__ void store(
        const typename Consumer<Tile>::Total& total, int row, int row_end, int column, bool foreign) {
        const int thread = own_thread(), warp = thread / 32, lane = thread % 32;
        if constexpr (Tile::kStaged) {
            if (!direct(row_end - row)) {
                store_by_tma(total, row, row_end, column, foreign, warp, lane);
                return;
            }
        }
        const int own_row = row + warp * 16 + lane / 4, own_column = column + 2 * (lane % 4);
#pragma unroll
        for (int wave = 0; wave < Tile::kWaves; ++wave) {
            epilogue::store_direct<Tile::kWaveN>(
                total[wave], d, pitch, own_row + wave * Tile::kWaveStride, own_column, row_end, n);
        }
        __syncwarp();  // some lanes have no rows; wgmma needs them together
    }

    // What Consumer::multiply_shared leaves: the wave at `row`, and of the one at last_row this warpgroup's
    // half of the columns. Rows from row_end on belong to somebody else.
    __device__ __forceinline__ void store_shared(
        const float (&total)[Tile::kBlockN / 2], const float (&half)[Tile::kBlockN / 4], int row, int last_row,
        int row_end, int column) {
        constexpr int kHalf = Tile::kBlockN / 2;
        static_assert(!Tile::kStaged || Tile::kConsumers != 2 || kHalf == kChunk, "a half is one store box");
        const int half_column = column + warpgroup * kHalf;
        u8* staged_half = buffer + kWaveBytes;
        const int thread = own_thread(), warp = thread / 32, lane = thread % 32;
        if (issuer()) ptx::tma_store_wait_read();
        ptx::named_barrier(1 + warpgroup, 128);
        epilogue::stage_bf16<Tile::kBlockN, 64, kChunk>(total, ptx::shared_address(buffer), warp * 16, lane);
        epilogue::stage_bf16<kHalf, 64, kChunk>(half, ptx::shared_address(staged_half), warp * 16, lane);
        ptx::fence_async_shared();
        ptx::named_barrier(1 + warpgroup, 128);
        if (issuer()) epilogue::store_staged<Tile::kBlockN, 64, kChunk>(map_d, buffer, row, column, row_end, n);
        if (row_end - last_row < 64) {
            epilogue::copy_staged<kHalf, 64, kChunk>(
                staged_half, d + last_row * pitch + half_column, pitch, row_end - last_row, n - half_column);
            __syncwarp();
        } else if (issuer()) {
            epilogue::store_staged<kHalf, 64, kChunk>(map_d, staged_half, last_row, half_column, row_end, n);
        }
    }

    // Before the block ends: its shared memory may still be read by the copy engine.
    __device__ __forceinline__ void drain() {
        if (Tile::kStaged && issuer()) ptx::tma_store_wait_read();
    }

    static __device__ __forceinline__ bool direct(int rows) { return Tile::kBlockM == 64 && rows <= kDirectRows; }

    // Through the staging buffer; rows that end within a wave of foreign ones are copied by the threads instead.
    __device__ __forceinline__ void store_by_tma(
        const typename Consumer<Tile>::Total& total, int row, int row_end, int column, bool foreign, int warp,
        int lane) {
        if (issuer()) ptx::tma_store_wait_read();
        ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
        for (int wave = 0; wave < Tile::kWaves; ++wave) {
            epilogue::stage_bf16<Tile::kWaveN, 64, kChunk>(
                total[wave], ptx::shared_address(buffer) + wave * kWaveBytes, warp * 16, lane);
        }
        ptx::fence_async_shared();
        ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
        for (int wave = 0; wave < Tile::kWaves; ++wave) {
            const int first = row + wave * Tile::kWaveStride;
            const u8* staged = buffer + wave * kWaveBytes;
            if (foreign && row_end - first < 64) {
                epilogue::copy_staged<Tile::kWaveN, 64, kChunk>(
                    staged, d + first * pitch + column, pitch, row_end - first, n - column);
                __syncwarp();  // lanes leave the copy at different times; wgmma needs them together
            } else if (issuer()) {
                epilogue::store_staged<Tile::kWaveN, 64, kChunk>(map_d, staged, first, column, row_end, n);
            }
        }
    }

    __device__ __forceinline__ bool issuer() const { return threadIdx.x % 128 == 0; }

    // Number in the warpgroup, opaque: addresses that follow from it are made anew for each tile instead of
    // holding registers through the main loop.
    __device__ __forceinline__ int own_thread() const { return ptx::opaque(threadIdx.x % 128); }
};
