"""Products of other libraries' arrays: their kind, their memory, their stream.

The bridge itself is tested in ``test_dlpack``; here it is in the calls that use it.
"""

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import operands

import cpgemm
from cpgemm import ArgumentError, ArgumentTypeError, ScaledTensor, moe
from cpgemm.dlpack import as_native, framework_of
from cpgemm.streams import external_stream

BF16 = np.dtype(ml_dtypes.bfloat16)
M, N, K, GROUPS = 37, 264, 400, 3


class Torch:
    """Conversions for tensors of torch on one device."""

    name = "torch"

    def __init__(self, device: str) -> None:
        self.module = pytest.importorskip("torch", reason="torch is not installed")
        self.device = device

    def floats(self, values):
        return self.module.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def integers(self, values):
        return self.floats(np.asarray(values, np.int32))

    def fp8(self, codes):
        return self.floats(codes.view(np.uint8)).view(self.module.float8_e4m3fn)


class Jax:
    """Conversions for arrays of JAX on one device."""

    name = "jax"

    def __init__(self, device: str) -> None:
        import dlpack_producers  # noqa: F401  JAX must not take all of the memory

        self.module = pytest.importorskip("jax", reason="JAX is not installed")
        kind = "cpu" if device == "cpu" else "gpu"
        self.device = self.module.devices(kind)[0]

    def floats(self, values):
        return self.module.device_put(np.ascontiguousarray(values), self.device)

    integers = fp8 = floats


@pytest.fixture(params=["torch", "jax"])
def library(request):
    return {"torch": Torch, "jax": Jax}[request.param]


def bits(result) -> np.ndarray:
    """A result of any library as NumPy's integers."""
    native = as_native("result", result)
    native = native.view(np.uint16 if native.itemsize == 2 else np.uint32)
    return native if isinstance(native, np.ndarray) else native.get()


def on(kind, tensor: ScaledTensor) -> ScaledTensor:
    """A NumPy tensor as one of another library's arrays."""
    return ScaledTensor.from_arrays(
        kind.fp8(tensor.data), kind.floats(tensor.scales), tensor.granularity
    )


def everything(kind, rng):
    """Every public product and quantiser on ``kind``'s arrays, each beside the NumPy result."""
    a, b = operands(rng, M, N, K)
    x, y = on(kind, a), on(kind, b)
    assert (x.framework, y.framework) == (kind.name, kind.name)
    yield "gemm", cpgemm.gemm(x, y), cpgemm.gemm(a, b)
    c = rng.standard_normal((M, N), dtype=np.float32)
    yield "c", cpgemm.gemm(x, y, c=kind.floats(c)), cpgemm.gemm(a, b, c=c)
    values = rng.standard_normal((M, K), dtype=np.float32)
    quantized, wanted = cpgemm.quantize(kind.floats(values)), cpgemm.quantize(values)
    assert quantized.framework == kind.name
    yield "dequantize", quantized.dequantize(), wanted.dequantize()
    left, right = (rng.standard_normal((128, n), dtype=np.float32) for n in (48, 64))
    yield (
        "columns",
        cpgemm.gemm_tn(
            cpgemm.quantize(kind.floats(left), (128, 1)),
            cpgemm.quantize(kind.floats(right), (128, 128)),
        ),
        cpgemm.gemm_tn(cpgemm.quantize(left, (128, 1)), cpgemm.quantize(right, (128, 128))),
    )
    weights = cpgemm.quantize(rng.standard_normal((GROUPS, N, K), dtype=np.float32), (128, 128))
    w = on(kind, weights)
    offsets = np.array([0, 5, 5, M], np.int32)
    yield "offsets", cpgemm.grouped_gemm_contiguous(
        x, w, offsets=kind.integers(offsets)
    ), cpgemm.grouped_gemm_contiguous(a, weights, offsets=offsets)  # fmt: skip
    stacked = cpgemm.quantize(rng.standard_normal((GROUPS, 8, K), dtype=np.float32))
    counts = np.array([8, 8, 8], np.int32)
    yield "masked", cpgemm.grouped_gemm_masked(
        on(kind, stacked), w, masked_m=kind.integers(counts)
    ), cpgemm.grouped_gemm_masked(stacked, weights, masked_m=counts)  # fmt: skip
    h = rng.standard_normal((M, 2 * 32), dtype=np.float32)
    fused = moe.swiglu_quantize(kind.floats(h))
    assert fused.framework == kind.name
    yield "swiglu", fused.dequantize(), moe.swiglu_quantize(h).dequantize()
    ids = rng.integers(0, GROUPS, (M, 2)).astype(np.int32)
    routing = moe.route(kind.integers(ids), GROUPS)
    there = moe.route(ids, GROUPS)
    gathered = moe.gather(x, routing)
    assert gathered.framework == kind.name
    rows = np.asarray(bits(gathered.dequantize()))
    yield "gather", gathered.dequantize(), moe.gather(a, there).dequantize()
    assert rows.shape == (there.rows, K)


def test_cpu_results_are_of_the_library_and_equal(library, rng):
    kind = library("cpu")
    for name, got, wanted in everything(kind, rng):
        assert framework_of(got) == kind.name, name
        np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=name)


def test_cpu_results_go_into_a_tensor(rng):
    kind = Torch("cpu")
    a, b = operands(rng, M, N, K)
    out = kind.module.zeros((M, N), dtype=kind.module.bfloat16)
    assert cpgemm.gemm(on(kind, a), on(kind, b), out) is out
    np.testing.assert_array_equal(bits(out), bits(cpgemm.gemm(a, b)))


def test_jax_arrays_are_not_written(rng):
    kind = Jax("cpu")
    a, b = operands(rng, M, N, K)
    out = kind.floats(np.zeros((M, N), np.float32))
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a JAX array"):
        cpgemm.gemm(on(kind, a), on(kind, b), out)


def test_tensors_that_require_gradients(rng):
    kind = Torch("cpu")
    x = kind.module.zeros((4, 128), requires_grad=True)
    with pytest.raises(ArgumentError, match=r"^x: must not require gradients.*cpgemm\.torch"):
        cpgemm.quantize(x)


def test_scaled_tensor_to_torch_and_back(rng):
    kind = Torch("cpu")
    a, _ = operands(rng, M, N, K)
    data, scales = a.to_torch()
    assert data.dtype == kind.module.float8_e4m3fn and scales.dtype == kind.module.float32
    assert data.data_ptr() == a.data.__array_interface__["data"][0]
    again = ScaledTensor.from_arrays(data, scales, a.granularity)
    assert again.framework == "torch" and again.scales.strides == a.scales.strides
    np.testing.assert_array_equal(bits(again.dequantize()), bits(a.dequantize()))


def test_scaled_tensor_to_jax(rng):
    kind = Jax("cpu")
    a, _ = operands(rng, M, N, K)
    data, scales = a.to_jax()
    assert str(data.dtype) == "float8_e4m3fn"
    np.testing.assert_array_equal(np.asarray(scales), a.scales)
    np.testing.assert_array_equal(np.asarray(data).view(np.uint8), a.data.view(np.uint8))
    assert kind.name == framework_of(data)


def test_the_kind_survives_transposing(rng):
    kind = Torch("cpu")
    _, b = operands(rng, M, N, K)
    assert on(kind, b).T.framework == "torch" and on(kind, b).T.k_major().framework == "torch"


# ------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_gpu_results_are_of_the_library_and_equal(library, rng):
    """Equal to the NumPy path to rounding: the kernels sum in another order."""
    kind = library("cuda")
    for name, got, wanted in everything(kind, rng):
        assert framework_of(got) == kind.name, name
        got, wanted = (as_native("x", x) for x in (got, wanted))
        assert not isinstance(got, np.ndarray), name
        if got.dtype == BF16:
            got = (got.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        got, wanted = got.get().astype(np.float64), wanted.astype(np.float64)
        assert np.linalg.norm(got - wanted) <= 0.003 * np.linalg.norm(wanted), name


@pytest.mark.gpu
def test_gpu_memory_is_shared_both_ways(library, rng):
    kind = library("cuda")
    a, _ = operands(rng, M, N, K)
    codes, scales = kind.fp8(a.data), kind.floats(a.scales)
    address = codes.data_ptr() if kind.name == "torch" else codes.unsafe_buffer_pointer()
    tensor = ScaledTensor.from_arrays(codes, scales, a.granularity)
    assert tensor.data.data.ptr == address
    back = tensor.to_torch()[0] if kind.name == "torch" else tensor.to_jax()[0]
    again = back.data_ptr() if kind.name == "torch" else back.unsafe_buffer_pointer()
    assert again == address


@pytest.mark.gpu
def test_gpu_results_for_torch_come_from_its_allocator(rng):
    import cupy as cp

    kind = Torch("cuda")
    torch = kind.module
    a, b = operands(rng, 256, 512, K)
    x, y = on(kind, a), on(kind, b)
    values = torch.randn(256, 512, device="cuda")
    kept = [cpgemm.gemm(x, y), cpgemm.quantize(values)]  # compiles and loads
    pool = cp.get_default_memory_pool()
    before, ours = torch.cuda.memory_allocated(), pool.used_bytes()
    kept.append(cpgemm.gemm(x, y))
    assert torch.cuda.memory_allocated() - before == 256 * 512 * 2
    kept.append(cpgemm.quantize(values))
    assert torch.cuda.memory_allocated() - before == 256 * 512 * (2 + 1) + 256 * 4 * 4
    assert pool.used_bytes() == ours
    del kept[2:]
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True])
def test_gpu_work_goes_to_torchs_current_stream(rng, given):
    """A slow stream writes A; the product is right only behind it. The default stream is idle."""
    from dlpack_producers import LATE_CLOCKS, late_kernels

    _, late_copy = late_kernels()
    kind = Torch("cuda")
    torch = kind.module
    a, b = operands(rng, 64, N, K)
    new, _ = operands(rng, 64, N, K)
    x, y, z = on(kind, a), on(kind, b), on(kind, new)
    out = cpgemm.gemm(x, y)
    cpgemm.gemm(x, y, out)
    wanted = bits(cpgemm.gemm(z, y))
    x.scales[...] = on(kind, a).scales  # what copies is compiled by now
    old_codes, new_codes = x.data.view(np.uint8), z.data.view(np.uint8)
    assert old_codes.flags.c_contiguous and new_codes.flags.c_contiguous
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cpgemm.gemm(x, y)  # torch has memory for this stream now: getting some waits for the GPU
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with external_stream(stream.cuda_stream):
            size = np.int64(old_codes.size)
            late_copy((1,), (1024,), (new_codes, old_codes, size, np.int64(LATE_CLOCKS)))
            x.scales[...] = z.scales
        result = cpgemm.gemm(x, y, out) if given else cpgemm.gemm(x, y)
    assert not stream.query(), "the slow kernel must still run, or this test shows nothing"
    stream.synchronize()
    np.testing.assert_array_equal(bits(result), wanted)


@pytest.mark.gpu
def test_gpu_graph_of_torch(rng):
    kind = Torch("cuda")
    torch = kind.module
    a, b = operands(rng, 64, N, K)
    new, _ = operands(rng, 64, N, K)
    x, y = on(kind, a), on(kind, b)
    out = cpgemm.gemm(x, y)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        cpgemm.gemm(x, y, out)
    x.data.view(np.uint8)[...] = as_native("new", kind.floats(new.data.view(np.uint8)))
    x.scales[...] = as_native("new", kind.floats(new.scales))
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    np.testing.assert_array_equal(bits(out), bits(cpgemm.gemm(on(kind, new), y)))


@pytest.mark.gpu
def test_gpu_and_cpu_do_not_mix(rng):
    kind = Torch("cuda")
    a, b = operands(rng, M, N, K)
    with pytest.raises(ArgumentError, match="b: must be on a's device, cuda:0; got cpu"):
        cpgemm.gemm(on(kind, a), b)
    out = kind.module.zeros((M, N), dtype=kind.module.bfloat16)
    with pytest.raises(ArgumentTypeError, match="out: must be a CuPy array, as a is"):
        cpgemm.gemm(on(kind, a), on(kind, b), out)
    with pytest.raises(ArgumentError, match="scales: must be where data is"):
        ScaledTensor.from_arrays(kind.fp8(a.data), a.scales, a.granularity)


@pytest.mark.gpu
def test_gpu_new_tensors_at_old_addresses(rng):
    """What is remembered of a call holds numbers: memory that is given out again is no danger."""
    kind = Torch("cuda")
    torch = kind.module
    _, b = operands(rng, M, N, K)
    y = on(kind, b)
    for seed in range(6):
        fresh, _ = operands(np.random.default_rng(seed), M, N, K)
        x = on(kind, fresh)
        out = torch.empty((M, N), dtype=torch.bfloat16, device="cuda")
        cpgemm.gemm(x, y, out)
        wanted = bits(cpgemm.gemm(fresh, b)).astype(np.uint32) << 16
        got = (bits(out).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        wanted = wanted.view(np.float32).astype(np.float64)
        assert np.linalg.norm(got - wanted) <= 0.003 * np.linalg.norm(wanted)
        del x, out
