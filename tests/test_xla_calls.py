"""What cpgemm's custom calls compute, on buffers made here in XLA's place.

CuPy's views of device memory are looked at without a device: making one touches no driver.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cpgemm
from cpgemm import xla_calls
from cpgemm.errors import MissingDependencyError
from cpgemm.layout import FP8, pointer, scale_pitch, scales_in_layout
from cpgemm.xla_ffi import Buffer

BF16 = np.dtype(ml_dtypes.bfloat16)
HOST = {
    name: handler.function for name, platform, handler in xla_calls.handlers() if platform == "cpu"
}
DEVICE = {
    name: handler.function for name, platform, handler in xla_calls.handlers() if platform == "CUDA"
}


def buffer(array: np.ndarray) -> Buffer:
    assert array.flags.c_contiguous
    return Buffer(pointer(array) if array.size else 0, array.shape, array.dtype)


def call(arguments, results, **attributes) -> SimpleNamespace:
    return SimpleNamespace(
        kept=(arguments, results),  # buffers are bare addresses: as XLA, keep what is behind them
        arguments=tuple(map(buffer, arguments)),
        results=tuple(map(buffer, results)),
        attributes=attributes,
    )


def turned(scales: np.ndarray) -> np.ndarray:
    """(..., R, KB) as XLA hands it over: (..., KB, R4), the padding NaN."""
    *outer, rows, kblocks = scales.shape
    padded = np.full((*outer, kblocks, scale_pitch(rows)), np.nan, np.float32)
    padded[..., :rows] = scales.swapaxes(-1, -2)
    return padded


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def operands(rng, m, n, k, groups=None):
    outer = () if groups is None else (groups,)
    x = rng.standard_normal((m, k), np.float32)
    w = rng.standard_normal((*outer, n, k), np.float32)
    return cpgemm.quantize(x), cpgemm.quantize(w, (128, 128))


def arrays(a, b) -> list[np.ndarray]:
    return [np.ascontiguousarray(a.data), turned(a.scales), b.data, b.scales]


def test_handlers_are_made_once() -> None:
    first, second = list(xla_calls.handlers()), list(xla_calls.handlers())
    assert [name for name, *_ in first] == [name for name, *_ in second]
    assert all(a[2] is b[2] for a, b in zip(first, second, strict=True))
    assert {(name, platform) for name, platform, _ in first} == {
        (name, platform)
        for name in ("cpgemm_quantize", "cpgemm_gemm", "cpgemm_grouped_gemm")
        for platform in ("cpu", "CUDA")
    }


@pytest.mark.parametrize("shape", [(5, 144), (3, 7, 256), (2, 3, 6, 128), (0, 128), (4, 0)])
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_quantize(rng, shape, block_rows, dtype) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    data = np.zeros(shape, np.uint8).view(FP8)
    *outer, rows, columns = shape
    kblocks = -(-columns // 128)
    if block_rows == 1:
        scales = np.zeros((*outer, kblocks, scale_pitch(rows)), np.float32)
    else:
        scales = np.zeros((*outer, -(-rows // 128), kblocks), np.float32)
    HOST["cpgemm_quantize"](call([x], [data, scales], block_rows=block_rows, scale_format="pow2"))
    flat = x.reshape(-1, *x.shape[-2:]) if x.ndim > 3 else x
    expected = cpgemm.quantize(flat, (block_rows, 128), scale_format="pow2")
    got = scales[..., :rows].swapaxes(-1, -2) if block_rows == 1 else scales
    np.testing.assert_array_equal(bits(data).ravel(), bits(expected.data).ravel())
    np.testing.assert_array_equal(bits(got).ravel(), bits(expected.scales).ravel())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (7, 136, 272), (0, 8, 128), (4, 8, 0)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
@pytest.mark.parametrize("addend", [False, True])
def test_gemm(rng, m, n, k, dtype, addend) -> None:
    a, b = operands(rng, m, n, k)
    c = rng.standard_normal((m, n)).astype(dtype) if addend else None
    out = np.full((m, n), np.nan, dtype)
    HOST["cpgemm_gemm"](call(arrays(a, b) + ([c] if addend else []), [out]))
    np.testing.assert_array_equal(bits(out), bits(cpgemm.gemm(a, b, c=c, out_dtype=dtype)))


def test_gemm_on_memory_that_is_barely_aligned(rng) -> None:
    """XLA promises a host buffer no more than its items' alignment."""
    a, b = operands(rng, 6, 16, 256)
    moved = []
    for array in arrays(a, b):
        item = array.dtype.itemsize
        memory = np.zeros(array.nbytes + 64, np.uint8)
        start = -pointer(memory) % 16 + item
        moved.append(memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape))
        moved[-1][...] = array
    out = np.zeros((6, 16), BF16)
    HOST["cpgemm_gemm"](call(moved, [out]))
    np.testing.assert_array_equal(bits(out), bits(cpgemm.gemm(a, b)))


def test_arguments_cannot_be_written_to(rng) -> None:
    x = rng.standard_normal((4, 16), np.float32)
    view = xla_calls._Host().array(buffer(x))
    assert not view.flags.writeable and pointer(view) == pointer(x)
    assert xla_calls._Host().array(buffer(x), writable=True).flags.writeable


@pytest.mark.parametrize("fill", [False, True])
def test_grouped_gemm_contiguous(rng, fill) -> None:
    a, b = operands(rng, 300, 16, 144, groups=3)
    offsets = np.array([2, 100, 100, 270], np.int32)
    ends = np.array([100, 200, 280], np.int32)
    m_indices = np.repeat(np.array([0, 1, -1], np.int32), (128, 128, 44))
    for layout, index in (("offsets", offsets), ("ends", ends), ("m_indices", m_indices)):
        out, expected = (np.full((300, 16), 7, BF16) for _ in range(2))
        HOST["cpgemm_grouped_gemm"](
            call([*arrays(a, b), index], [out], layout=layout, fill_padding=fill, expected_m=-1)
        )
        cpgemm.grouped_gemm_contiguous(a, b, expected, fill_padding=fill, **{layout: index})
        np.testing.assert_array_equal(bits(out), bits(expected), err_msg=layout)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_grouped_gemm_masked(rng, fill, dtype) -> None:
    x = rng.standard_normal((3, 6, 144), np.float32)
    a = cpgemm.quantize(x)
    _, b = operands(rng, 1, 16, 144, groups=3)
    counts = np.array([6, 0, 3], np.int32)
    out = np.full((3, 6, 16), 7, dtype)
    HOST["cpgemm_grouped_gemm"](
        call([*arrays(a, b), counts], [out], layout="masked", fill_padding=fill, expected_m=4)
    )
    expected = np.full((3, 6, 16), 0 if fill else 7, dtype)
    cpgemm.grouped_gemm_masked(a, b, expected, masked_m=counts)
    np.testing.assert_array_equal(bits(out), bits(expected))


# ------------------------------------------------------------------------- CuPy without a device

ADDRESS = 0x7F00_0000_0000  # never dereferenced


def device_call(*, m=6, n=16, k=272, with_c=True) -> SimpleNamespace:
    kblocks = -(-k // 128)
    shapes = [
        ((m, k), FP8), ((kblocks, scale_pitch(m)), np.float32), ((n, k), FP8),
        ((-(-n // 128), kblocks), np.float32), ((m, n), BF16),
    ]  # fmt: skip
    buffers = [
        Buffer(ADDRESS + index * 0x10000, shape, np.dtype(dtype))
        for index, (shape, dtype) in enumerate(shapes)
    ]
    return SimpleNamespace(
        arguments=tuple(buffers if with_c else buffers[:4]),
        results=(Buffer(ADDRESS + 0x100000, (m, n), BF16),),
        attributes={},
        stream=0x1234,
    )


@pytest.fixture
def no_driver(monkeypatch):
    """CuPy's contexts without CUDA; yields what they were entered with."""
    cupy = pytest.importorskip("cupy")
    entered: list[object] = []

    @contextlib.contextmanager
    def device(ordinal: int):
        entered.append(ordinal)
        yield

    @contextlib.contextmanager
    def stream(handle: int):
        entered.append(handle)
        yield

    monkeypatch.setattr(cupy.cuda, "Device", device)
    monkeypatch.setattr(xla_calls, "external_stream", stream)
    monkeypatch.setattr(xla_calls, "_ordinal", {ADDRESS + 0x100000: 0}.__getitem__)
    return entered


def test_device_views(no_driver, monkeypatch) -> None:
    """CuPy arrays at XLA's addresses in the kernels' layouts, on XLA's device and stream."""
    seen = []
    monkeypatch.setattr(xla_calls, "dense_gemm", lambda *args, **kw: seen.append((args, kw)))
    request = device_call()
    DEVICE["cpgemm_gemm"](request)
    assert no_driver == [0, 0x1234]
    (((a, b, out), options),) = seen
    assert a.shape == (6, 272) and a.scales.shape == (6, 3) and a.scales_pitch == 8
    assert scales_in_layout(a.scales, (1, 128)) and a.is_k_major and b.is_k_major
    got = (a.data, a.scales, b.data, b.scales, options["c"], out)
    expected = (*request.arguments, *request.results)
    assert [int(array.data.ptr) for array in got] == [item.pointer for item in expected]
    assert [array.dtype for array in got] == [item.dtype for item in expected]
    assert [array.nbytes for array in (b.data, b.scales, out)] == [16 * 272, 4 * 3, 6 * 16 * 2]


def test_device_operands_are_made_once_for_an_address(no_driver, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(xla_calls, "dense_gemm", lambda a, b, out, c: seen.append((a, b)))
    for request in (device_call(), device_call(), device_call(m=7), device_call(with_c=False)):
        DEVICE["cpgemm_gemm"](request)
    assert seen[0][0] is seen[1][0] is seen[3][0] and seen[0][1] is seen[1][1] is seen[2][1]
    assert seen[2][0].shape == (7, 272)


def test_device_operands_without_elements(no_driver, monkeypatch) -> None:
    """K = 0: XLA may give such operands no address; the result is still to be filled."""
    seen = []
    monkeypatch.setattr(xla_calls, "dense_gemm", lambda a, b, out, c: seen.append((a, b)))
    request = device_call(k=0)
    request.arguments = tuple(
        item if item.size else item._replace(pointer=0) for item in request.arguments
    )
    DEVICE["cpgemm_gemm"](request)
    ((a, b),) = seen
    assert a.shape == (6, 0) and b.shape == (16, 0) and a.device == b.device == "cuda:0"


def test_nothing_happens_on_a_device_without_elements(no_driver, monkeypatch) -> None:
    monkeypatch.setattr(xla_calls, "dense_gemm", lambda *_, **__: pytest.fail("called"))
    DEVICE["cpgemm_gemm"](device_call(m=0))
    assert no_driver == []


def test_a_device_without_cupy_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(MissingDependencyError, match="cupy: running a kernel needs it"):
        DEVICE["cpgemm_gemm"](device_call())
