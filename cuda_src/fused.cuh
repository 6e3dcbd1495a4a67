// Epilogues: what is done with the sums of a product, in float32, before D is stored.
//
// A kernel renders a struct of stages (templates/epilogue.j2). Each changes the values of one wave, or of a
// split kernel's share, where they lie in the registers of 128 threads. SwiGLU halves their number: from
// then on they lie otherwise. What becomes of them is in fused_output.cuh.
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
