"""``ScaledTensor``: e4m3 data together with its scales, and the layout rules that both obey.

A scaled tensor stands for the real values ``data[r, k] * scale of the block that holds (r, k)``.
What a block is says ``granularity``, a pair (rows, columns):

==============  ==============================  ===================================================
granularity     logical shape of the scales     memory layout of the scales
==============  ==============================  ===================================================
``(1, 128)``    ``(..., R, ceil(K/128))``       rows-fastest: 4 bytes between rows, a pitch that is
                                                a multiple of 4 floats between k-blocks, base
                                                aligned to 16 bytes (what TMA reads)
``(128, 128)``  ``(..., ceil(R/128),            row-major, contiguous
                ceil(K/128))``
``(128, 1)``    ``(..., ceil(R/128), K)``       the transpose of ``(1, 128)``
==============  ==============================  ===================================================

Nothing here launches a kernel of ours, and nothing looks at values on a device: all checks are
about types, shapes and strides.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from cpgemm.errors import ArgumentTypeError, reject

__all__ = [
    "BLOCK",
    "FP8",
    "GRANULARITIES",
    "SCALE_FORMATS",
    "ScaledTensor",
    "array_module",
    "byte_range",
    "check_granularity",
    "check_scale_format",
    "device_of",
    "empty_codes",
    "empty_scales",
    "fp8_view",
    "is_array",
    "is_cupy",
    "pointer",
    "scale_pitch",
    "scale_shape",
]

# NumPy's stubs know nothing of ml_dtypes or CuPy, so that a precise array type would only be noise.
Array = Any
Granularity = tuple[int, int]
ScaleFormat = Literal["float32", "pow2"]

BLOCK = 128
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
GRANULARITIES: tuple[Granularity, ...] = ((1, BLOCK), (BLOCK, BLOCK), (BLOCK, 1))
SCALE_FORMATS: tuple[str, ...] = ("float32", "pow2")

_ALIGNMENT = 16  # bytes; TMA's rule for addresses and pitches
_DEQUANTIZED = tuple(
    np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
)
_CHUNK = 1 << 18  # elements that dequantize works on at a time, so that temporaries stay in cache


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
    raw = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -pointer(raw) % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(tuple(shape))


def empty_codes(shape: Sequence[int], xp: Any = np) -> Array:
    """Uninitialised float8_e4m3fn array, contiguous along the last axis, rows 16-byte aligned.

    The row pitch is the last extent rounded up to 16 bytes; ``shape`` has two or three axes.
    """
    *outer, columns = shape
    pitch = -(-columns // _ALIGNMENT) * _ALIGNMENT
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
    if pointer(scales) % _ALIGNMENT or (rows > 1 and row_stride != 4):
        return False
    if kblocks > 1 and (block_stride % _ALIGNMENT or block_stride < 4 * rows):
        return False
    inner = (kblocks - 1) * block_stride + 4 * rows
    return _groups_apart(scales, inner) and (
        scales.ndim == 2 or scales.shape[0] < 2 or scales.strides[0] % _ALIGNMENT == 0
    )


def _is_row_major(scales: Array) -> bool:
    return bool(scales.flags.c_contiguous) and pointer(scales) % 4 == 0


def _groups_apart(array: Array, inner: int) -> bool:
    """Whether the groups of a 3-D array, ``inner`` bytes long each, follow one another."""
    return array.ndim == 2 or array.shape[0] < 2 or array.strides[0] >= inner


def _scales_in_layout(scales: Array, granularity: Granularity) -> bool:
    if granularity == (1, BLOCK):
        return _is_rows_fastest(scales)
    if granularity == (BLOCK, 1):
        return _is_rows_fastest(scales.swapaxes(-1, -2))
    return _is_row_major(scales)


def _is_k_contiguous(data: Array) -> bool:
    """Rows contiguous, following one another without overlap."""
    rows, columns = data.shape[-2:]
    row_stride, column_stride = data.strides[-2:]
    item = data.itemsize
    if data.size == 0:
        return True
    if (columns > 1 and column_stride != item) or (rows > 1 and row_stride < columns * item):
        return False
    last_row = (rows - 1) * row_stride if rows > 1 else 0
    return _groups_apart(data, last_row + columns * item)


# ---------------------------------------------------------------------------------- validation


def check_granularity(granularity: object) -> Granularity:
    """The pair as a tuple of ints; ``ArgumentError`` unless it is one of ``GRANULARITIES``."""
    pair = tuple(granularity) if isinstance(granularity, (tuple, list)) else granularity
    if pair not in GRANULARITIES:
        reject(
            "granularity",
            "must be (1, 128), (128, 128) or (128, 1)",
            repr(granularity),
            "Give the rows and columns that share one scale.",
        )
    return (int(pair[0]), int(pair[1]))


def check_scale_format(scale_format: object) -> None:
    """``ArgumentError`` unless the format is one of ``SCALE_FORMATS``."""
    if scale_format not in SCALE_FORMATS:
        reject(
            "scale_format",
            "must be 'float32' or 'pow2'",
            repr(scale_format),
            "Say 'float32' for scales that may be any float32 number.",
        )


def _check_data(data: Array) -> None:
    if not is_array(data):
        reject(
            "data",
            "must be a NumPy or a CuPy array",
            type(data).__qualname__,
            "Convert it, for example with numpy.asarray or cupy.from_dlpack.",
            kind=ArgumentTypeError,
        )
    if data.dtype != FP8:
        reject(
            "data",
            "must have dtype float8_e4m3fn",
            data.dtype,
            "Quantise float values with cpgemm.quantize; give uint8 codes to "
            "ScaledTensor.from_arrays.",
            kind=ArgumentTypeError,
        )
    if data.ndim not in (2, 3):
        reject(
            "data",
            "must have 2 axes (rows, K) or 3 axes (groups, rows, K)",
            f"{data.ndim} axes, shape {data.shape}",
            "Reshape it.",
        )
    if not (_is_k_contiguous(data) or _is_k_contiguous(data.swapaxes(-1, -2))):
        reject(
            "data",
            "must be contiguous along one of its last two axes, without overlap",
            f"shape {data.shape} with strides {data.strides}",
            "Copy it, for example with numpy.ascontiguousarray.",
        )


def _check_scales(data: Array, scales: Array, granularity: Granularity) -> None:
    if not is_array(scales):
        reject(
            "scales",
            "must be a NumPy or a CuPy array",
            type(scales).__qualname__,
            "Convert it, for example with numpy.asarray or cupy.from_dlpack.",
            kind=ArgumentTypeError,
        )
    if scales.dtype != np.float32:
        reject(
            "scales",
            "must have dtype float32",
            scales.dtype,
            "Convert them with astype(numpy.float32).",
            kind=ArgumentTypeError,
        )
    if device_of(scales) != device_of(data):
        reject(
            "scales",
            f"must be where data is ({device_of(data)})",
            device_of(scales),
            "Move one of them, for example with cupy.asarray or .get().",
        )
    wanted = scale_shape(data.shape, granularity)
    if tuple(scales.shape) != wanted:
        reject(
            "scales",
            f"must have shape {wanted} for data of shape {tuple(data.shape)} "
            f"and granularity {granularity}",
            f"shape {tuple(scales.shape)}",
            "Give one scale for each block, short last blocks included.",
        )


# ------------------------------------------------------------------------------ the class itself


@dataclass(frozen=True, eq=False, repr=False)
class ScaledTensor:
    """e4m3 data with one float32 scale for each block.

    ``data``: float8_e4m3fn, shape (R, K), or (G, R, K) for G groups; contiguous along one of the
    last two axes.  ``scales``: float32, in the layout of this module's table; a (128, 128) tensor
    may also hold the transpose of that layout, which is what ``.T`` makes.  ``scale_format``
    ("float32" or "pow2") says how the scales were chosen; their values are not checked.

    The arrays must be of one kind and on one device.  Every broken rule raises ``ArgumentError``
    or ``ArgumentTypeError``.  ``from_arrays`` is the lenient way in: it brings scales into layout.
    """

    data: Array
    scales: Array
    granularity: Granularity
    scale_format: ScaleFormat = "float32"

    def __post_init__(self) -> None:
        _check_data(self.data)
        granularity = check_granularity(self.granularity)
        check_scale_format(self.scale_format)
        _check_scales(self.data, self.scales, granularity)
        object.__setattr__(self, "granularity", granularity)
        flipped = granularity == (BLOCK, BLOCK) and _is_row_major(self.scales.swapaxes(-1, -2))
        if not (flipped or _scales_in_layout(self.scales, granularity)):
            layout = "row-major and contiguous"
            if granularity != (BLOCK, BLOCK):
                layout = "rows-fastest with a 16-byte aligned base and pitch"
                layout = layout if granularity == (1, BLOCK) else f"the transpose of {layout}"
            reject(
                "scales",
                f"must be {layout} for granularity {granularity}",
                f"shape {self.scales.shape} with strides {self.scales.strides}",
                "ScaledTensor.from_arrays copies them into that layout.",
            )

    @classmethod
    def from_arrays(
        cls,
        data: Array,
        scales: Array,
        granularity: Granularity,
        *,
        scale_format: ScaleFormat = "float32",
    ) -> ScaledTensor:
        """Wrap existing NumPy or CuPy arrays.

        ``data`` is float8_e4m3fn, or uint8 codes, which are viewed; it is never copied.  ``scales``
        is float32 of the logical shape; it is copied only when it is not yet in the layout that
        ``granularity`` asks for, otherwise it is shared.  Raises what the constructor raises.
        """
        if is_array(data) and data.dtype == np.uint8:
            data = fp8_view(data)
        _check_data(data)
        pair = check_granularity(granularity)
        check_scale_format(scale_format)
        _check_scales(data, scales, pair)
        if not _scales_in_layout(scales, pair):
            scales = _relaid(scales, pair)
        return cls(data, scales, pair, scale_format)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the data, (R, K) or (G, R, K)."""
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        """2, or 3 for groups."""
        return int(self.data.ndim)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:<ordinal>"``."""
        return device_of(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales, padding not counted."""
        return int(self.data.nbytes) + int(self.scales.nbytes)

    @property
    def is_k_major(self) -> bool:
        """Whether ``k_major`` would return this very tensor."""
        return self._data_is_k_major() and _scales_in_layout(self.scales, self.granularity)

    @property
    def scales_pitch(self) -> int:
        """Floats between two neighbours along the slow axis of the scales.

        (1, 128): between k-blocks, a multiple of 4.  (128, 1): between row blocks, likewise.
        (128, 128): between rows of blocks (between columns of blocks for the transposed layout).
        An axis of extent 1 has no neighbours; the pitch of a fresh allocation is given then.
        """
        rows, kblocks = self.scales.shape[-2:]
        if self.granularity == (BLOCK, BLOCK):
            return int(kblocks if _is_row_major(self.scales) else rows)
        fast, slow = (-2, -1) if self.granularity == (1, BLOCK) else (-1, -2)
        if self.scales.shape[slow] > 1 and self.scales.size:
            return int(self.scales.strides[slow]) // 4
        return scale_pitch(self.scales.shape[fast])

    @property
    def T(self) -> ScaledTensor:
        """The last two axes swapped in data, scales and granularity; shares memory."""
        return ScaledTensor(
            self.data.swapaxes(-1, -2),
            self.scales.swapaxes(-1, -2),
            (self.granularity[1], self.granularity[0]),
            self.scale_format,
        )

    def k_major(self) -> ScaledTensor:
        """The same tensor with its data contiguous along the last axis.

        This is the explicit transposing copy: Hopper's FP8 tensor cores read both operands along K.
        Base address, row pitch and group pitch of the result are multiples of 16 bytes and its
        scales are in the layout of this module's table.  Only what is not so yet is copied; when
        nothing is, the tensor itself is returned.
        """
        if self.is_k_major:
            return self
        data, scales = self.data, self.scales
        if not self._data_is_k_major():
            data = empty_codes(self.shape, array_module(data))
            # As bytes, because CuPy has no copy kernels for FP8.
            data.view(np.uint8)[...] = self.data.view(np.uint8)
        if not _scales_in_layout(scales, self.granularity):
            scales = _relaid(scales, self.granularity)
        return ScaledTensor(data, scales, self.granularity, self.scale_format)

    def dequantize(self, dtype: Any = np.float32) -> Array:
        """The values that this tensor stands for, as a new C-contiguous array of ``shape``.

        ``dtype``: float32 (each value is the float32 product of code and scale), float64 (the exact
        product), float16 or bfloat16 (the float32 product, rounded once more).
        """
        try:
            target = np.dtype(dtype)
        except TypeError:
            target = np.dtype(object)
        if target not in _DEQUANTIZED:
            reject(
                "dtype",
                "must be float32, float64, float16 or bfloat16",
                repr(dtype),
                "Dequantise to float32 and convert from there.",
                kind=ArgumentTypeError,
            )
        xp = array_module(self.data)
        if self.granularity == (BLOCK, 1):
            return xp.ascontiguousarray(self.T.dequantize(target).swapaxes(-1, -2))
        out = xp.empty(self.shape, dtype=target)
        work = np.float64 if target == np.float64 else np.float32
        table = xp.asarray(np.arange(256, dtype=np.uint8).view(FP8).astype(work))
        rows, columns = self.shape[-2:]
        # A GPU takes a group in one go, the CPU by pieces that stay in its cache.
        step = max(rows, 1) if xp is not np else max(_CHUNK // max(columns, 1), 1)
        for group in np.ndindex(*self.shape[:-2]):
            codes, scales = self.data[group].view(np.uint8), self.scales[group]
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                block_row = xp.arange(start, stop) // self.granularity[0]
                values = table[codes[start:stop]]
                _scale_blocks(values, scales[block_row].astype(work))
                out[group][start:stop] = values
        return out

    def _data_is_k_major(self) -> bool:
        data = self.data
        if data.size == 0:
            return True
        aligned = pointer(data) % _ALIGNMENT == 0 and all(
            stride % _ALIGNMENT == 0
            for extent, stride in zip(data.shape[:-1], data.strides[:-1], strict=True)
            if extent > 1
        )
        return aligned and _is_k_contiguous(data)

    def __repr__(self) -> str:
        order = "K-major" if self.is_k_major else "not K-major"
        return (
            f"ScaledTensor(shape={self.shape}, granularity={self.granularity}, "
            f"scale_format={self.scale_format!r}, device={self.device!r}, {order})"
        )


def _relaid(scales: Array, granularity: Granularity) -> Array:
    """A copy of ``scales`` in the layout that ``granularity`` asks for."""
    groups = scales.shape[0] if scales.ndim == 3 else None
    copy = empty_scales(
        scales.shape[-2], scales.shape[-1], granularity, array_module(scales), groups=groups
    )
    copy[...] = scales
    return copy


def _scale_blocks(values: Array, scales: Array) -> None:
    """Multiply (R, K) values in place by (R, ceil(K/128)) scales, one for 128 columns each."""
    whole = values.shape[1] // BLOCK * BLOCK
    if whole:
        blocks = values[:, :whole].reshape(values.shape[0], -1, BLOCK)  # splits an axis: a view
        blocks *= scales[:, : whole // BLOCK, None]
    if whole < values.shape[1]:
        values[:, whole:] *= scales[:, -1:]
