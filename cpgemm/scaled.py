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

Arrays are NumPy's or CuPy's inside; ``from_arrays`` takes those of torch, JAX and any DLPack
producer too and remembers whose they were, so that results can be of the same kind.

Nothing here launches a kernel of ours, and nothing looks at values on a device: all checks are
about types, shapes and strides.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from cpgemm.dlpack import Framework, as_framework, as_native, framework_of, to_jax, to_torch
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import (
    ALIGNMENT,
    BLOCK,
    FP8,
    GRANULARITIES,
    SCALE_FORMATS,
    Array,
    Granularity,
    ScaleFormat,
    array_module,
    byte_range,
    device_of,
    empty_codes,
    empty_scales,
    fp8_view,
    is_array,
    is_cupy,
    is_k_contiguous,
    is_row_major,
    pointer,
    relaid,
    scale_pitch,
    scale_shape,
    scales_in_layout,
)
from cpgemm.scaled_rules import (
    check_data,
    check_granularity,
    check_scale_format,
    check_scales,
)
from cpgemm.streams import allocator, working_stream

__all__ = [
    "BLOCK",
    "FP8",
    "GRANULARITIES",
    "SCALE_FORMATS",
    "Array",
    "Granularity",
    "ScaleFormat",
    "ScaledTensor",
    "array_module",
    "byte_range",
    "check_granularity",
    "check_scale_format",
    "device_of",
    "empty_codes",
    "empty_scaled",
    "empty_scales",
    "fp8_view",
    "is_array",
    "is_cupy",
    "pointer",
    "require_scaled",
    "scale_pitch",
    "scale_shape",
]

_DEQUANTIZED = tuple(
    np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
)
_CHUNK = 1 << 18  # elements that dequantize works on at a time, so that temporaries stay in cache


@functools.lru_cache(maxsize=8192)
def _token(*_numbers: Hashable) -> object:
    """One object for equal numbers: every call hashes it anew, and an object hashes at once."""
    return object()


@dataclass(frozen=True, eq=False, repr=False)
class ScaledTensor:
    """e4m3 data with one float32 scale for each block.

    ``data``: float8_e4m3fn, shape (R, K), or (G, R, K) for G groups; contiguous along one of the
    last two axes.  ``granularity``: the (rows, columns) of a block.  ``scales``: float32,

    - (1, 128): (..., R, ceil(K/128)), rows-fastest: 4 bytes between rows, between k-blocks a pitch
      that is a multiple of 4 floats, address a multiple of 16 bytes;
    - (128, 128): (..., ceil(R/128), ceil(K/128)), row-major, or the transpose, which ``.T`` makes;
    - (128, 1): (..., ceil(R/128), K), the transpose of (1, 128).

    ``scale_format`` ("float32" or "pow2") says how the scales were chosen; their values are not
    checked.

    ``framework`` says whose arrays these are views of ("numpy", "cupy", "torch", "jax" or
    "dlpack"): functions return their results as such arrays, and work on torch tensors goes to
    torch's current stream, all other work to CuPy's.

    The arrays must be of one kind and on one device.  Every broken rule raises ``ArgumentError``
    or ``ArgumentTypeError``.  ``from_arrays`` is the lenient way in: it takes the arrays of other
    libraries and brings scales into layout.
    """

    data: Array
    scales: Array
    granularity: Granularity
    scale_format: ScaleFormat = "float32"
    framework: Framework = ""  # type: ignore[assignment]  # that of data

    def __post_init__(self) -> None:
        check_data(self.data)
        granularity = check_granularity(self.granularity)
        check_scale_format(self.scale_format)
        check_scales(self.data, self.scales, granularity)
        object.__setattr__(self, "granularity", granularity)
        if not self.framework:
            object.__setattr__(self, "framework", framework_of(self.data))
        flipped = granularity == (BLOCK, BLOCK) and is_row_major(self.scales.swapaxes(-1, -2))
        if not (flipped or scales_in_layout(self.scales, granularity)):
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
        data: Any,
        scales: Any,
        granularity: Granularity,
        *,
        scale_format: ScaleFormat = "float32",
    ) -> ScaledTensor:
        """Wrap existing arrays: NumPy, CuPy, torch, JAX, or of any DLPack producer.

        ``data`` is float8_e4m3fn, or uint8 codes, which are viewed; it is never copied.  ``scales``
        is float32 of the logical shape; it is copied only when it is not yet in the layout that
        ``granularity`` asks for, otherwise it is shared.  Raises what the constructor and
        ``dlpack.as_native`` raise.
        """
        framework = framework_of(data)
        data, scales = as_native("data", data), as_native("scales", scales)
        if data.dtype == np.uint8:
            data = fp8_view(data)
        check_data(data)
        pair = check_granularity(granularity)
        check_scale_format(scale_format)
        check_scales(data, scales, pair)
        assert framework is not None, "as_native takes no other"
        if not scales_in_layout(scales, pair):
            with _working(data, framework):
                scales = relaid(scales, pair, allocator(framework, data))
        return cls.of_checked(data, scales, pair, scale_format, framework)

    @classmethod
    def of_checked(
        cls,
        data: Array,
        scales: Array,
        granularity: Granularity,
        scale_format: ScaleFormat,
        framework: Framework,
    ) -> ScaledTensor:
        """The tensor of arrays that obey every rule: it stands on the path of every layer."""
        tensor = object.__new__(cls)
        tensor.__dict__.update(
            data=data, scales=scales, granularity=granularity, scale_format=scale_format,
            framework=framework,
        )  # fmt: skip
        return tensor

    def to_torch(self) -> tuple[Any, Any]:
        """Data (torch.float8_e4m3fn) and scales (torch.float32) as tensors on the same memory."""
        return to_torch(self.data), to_torch(self.scales)

    def to_jax(self) -> tuple[Any, Any]:
        """Data (float8_e4m3fn) and scales (float32) as JAX arrays.

        They share memory, except that JAX copies arrays of the CPU whose address or strides it
        cannot take.  JAX takes its arrays to be immutable: do not write to the memory afterwards.
        """
        with _working(self.data, self.framework):
            return to_jax(self.data), to_jax(self.scales)

    @cached_property
    def signature(self) -> Hashable:
        """Stands for all that rules about this operand look at; None on the CPU.

        Operands with equal signatures are interchangeable to a prepared launch (``calls``).
        """
        if not is_cupy(self.data):
            return None
        data, scales = self.data, self.scales
        return _token(
            data.data.ptr, data.shape, data.strides, scales.data.ptr, scales.shape, scales.strides,
            data.data.device_id, self.granularity, self.framework,
        )  # fmt: skip

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
        return self._data_is_k_major() and scales_in_layout(self.scales, self.granularity)

    @property
    def scales_pitch(self) -> int:
        """Floats between two neighbours along the slow axis of the scales.

        (1, 128): between k-blocks, a multiple of 4.  (128, 1): between row blocks, likewise.
        (128, 128): between rows of blocks (between columns of blocks for the transposed layout).
        An axis of extent 1 has no neighbours; the pitch of a fresh allocation is given then.
        """
        rows, kblocks = self.scales.shape[-2:]
        if self.granularity == (BLOCK, BLOCK):
            return int(kblocks if is_row_major(self.scales) else rows)
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
            self.framework,
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
        with _working(data, self.framework):
            memory = allocator(self.framework, data)
            if not self._data_is_k_major():
                data = empty_codes(self.shape, memory)
                # As bytes, because CuPy has no copy kernels for FP8.
                data.view(np.uint8)[...] = self.data.view(np.uint8)
            if not scales_in_layout(scales, self.granularity):
                scales = relaid(scales, self.granularity, memory)
        return ScaledTensor(data, scales, self.granularity, self.scale_format, self.framework)

    def dequantize(self, dtype: Any = np.float32) -> Any:
        """The values that this tensor stands for, as a new C-contiguous array of ``framework``.

        ``dtype``: float32 (each value is the float32 product of code and scale), float64 (the exact
        product), float16 or bfloat16 (the float32 product, rounded once more).  What exceeds the
        dtype is infinite: in float32 that can be magnitudes within 1/32 of its largest number.
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
        with _working(self.data, self.framework):
            return as_framework(self.framework, self._dequantized(target))

    def _dequantized(self, target: np.dtype[Any]) -> Array:
        xp = array_module(self.data)
        if self.granularity == (BLOCK, 1):
            return xp.ascontiguousarray(self.T._dequantized(target).swapaxes(-1, -2))
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
                with np.errstate(over="ignore"):  # as on a GPU
                    _scale_blocks(values, scales[block_row].astype(work))
                    out[group][start:stop] = values
        return out

    def _data_is_k_major(self) -> bool:
        data = self.data
        if data.size == 0:
            return True
        aligned = pointer(data) % ALIGNMENT == 0 and all(
            stride % ALIGNMENT == 0
            for extent, stride in zip(data.shape[:-1], data.strides[:-1], strict=True)
            if extent > 1
        )
        return aligned and is_k_contiguous(data)

    def _repr_html_(self) -> str:
        from cpgemm.displays.tensor import tensor_html

        return tensor_html(self)

    def __repr__(self) -> str:
        order = "K-major" if self.is_k_major else "not K-major"
        return (
            f"ScaledTensor(shape={self.shape}, granularity={self.granularity}, "
            f"scale_format={self.scale_format!r}, device={self.device!r}, "
            f"framework={self.framework!r}, {order})"
        )


def _working(data: Array, framework: Framework) -> contextlib.AbstractContextManager[None]:
    """Device and stream of the framework's own work; nothing to do on the CPU."""
    if not is_cupy(data):
        return contextlib.nullcontext()
    return working_stream(framework, data.data.device_id)


def empty_scaled(
    shape: tuple[int, ...],
    granularity: Granularity,
    scale_format: ScaleFormat,
    framework: Framework,
    like: Array,
) -> ScaledTensor:
    """Room for (R, K) or (G, R, K) values where ``like`` is, in memory of the framework's own."""
    rows, kblocks = scale_shape(shape, granularity)[-2:]
    groups = shape[0] if len(shape) == 3 else None
    with like.device if is_cupy(like) else contextlib.nullcontext():
        memory = allocator(framework, like)
        scales = empty_scales(rows, kblocks, granularity, memory, groups=groups)
        codes = empty_codes(shape, memory)
    return ScaledTensor.of_checked(codes, scales, granularity, scale_format, framework)


def require_scaled(name: str, value: object, mend: str) -> ScaledTensor:
    """``value`` when it is a ``ScaledTensor``; otherwise ``ArgumentTypeError`` for ``name``."""
    if isinstance(value, ScaledTensor):
        return value
    kind = type(value).__qualname__
    reject(name, "must be a ScaledTensor", kind, mend, kind=ArgumentTypeError)


def _scale_blocks(values: Array, scales: Array) -> None:
    """Multiply (R, K) values in place by (R, ceil(K/128)) scales, one for 128 columns each."""
    whole = values.shape[1] // BLOCK * BLOCK
    if whole:
        blocks = values[:, :whole].reshape(values.shape[0], -1, BLOCK)  # splits an axis: a view
        blocks *= scales[:, : whole // BLOCK, None]
    if whole < values.shape[1]:
        values[:, whole:] *= scales[:, -1:]
