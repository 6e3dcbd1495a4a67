"""The semantics of the grouped products, in NumPy: each group's rows through ``gemm_reference``."""

from __future__ import annotations

import numpy as np

from cpgemm.grouped_problem import GroupedProblem
from cpgemm.problem import OUT_DTYPES
from cpgemm.reference import gemm_reference
from cpgemm.scaled import BLOCK, Array, ScaledTensor

__all__ = ["grouped_reference", "row_ranges"]


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
    ranges = row_ranges(problem, index)
    for group, begin, end in ranges:
        codes, scales, target = a.data, a.scales, out
        if problem.layout == "masked":
            codes, scales, target = codes[group], scales[group], target[group]
            begin, end = begin - group * problem.m, end - group * problem.m
        rows = ScaledTensor.from_arrays(codes[begin:end], scales[begin:end], a.granularity)
        matrix = ScaledTensor.from_arrays(b.data[group], b.scales[group], b.granularity)
        target[begin:end] = gemm_reference(rows, matrix, out_dtype=problem.out_dtype)
    if problem.fill_padding:
        covered = np.zeros(problem.rows, bool)
        for _, begin, end in ranges:
            covered[begin:end] = True
        out[~covered] = 0
    return out


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
