"""Arrays of either kind, and how codes and scales lie in memory.

The layouts are those of the table in ``cpgemm.scaled``.  Everything here is about types, shapes and
strides; nothing looks at values, and CuPy is never imported for a NumPy user.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

# NumPy's stubs know nothing of ml_dtypes or CuPy, so that a precise array type would only be noise.
Array = Any
Granularity = tuple[int, int]
ScaleFormat = Literal["float32", "pow2"]

BLOCK = 128
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
GRANULARITIES: tuple[Granularity, ...] = ((1, BLOCK), (BLOCK, BLOCK), (BLOCK, 1))
SCALE_FORMATS: tuple[str, ...] = ("float32", "pow2")

ALIGNMENT = 16  # bytes; TMA's rule for addresses and pitches


# ------------------------------------------------------------------------------- array helpers


def is_cupy(x: object) -> bool:
    """Whether ``x`` is a CuPy array; never imports CuPy."""
    cupy = sys.modules.get("cupy")
    kind = getattr(cupy, "ndarray", None)  # None while CuPy itself is being imported
    return kind is not None and isinstance(x, kind)


def is_array(x: object) -> bool:
    """Whether ``x`` is a NumPy or a CuPy array."""
    return isinstance(x, np.ndarray) or is_cupy(x)


def array_module(x: object) -> Any:
    """``cupy`` for a CuPy array, ``numpy`` for everything else."""
    return sys.modules["cupy"] if is_cupy(x) else np


def device_of(x: Array) -> str:
    """``"cpu"`` or ``"cuda:<ordinal>"`` of a NumPy or CuPy array."""
    return f"cuda:{x.device.id}" if is_cupy(x) else "cpu"


def pointer(x: Array) -> int:
    """Address of the first element of a NumPy or CuPy array."""
    return int(x.data.ptr) if is_cupy(x) else int(x.__array_interface__["data"][0])


def byte_range(x: Array) -> tuple[int, int]:
    """First address and one-past-last address that an array's elements span (0, 0 when empty)."""
    if x.size == 0:
        return (0, 0)
    low = high = pointer(x)
    for extent, stride in zip(x.shape, x.strides, strict=True):
        reach = (extent - 1) * stride
        low += min(reach, 0)
        high += max(reach, 0)
    return (low, high + x.itemsize)


def fp8_view(codes: Array) -> Array:
    """A uint8 array of any strides seen as float8_e4m3fn; no copy."""
    return codes.view(FP8)


def _aligned_empty(shape: Sequence[int], dtype: Any, xp: Any) -> Array:
    """C-contiguous uninitialised array whose base is aligned to 16 bytes."""
    if xp is not np:
        return xp.empty(tuple(shape), dtype=dtype)  # CuPy allocates in units of 512 bytes
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -pointer(raw) % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(tuple(shape))


def empty_codes(shape: Sequence[int], xp: Any = np) -> Array:
    """Uninitialised float8_e4m3fn array, contiguous along the last axis, rows 16-byte aligned.

    The row pitch is the last extent rounded up to 16 bytes; ``shape`` has two or three axes.
    """
    *outer, columns = shape
    pitch = -(-columns // ALIGNMENT) * ALIGNMENT
    return fp8_view(_aligned_empty((*outer, pitch), np.uint8, xp)[..., :columns])


# ------------------------------------------------------------------------------- scale layouts


def scale_shape(shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """Logical shape of the scales of data of ``shape`` (..., R, K)."""
    *outer, rows, columns = shape
    return (*outer, -(-rows // granularity[0]), -(-columns // granularity[1]))


def scale_pitch(rows: int) -> int:
    """Floats between two k-blocks of rows-fastest scales: ``rows`` rounded up to 4."""
    return -(-rows // 4) * 4


def empty_scales(
    rows: int, kblocks: int, granularity: Granularity, xp: Any = np, *, groups: int | None = None
) -> Array:
    """Uninitialised float32 scales in the layout that ``granularity`` asks for.

    ``rows`` and ``kblocks`` are the last two extents that ``scale_shape`` gives; ``groups`` is the
    leading extent of three-dimensional data, None for two dimensions.  ``xp`` is the array module.
    """
    outer = () if groups is None else (groups,)
    if granularity == (BLOCK, 1):
        return empty_scales(kblocks, rows, (1, BLOCK), xp, groups=groups).swapaxes(-1, -2)
    if granularity == (BLOCK, BLOCK):
        return _aligned_empty((*outer, rows, kblocks), np.float32, xp)
    storage = _aligned_empty((*outer, kblocks, scale_pitch(rows)), np.float32, xp)
    return storage[..., :rows].swapaxes(-1, -2)


def _is_rows_fastest(scales: Array) -> bool:
    rows, kblocks = scales.shape[-2:]
    row_stride, block_stride = scales.strides[-2:]
    if scales.size == 0:
        return True
    if pointer(scales) % ALIGNMENT or (rows > 1 and row_stride != 4):
        return False
    if kblocks > 1 and (block_stride % ALIGNMENT or block_stride < 4 * rows):
        return False
    inner = (kblocks - 1) * block_stride + 4 * rows
    return _groups_apart(scales, inner) and (
        scales.ndim == 2 or scales.shape[0] < 2 or scales.strides[0] % ALIGNMENT == 0
    )


def is_row_major(scales: Array) -> bool:
    """Whether scales are C-contiguous."""
    return bool(scales.flags.c_contiguous) and pointer(scales) % 4 == 0


def _groups_apart(array: Array, inner: int) -> bool:
    """Whether the groups of a 3-D array, ``inner`` bytes long each, follow one another."""
    return array.ndim == 2 or array.shape[0] < 2 or array.strides[0] >= inner


def scales_in_layout(scales: Array, granularity: Granularity) -> bool:
    """Whether scales are as ``empty_scales`` lays them out, a larger pitch allowed."""
    if granularity == (1, BLOCK):
        return _is_rows_fastest(scales)
    if granularity == (BLOCK, 1):
        return _is_rows_fastest(scales.swapaxes(-1, -2))
    return is_row_major(scales)


def is_k_contiguous(data: Array) -> bool:
    """Whether rows are contiguous and follow one another without overlap."""
    rows, columns = data.shape[-2:]
    row_stride, column_stride = data.strides[-2:]
    item = data.itemsize
    if data.size == 0:
        return True
    if (columns > 1 and column_stride != item) or (rows > 1 and row_stride < columns * item):
        return False
    last_row = (rows - 1) * row_stride if rows > 1 else 0
    return _groups_apart(data, last_row + columns * item)


def relaid(scales: Array, granularity: Granularity, xp: Any) -> Array:
    """A copy of ``scales`` in the layout that ``granularity`` asks for, in memory of ``xp``."""
    groups = scales.shape[0] if scales.ndim == 3 else None
    copy = empty_scales(scales.shape[-2], scales.shape[-1], granularity, xp, groups=groups)
    copy[...] = scales
    return copy
