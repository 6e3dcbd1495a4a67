"""Operands in shared memory, and the check of results."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cpgemm.layout import byte_range
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.reference import gemm_reference
from cpgemm.timing import rotations
from cpgemm.trial_operands import OperandMemory, sample_of, wanted, why_wrong

SHAPES = [(1, 256, 512), (130, 264, 528), (300, 8, 16), (65, 136, 1040)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_operands_obey_the_rules_and_do_not_overlap(dtype: Any, accumulate: bool) -> None:
    problems = [GemmProblem(*shape, dtype, accumulate) for shape in SHAPES]
    memory = OperandMemory(problems, seed=3, xp=np)
    for problem in problems:
        sets = memory.sets(problem)
        assert len(sets) == rotations(problem.bytes)
        ranges = []
        for one in sets:
            # Every rule of gemm, outputs against inputs included.
            assert GemmProblem.of(one.a, one.b, one.out, one.c, dtype) == problem
            arrays = [one.a.data, one.a.scales, one.b.data, one.b.scales, one.out]
            arrays += [] if one.c is None else [one.c]
            ranges += [byte_range(array) for array in arrays]
        ranges.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        first, second = sets[0].a.data.view(np.uint8), sets[1].a.data.view(np.uint8)
        assert not np.array_equal(first, second), "the sets are different memory and values"
        if problem.m > 1:
            assert not np.array_equal(first[0], first[1]), "rows differ"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_right_results_are_right_and_wrong_ones_are_not(dtype: Any, accumulate: bool) -> None:
    problem = GemmProblem(130, 264, 528, dtype, accumulate)
    one = OperandMemory([problem], seed=4, xp=np).sets(problem)[0]
    sample = sample_of(problem)
    assert sample[0][-1] == 129 and sample[1][-1] == 263, "tails are looked at"
    exact = wanted(one, sample)
    one.out[...] = gemm_reference(one.a, one.b, c=one.c, out_dtype=dtype)
    assert why_wrong(one.out, sample, exact) is None
    right = one.out.copy()
    one.out[...] = right * np.asarray(1.02, OUT_DTYPES[dtype])
    assert "off by 0.0" in str(why_wrong(one.out, sample, exact))
    one.out[...] = np.roll(right, 1, axis=0)
    assert "off by" in str(why_wrong(one.out, sample, exact))
    one.out[...] = right
    one.out[77, 100] = np.nan
    assert "not written everywhere" in str(why_wrong(one.out, sample, exact))
