"""The suites and single shapes."""

from __future__ import annotations

import itertools

import pytest

from cpgemm.bench.cases import (
    HOST_PATHS,
    JIT_STEPS,
    LAYERS,
    SUITES,
    check_case,
    on_cpu,
    single,
    suite,
    suites,
)
from cpgemm.bench.published_deepgemm import TABLE
from cpgemm.bench.result import Case
from cpgemm.errors import ArgumentError


def test_dense_is_every_height_of_every_layer() -> None:
    cases = suite("dense")
    assert len(cases) == len(set(cases)) == 42
    assert {(case.n, case.k) for case in cases} == set(LAYERS) and len(LAYERS) == 6
    assert {case.m for case in cases} == {1, 8, 16, 32, 64, 128, 4096}
    assert {case.groups for case in cases} == {0}


def test_grouped_suites() -> None:
    assert {(c.groups, c.m) for c in suite("contiguous")} == {(4, 8192), (8, 4096)}
    assert len(suite("contiguous")) == 4
    masked = {(case.groups, case.m, case.n, case.k) for case in suite("masked")}
    for (groups, m), layer in itertools.product(
        ((1, 1024), (2, 512), (4, 256)), ((4096, 7168), (7168, 2048))
    ):
        assert (groups, m, *layer) in masked
    assert {(groups, m) for groups, m, _, _ in masked} >= {(32, 20), (32, 192), (9, 64), (8, 4)}


def test_the_published_tables_are_among_the_suites() -> None:
    everything = suite("all")
    assert all(row.case in everything for row in TABLE)


def test_all_is_everything_and_every_case_is_possible() -> None:
    cases = suite("all")
    assert cases == suites(SUITES) and len({case.name for case in cases}) == len(cases)
    assert {case.suite for case in cases} == set(SUITES)
    for case in cases:
        check_case(case)
    assert suites(["jit", "dense", "jit"]) == suite("jit") + suite("dense")


def test_quantize_host_jit() -> None:
    assert len(suite("quantize")) == 3 * 3 * 2 * 2 and all(not c.n for c in suite("quantize"))
    assert tuple(case.detail for case in suite("host")) == HOST_PATHS and len(HOST_PATHS) == 7
    assert tuple(case.detail for case in suite("jit")) == JIT_STEPS
    assert suite("jit")[2] == Case("jit", detail="import")


def test_an_unknown_suite() -> None:
    with pytest.raises(ArgumentError, match=r"must be one of dense, .*, jit or all; got 'fast'"):
        suite("fast")


def test_single_shapes() -> None:
    assert single((), m=64, n=4096, k=7168) == (Case("dense", 64, 4096, 7168),)
    assert single((), m=20, n=8, k=16, groups=3) == (Case("contiguous", 20, 8, 16, 3),)
    assert single(["masked"], m=20, n=8, k=16, groups=3) == (Case("masked", 20, 8, 16, 3),)
    assert {case.detail for case in single(["host"], m=1, n=8, k=16)} == set(HOST_PATHS)
    assert [case.detail for case in single(["jit"], m=1, n=8, k=16)] == list(JIT_STEPS[:2])
    quantized = single(["quantize"], m=4, k=32)
    assert len(quantized) == 12 and {(case.m, case.n, case.k) for case in quantized} == {(4, 0, 32)}


@pytest.mark.parametrize(
    ("names", "sizes", "says"),
    [
        ((), {"m": 64, "k": 16}, "--n: is needed for a shape of dense"),
        ((), {"groups": 2, "n": 8, "k": 16}, "--m: is needed for a shape of contiguous"),
        (("dense",), {"m": 1, "n": 8, "k": 16, "groups": 2}, "--groups: is no size of dense"),
        (("quantize",), {"m": 1, "n": 8, "k": 16}, "--n: is no size of quantize"),
        (("masked",), {"m": 1, "n": 8, "k": 16}, "--groups: is needed for a shape of masked"),
        (("all",), {"m": 1}, "must be one of dense, .* with a shape; got 'all'"),
        ((), {"m": 1, "n": 8, "k": 100}, "k: K must be a multiple of 16; got 100"),
        ((), {"m": 1, "n": 9, "k": 16}, "n: N must be a multiple of 8; got 9"),
        ((), {"m": 1, "n": 8, "k": 16, "groups": 4096}, "groups: must be between 1 and 1024"),
        (("quantize",), {"m": 1, "k": 24}, "k: K must be a multiple of 16; got 24"),
    ],
)
def test_shapes_that_are_none(names: tuple[str, ...], sizes: dict[str, int], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        single(names, **sizes)


def test_what_a_cpu_takes() -> None:
    kept, left_out = on_cpu(suite("all"))
    assert set(kept) | set(left_out) == set(suite("all")) and not set(kept) & set(left_out)
    assert set(suite("jit")) <= set(kept) and set(suite("host")) <= set(left_out)
    assert Case("dense", 64, 7168, 2048) in kept and Case("dense", 4096, 7168, 2048) in left_out
    assert Case("dense", 1, 7168, 16384) in left_out, "its weights take seconds to quantise"
    assert {case.suite for case in kept} == {"dense", "quantize", "jit"}
    large, host = Case("dense", 4096, 7168, 2048), Case("host", 1, 8, 16, detail="plan")
    assert on_cpu([large, host], any_size=True) == ((large,), (host,))
