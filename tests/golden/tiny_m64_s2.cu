// tiny_m64_s2
// Rendered by cpgemm from templates/tiny.cu.j2; edit the template, not this file.
//   accumulate = False
//   config.block_m = 64
//   config.stages = 2
//   threads = 128

#include "tiny.cuh"

constexpr int kBlockM = 64;
constexpr int kStages = 2;

extern "C" __global__ void __launch_bounds__(128, 1) tiny(float* out) {
    out[0 * kBlockM] = scale(out[0]);
    out[1 * kBlockM] = scale(out[1]);
}
