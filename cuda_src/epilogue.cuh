// From float32 accumulators in wgmma's D fragment to D in global memory.
//
// add_c        reads C where the fragment's elements lie and adds it.
// stage_bf16   rounds to bfloat16 and stages the rows of one wave in shared memory (TMA's swizzle keeps
//              stmatrix free of bank conflicts).
// store_staged issues the TMA stores of a staged warpgroup tile.
// copy_staged  copies some of its rows with ordinary stores.
// store_direct writes pairs of elements from registers: in float32 the 4 lanes of a quad fill whole
//              32-byte sectors, in bfloat16 (a split kernel has no tile to stage) half of one.
#pragma once

#include "ptx.cuh"

namespace epilogue {

__device__ __forceinline__ float2 load_pair(const float* pointer) { return *reinterpret_cast<const float2*>(pointer); }

// Two bfloat16 widen to float32 by a shift: they are its upper halves.
__device__ __forceinline__ float2 load_pair(const u16* pointer) {
    const u32 both = *reinterpret_cast<const u32*>(pointer);
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

// `row` and `column` are this thread's first element in the matrix; rows row and row + 8 are its own.
template <int kN, typename Element>
__device__ __forceinline__ void add_c(
    float (&total)[kN / 2], const Element* c, long long pitch, int row, int column, int m, int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= m) continue;
        const Element* line = c + static_cast<long long>(row + 8 * half) * pitch;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
            if (column + 8 * j < n) {
                const float2 pair = load_pair(line + column + 8 * j);
                total[4 * j + 2 * half] += pair.x;
                total[4 * j + 2 * half + 1] += pair.y;
            }
        }
    }
}

__device__ __forceinline__ void store_pair(float* pointer, float x, float y) {
    *reinterpret_cast<float2*>(pointer) = make_float2(x, y);
}

__device__ __forceinline__ void store_pair(u16* pointer, float x, float y) {
    *reinterpret_cast<u32*>(pointer) = ptx::pack_bfloat16(x, y);
}

template <int kN, typename Element>
__device__ __forceinline__ void store_direct(
    const float (&total)[kN / 2], Element* d, long long pitch, int row, int column, int m, int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= m) continue;
        Element* line = d + static_cast<long long>(row + 8 * half) * pitch;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
            if (column + 8 * j < n) {
                store_pair(line + column + 8 * j, total[4 * j + 2 * half], total[4 * j + 2 * half + 1]);
            }
        }
    }
}

// The staging buffer holds kN / kChunk chunks of kRows rows by kChunk columns; a row of a chunk is as
// wide as TMA's swizzle span (128, 64 or 32 bytes), in which address bits 4.. are XORed with bits 7...
template <int kRows, int kChunk>
__device__ __forceinline__ u32 staged_offset(int row, int column) {
    constexpr u32 kRowBytes = kChunk * 2;
    constexpr u32 kSwizzle = (kRowBytes - 1) & 0x70u;
    const u32 offset = row * kRowBytes + column % kChunk * 2;
    return column / kChunk * (kRows * kRowBytes) + (offset ^ ((offset >> 3) & kSwizzle));
}

template <int kN, int kRows, int kChunk>
__device__ __forceinline__ void stage_bf16(const float (&total)[kN / 2], u32 buffer, int first_row, int lane) {
#pragma unroll
    for (int column = 0; column < kN; column += 16) {
        const u32 offset = staged_offset<kRows, kChunk>(first_row + lane % 16, column % kChunk + lane / 16 * 8);
        const int i = column / 2;
        ptx::stmatrix_x4(
            buffer + column / kChunk * (kRows * kChunk * 2) + offset,
            ptx::pack_bfloat16(total[i + 0], total[i + 1]), ptx::pack_bfloat16(total[i + 2], total[i + 3]),
            ptx::pack_bfloat16(total[i + 4], total[i + 5]), ptx::pack_bfloat16(total[i + 6], total[i + 7]));
    }
}

// Called by one thread, behind a barrier of the threads that staged. Boxes that hang over the end of the
// matrix are clipped; those that lie outside altogether are left out.
template <int kN, int kRows, int kChunk>
__device__ __forceinline__ void store_staged(
    const TensorMap& map, const u8* buffer, int row, int column, int m, int n) {
    if (row >= m) return;
#pragma unroll
    for (int x = 0; x < kN; x += kChunk) {
        if (column + x < n) ptx::tma_store_2d(&map, buffer + x * kRows * 2, column + x, row);
    }
    ptx::tma_store_commit();
}

// Called by a warpgroup, behind the same barrier: copies the first `rows` rows with ordinary 16-byte stores,
// for tiles whose other rows belong to somebody else. `d` points to the tile's first element.
template <int kN, int kRows, int kChunk>
__device__ __forceinline__ void copy_staged(const u8* buffer, u16* d, long long pitch, int rows, int columns) {
    constexpr int kUnits = kN / 8;  // of 16 bytes, per row
#pragma unroll 1
    for (int i = ptx::opaque(threadIdx.x % 128); i < rows * kUnits; i += 128) {
        const int row = i / kUnits, column = i % kUnits * 8;
        if (column < columns) {
            const uint4 unit = *reinterpret_cast<const uint4*>(buffer + staged_offset<kRows, kChunk>(row, column));
            *reinterpret_cast<uint4*>(d + row * pitch + column) = unit;
        }
    }
}

}  // namespace epilogue
