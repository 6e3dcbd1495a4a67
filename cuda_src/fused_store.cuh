// Stores a warpgroup's waves of one tile of D through an epilogue (fused.cuh): TileStore, before which the
// values are changed in their registers, or stores of the epilogue's own.
#pragma once

#include "fused_output.cuh"
#include "tile_store.cuh"

template <class Tile, int kChunk, class Epilogue>
struct FusedTileStore : TileStore<Tile, kChunk> {
    using Base = TileStore<Tile, kChunk>;

    Epilogue fused;
    int group = 0;  // of the tile's rows, where the epilogue wants it

    __device__ __forceinline__ FusedTileStore(
        SharedMemory<Tile>& shared, const TensorMap& map, typename Tile::Element* d, long long pitch, int n,
        int warpgroup, const Epilogue& fused_)
        : Base(shared, map, d, pitch, n, warpgroup), fused(fused_) {
        static_assert(!(Epilogue::kOwnStore && Tile::kStaged), "what stores itself needs no staging buffer");
    }

    // As TileStore's, which changes nothing: `total` holds what the epilogue made of it afterwards.
    __device__ __forceinline__ void store(
        typename Consumer<Tile>::Total& total, int row, int row_end, int column, bool foreign) {
        const int thread = this->own_thread();
#pragma unroll
        for (int wave = 0; wave < Tile::kWaves; ++wave) {
            apply<Tile::kWaveN>(total[wave], row + wave * Tile::kWaveStride, row_end, column, thread);
        }
        __syncwarp();  // rows and columns end within a warp; what follows needs its lanes together
        if constexpr (!Epilogue::kOwnStore) Base::store(total, row, row_end, column, foreign);
    }

    __device__ __forceinline__ void store_shared(
        float (&total)[Tile::kBlockN / 2], float (&half)[Tile::kBlockN / 4], int row, int last_row, int row_end,
        int column) {
        constexpr int kHalf = Tile::kBlockN / 2;
        const int thread = this->own_thread();
        apply<Tile::kBlockN>(total, row, row_end, column, thread);
        apply<kHalf>(half, last_row, row_end, column + this->warpgroup * kHalf, thread);
        __syncwarp();
        Base::store_shared(total, half, row, last_row, row_end, column);
    }

    // One wave; `thread`: own_thread().
    template <int kN>
    __device__ __forceinline__ void apply(float (&values)[kN / 2], int row, int row_end, int column, int thread) {
        const int lane = thread % 32;
        const fused::Place at{row + thread / 32 * 16 + lane / 4, column + 2 * (lane % 4), row_end, this->n, group};
        if constexpr (Epilogue::kOwnStore) {
            fused.template store<kN, Tile::kColumnParts>(
                values, at, reinterpret_cast<typename Epilogue::Output*>(this->d), this->pitch,
                reinterpret_cast<float*>(this->buffer), this->warpgroup);
        } else {
            fused.template apply<kN>(values, at);
        }
    }
};
