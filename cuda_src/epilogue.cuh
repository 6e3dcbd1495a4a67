// From float32 accumulators in wgmma's D fragment to D in global memory.
//
// add_c        reads C where the fragment's elements lie and adds it.
// stage_bf16   rounds to bfloat16 and stages the rows of one wave in shared memory (TMA's swizzle keeps
//              stmatrix free of bank conflicts).
// store_staged issues the TMA stores of a staged warpgroup tile.
// copy_staged  copies some of its rows with ordinary stores.
// store_direct writes pairs of elements from registers: in float32 the 4 lanes of a quad fill whole
//              32-byte sectors, in bfloat16 half of one: quickest for a few rows.
// store_quads  the same for bfloat16 after the lanes of a quad have exchanged words: 16 bytes a lane.
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

// The words of a quad of lanes, transposed: lane q gets word q of each, in the order of the lanes.
__device__ __forceinline__ uint4 transpose_quad(u32 w0, u32 w1, u32 w2, u32 w3, int q) {
    const bool upper = q & 2, odd = q & 1;
    const u32 low = ptx::shuffle_xor(upper ? w0 : w2, 2), high = ptx::shuffle_xor(upper ? w1 : w3, 2);
    w0 = upper ? low : w0, w1 = upper ? high : w1, w2 = upper ? w2 : low, w3 = upper ? w3 : high;
    const u32 first = ptx::shuffle_xor(odd ? w0 : w1, 1), second = ptx::shuffle_xor(odd ? w2 : w3, 1);
    return odd ? make_uint4(first, w1, second, w3) : make_uint4(w0, first, w2, second);
}

// For 16 or 32 columns; called by whole warps, arguments as for store_direct.
template <int kN>
__device__ __forceinline__ void store_quads(
    const float (&total)[kN / 2], u16* d, long long pitch, int row, int column, int m, int n) {
    static_assert(kN == 16 || kN == 32, "a lane has one unit of 16 bytes, or one in each of its rows");
    const int q = threadIdx.x % 4;
    u32 word[kN / 4];  // 2 j: of the first row, columns 8 j.., 2 j + 1: of the second
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) word[i] = ptx::pack_bfloat16(total[2 * i], total[2 * i + 1]);
    const auto store = [&](const uint4& unit, int own_row, int own_column) {
        if (own_row < m && own_column < n) *reinterpret_cast<uint4*>(d + own_row * pitch + own_column) = unit;
    };
    column -= 2 * q;
    if constexpr (kN == 32) {
        store(transpose_quad(word[0], word[2], word[4], word[6], q), row, column + 8 * q);
        store(transpose_quad(word[1], word[3], word[5], word[7], q), row + 8, column + 8 * q);
    } else {
        store(transpose_quad(word[0], word[2], word[1], word[3], q), row + q / 2 * 8, column + q % 2 * 8);
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
