// Quantising to e4m3: loads, largest magnitudes, scales, codes.
//
// One thread handles whole 16-byte chunks of the input.  A chunk stays packed, as it was loaded,
// until its codes are made: few registers are live while many loads are in flight.
//
// Values that are not finite are rare and handled apart.  Maxima propagate NaN, and infinity is
// larger than all else, so that a maximum that is finite proves that there are none.
#pragma once

namespace cpgemm {

enum class Dtype { float32, float16, bfloat16 };
enum class ScaleFormat { float32, pow2 };

constexpr int kBlock = 128;                     // columns (and rows) that share a scale
constexpr unsigned kFullMask = 0xffffffffu;     // all lanes of a warp
constexpr unsigned kInfinityBits = 0x7f800000u; // magnitudes from here on are infinity and NaN

struct Chunk {
  unsigned word[4];
};

// ---------------------------------------------------------------------------- one instruction each

// Predicates sit inside: an address computed outside of them is stepped by one addition.
//
// The input is read once: it need not stay in L1.  Without `valid` the chunk is zeros.
__device__ __forceinline__ Chunk load_chunk(const char* address, bool valid) {
  Chunk chunk;
  asm volatile(
      "{\n\t.reg .pred valid;\n\t"
      "setp.ne.b32 valid, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
      "@valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(chunk.word[0]), "=&r"(chunk.word[1]), "=&r"(chunk.word[2]), "=&r"(chunk.word[3])
      : "l"(address), "r"(static_cast<int>(valid)));
  return chunk;
}

__device__ __forceinline__ void store_codes(unsigned char* address, const unsigned (&codes)[1],
                                            bool valid) {
  asm volatile(
      "{\n\t.reg .pred valid;\n\t"
      "setp.ne.b32 valid, %2, 0;\n\t"
      "@valid st.global.u32 [%0], %1;\n\t}" ::"l"(address),
      "r"(codes[0]), "r"(static_cast<int>(valid))
      : "memory");
}

__device__ __forceinline__ void store_codes(unsigned char* address, const unsigned (&codes)[2],
                                            bool valid) {
  asm volatile(
      "{\n\t.reg .pred valid;\n\t"
      "setp.ne.b32 valid, %3, 0;\n\t"
      "@valid st.global.v2.u32 [%0], {%1, %2};\n\t}" ::"l"(address),
      "r"(codes[0]), "r"(codes[1]), "r"(static_cast<int>(valid))
      : "memory");
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// For magnitudes: what has no sign.
__device__ __forceinline__ bool is_finite(float magnitude) {
  return __float_as_uint(magnitude) < kInfinityBits;
}

// Four e4m3 codes, the first value in the lowest byte.  Rounds to nearest even, saturates at 448,
// turns NaN into 0x7F.
__device__ __forceinline__ unsigned encode(float x0, float x1, float x2, float x3) {
  unsigned codes;
  asm("{\n\t.reg .b16 low, high;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
      "mov.b32 %0, {low, high};\n\t}"
      : "=r"(codes)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return codes;
}

// ------------------------------------------------------------------------------------ input dtypes
//
// peak: largest magnitude of a chunk, NaN if there is one.  unpack: the chunk as float32, exactly.
// infinities: a word with a 1 in the lowest bit of each element that is an infinity (with that bit
// set it is a NaN).

template <Dtype kDtype>
struct Input;

template <>
struct Input<Dtype::float32> {
  static constexpr int kElements = 4;

  static __device__ __forceinline__ float peak(const Chunk& chunk) {
    const float low = max_nan(fabsf(value(chunk, 0)), fabsf(value(chunk, 1)));
    return max_nan(low, max_nan(fabsf(value(chunk, 2)), fabsf(value(chunk, 3))));
  }
  static __device__ __forceinline__ void unpack(const Chunk& chunk, float (&x)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = value(chunk, i);
  }
  static __device__ __forceinline__ unsigned infinities(unsigned word) {
    return (word & 0x7fffffffu) == kInfinityBits;
  }

 private:
  static __device__ __forceinline__ float value(const Chunk& chunk, int i) {
    return __uint_as_float(chunk.word[i]);
  }
};

// What float16 and bfloat16 share: two elements in a word, the first in its lower half.
template <typename Half, unsigned kHalfInfinity>
struct PackedInput {
  static constexpr int kElements = 8;

  static __device__ __forceinline__ float peak(const Chunk& chunk) {
    const unsigned first = Half::max_nan(magnitudes(chunk, 0), magnitudes(chunk, 1));
    const unsigned second = Half::max_nan(magnitudes(chunk, 2), magnitudes(chunk, 3));
    const unsigned both = Half::max_nan(first, second);
    return cpgemm::max_nan(Half::low(both), Half::high(both));
  }
  static __device__ __forceinline__ void unpack(const Chunk& chunk, float (&x)[kElements]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = Half::low(chunk.word[i]);
      x[2 * i + 1] = Half::high(chunk.word[i]);
    }
  }
  static __device__ __forceinline__ unsigned infinities(unsigned word) {
    const unsigned low = (word & 0x7fffu) == kHalfInfinity;
    const unsigned high = (word & 0x7fff0000u) == kHalfInfinity << 16;
    return high << 16 | low;
  }

 private:
  static __device__ __forceinline__ unsigned magnitudes(const Chunk& chunk, int i) {
    return chunk.word[i] & 0x7fff7fffu;
  }
};

struct Bfloat16 {
  static __device__ __forceinline__ unsigned max_nan(unsigned a, unsigned b) {
    unsigned larger;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
  }
  static __device__ __forceinline__ float low(unsigned word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(unsigned word) {
    return __uint_as_float(word & 0xffff0000u);
  }
};

struct Float16 {
  static __device__ __forceinline__ unsigned max_nan(unsigned a, unsigned b) {
    unsigned larger;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
  }
  static __device__ __forceinline__ float low(unsigned word) { return widen(word & 0xffffu); }
  static __device__ __forceinline__ float high(unsigned word) { return widen(word >> 16); }

 private:
  static __device__ __forceinline__ float widen(unsigned bits) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<unsigned short>(bits)));
    return wide;
  }
};

template <>
struct Input<Dtype::float16> : PackedInput<Float16, 0x7c00u> {};

template <>
struct Input<Dtype::bfloat16> : PackedInput<Bfloat16, 0x7f80u> {};

// The rare way: largest magnitude among the finite elements; infinities become NaN, as they shall
// be coded.
template <typename In>
__device__ __forceinline__ float finite_peak(Chunk& chunk) {
  float x[In::kElements];
  In::unpack(chunk, x);
  float peak = 0.0f;
#pragma unroll
  for (int i = 0; i < In::kElements; ++i) {
    const float magnitude = fabsf(x[i]);
    peak = fmaxf(peak, is_finite(magnitude) ? magnitude : 0.0f);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) chunk.word[i] |= In::infinities(chunk.word[i]);
  return peak;
}

// -------------------------------------------------------------------------------- scales and codes

struct Scale {
  float scale;    // what a code is multiplied with to get the value back
  float inverse;  // what a value is multiplied with to get its code
};

// From the largest magnitude of a block, which is finite.  The lower bound keeps scale and inverse
// normal numbers.  IEEE operations only: a CPU gets the same bits.
template <ScaleFormat kFormat>
__device__ __forceinline__ Scale scale_of(float peak) {
  if (peak == 0.0f) return {1.0f, 1.0f};
  const float bounded = fmaxf(peak, 0x1p-96f);
  if constexpr (kFormat == ScaleFormat::float32) {
    return {__fdiv_rn(bounded, 448.0f), __fdiv_rn(448.0f, bounded)};
  } else {
    // 448 = 1.75 * 2^8: a significand above 1.75 needs the next exponent.  The addition carries
    // into the exponent exactly then.
    const unsigned exponent = (__float_as_uint(bounded) + 0x1fffffu) >> 23;
    return {__uint_as_float((exponent - 8) << 23), __uint_as_float((254 + 8 - exponent) << 23)};
  }
}

// Code one chunk and store its codes, one byte each, if `valid`.
template <typename In>
__device__ __forceinline__ void encode_chunk(const Chunk& chunk, float inverse,
                                             unsigned char* address, bool valid) {
  float x[In::kElements];
  In::unpack(chunk, x);
  unsigned codes[In::kElements / 4];
#pragma unroll
  for (int i = 0; i < In::kElements / 4; ++i) {
    const float* four = x + 4 * i;
    codes[i] = encode(__fmul_rn(four[0], inverse), __fmul_rn(four[1], inverse),
                      __fmul_rn(four[2], inverse), __fmul_rn(four[3], inverse));
  }
  store_codes(address, codes, valid);
}

// -------------------------------------------------------------------------------------- reductions

// Four maxima over kLanes neighbouring lanes at once: lane i gets that of peak[i % 4].
// The first two exchanges also halve the number of values; 5 or 6 shuffles do the work of 16 or 20.
template <int kLanes>
__device__ __forceinline__ float reduce_four(const float (&peak)[4], int lane) {
  const bool odd = lane & 1;
  const float even_row = max_nan(odd ? peak[1] : peak[0],
                                 __shfl_xor_sync(kFullMask, odd ? peak[0] : peak[1], 1));
  const float odd_row = max_nan(odd ? peak[3] : peak[2],
                                __shfl_xor_sync(kFullMask, odd ? peak[2] : peak[3], 1));
  const bool upper = lane & 2;
  float mine = max_nan(upper ? odd_row : even_row,
                       __shfl_xor_sync(kFullMask, upper ? even_row : odd_row, 2));
#pragma unroll
  for (int step = 4; step < kLanes; step *= 2) {
    mine = max_nan(mine, __shfl_xor_sync(kFullMask, mine, step));
  }
  return mine;
}

// Maximum over all threads of a block, for all of them.  Bits of magnitudes order as the magnitudes
// do, NaN above all.
template <int kWarps>
__device__ __forceinline__ float reduce_block(float peak, unsigned (&shared)[kWarps]) {
  const unsigned warp_peak = __reduce_max_sync(kFullMask, __float_as_uint(peak));
  __syncthreads();  // everyone is done with what an earlier reduction left
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = warp_peak;
  __syncthreads();
  unsigned largest = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) largest = max(largest, shared[warp]);
  return __uint_as_float(largest);
}

}  // namespace cpgemm
