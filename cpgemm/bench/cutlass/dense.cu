// The peer of dense products: CUTLASS's Hopper collective for FP8 with 1 x 128 and 128 x 128 scales, instantiated
// for one tile. The macros choose what is instantiated; each choice is a shared library of its own:
//   CPGEMM_TILE_M     rows of a tile; its columns and its K are 128
//   CPGEMM_CLUSTER_M, CPGEMM_CLUSTER_N
//   CPGEMM_PINGPONG   1: two warpgroups take tiles in turn; 0: they share a tile (cooperative)
//   CPGEMM_STREAM_K   1: tiles of the last waves are split along K
//
// Operands lie as cpgemm stores them, so that all contenders read the same memory: A (m, k) and B (n, k) rows of e4m3,
// scales of A rows-fastest with a pitch, scales of B row-major, D (m, n) rows of bfloat16.
#include <cstddef>
#include <new>

#include "cutlass/cutlass.h"
#include "cutlass/detail/blockwise_scale_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

namespace {

using cute::_0, cute::_1, cute::_128, cute::Int, cute::Shape, cute::make_shape, cute::make_stride;

using Tile = Shape<Int<CPGEMM_TILE_M>, _128, _128>;
using Cluster = Shape<Int<CPGEMM_CLUSTER_M>, Int<CPGEMM_CLUSTER_N>, _1>;
using Code = cutlass::float_e4m3_t;
using Output = cutlass::bfloat16_t;

using Scales = cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128, cute::GMMA::Major::MN, cute::GMMA::Major::K>;
using ScalesA = decltype(Scales::deduce_layoutSFA());
using ScalesB = decltype(Scales::deduce_layoutSFB());

using MainSchedule = cute::conditional_t<
    CPGEMM_PINGPONG, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8BlockScaledAccum,
    cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8BlockScaledAccum>;
using StoreSchedule = cute::conditional_t<
    CPGEMM_PINGPONG, cutlass::epilogue::TmaWarpSpecialized, cutlass::epilogue::TmaWarpSpecializedCooperative>;
using TileOrder = cute::conditional_t<CPGEMM_STREAM_K, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;

// There is no C: void.
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, void, cutlass::layout::RowMajor, 8, Output, cutlass::layout::RowMajor, 8, StoreSchedule>::CollectiveOp;

using MainLoop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Code, cute::tuple<cutlass::layout::RowMajor, ScalesA>, 16, Code,
    cute::tuple<cutlass::layout::ColumnMajor, ScalesB>, 16, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    MainSchedule>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, MainLoop, Epilogue, TileOrder>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

struct Prepared {
    Gemm gemm;
    Gemm::Arguments arguments;
    void* workspace = nullptr;
};

Gemm::Arguments arguments_of(
    const void* a, const void* b, const float* scale_a, const float* scale_b, void* d, int m, int n, int k,
    int scale_pitch, int sms) {
    const int blocks = (k + 127) / 128, columns = (n + 127) / 128;
    // TMA reads the scales of A, and CUTLASS wants whole groups of four; the pitch has room for them.
    const int rows = (m + 3) / 4 * 4;
    const ScalesA layout_a = cute::make_layout(
        make_shape(make_shape(Int<1>{}, rows), make_shape(Int<128>{}, blocks), 1),
        make_stride(make_stride(_0{}, _1{}), make_stride(_0{}, scale_pitch), scale_pitch * blocks));
    const ScalesB layout_b = cute::make_layout(
        make_shape(make_shape(Int<128>{}, columns), make_shape(Int<128>{}, blocks), 1),
        make_stride(make_stride(_0{}, blocks), make_stride(_0{}, _1{}), blocks * columns));
    cutlass::KernelHardwareInfo hardware;
    cudaGetDevice(&hardware.device_id);
    hardware.sm_count = sms;
    Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const Code*>(a), make_stride(static_cast<int64_t>(k), _1{}, int64_t{0}), static_cast<const Code*>(b),
         make_stride(static_cast<int64_t>(k), _1{}, int64_t{0}), scale_a, layout_a, scale_b, layout_b},
        {{}, nullptr, make_stride(static_cast<int64_t>(n), _1{}, int64_t{0}), static_cast<Output*>(d),
         make_stride(static_cast<int64_t>(n), _1{}, int64_t{0})},
        hardware};
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
    return arguments;
}

}  // namespace

extern "C" {

// Makes a product of device pointers; `scale_pitch` counts floats. Null, with a status of CUTLASS, where it is refused.
// Allocates its workspace, hence waits for the device.
void* cpgemm_cutlass_create(
    const void* a, const void* b, const float* scale_a, const float* scale_b, void* d, int m, int n, int k,
    int scale_pitch, int sms, int* status) {
    auto* product = new (std::nothrow) Prepared;
    if (product == nullptr) {
        *status = static_cast<int>(cutlass::Status::kErrorInternal);
        return nullptr;
    }
    product->arguments = arguments_of(a, b, scale_a, scale_b, d, m, n, k, scale_pitch, sms);
    cutlass::Status found = Gemm::can_implement(product->arguments);
    const size_t bytes = Gemm::get_workspace_size(product->arguments);
    if (found == cutlass::Status::kSuccess && bytes != 0 && cudaMalloc(&product->workspace, bytes) != cudaSuccess) {
        found = cutlass::Status::kErrorMemoryAllocation;
    }
    if (found == cutlass::Status::kSuccess) found = product->gemm.initialize(product->arguments, product->workspace);
    cudaDeviceSynchronize();  // the workspace is zeroed on another stream than the product runs on
    *status = static_cast<int>(found);
    if (found == cutlass::Status::kSuccess) return product;
    cudaFree(product->workspace);
    delete product;
    return nullptr;
}

// Enqueues the product on a stream; 0, or a status of CUTLASS. Stream-K's counters are zeroed in each call, as its
// users do.
int cpgemm_cutlass_run(void* handle, void* stream) {
    auto* product = static_cast<Prepared*>(handle);
    const auto on = static_cast<cudaStream_t>(stream);
    if (CPGEMM_STREAM_K) {
        const auto zeroed = Kernel::initialize_workspace(product->arguments, product->workspace, on);
        if (zeroed != cutlass::Status::kSuccess) return static_cast<int>(zeroed);
    }
    return static_cast<int>(product->gemm.run(on));
}

void cpgemm_cutlass_destroy(void* handle) {
    auto* product = static_cast<Prepared*>(handle);
    cudaFree(product->workspace);
    delete product;
}

const char* cpgemm_cutlass_status(int status) {
    return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}

}  // extern "C"
