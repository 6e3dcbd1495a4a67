// The peer of grouped products: as dense.cu, with a B and a number of rows for each group, which CUTLASS reads from
// device memory, as it reads the groups' pointers.
//   CPGEMM_TILE_M     rows of a tile; its columns and its K are 128
//   CPGEMM_CLUSTER_M, CPGEMM_CLUSTER_N
//   CPGEMM_PINGPONG   1: two warpgroups take tiles in turn; 0: they share a tile (cooperative)
#include <cstddef>
#include <new>
#include <vector>

#include "cutlass/cutlass.h"
#include "cutlass/detail/blockwise_scale_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

using cute::_0, cute::_1, cute::_128, cute::Int, cute::Shape, cute::make_shape, cute::make_stride;

using Tile = Shape<Int<CPGEMM_TILE_M>, _128, _128>;
using Cluster = Shape<Int<CPGEMM_CLUSTER_M>, Int<CPGEMM_CLUSTER_N>, _1>;
using Code = cutlass::float_e4m3_t;
using Output = cutlass::bfloat16_t;
using Sizes = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;

using Scales = cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128, cute::GMMA::Major::MN, cute::GMMA::Major::K>;
using ScalesA = decltype(Scales::deduce_layoutSFA());
using ScalesB = decltype(Scales::deduce_layoutSFB());

using MainSchedule = cute::conditional_t<
    CPGEMM_PINGPONG, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongFP8BlockScaledAccum,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8BlockScaledAccum>;
using StoreSchedule = cute::conditional_t<
    CPGEMM_PINGPONG, cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong,
    cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;

// There is no C: void.
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, void, cutlass::layout::RowMajor*, 8, Output, cutlass::layout::RowMajor*, 8, StoreSchedule>::CollectiveOp;

using MainLoop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Code, cute::tuple<cutlass::layout::RowMajor*, ScalesA*>, 16,
    Code, cute::tuple<cutlass::layout::ColumnMajor*, ScalesB*>, 16, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    MainSchedule>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<Sizes, MainLoop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
using StrideA = typename Kernel::InternalStrideA;
using StrideB = typename Kernel::InternalStrideB;
using StrideD = typename Kernel::InternalStrideD;

// Device memory that one product owns.
struct Prepared {
    Gemm gemm;
    std::vector<void*> memory;
    bool complete = true;  // every allocation and copy succeeded

    ~Prepared() {
        for (void* one : memory) cudaFree(one);
    }

    void* allocate(size_t bytes) {
        void* made = nullptr;
        complete = complete && cudaMalloc(&made, bytes) == cudaSuccess;
        if (made != nullptr) memory.push_back(made);
        return made;
    }

    template <class T>
    T* upload(const std::vector<T>& values) {
        const size_t bytes = values.size() * sizeof(T);
        void* made = allocate(bytes);
        complete = complete && cudaMemcpy(made, values.data(), bytes, cudaMemcpyHostToDevice) == cudaSuccess;
        return static_cast<T*>(made);
    }
};

}  // namespace

extern "C" {

// Group g has counts[g] rows, which start at row g * row_stride of A and D; its scales of A start at float
// g * scale_stride and have `scale_pitch` floats between k-blocks. `counts` is host memory, read here; all else is
// device memory. Null, with a status of CUTLASS, where the product is refused. Waits for the device.
void* cpgemm_cutlass_grouped_create(
    const void* a, const void* b, const float* scale_a, const float* scale_b, void* d, const int* counts, int groups,
    int n, int k, int row_stride, int scale_stride, int scale_pitch, int sms, int* status) {
    const int blocks = (k + 127) / 128, columns = (n + 127) / 128;
    std::vector<Shape<int, int, int>> sizes;
    std::vector<const Code*> all_a, all_b;
    std::vector<const float*> all_scale_a, all_scale_b;
    std::vector<Output*> all_d;
    std::vector<ScalesA> layouts_a;
    std::vector<ScalesB> layouts_b;
    for (int g = 0; g < groups; ++g) {
        const int64_t row = static_cast<int64_t>(g) * row_stride;
        sizes.push_back(make_shape(counts[g], n, k));
        all_a.push_back(static_cast<const Code*>(a) + row * k);
        all_b.push_back(static_cast<const Code*>(b) + static_cast<int64_t>(g) * n * k);
        all_scale_a.push_back(scale_a + static_cast<int64_t>(g) * scale_stride);
        all_scale_b.push_back(scale_b + static_cast<int64_t>(g) * blocks * columns);
        all_d.push_back(static_cast<Output*>(d) + row * n);
        layouts_a.push_back(cute::make_layout(
            make_shape(make_shape(Int<1>{}, counts[g]), make_shape(Int<128>{}, blocks), 1),
            make_stride(make_stride(_0{}, _1{}), make_stride(_0{}, scale_pitch), scale_pitch * blocks)));
        layouts_b.push_back(cute::make_layout(
            make_shape(make_shape(Int<128>{}, columns), make_shape(Int<128>{}, blocks), 1),
            make_stride(make_stride(_0{}, blocks), make_stride(_0{}, _1{}), blocks * columns)));
    }
    StrideA stride_a{};
    StrideB stride_b{};
    StrideD stride_d{};
    cute::get<0>(stride_a) = k;
    cute::get<0>(stride_b) = k;
    cute::get<0>(stride_d) = n;

    auto* product = new (std::nothrow) Prepared;
    *status = static_cast<int>(cutlass::Status::kErrorMemoryAllocation);
    if (product == nullptr) return nullptr;
    cutlass::KernelHardwareInfo hardware;
    cudaGetDevice(&hardware.device_id);
    hardware.sm_count = sms;
    Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGrouped,
        {groups, product->upload(sizes), nullptr},
        {product->upload(all_a), product->upload(std::vector<StrideA>(groups, stride_a)), product->upload(all_b),
         product->upload(std::vector<StrideB>(groups, stride_b)), product->upload(all_scale_a),
         product->upload(layouts_a), product->upload(all_scale_b), product->upload(layouts_b)},
        {{}, nullptr, nullptr, product->upload(all_d), product->upload(std::vector<StrideD>(groups, stride_d))},
        hardware};
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
    const size_t bytes = Gemm::get_workspace_size(arguments);
    void* workspace = bytes == 0 ? nullptr : product->allocate(bytes);
    cutlass::Status found = cutlass::Status::kErrorMemoryAllocation;
    if (product->complete) found = Gemm::can_implement(arguments);
    if (found == cutlass::Status::kSuccess) found = product->gemm.initialize(arguments, workspace);
    cudaDeviceSynchronize();  // the copies above may still be under way
    *status = static_cast<int>(found);
    if (found == cutlass::Status::kSuccess) return product;
    delete product;
    return nullptr;
}

// Enqueues the product on a stream; 0, or a status of CUTLASS.
int cpgemm_cutlass_run(void* handle, void* stream) {
    return static_cast<int>(static_cast<Prepared*>(handle)->gemm.run(static_cast<cudaStream_t>(stream)));
}

void cpgemm_cutlass_destroy(void* handle) { delete static_cast<Prepared*>(handle); }

const char* cpgemm_cutlass_status(int status) {
    return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}

}  // extern "C"
