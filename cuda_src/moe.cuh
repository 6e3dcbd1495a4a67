// Pieces of the mixture-of-experts helpers: moving rows, quantising tiles of four rows, SiLU.
#pragma once

#include "quantize.cuh"

namespace cpgemm {

constexpr int kThreadRows = 4;  // consecutive rows that a thread of a quantising kernel takes

// The least multiple of `step` that is not less; for value + step up to 2^32.
__device__ __forceinline__ unsigned round_up(unsigned value, unsigned step) {
  return step == 1 ? value : (value + step - 1) / step * step;
}

// ---------------------------------------------------------------------------- one instruction each

__device__ __forceinline__ void store_chunk(void* address, const Chunk& chunk) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(chunk.word[0]),
               "r"(chunk.word[1]), "r"(chunk.word[2]), "r"(chunk.word[3])
               : "memory");
}

// Two neighbouring bfloat16, the first in the lower half.  Rounds to nearest even.
__device__ __forceinline__ unsigned pack_bfloat16(float first, float second) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// -------------------------------------------------------------------------------------- expert ids

// Four expert ids from `index` on; what lies behind `count` comes as -1.
__device__ __forceinline__ Chunk load_ids(const int* __restrict__ ids, int index, int count) {
  Chunk chunk;
  asm volatile(
      "{\n\t.reg .pred whole;\n\t"
      "setp.ne.b32 whole, %5, 0;\n\t"
      "mov.b32 %0, -1;\n\tmov.b32 %1, -1;\n\tmov.b32 %2, -1;\n\tmov.b32 %3, -1;\n\t"
      "@whole ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(chunk.word[0]), "=&r"(chunk.word[1]), "=&r"(chunk.word[2]), "=&r"(chunk.word[3])
      : "l"(ids + index), "r"(static_cast<int>(index + 4 <= count)));
  if (index < count && index + 4 > count) {  // one thread of a block at most
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (index + i < count) chunk.word[i] = ids[index + i];
    }
  }
  return chunk;
}

// Experts are buckets 0 .. groups - 1; every other id falls into bucket `groups`, nobody's.
__device__ __forceinline__ int bucket_of(unsigned id, int groups) {
  return static_cast<int>(min(id, static_cast<unsigned>(groups)));
}

// ------------------------------------------------------------------------------------- moving rows

// Which row of `tokens` a sorted row comes from, -1 for none.  Entries that no routing has, in an
// array that a user made, are none too: nothing outside the source is ever read.
__device__ __forceinline__ int source_row(const int* __restrict__ order, int row, int rows,
                                          int top_k, int tokens) {
  const int flat = row < rows ? order[row] : -1;
  if (flat < 0) return -1;
  const int token = flat / top_k;
  return token < tokens ? token : -1;
}

// -------------------------------------------------------------------------------- quantising tiles

// Scale of four rows of a k-block, which kLanes neighbouring lanes share, kChunks chunks of a row
// each: lane i gets that of row i % 4.  Infinities become NaN, as they shall be coded.
template <typename In, int kLanes, int kChunks>
__device__ __forceinline__ Scale scale_of_rows(Chunk (&chunk)[kThreadRows][kChunks], int lane,
                                               bool pow2) {
  float peak[kThreadRows];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    peak[i] = In::peak(chunk[i][0]);
#pragma unroll
    for (int j = 1; j < kChunks; ++j) peak[i] = max_nan(peak[i], In::peak(chunk[i][j]));
  }
  float row_peak = reduce_four<kLanes>(peak, lane);

  if (__any_sync(kFullMask, !is_finite(row_peak))) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      peak[i] = finite_peak<In>(chunk[i][0]);
#pragma unroll
      for (int j = 1; j < kChunks; ++j) peak[i] = fmaxf(peak[i], finite_peak<In>(chunk[i][j]));
    }
    row_peak = reduce_four<kLanes>(peak, lane);
  }
  return pow2 ? scale_of<ScaleFormat::pow2>(row_peak) : scale_of<ScaleFormat::float32>(row_peak);
}

// Code two float32 chunks and store their eight codes at once, if `valid`.
__device__ __forceinline__ void encode_chunks(const Chunk (&chunk)[2], float inverse,
                                              unsigned char* address, bool valid) {
  unsigned codes[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float x[4];
    Input<Dtype::float32>::unpack(chunk[j], x);
    codes[j] = encode(__fmul_rn(x[0], inverse), __fmul_rn(x[1], inverse),
                      __fmul_rn(x[2], inverse), __fmul_rn(x[3], inverse));
  }
  store_codes(address, codes, valid);
}

__device__ __forceinline__ void encode_chunks(const Chunk (&chunk)[1], float inverse,
                                              unsigned char* address, bool valid) {
  encode_chunk<Input<Dtype::float32>>(chunk[0], inverse, address, valid);
}

// -------------------------------------------------------------------------------------------- SiLU
//
// x / (1 + exp(-x)) from single IEEE operations, none of them fused, so that a CPU gets the same
// bits.  exp(-x) = 2^n * 2^f with n + f = -x / ln 2, f in [-1/2, 1/2]; 2^f is a polynomial with a
// relative error of 2^-22, the rounding of n + f adds up to 2^-17 at the ends of the range.
// From 2^127.5 on exp(-x) counts as infinite: x below about -88.4 gives zero.

constexpr float kMinusLog2E = -0x1.715476p+0f;
constexpr float kRounder = 0x1.8p+23f;  // added, it leaves the nearest integer in the lowest bits

__device__ __forceinline__ float silu(float x) {
  const float t = fminf(fmaxf(__fmul_rn(x, kMinusLog2E), -126.0f), 128.0f);
  const float shifted = __fadd_rn(t, kRounder);
  const float f = __fsub_rn(t, __fsub_rn(shifted, kRounder));
  float power = 0x1.5bba14p-10f;
  power = __fadd_rn(__fmul_rn(power, f), 0x1.3cea88p-7f);
  power = __fadd_rn(__fmul_rn(power, f), 0x1.c6b752p-5f);
  power = __fadd_rn(__fmul_rn(power, f), 0x1.ebf9bcp-3f);
  power = __fadd_rn(__fmul_rn(power, f), 0x1.62e42ap-1f);
  power = __fadd_rn(__fmul_rn(power, f), 1.0f);
  // The shift drops all of kRounder's bits and leaves n + 127 as an exponent; 255 is infinity.
  const float scale = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
  return __fdiv_rn(x, __fadd_rn(1.0f, __fmul_rn(power, scale)));
}

}  // namespace cpgemm
