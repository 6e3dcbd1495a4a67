// Epilogues: what is done with the sums of a product, in float32, before D is stored.
//
// A kernel renders a struct of stages (templates/epilogue.j2). Each changes the values of one wave, or of a
// split kernel's share, where they lie in the registers of 128 threads. SwiGLU halves their number: from
// then on they lie otherwise, and are stored by `store`. `quantize` stores codes and scales.
//
// Both first turn 4 x 4 words over each quad of lanes, so that every lane has 16 neighbouring bytes of a row.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"
#include "quantize.cuh"

namespace fused {

// Where a thread's values lie: its first element, and where the rows and columns that count end.
struct Place {
    int row, column, row_end, columns;
    int group;  // of the rows, for stages that want it
};

enum : int { kPeaksBarrier = 8 };  // a named barrier that TileStore does not use

// An array or a number that the user gives: an ordinary kernel argument.
struct alignas(16) Operand {
    const void* data;
    long long number;  // elements between two rows of the array, or the bits of a float
};

// How a thread's values lie, relative to its first. Values i and i ^ 2 (Pairs), i ^ 1 (Singles) are of rows
// that lie 8 apart.
template <int kN>
struct Pairs {  // wgmma's fragment of kN columns: groups of 8, of which a lane has two neighbours
    static constexpr int kValues = kN / 2;
    static constexpr int kLaneColumns = 2;
    static constexpr bool kPairs = true;
    static __device__ constexpr int half(int i) { return i / 2 % 2; }
    static __device__ constexpr int column(int i) { return 8 * (i / 4) + i % 2; }
};

template <int kN>
struct Singles {  // what SwiGLU makes of it: groups of 4, of which a lane has one
    static constexpr int kValues = kN / 4;
    static constexpr int kLaneColumns = 1;
    static constexpr bool kPairs = false;
    static __device__ constexpr int half(int i) { return i % 2; }
    static __device__ constexpr int column(int i) { return 4 * (i / 2); }
};

__device__ __forceinline__ float load_one(const float* pointer) { return *pointer; }
__device__ __forceinline__ float load_one(const u16* pointer) {
    return __uint_as_float(static_cast<u32>(*pointer) << 16);
}
__device__ __forceinline__ int load_one(const int* pointer) { return *pointer; }

// Always true, which the compiler does not know. What stands behind it is a basic block of its own: were the
// instructions of several stages, or of all values, mixed, registers would spill.
__device__ __forceinline__ bool apart(const Place& at) { return ptx::opaque(at.columns) > 0; }

enum : int { kTogether = 16 };  // values of a thread whose arithmetic may be mixed

// ---- stages that look at values only --------------------------------------------------------

// x / (1 + 2^t) in two approximate instructions: t = -x log2(e) makes it SiLU.
__device__ __forceinline__ float gated(float x, float t) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
}

__device__ __forceinline__ float silu(float x) { return gated(x, x * -0x1.715476p+0f); }

template <class Stage>
struct Elementwise {
    template <class Layout>
    __device__ __forceinline__ void apply(float (&values)[Layout::kValues], const Place& at) const {
#pragma unroll
        for (int first = 0; first < Layout::kValues; first += kTogether) {
            if (apart(at)) {
#pragma unroll
                for (int i = first; i < first + kTogether && i < Layout::kValues; ++i) values[i] = Stage::of(values[i]);
            }
        }
    }
};

struct Silu : Elementwise<Silu> {
    static __device__ __forceinline__ float of(float x) { return silu(x); }
};

// x / 2 * (1 + erf(x / sqrt(2)))
struct GeluErf : Elementwise<GeluErf> {
    static __device__ __forceinline__ float of(float x) { return 0.5f * x * (1.0f + erff(x * 0x1.6a09e6p-1f)); }
};

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3)
struct GeluTanh : Elementwise<GeluTanh> {
    static __device__ __forceinline__ float of(float x) {
        const float u = x * fmaf(0.044715f * x, x, 1.0f);
        return gated(x, u * -0x1.26aec2p+1f);  // -2 sqrt(2 / pi) log2(e)
    }
};

struct Scale {
    Operand factor;  // an array of one float, or the float itself

    template <class Layout>
    __device__ __forceinline__ void apply(float (&values)[Layout::kValues], const Place& at) const {
        if (!apart(at)) return;
        const float by = factor.data != nullptr ? *static_cast<const float*>(factor.data)
                                                : __uint_as_float(static_cast<u32>(factor.number));
#pragma unroll
        for (int i = 0; i < Layout::kValues; ++i) values[i] *= by;
    }
};

// Gate and up are neighbours in each pair.
template <int kN>
__device__ __forceinline__ void swiglu(const float (&values)[kN / 2], float (&products)[kN / 4]) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) products[i] = silu(values[2 * i]) * values[2 * i + 1];
}

__device__ __forceinline__ Place halved(const Place& at) {
    return {at.row, at.column / 2, at.row_end, at.columns / 2, at.group};
}

// ---- stages that read arrays ----------------------------------------------------------------

// Loads stay on their side of it. Each stage ends with one: were those of several stages under way together,
// registers would spill.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// One number for each column; kPerGroup: a row of them for each group.
template <typename T, bool kPerGroup>
struct Bias {
    Operand bias;

    template <class Layout>
    __device__ __forceinline__ void apply(float (&values)[Layout::kValues], const Place& at) const {
        if (!apart(at)) return;
        const T* line = static_cast<const T*>(bias.data) + (kPerGroup ? at.group * bias.number : 0) + at.column;
#pragma unroll
        for (int i = 0; i < Layout::kValues; i += Layout::kPairs ? 4 : 2) {
            if (at.column + Layout::column(i) >= at.columns) continue;
            if constexpr (Layout::kPairs) {
                const float2 pair = epilogue::load_pair(line + Layout::column(i));
                values[i] += pair.x;
                values[i + 1] += pair.y;
                values[i + 2] += pair.x;
                values[i + 3] += pair.y;
            } else {
                const float one = load_one(line + Layout::column(i));
                values[i] += one;
                values[i + 1] += one;
            }
        }
        keep_order();
    }
};

template <typename T>
struct Residual {
    Operand residual;

    template <class Layout>
    __device__ __forceinline__ void apply(float (&values)[Layout::kValues], const Place& at) const {
        if (!apart(at)) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = at.row + 8 * half;
            if (row >= at.row_end) continue;
            const T* line = static_cast<const T*>(residual.data) + row * residual.number + at.column;
#pragma unroll
            for (int i = 0; i < Layout::kValues; i += Layout::kPairs ? 4 : 2) {
                if (at.column + Layout::column(i) >= at.columns) continue;
                if constexpr (Layout::kPairs) {
                    const float2 pair = epilogue::load_pair(line + Layout::column(i));
                    values[i + 2 * half] += pair.x;
                    values[i + 2 * half + 1] += pair.y;
                } else {
                    values[i + half] += load_one(line + Layout::column(i));
                }
            }
            keep_order();
        }
    }
};

// ---- storing --------------------------------------------------------------------------------

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

// What the functions of users see of their arrays: bfloat16 reads as float.
struct bfloat16;

template <typename T>
struct StoredAs {
    using Type = T;
    using Value = T;
};
template <>
struct StoredAs<bfloat16> {
    using Type = u16;
    using Value = float;
};

template <typename T>
struct Array {
    const typename StoredAs<T>::Type* data;
    long long pitch;  // elements between two rows

    __device__ __forceinline__ explicit Array(const fused::Operand& operand)
        : data(static_cast<const typename StoredAs<T>::Type*>(operand.data)), pitch(operand.number) {}

    __device__ __forceinline__ typename StoredAs<T>::Value operator[](int i) const { return fused::load_one(data + i); }
    __device__ __forceinline__ typename StoredAs<T>::Value operator()(int row, int column) const {
        return fused::load_one(data + row * pitch + column);
    }
};
