"""Tensor maps: how the copy engine (TMA) sees a matrix and the boxes that it moves.

A map is 128 bytes that a kernel takes by value.  It is bound to an address, so that maps are cached
by everything that they hold.
"""

from __future__ import annotations

import ctypes
import functools

from cpgemm.layout import Array, pointer

__all__ = ["MAP_BYTES", "matrix_map", "row_pitch", "tensor_map"]

MAP_BYTES = 128
_SWIZZLES = (0, 32, 64, 128)  # bytes; position is CUtensorMapSwizzle's number


@functools.lru_cache(maxsize=8192)
def tensor_map(
    pointer: int,
    rows: int,
    columns: int,
    pitch: int,
    itemsize: int,
    box: tuple[int, int],
    swizzle: int,
) -> bytes:
    """Map of a matrix of ``rows`` x ``columns`` elements with ``pitch`` bytes between rows.

    ``box``: rows and columns that one copy moves, 256 at most each.  ``swizzle``: 0, 32, 64 or 128
    bytes, which is then the width of the box.  Address and pitch are multiples of 16 bytes
    (``problem`` has checked them).  What lies outside the matrix reads as zeros, is never written.
    """
    from cuda.bindings import driver

    # FP8 and bfloat16 travel as plain bytes and halves: TMA only moves them.
    kinds = driver.CUtensorMapDataType
    kind = {
        1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        4: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }[itemsize]
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    status, tensor_map = driver.cuTensorMapEncodeTiled(
        kind,
        2,
        pointer,
        [wide(columns), wide(rows)],
        [wide(pitch)],
        [narrow(box[1]), narrow(box[0])],
        [narrow(1), narrow(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle(_SWIZZLES.index(swizzle)),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"cpgemm: the driver refuses a tensor map ({status!s}) of {rows} x {columns} elements "
            f"of {itemsize} bytes at {pointer:#x}, pitch {pitch}, box {box}, swizzle {swizzle}"
        )
    return ctypes.string_at(int(tensor_map.getPtr()), MAP_BYTES)


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


def matrix_map(array: Array, box: tuple[int, int], swizzle: int) -> bytes:
    """Map of a CuPy array (R, C), or (G, R, C) whose groups follow one another, as one matrix."""
    *outer, rows, columns = array.shape
    return tensor_map(
        pointer(array), rows * (outer[0] if outer else 1), columns, row_pitch(array),
        int(array.itemsize), box, swizzle,
    )  # fmt: skip
