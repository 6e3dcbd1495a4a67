"""Rules that the arguments of several mixture-of-experts helpers share, each with its message."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm import env
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.problem import check_alignment
from cpgemm.quantize_kernels import INPUT_DTYPES
from cpgemm.scaled import (
    Array,
    array_module,
    device_of,
    is_array,
    is_cupy,
    pointer,
)

__all__ = [
    "MAX_EXTENT",
    "check_like",
    "check_numbers",
    "check_rows",
    "check_size",
    "readable_contents",
]

MAX_EXTENT = 1 << 30  # so that kernels may count rows and columns with 32 bits


def check_numbers(name: str, array: Array, ndim: int, dtype: Any = np.int32) -> None:
    """An array of plain numbers: kind, dtype, axes, contiguous."""
    if not is_array(array):
        reject(
            name,
            "must be a NumPy or a CuPy array",
            type(array).__qualname__,
            "Convert it, for example with numpy.asarray or cupy.asarray.",
            kind=ArgumentTypeError,
        )
    if array.dtype != dtype:
        reject(
            name,
            f"must have dtype {np.dtype(dtype)}",
            array.dtype,
            f"Convert it with astype(numpy.{np.dtype(dtype)}).",
            kind=ArgumentTypeError,
        )
    if array.ndim != ndim:
        axes = "axis" if ndim == 1 else "axes"
        reject(name, f"must have {ndim} {axes}", f"shape {tuple(array.shape)}", "Reshape it.")
    if not array.flags.c_contiguous or (array.size and pointer(array) % 4):
        reject(
            name,
            "must be contiguous and 4-byte aligned",
            f"strides {tuple(array.strides)}, address {pointer(array):#x}",
            "Copy it with ascontiguousarray.",
        )


def check_like(name: str, array: Array, other_name: str, other: Array) -> None:
    """Both NumPy, or both CuPy on one device."""
    if device_of(array) != device_of(other):
        reject(
            name,
            f"must be where {other_name} is ({device_of(other)})",
            device_of(array),
            "Move one of them, for example with cupy.asarray or .get().",
        )


def readable_contents(array: Array) -> Array | None:
    """int64 values of an int32 array whose contents shall be checked, None for those on a GPU.

    With ``CPGEMM_CHECK=1`` those are downloaded, which waits and is refused during a capture.
    """
    if is_cupy(array):
        if not env.check():
            return None
        with array.device:
            if array_module(array).cuda.get_current_stream().is_capturing():
                reject(
                    "CPGEMM_CHECK",
                    "must be 0 while a graph is captured, when nothing can be read",
                    "1",
                    "Check a call before the capture, then unset it.",
                )
            array = array.get()
    return array.astype(np.int64)


def check_size(name: str, size: object, least: int, most: int) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
        reject(name, "must be an integer", repr(size), "Give a size.", kind=ArgumentTypeError)
    if not least <= size <= most:
        reject(name, f"must be between {least} and {most}", size, "Give a size within.")


def check_rows(name: str, array: Array, dtypes: tuple[str, ...], multiple: int) -> None:
    """A matrix of floats: kind, dtype, axes, width, contiguous rows, aligned on a GPU."""
    if not is_array(array):
        reject(
            name,
            "must be a NumPy or a CuPy array",
            type(array).__qualname__,
            "Convert it, for example with numpy.asarray or cupy.from_dlpack.",
            kind=ArgumentTypeError,
        )
    if not any(array.dtype == INPUT_DTYPES[dtype] for dtype in dtypes):
        reject(
            name,
            f"must have dtype {' or '.join(dtypes)}",
            array.dtype,
            "Convert it with astype.",
            kind=ArgumentTypeError,
        )
    if array.ndim != 2:
        reject(name, "must have 2 axes", f"shape {tuple(array.shape)}", "Reshape it.")
    rows, columns = array.shape
    if columns % multiple:
        reject(
            name,
            f"must have a multiple of {multiple} columns",
            columns,
            "Pad it with zeros.",
        )
    if max(rows, columns) > MAX_EXTENT:
        reject(
            name, f"at most {MAX_EXTENT} rows and columns", f"shape {array.shape}", "Split it."
        )  # fmt: skip
    if array.size and (
        array.strides[1] != array.itemsize
        or (rows > 1 and array.strides[0] < columns * array.itemsize)
    ):
        reject(
            name,
            "must have contiguous rows, without overlap",
            f"shape {tuple(array.shape)} with strides {tuple(array.strides)}",
            "Copy it with ascontiguousarray.",
        )
    if is_cupy(array):
        check_alignment(name, array)
