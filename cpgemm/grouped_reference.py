"""The semantics of the grouped products, in NumPy: each group's rows through ``gemm_reference``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpgemm.grouped_problem import GroupedProblem
from cpgemm.problem import OUT_DTYPES, OutDtype
from cpgemm.reference import gemm_reference
from cpgemm.scaled import BLOCK, Array, ScaledTensor

__all__ = ["group_products", "grouped_reference", "row_ranges", "zero_padding"]


def grouped_reference(
    problem: GroupedProblem, a: ScaledTensor, b: ScaledTensor, out: Array, index: Array
) -> Array:
    """out[rows of g] = a[rows of g] @ b[g].T for each group g; returns ``out``.

    NumPy operands that pose ``problem`` (``GroupedProblem.of_contiguous`` and ``of_masked`` check
    them), ``index`` its index array.  Rows of ``a`` outside every group are never read; rows of
    ``out`` outside every group are left alone, or zeroed if ``problem.fill_padding``.  ``out`` may
    be None: a new array is returned, whose rows outside every group hold anything.
    """
    if out is None:
        out = np.empty(problem.shape, OUT_DTYPES[problem.out_dtype])
    for group, rows, product in group_products(problem, a, b, index, problem.out_dtype):
        _rows_of(problem, out, group, rows)[...] = product
    zero_padding(problem, out, index)
    return out


def group_products(
    problem: GroupedProblem, a: ScaledTensor, b: ScaledTensor, index: Array, out_dtype: OutDtype
) -> Iterator[tuple[int, slice, Array]]:
    """(group, rows, a[rows] @ b[group].T) of each run of rows, as ``row_ranges`` has them."""
    for group, begin, end in row_ranges(problem, index):
        rows = slice(begin, end)
        codes, scales = (_rows_of(problem, array, group, rows) for array in (a.data, a.scales))
        mine = ScaledTensor.from_arrays(codes, scales, a.granularity)
        matrix = ScaledTensor.from_arrays(b.data[group], b.scales[group], b.granularity)
        yield group, rows, gemm_reference(mine, matrix, out_dtype=out_dtype)


def _rows_of(problem: GroupedProblem, array: Array, group: int, rows: slice) -> Array:
    """These rows of A, its scales or D, a view: ``rows`` counts through all of a masked one."""
    if problem.layout != "masked":
        return array[rows]
    first = group * problem.m
    return array[group, rows.start - first : rows.stop - first]


def zero_padding(problem: GroupedProblem, out: Array, index: Array) -> None:
    """Zero the rows of ``out`` outside every group if ``problem`` asks for it."""
    if problem.fill_padding:
        covered = np.zeros(problem.rows, bool)
        for _, begin, end in row_ranges(problem, index):
            covered[begin:end] = True
        out[~covered] = 0


def row_ranges(problem: GroupedProblem, index: Array) -> list[tuple[int, int, int]]:
    """(group, begin, end) of each run of rows that a group owns, empty runs left out.

    Rows are counted through all of ``out``: those of group g begin at g * M_max in the masked
    layout.  Contents that break the rules are read as the kernels read them: ranges are clamped to
    the rows there are, and an index that names no group is padding.
    """
    values = index.astype(np.int64)
    if problem.layout == "m_indices":
        return _ranges_of_blocks(values, problem.groups)
    begins: Array
    ends: Array
    if problem.layout == "masked":
        begins = np.arange(problem.groups) * problem.m
        ends = begins + np.clip(values, 0, problem.m)
    elif problem.layout == "offsets":
        clamped = np.clip(values, 0, problem.m)
        begins, ends = clamped[:-1], clamped[1:]
    else:
        ends = np.clip(values, 0, problem.m)
        begins = -(-np.concatenate(([0], ends[:-1])) // BLOCK) * BLOCK
    return [
        (group, int(begin), int(end))
        for group, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if begin < end
    ]


def _ranges_of_blocks(indices: Array, groups: int) -> list[tuple[int, int, int]]:
    ranges: list[tuple[int, int, int]] = []
    for begin in range(0, indices.size, BLOCK):
        block = indices[begin : begin + BLOCK]
        group = int(block[0])
        if not 0 <= group < groups:
            continue
        other = block != group
        end = begin + (int(np.argmax(other)) if other.any() else block.size)
        # Blocks that continue a group are joined, so that its matrix is decoded once.
        if ranges and ranges[-1][0] == group and ranges[-1][2] == begin:
            ranges[-1] = (group, ranges[-1][1], end)
        else:
            ranges.append((group, begin, end))
    return ranges
