// FP8 promotion: the tensor core keeps about 22 effective bits in its accumulator, so every 128 of K the
// partial sums of one m64 wave are scaled and added to float32 registers.
//
// D fragment of wgmma m64nN, thread (warp w, lane l), register i:
//   row = 16 w + l / 4 + 8 * ((i / 2) % 2),   column = 8 * (i / 4) + 2 * (l % 4) + i % 2.
#pragma once

// total += (row scale * column scale) * partial. One column scale holds for kSegment columns;
// `scale_b` points to the kN / kSegment of them, in shared memory.
template <int kN, int kSegment>
__device__ __forceinline__ void promote(
    float (&total)[kN / 2], const float (&partial)[kN / 2], float row_scale, float row_scale_8,
    const float (&column_scale)[kN / kSegment]) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
        const float scale = row_scale * column_scale[8 * j / kSegment];  // hoisted: one product per segment
        const float scale_8 = row_scale_8 * column_scale[8 * j / kSegment];
        total[4 * j + 0] += scale * partial[4 * j + 0];
        total[4 * j + 1] += scale * partial[4 * j + 1];
        total[4 * j + 2] += scale_8 * partial[4 * j + 2];
        total[4 * j + 3] += scale_8 * partial[4 * j + 3];
    }
}
