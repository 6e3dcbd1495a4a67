#pragma once
#include "tiny_inner.cuh"

__device__ __forceinline__ float scale(float x) { return x * kFactor; }
