"""Quantising float arrays to e4m3 with fine-grained scales, on CPU and GPU with identical bits.

For each block (what ``granularity`` says, see ``cpgemm.scaled``), in float32 with IEEE operations:

1. ``amax`` = largest magnitude of the block's *finite* elements, raised to at least 2**-96 unless
   it is 0.  (The bound keeps scale and inverse normal numbers.)
2. A block without a finite element other than 0 gets scale 1 and inverse 1.  Otherwise:
   ``"float32"``: scale = amax / 448, inverse = 448 / amax, each rounded once.
   ``"pow2"``: scale = 2**e with the smallest integer e such that 2**e >= amax / 448 (exactly, not
   of a rounded quotient), inverse = 2**-e.
3. code = e4m3(x * inverse): the float32 product, rounded to nearest even and saturated at 448.
   NaN and infinities become the code 0x7F (NaN, no sign).  Negative zero stays negative zero.

448 is the largest finite e4m3fn number.  Rounding up may take the largest code times the scale
beyond float32 for magnitudes from 31/32 * 2**128 on; ``dequantize`` to float64 holds them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpgemm.calls import ReadyCalls, signature
from cpgemm.dlpack import Framework, as_native, framework_of
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.launch import PreparedLaunch
from cpgemm.problem import check_scaled_out
from cpgemm.quantize_kernels import INPUT_DTYPES, MAX_GRID_YZ, QuantizeConfig, quantize_sources
from cpgemm.scaled import (
    BLOCK,
    Array,
    Granularity,
    ScaledTensor,
    ScaleFormat,
    array_module,
    empty_scaled,
    is_cupy,
    pointer,
)
from cpgemm.scaled_rules import (
    check_axes,
    check_block_axis,
    check_granularity,
    check_scale_format,
)
from cpgemm.streams import working_stream

if TYPE_CHECKING:
    from cpgemm.render import KernelSource

__all__ = ["QuantizeConfig", "quantize", "quantize_sources"]

_LARGEST_CODE = np.float32(448.0)
_SMALLEST_AMAX = np.float32(2.0**-96)
_NAN_CODE = 0x7F
_INFINITY_BITS = 0x7F800000  # magnitudes from here on are infinity and NaN
_CHUNK = 1 << 18  # elements that the NumPy path works on at a time: a few buffers of 1 MiB
_ALIGNMENT = 16  # bytes that a thread loads at once
_MAX_EXTENT = 1 << 30  # so that a kernel may count rows and columns with 32 bits


# ------------------------------------------------------------------------------------ public face


def quantize(
    x: Array,
    granularity: Granularity = (1, 128),
    *,
    scale_format: ScaleFormat = "float32",
    out: ScaledTensor | None = None,
) -> ScaledTensor:
    """Quantise ``x`` to e4m3 with a scale for each block (docs/numerics.md has the rule).

    ``x``: float32, float16 or bfloat16, an array of NumPy, CuPy, torch, JAX or any DLPack producer,
    shape (R, K) or (G, R, K), rows contiguous (they may be padded), K a multiple of 16, not
    necessarily of 128.  ``granularity`` (1, 128) or (128, 128); (128, 1) quantises columns: R must
    be a multiple of 16 then, and the result is the transpose of a quantised transpose, for which
    ``x`` is copied unless its columns are contiguous.  ``scale_format``: "float32", amax / 448, or
    "pow2", the next power of two.  On a GPU one launch does it, for torch's arrays on torch's
    current stream and into torch's memory, for all others on CuPy's and into CuPy's.

    Returns a ``ScaledTensor`` where ``x`` is; only its data and scales are allocated.  With
    ``out``, a tensor of the same shape, granularity and format, nothing is; ``out`` is filled and
    returned.

    Raises ``ArgumentError`` or ``ArgumentTypeError`` for what breaks a rule, before anything is
    written, and ``DeviceError`` for a GPU other than Hopper.
    """
    pair = check_granularity(granularity)
    check_scale_format(scale_format)
    framework = framework_of(x) or "dlpack"  # as_native refuses what has none
    task = _Task(pair, scale_format, framework, _signed(x))
    made = out is None and task in _seen
    if made:
        out = empty_scaled(tuple(x.shape), pair, scale_format, framework, x)
    if out is not None:
        launch = _ready.get(_key(task, out))
        if launch is not None:
            launch()
            return out
    x = as_native("x", x)
    if framework in ("numpy", "cupy") or not is_cupy(x):
        return _quantize(x, task, out, made)
    with working_stream(framework, x.data.device_id):
        return _quantize(x, task, out, made)


class _Task(NamedTuple):
    """A call but for its result.  ``subject``: signature of x, None where only a view has one."""

    granularity: Granularity
    scale_format: ScaleFormat
    framework: Framework
    subject: Hashable


_ready = ReadyCalls()
_seen: set[_Task] = set()  # those that obey every rule: room for their results can be made first
_MOST_SEEN = 4096


def _signed(array: Any) -> Hashable:
    try:
        return signature(array)
    except RuntimeError:  # torch's, of a tensor without memory: as_native says it better
        return None


def _key(task: _Task, out: Any) -> Hashable:
    """Of a launch; a ScaledTensor's signature says nothing of its scale format."""
    return task, _signed(out), getattr(out, "scale_format", None)


def _quantize(x: Array, task: _Task, out: ScaledTensor | None, made: bool = False) -> ScaledTensor:
    """A call that was not made before.  ``made``: ``out`` was made here, by the rules."""
    pair, scale_format, framework, _ = task
    _check_type(x)
    if out is not None and not made:
        check_scaled_out(out, x.shape, pair, scale_format, {"x": x})
    if pair == (BLOCK, 1):
        check_block_axis(x.shape[-2])
        turned = _with_contiguous_rows(x.swapaxes(-1, -2))
        task = _Task((1, BLOCK), scale_format, framework, None)
        return _quantize(turned, task, None if out is None else out.T).T
    check_block_axis(x.shape[-1])
    _check_rows(x)
    if is_cupy(x):
        return _quantize_on_device(x, task, out)
    result = out if out is not None else empty_scaled(x.shape, pair, scale_format, framework, x)
    for group in np.ndindex(*x.shape[:-2]):
        _quantize_on_host(x[group], result.data[group], result.scales[group], pair, scale_format)
    return result


# ------------------------------------------------------------------------------------- NumPy path


def _quantize_on_host(
    x: Array, data: Array, scales: Array, granularity: Granularity, scale_format: str
) -> None:
    """Quantise a (R, K) array into given arrays, by pieces of rows that stay in cache."""
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    kblocks = -(-columns // BLOCK)
    block_rows = granularity[0]
    step = -(-max(_CHUNK // (kblocks * BLOCK), 1) // block_rows) * block_rows
    # Columns beyond K are zeros: they change no maximum.
    buffer = np.zeros((min(step, rows), kblocks * BLOCK), np.float32)
    scratch = np.empty(buffer.shape, np.uint32)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values, magnitudes = buffer[:count], scratch[:count]
        values[:, :columns] = x[start : start + count]
        amax, not_finite = _largest_magnitudes(values, magnitudes, block_rows)
        scale, inverse = _scales_of(amax, scale_format)
        first = start // block_rows
        scales[first : first + scale.shape[0]] = scale
        by_row = inverse if block_rows == 1 else np.repeat(inverse, block_rows, axis=0)[:count]
        blocked = values.reshape(count, kblocks, BLOCK)
        blocked *= by_row[:, :, None]
        np.clip(values, -_LARGEST_CODE, _LARGEST_CODE, out=values)
        codes = data[start : start + count]
        np.copyto(codes, values[:, :columns], casting="unsafe")
        if not_finite is not None:
            codes.view(np.uint8)[not_finite[:, :columns]] = _NAN_CODE


def _largest_magnitudes(
    values: Array, magnitudes: Array, block_rows: int
) -> tuple[Array, Array | None]:
    """Largest finite magnitude of each block, as float32, and where values are not finite.

    Bits of magnitudes order as the magnitudes do, with infinity and NaN above all: one integer
    maximum finds the largest and whether anything needs care.  Values that are not finite are
    replaced by zeros; the mask is None when there are none.
    """
    np.bitwise_and(values.view(np.uint32), 0x7FFFFFFF, out=magnitudes)
    by_row = magnitudes.reshape(values.shape[0], -1, BLOCK)
    largest = by_row.max(axis=2)
    not_finite = None
    if (largest >= _INFINITY_BITS).any():
        not_finite = magnitudes >= _INFINITY_BITS
        magnitudes[not_finite] = 0
        values[not_finite] = 0.0
        largest = by_row.max(axis=2)
    if block_rows > 1:
        largest = np.maximum.reduceat(largest, np.arange(0, values.shape[0], block_rows), axis=0)
    return largest.view(np.float32), not_finite


def _scales_of(amax: Array, scale_format: str) -> tuple[Array, Array]:
    """Scale and inverse, float32, of each amax (float32, finite)."""
    bounded = np.maximum(amax, _SMALLEST_AMAX)
    if scale_format == "float32":
        scale, inverse = bounded / _LARGEST_CODE, _LARGEST_CODE / bounded
    else:
        # 448 = 1.75 * 2**8: a significand above 1.75 needs the next exponent.  The addition
        # carries into the exponent exactly then.
        exponent = (bounded.view(np.uint32) + np.uint32(0x1FFFFF)) >> np.uint32(23)
        scale = ((exponent - np.uint32(8)) << np.uint32(23)).view(np.float32)
        inverse = ((np.uint32(254 + 8) - exponent) << np.uint32(23)).view(np.float32)
    zero = amax == 0
    scale[zero] = 1.0
    inverse[zero] = 1.0
    return scale, inverse


# -------------------------------------------------------------------------------------- CuPy path


def _quantize_on_device(x: Array, task: _Task, out: ScaledTensor | None) -> ScaledTensor:
    granularity, scale_format, framework, subject = task
    _check_device_layout("x", x)
    if out is not None:
        _check_device_layout("out", out.data)
    if subject is None:
        task = task._replace(subject=signature(x))
    with x.device:
        result = out or empty_scaled(x.shape, granularity, scale_format, framework, x)
        if x.size == 0:
            return result
        key = _key(task, result)
        launch = _ready.get(key)
        if launch is None:
            launch = _prepared(x, task, result)
            _ready.put(key, launch)
        if len(_seen) >= _MOST_SEEN:
            _seen.clear()
        _seen.add(task)
        launch()
    return result


def _prepared(x: Array, task: _Task, result: ScaledTensor) -> PreparedLaunch:
    from cpgemm.compiler import load_kernel

    dtype = next(name for name, kind in INPUT_DTYPES.items() if x.dtype == kind)
    config = QuantizeConfig(task.granularity, dtype, task.scale_format)
    groups = x.shape[0] if x.ndim == 3 else 1
    rows, columns = x.shape[-2:]
    scales = result.scales
    # What a kernel steps through the scales with: k-blocks or rows of blocks, then groups.
    scale_step = scales.strides[-2 if config.by_blocks else -1] // 4
    return PreparedLaunch(
        load_kernel(_source(config)),
        config.grid(groups, rows, columns),
        config.threads,
        [
            np.uint64(pointer(x)),
            np.uint64(pointer(result.data)),
            np.uint64(pointer(scales)),
            np.int32(rows),
            np.int32(columns),
            np.int64(x.strides[-2]),
            np.int64(_group_stride(x)),
            np.int64(result.data.strides[-2]),
            np.int64(_group_stride(result.data)),
            np.int64(scale_step),
            np.int64(_group_stride(scales) // 4),
        ],
        framework="torch" if task.framework == "torch" else "cupy",
    )


@functools.cache
def _source(config: QuantizeConfig) -> KernelSource:
    """The kernel, rendered once in a process."""
    return config.source()


def _group_stride(array: Array) -> int:
    return int(array.strides[0]) if array.ndim == 3 else 0


# ------------------------------------------------------------------------------------- both paths


def _with_contiguous_rows(x: Array) -> Array:
    """``x`` itself when its rows are contiguous, else a copy."""
    if x.shape[-1] < 2 or x.strides[-1] == x.itemsize:
        return x
    # As integers, because those can be copied everywhere.
    bits = x.view(np.uint16 if x.itemsize == 2 else np.uint32)
    return array_module(x).ascontiguousarray(bits).view(x.dtype)


def _check_type(x: Array) -> None:
    if x.dtype not in INPUT_DTYPES.values():
        reject(
            "x",
            "must have dtype float32, float16 or bfloat16",
            x.dtype,
            "Convert it with astype.",
            kind=ArgumentTypeError,
        )
    check_axes("x", x.shape)


def _check_rows(x: Array) -> None:
    if x.size and x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        reject(
            "x",
            "must have contiguous rows",
            f"shape {x.shape} with strides {x.strides}",
            "Copy it with ascontiguousarray, or quantise its transpose.",
        )


def _check_device_layout(argument: str, array: Array) -> None:
    """What the kernels need beyond what NumPy needs."""
    if array.size == 0:
        return
    pitches = [
        stride
        for extent, stride in zip(array.shape[:-1], array.strides[:-1], strict=True)
        if extent > 1
    ]
    if pointer(array) % _ALIGNMENT or any(pitch % _ALIGNMENT for pitch in pitches):
        reject(
            argument,
            "its address and its row and group pitches must be multiples of 16 bytes on a GPU",
            f"address {pointer(array):#x}, pitches {pitches}",
            "Copy it with cupy.ascontiguousarray.",
        )
    if max(array.shape[-2:]) > _MAX_EXTENT or (array.ndim == 3 and array.shape[0] > MAX_GRID_YZ):
        reject(
            argument,
            f"at most {MAX_GRID_YZ} groups of {_MAX_EXTENT} rows and columns on a GPU",
            f"shape {array.shape}",
            "Quantise it by parts.",
        )
