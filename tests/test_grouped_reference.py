"""The NumPy semantics of the grouped products, group by group."""

import ml_dtypes
import numpy as np
import pytest
from grouped_checks import CONTIGUOUS, LAYOUTS, Case, assert_same_bits, bits, random_index

from cpgemm.grouped_problem import GroupedProblem
from cpgemm.grouped_reference import grouped_reference, row_ranges
from cpgemm.reference import gemm_reference
from cpgemm.scaled import ScaledTensor

BF16 = np.dtype(ml_dtypes.bfloat16)
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def run(case, out=None):
    return grouped_reference(case.problem, case.a, case.b, out, case.index)


def ranges(layout, index, groups=3, m=300):
    return row_ranges(GroupedProblem(layout, groups, m, 8, 16), np.asarray(index, np.int32))


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_group_is_one_product(rng, layout, out_dtype):
    case = Case(rng, layout, [3, 0, 130, 1], 136, 272, out_dtype=out_dtype, first=5, spare=7)
    assert run(case, case.out) is case.out
    case.check()
    for group, begin, end in case.ranges:
        part = ScaledTensor.from_arrays(
            case.plain_a.data[begin:end], case.plain_a.scales[begin:end], (1, 128)
        )
        expected = gemm_reference(part, case.group_of_b(group), out_dtype=out_dtype)
        assert_same_bits(case.flat_out[begin:end], expected)


@pytest.mark.parametrize("layout", CONTIGUOUS)
def test_fill_padding(rng, layout):
    case = Case(rng, layout, [3, 0, 130, 1], 136, 272, first=5, spare=7, fill_padding=True)
    run(case, case.out)
    case.check()
    assert not bits(case.flat_out)[case.cover() == 0].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_divisions(rng, layout):
    case = Case(rng, layout, [130, 126, 256, 300], 72, 144)
    for _ in range(5):
        case.set_index(random_index(rng, layout, 4, case.problem.m))
        run(case, case.out)
        case.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_output(rng, layout):
    case = Case(rng, layout, [3, 0, 130, 1], 136, 272)
    out = run(case)
    assert out.shape == case.problem.shape and out.dtype == BF16
    case.check_rows(out.reshape(-1, 136), case.cover() > 0)


def test_ranges_of_offsets():
    assert ranges("offsets", [10, 20, 20, 300]) == [(0, 10, 20), (2, 20, 300)]
    assert ranges("offsets", [-5, 20, 10, 400]) == [(0, 0, 20), (2, 10, 300)]
    assert ranges("offsets", [LOWEST, HIGHEST, LOWEST, HIGHEST]) == [(0, 0, 300), (2, 0, 300)]


def test_ranges_of_ends():
    assert ranges("ends", [100, 128, 300]) == [(0, 0, 100), (2, 128, 300)]
    assert ranges("ends", [130, 257, 300]) == [(0, 0, 130), (1, 256, 257)]
    assert ranges("ends", [HIGHEST, LOWEST, 50]) == [(0, 0, 300), (2, 0, 50)]


def test_ranges_of_m_indices():
    index = np.repeat([2, -1, 0], [200, 56, 44])
    assert ranges("m_indices", index) == [(2, 0, 200), (0, 256, 300)]
    assert ranges("m_indices", np.repeat([3, -2, HIGHEST], [128, 128, 44])) == []
    assert ranges("m_indices", np.repeat([1, -1, 1], [100, 28, 172])) == [
        (1, 0, 100),
        (1, 128, 300),
    ]
    assert ranges("m_indices", [], m=0) == []


def test_ranges_of_masked():
    assert ranges("masked", [4, 0, 300]) == [(0, 0, 4), (2, 600, 900)]
    assert ranges("masked", [-1, HIGHEST, 1]) == [(1, 300, 600), (2, 600, 601)]
