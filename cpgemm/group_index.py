"""The index arrays of grouped products: which rows belong to which group, and their rules.

All are int32 and lie where the operands lie:

==============  ===============  ==================================================================
layout          shape            rows of group g
==============  ===============  ==================================================================
``offsets``     (groups + 1,)    ``offsets[g]`` to ``offsets[g + 1]``: any sizes, no padding
``m_indices``   (M_total,)       those that hold g; constant within each aligned block of 128 rows,
                                 except that -1 (padding) may follow the block's group
``ends``        (groups,)        from ``ends[g - 1]`` rounded up to 128 (0 for the first group) to
                                 ``ends[g]``
``masked``      (groups,)        the first ``masked_m[g]`` rows of ``a[g]``
==============  ===============  ==================================================================

Rows that belong to no group are padding: before ``offsets[0]``, from ``offsets[groups]`` on, those
that hold -1, between ``ends[g]`` and the next group, from ``masked_m[g]`` on.

Contents on a GPU are not read by the host, since that would wait for the stream.  For contents that
break the rules the kernels promise that nothing outside ``out`` is written: every range is clamped
to the rows there are, a range that ends before it begins is empty, an aligned block whose first
index names no group is padding.  ``CPGEMM_CHECK=1`` downloads and checks them; NumPy arrays are
always checked.
"""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np

from cpgemm import env
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.scaled import BLOCK, Array, ScaledTensor, device_of, is_array, is_cupy, pointer

__all__ = [
    "GROUP_LAYOUTS",
    "GroupLayout",
    "check_contents",
    "check_index",
    "contiguous_alignment",
    "index_length",
    "index_name",
    "select_layout",
]

GroupLayout = Literal["offsets", "m_indices", "ends", "masked"]
GROUP_LAYOUTS: tuple[GroupLayout, ...] = ("offsets", "m_indices", "ends", "masked")


def contiguous_alignment() -> int:
    """Rows (128) at whose multiples groups start in the ``m_indices`` and ``ends`` layouts."""
    return BLOCK


def index_name(layout: GroupLayout) -> str:
    """Name of the argument that holds the index array."""
    return "masked_m" if layout == "masked" else layout


def index_length(layout: GroupLayout, groups: int, m: int) -> int:
    """Elements of the index array."""
    return {"offsets": groups + 1, "m_indices": m}.get(layout, groups)


def select_layout(*, m_indices: Array, offsets: Array, ends: Array) -> tuple[GroupLayout, Array]:
    """The contiguous layout of a call and its index array: exactly one of them is not None."""
    candidates: dict[GroupLayout, Array] = {
        "m_indices": m_indices,
        "offsets": offsets,
        "ends": ends,
    }
    given = {layout: index for layout, index in candidates.items() if index is not None}
    if len(given) != 1:
        reject(
            "m_indices, offsets, ends",
            "exactly one of them must be given",
            " and ".join(given) or "none",
            "Give offsets (int32, groups + 1) unless another layout is there already.",
        )
    return next(iter(given.items()))


def check_index(layout: GroupLayout, groups: int, m: int, index: Array, a: ScaledTensor) -> None:
    """The index array's kind, dtype, length, device and strides; ``a`` is the operand beside it."""
    name = index_name(layout)
    if not is_array(index) or is_cupy(index) != is_cupy(a.data):
        kind = "CuPy" if is_cupy(a.data) else "NumPy"
        reject(
            name,
            f"must be a {kind} array, as a is",
            f"{type(index).__module__}.{type(index).__qualname__}",
            "Keep it where the operands are.",
            kind=ArgumentTypeError,
        )
    if index.dtype != np.int32:
        reject(
            name,
            "must have dtype int32",
            index.dtype,
            "Convert it with astype(numpy.int32).",
            kind=ArgumentTypeError,
        )
    wanted = (index_length(layout, groups, m),)
    if tuple(index.shape) != wanted:
        meaning = {
            "offsets": "groups + 1: where each group begins, and the end of the last",
            "m_indices": "M_total: the group of each row",
            "ends": "groups: where each group ends",
            "masked": "groups: how many rows of each are valid",
        }[layout]
        reject(
            name,
            f"must have shape {wanted} ({meaning})",
            f"shape {tuple(index.shape)}",
            "Give one number for each.",
        )
    if device_of(index) != a.device:
        reject(name, f"must be on a's device, {a.device}", device_of(index), "Move it.")
    if index.size and ((index.size > 1 and index.strides[0] != 4) or pointer(index) % 4):
        reject(
            name,
            "must be contiguous and 4-byte aligned",
            f"strides {tuple(index.strides)}, address {pointer(index):#x}",
            "Copy it.",
        )


def check_contents(layout: GroupLayout, groups: int, m: int, index: Array) -> None:
    """``ArgumentError`` naming the first element of the index array that breaks a rule.

    NumPy arrays are always checked.  CuPy arrays are only read when ``CPGEMM_CHECK`` is 1, which
    waits for CuPy's current stream and cannot be done while that stream is captured.
    """
    if is_cupy(index):
        if not env.check():
            return
        with index.device:
            if sys.modules["cupy"].cuda.get_current_stream().is_capturing():
                reject(
                    "CPGEMM_CHECK",
                    "must be 0 while a graph is captured, when nothing can be read",
                    "1",
                    "Check a call before the capture, then unset it.",
                )
            index = index.get()
    values = index.astype(np.int64)  # so that sums and differences cannot overflow
    if layout == "masked":
        _check_masked_m(values, m)
    elif layout == "offsets":
        _check_offsets(values, m)
    elif layout == "ends":
        _check_ends(values, m)
    else:
        _check_m_indices(values, groups)


def _first(wrong: Array) -> int | None:
    """Position of the first True, None when there is none."""
    return int(np.argmax(wrong)) if wrong.any() else None


def _check_masked_m(counts: Array, rows: int) -> None:
    at = _first((counts < 0) | (counts > rows))
    if at is not None:
        reject(
            "masked_m",
            f"must be between 0 and M_max, {rows}",
            f"masked_m[{at}] = {counts[at]}",
            "Count the tokens that were really put into each group.",
        )


def _check_offsets(offsets: Array, rows: int) -> None:
    if offsets[0] < 0:
        reject("offsets", "must not be negative", f"offsets[0] = {offsets[0]}", "Start at row 0.")
    at = _first(offsets[1:] < offsets[:-1])
    if at is not None:
        reject(
            "offsets",
            "must not decrease",
            f"offsets[{at + 1}] = {offsets[at + 1]} after offsets[{at}] = {offsets[at]}",
            "Give the running sum of the groups' sizes.",
        )
    if offsets[-1] > rows:
        reject(
            "offsets",
            f"must not exceed the rows of a, {rows}",
            f"offsets[{offsets.size - 1}] = {offsets[-1]}",
            "The last offset is the end of the last group.",
        )


def _check_ends(ends: Array, rows: int) -> None:
    previous = np.concatenate(([0], ends[:-1]))
    begins = -(-previous // BLOCK) * BLOCK
    # An empty group may repeat the end before it or give its own aligned start.
    at = _first((ends < begins) & (ends != previous))
    if at is not None:
        reject(
            "ends",
            f"must not be before the group's start, the previous end rounded up to {BLOCK}",
            f"ends[{at}] = {ends[at]} with a start of {begins[at]}",
            "Each group starts at a multiple of contiguous_alignment().",
        )
    at = _first((ends > begins) & (ends > rows))
    if at is not None:
        reject(
            "ends",
            f"must not exceed the rows of a, {rows}",
            f"ends[{at}] = {ends[at]}",
            "Pad a so that each group starts at a multiple of contiguous_alignment().",
        )


def _check_m_indices(indices: Array, groups: int) -> None:
    at = _first((indices < -1) | (indices >= groups))
    if at is not None:
        reject(
            "m_indices",
            f"must be a group, 0 to {groups - 1}, or -1 for padding",
            f"m_indices[{at}] = {indices[at]}",
            "Give the index of the matrix in b that the row is multiplied by.",
        )
    blocks = -(-indices.size // BLOCK)
    padded = np.full((blocks, BLOCK), -1, np.int64)
    padded.reshape(-1)[: indices.size] = indices
    # Within a block only a step from its group to padding is allowed.
    wrong = np.zeros((blocks, BLOCK), bool)
    wrong[:, 1:] = (padded[:, 1:] != padded[:, :-1]) & (padded[:, 1:] != -1)
    at = _first(wrong.reshape(-1))
    if at is not None:
        reject(
            "m_indices",
            f"must be constant within each aligned block of {BLOCK} rows, up to -1 at its end",
            f"m_indices[{at}] = {indices[at]} after {indices[at - 1]}",
            f"Start each group at a multiple of contiguous_alignment(), {BLOCK}, or use offsets.",
        )
