"""Rules for a ``ScaledTensor``, for what becomes one and for operands by shape, with messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import (
    FP8,
    GRANULARITIES,
    SCALE_FORMATS,
    Array,
    Granularity,
    device_of,
    is_array,
    is_k_contiguous,
    scale_shape,
)

__all__ = [
    "check_axes",
    "check_block_axis",
    "check_data",
    "check_granularity",
    "check_operand_shapes",
    "check_scale_format",
    "check_scales",
]


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


def check_axes(name: str, shape: Sequence[int]) -> None:
    """A matrix or groups of them."""
    if len(shape) not in (2, 3):
        reject(
            name,
            "must have 2 axes (rows, K) or 3 axes (groups, rows, K)",
            f"{len(shape)} axes, shape {tuple(shape)}",
            "Reshape it.",
        )


def check_block_axis(extent: int) -> None:
    """Values of ``x``, which is to be quantised, along the axis whose blocks have 128."""
    if extent % 16:
        reject(
            "x",
            "its extent along the 128 values that share a scale must be a multiple of 16",
            extent,
            "Pad it with zeros.",
        )


def check_operand_shapes(
    names: tuple[str, str],
    a_shape: Sequence[int],
    b_shape: Sequence[int],
    a_form: str,
    b_form: str,
) -> None:
    """Data of both operands, as other libraries' operators take them.

    ``names``: what messages call them.  The forms are what they must look like, like "(M, K)".
    """
    for name, shape, form in zip(names, (a_shape, b_shape), (a_form, b_form), strict=True):
        axes = form.count(",") + 1
        if len(shape) != axes:
            reject(name, f"must have {axes} axes {form}", f"shape {tuple(shape)}", "Reshape it.")
    a, b = names
    if a_shape[-1] != b_shape[-1]:
        reject(
            b,
            f"must have as many columns (K) as {a}, {a_shape[-1]}",
            f"shape {tuple(b_shape)}",
            f"Both operands are K-last: give it as {b_form}.",
        )
    if a_shape[-1] % 16:
        mend = "Pad the values with zeros along K before quantising."
        reject(a, "K must be a multiple of 16", a_shape[-1], mend)
    if b_shape[-2] % 8:
        reject(b, "N must be a multiple of 8", b_shape[-2], "Pad it with zero rows.")


def check_data(data: Array) -> None:
    """Codes: kind, dtype, axes, contiguity."""
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
    check_axes("data", data.shape)
    if not (is_k_contiguous(data) or is_k_contiguous(data.swapaxes(-1, -2))):
        reject(
            "data",
            "must be contiguous along one of its last two axes, without overlap",
            f"shape {data.shape} with strides {data.strides}",
            "Copy it, for example with numpy.ascontiguousarray.",
        )


def check_scales(data: Array, scales: Array, granularity: Granularity) -> None:
    """Scales: kind, dtype, device, shape; their layout is the tensor's business."""
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
