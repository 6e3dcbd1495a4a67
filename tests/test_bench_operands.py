"""Operands of the benchmark: the same data for everyone, and a check that notices mistakes."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cpgemm
from cpgemm.bench.operands import Operands, Pool, Product, bytes_of, tolerance
from cpgemm.bench.result import Case
from cpgemm.problem import GemmProblem

CASES = (
    Case("dense", 70, 264, 592),
    Case("dense", 1, 8, 128),
    Case("contiguous", 128, 136, 272, 6),
    Case("masked", 5, 136, 272, 7),
)


def make(case: Case, seed: int = 0) -> Product:
    return Product.make(case, Pool(2 * seed, np), Pool(2 * seed + 1, np), np, sets=1)


def multiply(one: Operands, case: Case) -> None:
    if case.suite == "dense":
        cpgemm.gemm(one.a, one.b, one.out)
    elif case.suite == "contiguous":
        cpgemm.grouped_gemm_contiguous(one.a, one.b, one.out, m_indices=one.index)
    else:
        cpgemm.grouped_gemm_masked(one.a, one.b, one.out, masked_m=one.index)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_right_result_passes(case: Case) -> None:
    product = make(case)
    product.poison()
    multiply(product.sets[0], case)
    assert product.error() <= tolerance(product)
    assert product.error(by_blocks=False) > 0.5, "without scales it is another product"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_element_that_is_not_written_shows(case: Case) -> None:
    product = make(case)
    multiply(product.sets[0], case)
    bits = product.sets[0].out.view(np.uint16)
    (bits[-1, : case.m] if bits.ndim == 3 else bits)[-1, -1] = 0xFFFF
    assert math.isnan(product.error())


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=lambda case: case.name)
def test_wrong_scales_show(case: Case) -> None:
    """Scales of the next k-block: values stay plausible."""
    product = make(case)
    one = product.sets[0]
    rolled = cpgemm.ScaledTensor.from_arrays(
        one.a.data, np.roll(one.a.scales, 1, axis=-1), one.a.granularity
    )
    multiply(Operands(rolled, one.b, one.out, one.index), case)
    assert product.error() > 5 * tolerance(product)


def test_rows_behind_the_count_of_a_masked_group_do_not_matter() -> None:
    product = make(CASES[3])
    product.poison()
    multiply(product.sets[0], CASES[3])
    assert (product.sets[0].out.view(np.uint16)[:, CASES[3].m :] == 0xFFFF).all()
    assert product.error() <= tolerance(product)


def test_data_depend_on_the_seed_alone() -> None:
    first, again, other = make(CASES[0]), make(CASES[0]), make(CASES[0], seed=1)
    for attribute in ("a", "b"):
        codes = [
            getattr(one.sets[0], attribute).data.view(np.uint8) for one in (first, again, other)
        ]
        assert np.array_equal(codes[0], codes[1])
        assert not np.array_equal(codes[0], codes[2])
    # The same weights whatever the number of rows.
    more = make(Case("dense", 3, CASES[0].n, CASES[0].k))
    assert np.array_equal(more.sets[0].b.data.view(np.uint8), first.sets[0].b.data.view(np.uint8))


def test_values_are_normal_and_no_two_rows_are_equal() -> None:
    values = Pool(7, np).matrix(3000, 2048)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert len({row.tobytes() for row in values[:, :8]}) == len(values)


def test_the_sample_meets_every_stretch_of_rows() -> None:
    product = make(Case("dense", 4096, 8, 128))
    ((group, rows),) = product.sample
    assert group == 0 and len(rows) == 64
    assert list(rows // 64) == list(range(64))
    many = make(Case("masked", 5, 8, 128, 9))
    assert [group for group, _ in many.sample] == [0, 3, 5, 8]
    aligned = make(Case("contiguous", 128, 8, 128, 3))
    for group, rows in aligned.sample:
        assert set(rows // 128) == {group}


def test_weights_are_dequantised_once_for_cases_that_share_them() -> None:
    pools = Pool(0, np), Pool(1, np)
    kept = []
    for m in (3, 5):
        case = Case("dense", m, 264, 592)
        product = Product.make(case, *pools, np, sets=1)
        multiply(product.sets[0], case)
        assert product.error() <= tolerance(product)
        kept.append(pools[1].host[0, True])
    assert kept[0] is kept[1]
    case = Case("dense", 5, 136, 592)
    product = Product.make(case, *pools, np, sets=1)
    multiply(product.sets[0], case)
    assert product.error() <= tolerance(product), "other weights replace them"
    assert len(pools[1].host) == 2


def test_bytes() -> None:
    assert bytes_of(CASES[0]) == GemmProblem(70, 264, 592).bytes
    assert bytes_of(Case("masked", 5, 136, 272, 7)) == 7 * GemmProblem(5, 136, 272).bytes
