// dense_256x128_s3_w2_bfloat16
// Rendered by cpgemm from templates/dense.cu.j2; edit the template, not this file.
//   config.block_m = 256
//   config.block_n = 128
//   config.stages = 3
//   config.consumers = 2
//   config.cluster_m = 1
//   config.cluster_n = 1
//   config.out_dtype = bfloat16
//   config.raster_group = 8
//   config.unroll = 3
//   config.column_parts = 1

// Dense block-scaled FP8 GEMM for sm_90a, cooperative form:
//   D[m, n] = cast(C[m, n] + sum_kb sA[m, kb] * sB[n / 128, kb] * sum_{k in kb} A[m, k] * B[n, k])
//
// Roles (kConsumers + 1 warpgroups of 128 threads)
//   consumers 0 .. kConsumers-1   each owns every kConsumers-th 64 rows of the tile: wgmma, promotion, store
//   producer  (last warpgroup)    its warp 0 keeps the ring of stages full; its other warps leave at once
//
// Barriers: full[s] and empty[s] of the ring, with the arrivals that mainloop.cuh lists; a named barrier
// for each consumer (1 + its number, 128 threads) around its part of the staging buffer.
//
// Loads: whole boxes of A; for a last tile that is far from full, boxes of 64 rows (map_tail)
//
// Timeline of one tile
//   producer   fills stage after stage, and runs ahead into the next tile; with static weights it loads those of
//              the first stages before it waits for the launch that this one depends on
//   consumer   multiply | (+ C) | wait for its own last store | stmatrix | TMA store, left running
//   Consumers never meet at a block-wide barrier, so one's epilogue runs under the other's main loop.
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "tile_store.cuh"

constexpr int kBlockM = 256;
constexpr int kBlockN = 128;
constexpr int kStages = 3;
constexpr int kConsumers = 2;
constexpr int kClusterM = 1;
constexpr int kClusterN = 1;
constexpr int kRasterGroup = 8;
constexpr int kSegment = 128;
constexpr int kUnroll = 3;
constexpr int kColumnParts = 1;  // consumers that share the columns of a tile
constexpr int kStoreChunk = 64;  // columns per TMA store box
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
constexpr int kSharedBytes = 217088;
using Element = u16;

// d = A @ B.T for 64 rows of A, 128 rows of B and 128 of K: four wgmma m64n128k32, e4m3 x e4m3 -> float32, both
// operands in shared memory; the first one overwrites d. Fence, batch, commit and wait are one statement, so
// that the compiler can put nothing between them: a register touched there would serialise the pipeline.
template <>
struct Wgmma<128> {
    static __device__ __forceinline__ void k128(float (&d)[64], u64 a, u64 b) {
        asm volatile(
            "{\n\t"
            ".reg .b64 a, b;\n\t"
            "wgmma.fence.sync.aligned;\n\t"
            "add.u64 a, %64, 0;\n\t"
            "add.u64 b, %65, 0;\n\t"
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, a, b, 0, 1, 1;\n\t"
            "add.u64 a, %64, 2;\n\t"
            "add.u64 b, %65, 2;\n\t"
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, a, b, 1, 1, 1;\n\t"
            "add.u64 a, %64, 4;\n\t"
            "add.u64 b, %65, 4;\n\t"
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, a, b, 1, 1, 1;\n\t"
            "add.u64 a, %64, 6;\n\t"
            "add.u64 b, %65, 6;\n\t"
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, a, b, 1, 1, 1;\n\t"
            "wgmma.commit_group.sync.aligned;\n\t"
            "wgmma.wait_group.sync.aligned 0;\n\t"
            "}"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
            : "l"(a), "l"(b)
            : "memory");
    }
};

using Tile = TileConfig<kBlockM, kBlockN, kStages, kConsumers, kClusterM, kClusterN, kSegment, kBlockM, kUnroll, Element, kColumnParts>;
using Scheduler = TileScheduler<kBlockM, kBlockN, kClusterM, kClusterN, kRasterGroup>;
static_assert(sizeof(SharedMemory<Tile>) == kSharedBytes, "the host's shared memory size differs from the kernel's");

extern "C" __global__ void __launch_bounds__(Tile::kThreads, 1) __cluster_dims__(Tile::kCluster, 1, 1) cpgemm_dense(
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_tail,
    const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_scale_a,
    const __grid_constant__ TensorMap map_d, const float* __restrict__ scale_b, const Element* c, Element* d,
    long long pitch_c, long long pitch_d, int m, int n, int k, int rows_loaded, int static_b) {
    extern __shared__ __align__(1024) u8 shared_bytes[];
    auto& shared = *reinterpret_cast<SharedMemory<Tile>*>(shared_bytes);

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);  // within the warpgroup
    const int lane = threadIdx.x % 32;
    const u32 rank = Tile::kCluster > 1 ? ptx::cluster_rank() : 0;
    const int k_blocks = (k + Tile::kBlockK - 1) / Tile::kBlockK;

    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&map_a);
        ptx::prefetch_tensor_map(&map_b);
        ptx::prefetch_tensor_map(&map_scale_a);
        if (Tile::kStaged) ptx::prefetch_tensor_map(&map_d);
    }
    start<Tile>(shared);
    Scheduler tiles(m, n, rank);

    if (warpgroup == kConsumers) {
        if (kConsumers > 1) ptx::registers_decrease<kProducerRegisters>();
        if (warp == 0) {
            Producer<Tile> producer{
                shared, &map_a, &map_scale_a, &map_b, 1, rows_loaded, 1, rows_loaded, lane, rank};
            bool more = tiles.advance();
            producer.fit_boxes(tiles.block_m * kBlockM, m, map_a, rows_loaded, map_tail);
            int early = static_b && more ? producer.load_early(tiles.block_n * kBlockN, 0, k_blocks) : 0;
            ptx::grid_dependency_wait();
            for (; more; more = tiles.advance(), early = 0) {
                const int row = tiles.block_m * kBlockM, column = tiles.block_n * kBlockN;
                producer.fit_boxes(row, m, map_a, rows_loaded, map_tail);
                const int scale_row = min((column + lane * kSegment) / 128, (n - 1) / 128);
                // What comes next may be set up while this block's last tile is on its way.
                if (tiles.last()) ptx::grid_launch_dependents();
                producer.load(
                    row, column, row, 0, scale_b + static_cast<long long>(scale_row) * k_blocks, 0, k_blocks, early);
            }
        }
    } else {
        if (kConsumers > 1) ptx::registers_increase<kConsumerRegisters>();
        Consumer<Tile> consumer(shared, warpgroup, warp, lane, rank);
        TileStore<Tile, kStoreChunk> output(shared, map_d, d, pitch_d, n, warpgroup);
        float total[Tile::kWaves][Tile::kWaveN / 2];

        ptx::grid_dependency_wait();  // C and D may be what the launch before this one reads or writes
        while (tiles.advance()) {
            consumer.multiply(total, k_blocks);
            consumer.position.advance(k_blocks);
            const int row = tiles.block_m * kBlockM, column = tiles.block_n * kBlockN + consumer.first_column;
            if (c != nullptr) {
                const int own_row = row + consumer.fragment_row, own_column = column + 2 * (lane % 4);
#pragma unroll
                for (int wave = 0; wave < Tile::kWaves; ++wave) {
                    epilogue::add_c<Tile::kWaveN>(total[wave], c, pitch_c, own_row + wave * Tile::kWaveStride, own_column, m, n);
                }
            }
            output.store(total, row + consumer.first_row, m, column, false);
        }
        output.drain();
    }
    finish<Tile>();
}
