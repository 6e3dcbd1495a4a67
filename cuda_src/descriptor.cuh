// wgmma's 64-bit shared-memory descriptor for a K-major tile of 128-byte rows with 128-byte swizzle.
//
// Source of the fields: PTX ISA, "Matrix Descriptor Format" of wgmma. Bits 0-13 address >> 4;
// bits 32-45 stride between groups of 8 rows >> 4 (1024 bytes); bits 62-63 = 1 for 128-byte swizzle.
// The tile must be 1024-byte aligned. Only the low word moves: +2 for the next 32 of K inside the
// 128-byte row, +512 for the next 64 rows.
#pragma once

#include "ptx.cuh"

namespace descriptor {

constexpr u32 kHigh = (1u << 30) | (1024u >> 4);
constexpr u32 kStepRows64 = (64u * 128u) >> 4;

// Broadcast from lane 0 so that the compiler keeps it in a uniform register, where wgmma wants it.
__device__ __forceinline__ u32 low_word(const void* tile) {
    return __shfl_sync(0xffffffffu, (ptx::shared_address(tile) & 0x3ffffu) >> 4, 0);
}

__device__ __forceinline__ u64 make(u32 low) { return (static_cast<u64>(kHigh) << 32) | low; }

}  // namespace descriptor
