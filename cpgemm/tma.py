"""Tensor maps: how the copy engine (TMA) sees a matrix and the boxes that it moves.

A map is bound to an address, so that maps are cached by everything that they hold.  Creating one
costs some 4 us of host time, finding one in the cache less than 1 us.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from cpgemm.layout import Array, pointer

if TYPE_CHECKING:
    from cuda.core import TensorMapDescriptor

__all__ = ["matrix_map", "row_pitch", "tensor_map"]

# FP8 and bfloat16 travel as plain bytes and halves: TMA only moves them.
_TYPESTR = {1: "|u1", 2: "<u2", 4: "<f4"}


class _Matrix:
    """The least that cuda.core needs to see a row-pitched matrix in device memory."""

    def __init__(self, pointer: int, rows: int, columns: int, pitch: int, itemsize: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (pointer, False),
            "shape": (rows, columns),
            "strides": (pitch, itemsize),
            "typestr": _TYPESTR[itemsize],
            "version": 3,
            "stream": None,
        }


@functools.lru_cache(maxsize=8192)
def tensor_map(
    pointer: int,
    rows: int,
    columns: int,
    pitch: int,
    itemsize: int,
    box: tuple[int, int],
    swizzle: int,
    device: int,
) -> TensorMapDescriptor:
    """Map of a matrix of ``rows`` x ``columns`` elements with ``pitch`` bytes between rows.

    ``box``: rows and columns that one copy moves, 256 at most each.  ``swizzle``: 0, 32, 64 or 128
    bytes, which is then the width of the box.  Address and pitch are multiples of 16 bytes
    (``problem`` has checked them).  What lies outside the matrix reads as zeros, is never written.
    """
    # The enumerations are not exported by cuda.core 1.2; as_tensor_map takes no plain values.
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    modes = {
        0: TensorMapSwizzle.NONE,
        32: TensorMapSwizzle.SWIZZLE_32B,
        64: TensorMapSwizzle.SWIZZLE_64B,
        128: TensorMapSwizzle.SWIZZLE_128B,
    }
    matrix = _Matrix(pointer, rows, columns, pitch, itemsize)
    view = StridedMemoryView.from_cuda_array_interface(matrix, -1)
    return view.as_tensor_map(
        box_dim=box, swizzle=modes[swizzle], l2_promotion=TensorMapL2Promotion.L2_256B
    )


def row_pitch(array: Array) -> int:
    """Bytes between the rows of (R, C), or of (G, R, C) whose groups follow one another.

    A single row has no neighbour, and any stride; the pitch of a fresh allocation is given then.
    """
    *outer, rows, columns = array.shape
    if rows > 1:
        return int(array.strides[-2])
    if outer and outer[0] > 1:
        return int(array.strides[0])
    return -(-columns * int(array.itemsize) // 16) * 16


def matrix_map(array: Array, box: tuple[int, int], swizzle: int) -> TensorMapDescriptor:
    """Map of a CuPy array (R, C), or (G, R, C) whose groups follow one another, as one matrix."""
    *outer, rows, columns = array.shape
    return tensor_map(
        pointer(array), rows * (outer[0] if outer else 1), columns, row_pitch(array),
        int(array.itemsize), box, swizzle, array.device.id,
    )  # fmt: skip
