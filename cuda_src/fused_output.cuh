// What an epilogue leaves of a tile, to memory: what SwiGLU made, and codes with their scales.
//
// Both turn 4 x 4 words over each quad of lanes first, so that every lane has 16 neighbouring bytes of a row.
#pragma once

#include "fused.cuh"

namespace fused {

// Lane q of each quad gets word q of its four lanes, in their order.
__device__ __forceinline__ void turn_words(u32 (&words)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
        (odd ? words[i] : words[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 other = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + 2], 2);
        (upper ? words[i] : words[i + 2]) = other;
    }
}

// Four words of `kParts` parts each become kParts runs of four parts: first all first parts, ...
template <int kParts>
__device__ __forceinline__ uint4 turn_parts(const u32 (&w)[4]) {
    if constexpr (kParts == 1) {
        return make_uint4(w[0], w[1], w[2], w[3]);
    } else if constexpr (kParts == 2) {
        return make_uint4(
            __byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[0], w[1], 0x7632),
            __byte_perm(w[2], w[3], 0x7632));
    } else {
        const u32 a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
        const u32 c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
        return make_uint4(
            __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410),
            __byte_perm(c, d, 0x7632));
    }
}

__device__ __forceinline__ u32 word_of(const float* values, int step, float*) { return __float_as_uint(values[0]); }
__device__ __forceinline__ u32 word_of(const float* values, int step, u16*) {
    return ptx::pack_bfloat16(values[0], values[step]);
}

__device__ __forceinline__ void store_one(float* pointer, float value) { *pointer = value; }
__device__ __forceinline__ void store_one(u16* pointer, float value) {
    *pointer = static_cast<u16>(ptx::pack_bfloat16(value, 0.0f));
}

// Stores what SwiGLU made, as float or bfloat16. A warp's lanes are together.
template <int kN, typename T>
__device__ __forceinline__ void store(const float (&values)[kN / 4], const Place& at, T* d, long long pitch) {
    constexpr int kParts = 4 / sizeof(T);        // values in a word
    constexpr int kBlock = 4 * kParts;           // values of a lane that are stored at once
    constexpr int kCount = kN / 8;               // values of a lane in a row
    constexpr int kWhole = kCount / kBlock * kBlock;
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = at.row + 8 * half;
        T* line = d + row * pitch;
        const bool in_rows = row < at.row_end;
#pragma unroll
        for (int first = 0; first < kWhole; first += kBlock) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = word_of(values + 2 * (first + kParts * i) + half, 2, d);
            turn_words(words);
            const int column = at.column - lane + 4 * first + kBlock * lane;
            if (in_rows && column < at.columns) *reinterpret_cast<uint4*>(line + column) = turn_parts<kParts>(words);
        }
#pragma unroll
        for (int j = kWhole; j < kCount; ++j) {
            const int column = at.column + 4 * j;
            if (in_rows && column < at.columns) store_one(line + column, values[2 * j + half]);
        }
    }
}

// Where codes and scales of D go: scales (columns / 128, rows), rows contiguous, for each `group_rows` rows
// anew, `group_step` floats on.
struct Codes {
    Operand scales;  // number: floats between two blocks of columns
    Operand groups;  // data: group_rows; number: group_step

    __device__ __forceinline__ float* scale(int row, int block) const {
        const int group_rows = static_cast<int>(reinterpret_cast<u64>(groups.data));
        const int group = row / group_rows;
        return static_cast<float*>(const_cast<void*>(scales.data)) + group * groups.number + block * scales.number +
               (row - group * group_rows);
    }
};

// Largest magnitudes of rows whose 128 columns lie with kShares consumers, through shared memory: `peaks` has
// room for 64 floats of each. All consumers come here together, as often as each other.
template <int kShares>
__device__ __forceinline__ void share_peaks(float (&peak)[2], float* peaks, int share) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    __syncwarp();
    if (threadIdx.x % 4 == 0) {
        peaks[share * 64 + row] = peak[0];
        peaks[share * 64 + row + 8] = peak[1];
    }
    __syncwarp();
    ptx::named_barrier(kPeaksBarrier, 128 * kShares);
#pragma unroll
    for (int other = 0; other < kShares; ++other) {
        peak[0] = fmaxf(peak[0], peaks[other * 64 + row]);
        peak[1] = fmaxf(peak[1], peaks[other * 64 + row + 8]);
    }
    ptx::named_barrier(kPeaksBarrier, 128 * kShares);
}

// Codes and scales of values as the separate quantiser makes them (quantize.cuh). kShares: consumers that
// share each 128 columns of D.
template <class Layout, cpgemm::ScaleFormat kFormat, int kShares>
__device__ __forceinline__ void quantize(
    float (&values)[Layout::kValues], const Place& at, u8* codes, long long pitch, const Codes& to, float* peaks,
    int share) {
    constexpr int kColumns = Layout::kValues * 4 / 2;  // of this wave; a lane has two rows
    static_assert(kColumns * kShares == 128, "the consumers hold whole blocks of 128 columns");
    const int lane = threadIdx.x % 4;
    float peak[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Layout::kValues; ++i) {
        // Columns behind the end hold what the stages made of zeros.
        const float magnitude = at.column + Layout::column(i) < at.columns ? fabsf(values[i]) : 0.0f;
        peak[Layout::half(i)] = cpgemm::max_nan(peak[Layout::half(i)], magnitude);
    }
    // Values that are not finite do not count, and become NaN.
    if (!cpgemm::is_finite(peak[0]) || !cpgemm::is_finite(peak[1])) {
        peak[0] = peak[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < Layout::kValues; ++i) {
            const float magnitude = fabsf(values[i]);
            if (!cpgemm::is_finite(magnitude)) {
                values[i] = __uint_as_float(0x7fffffffu);
            } else if (at.column + Layout::column(i) < at.columns) {
                peak[Layout::half(i)] = fmaxf(peak[Layout::half(i)], magnitude);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 1));
        peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 2));
    }
    if constexpr (kShares > 1) share_peaks<kShares>(peak, peaks, share);

    const int first_column = at.column - Layout::kLaneColumns * lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = at.row + 8 * half;
        const bool in_rows = row < at.row_end;
        const cpgemm::Scale scale = cpgemm::scale_of<kFormat>(peak[half]);
        if (in_rows && lane == 0 && first_column % 128 == 0 && first_column < at.columns) {
            *to.scale(row, first_column / 128) = scale.scale;
        }
        __syncwarp();
        u8* line = codes + row * pitch;
#pragma unroll
        for (int block = 0; block < kColumns / 64; ++block) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* four = values + 8 * (4 * block + i) + (Layout::kPairs ? 2 : 1) * half;
                constexpr int kSecond = Layout::kPairs ? 1 : 2, kThird = 4, kFourth = Layout::kPairs ? 5 : 6;
                words[i] = cpgemm::encode(
                    __fmul_rn(four[0], scale.inverse), __fmul_rn(four[kSecond], scale.inverse),
                    __fmul_rn(four[kThird], scale.inverse), __fmul_rn(four[kFourth], scale.inverse));
            }
            turn_words(words);
            const int column = first_column + 64 * block + 16 * lane;
            if (in_rows && column < at.columns) {
                *reinterpret_cast<uint4*>(line + column) = turn_parts<Layout::kPairs ? 2 : 4>(words);
            }
        }
    }
}

}  // namespace fused
