"""What cpgemm's custom calls do when XLA reaches them: its buffers seen as arrays, then one call.

On a CPU the buffers become NumPy arrays and the reference paths fill the results.  On CUDA they
become CuPy arrays, and the kernels go onto the stream that XLA names; nothing waits for them.
Either way the arrays are views: nothing is copied, and results are written where XLA wants them.

Buffers are row-major.  Scales of granularity (1, 128) therefore travel as (..., ceil(K/128), R4)
with R4 the rows rounded up to 4: read along its last axis, that is the rows-fastest layout which
the kernels ask for (``cpgemm.layout``).  ``cpgemm.jax`` builds the calls; nothing here imports JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from cpgemm.errors import DeviceError, MissingDependencyError
from cpgemm.gemm import gemm as dense_gemm
from cpgemm.grouped import grouped_gemm_contiguous, grouped_gemm_masked
from cpgemm.layout import BLOCK, Array, Granularity, is_cupy
from cpgemm.quantize import quantize as quantize_arrays
from cpgemm.scaled import ScaledTensor
from cpgemm.streams import external_stream
from cpgemm.xla_ffi import Buffer, Call, Handler, target

__all__ = ["GEMM", "GROUPED_GEMM", "QUANTIZE", "handlers"]

# Names of the targets; compiled programs hold them.
QUANTIZE = "cpgemm_quantize"
GEMM = "cpgemm_gemm"
GROUPED_GEMM = "cpgemm_grouped_gemm"


class _Place(Protocol):
    """Where buffers lie, and how to see them as arrays for the time of a call."""

    def array(self, buffer: Buffer, writable: bool = False) -> Array:
        """A row-major view of a buffer."""

    def operand(self, data: Buffer, scales: Buffer, granularity: Granularity) -> ScaledTensor:
        """A view of two buffers that are read."""


# ------------------------------------------------------------------------- what is to be computed


def _quantize(call: Call, place: _Place) -> None:
    """x -> data, scales.  Attributes: ``block_rows`` (1 or 128), ``scale_format``.

    Axes before the last two, any number of them, are groups: that is what ``vmap`` adds.
    """
    x = _grouped(place.array(call.arguments[0]))
    data, scales = (_grouped(place.array(result, writable=True)) for result in call.results)
    granularity = (call.attributes["block_rows"], BLOCK)
    if granularity[0] == 1:
        scales = _rows_fastest(scales, x.shape[-2])
    scale_format = call.attributes["scale_format"]
    out = ScaledTensor(data, scales, granularity, scale_format)
    quantize_arrays(x, granularity, scale_format=scale_format, out=out)


def _gemm(call: Call, place: _Place) -> None:
    """a_data, a_scales, b_data, b_scales[, c] -> out."""
    a, b, rest = _operands(call, place)
    out = place.array(call.results[0], writable=True)
    dense_gemm(a, b, out, c=rest[0] if rest else None)


def _grouped_gemm(call: Call, place: _Place) -> None:
    """a_data, a_scales, b_data, b_scales, index -> out.

    Attributes: ``layout`` (which index array it is), ``fill_padding``, ``expected_m`` (-1: none).
    """
    a, b, (index,) = _operands(call, place)
    out = place.array(call.results[0], writable=True)
    layout, fill_padding = call.attributes["layout"], call.attributes["fill_padding"]
    if layout == "masked":
        if fill_padding:
            _zero(out)
        expected_m = call.attributes["expected_m"]
        grouped_gemm_masked(
            a, b, out, masked_m=index, expected_m=None if expected_m < 0 else expected_m
        )
    else:
        grouped_gemm_contiguous(a, b, out, **{layout: index}, fill_padding=fill_padding)


def _operands(call: Call, place: _Place) -> tuple[ScaledTensor, ScaledTensor, list[Array]]:
    a_data, a_scales, b_data, b_scales, *rest = call.arguments
    return (
        place.operand(a_data, a_scales, (1, BLOCK)),
        place.operand(b_data, b_scales, (BLOCK, BLOCK)),
        [place.array(buffer) for buffer in rest],
    )


def _rows_fastest(scales: Array, rows: int) -> Array:
    """(..., ceil(K/128), R4) seen as (..., R, ceil(K/128))."""
    return scales[..., :rows].swapaxes(-1, -2)


def _grouped(array: Array) -> Array:
    """All axes but the last two as one."""
    if array.ndim <= 3:
        return array
    return array.reshape(math.prod(array.shape[:-2]), *array.shape[-2:])


def _zero(out: Array) -> None:
    if is_cupy(out):
        out.data.memset_async(0, out.nbytes)  # on CuPy's current stream, which is XLA's here
    else:
        out.view(f"u{out.itemsize}")[...] = 0


# ---------------------------------------------------------------------------------- host memory


class _HostMemory:
    """Memory of XLA's in the form that NumPy takes."""

    def __init__(self, buffer: Buffer, writable: bool) -> None:
        self.__array_interface__ = {
            "data": (buffer.pointer, not writable),
            "shape": buffer.shape,
            "typestr": f"|V{buffer.dtype.itemsize}",  # NumPy has no letters for FP8 and bfloat16
            "version": 3,
        }


class _Host:
    def array(self, buffer: Buffer, writable: bool = False) -> Array:
        if buffer.size == 0:
            return np.empty(buffer.shape, buffer.dtype)  # its address may be 0
        return np.asarray(_HostMemory(buffer, writable)).view(buffer.dtype)

    def operand(self, data: Buffer, scales: Buffer, granularity: Granularity) -> ScaledTensor:
        layout = self.array(scales)
        if granularity[0] == 1:
            layout = _rows_fastest(layout, data.shape[-2])
        # Copies scales that are less aligned than the layout asks for: XLA promises nothing here.
        return ScaledTensor.from_arrays(self.array(data), layout, granularity)


def _on_host(run: Callable[[Call, _Place], None]) -> Callable[[Call], None]:
    place = _Host()

    def handle(call: Call) -> None:
        run(call, place)

    return handle


# -------------------------------------------------------------------------------- device memory


class _Device:
    """Memory of a CUDA device, seen through CuPy, which does not own it."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        # Programs find their buffers at the same few addresses call after call.  A view owns
        # nothing and holds no values, so that an old one is as good as a new one.
        self.operand = functools.lru_cache(maxsize=4096)(self._operand)

    def array(self, buffer: Buffer, writable: bool = False) -> Array:
        import cupy

        item = buffer.dtype.itemsize
        memory = cupy.cuda.UnownedMemory(buffer.pointer, buffer.size * item, None, self.ordinal)
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        return cupy.ndarray(buffer.shape, np.dtype(f"u{item}"), pointer).view(buffer.dtype)

    def _operand(self, data: Buffer, scales: Buffer, granularity: Granularity) -> ScaledTensor:
        layout = self.array(scales)
        if granularity[0] == 1:
            layout = _rows_fastest(layout, data.shape[-2])
        return ScaledTensor(self.array(data), layout, granularity)  # never copies, unlike the host


_device = functools.cache(_Device)


def _ordinal(pointer: int) -> int:
    """CUDA's number of the device that memory lies on.

    XLA counts the devices that it may use, which need not be all.  The driver is asked, because
    CUDA's runtime would take up the first device on a thread that has none yet.
    """
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, ordinal = driver.cuPointerGetAttribute(attribute, pointer)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"XLA: gives an address that CUDA does not know, {pointer:#x} ({status})")
    return int(ordinal)


def _on_device(run: Callable[[Call, _Place], None]) -> Callable[[Call], None]:
    def handle(call: Call) -> None:
        filled = [result.pointer for result in call.results if result.size]
        if not filled:
            return
        try:
            import cupy
        except ImportError as error:
            raise MissingDependencyError(
                "cupy: running a kernel needs it; it cannot be imported. "
                'Run: pip install "cpgemm[cuda12]" (or cuda13).'
            ) from error
        ordinal = _ordinal(filled[0])
        with cupy.cuda.Device(ordinal), external_stream(call.stream):
            run(call, _device(ordinal))

    return handle


# -------------------------------------------------------------------------------------- the table


def handlers() -> Iterator[tuple[str, str, Handler]]:
    """Name, platform and handler of every custom call; the same handlers each time."""
    for name, run in ((QUANTIZE, _quantize), (GEMM, _gemm), (GROUPED_GEMM, _grouped_gemm)):
        yield name, "cpu", target(name, "cpu", _on_host(run))
        yield name, "CUDA", target(name, "CUDA", _on_device(run))
