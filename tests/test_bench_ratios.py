"""What the rows of one case say together."""

from __future__ import annotations

import pytest
from bench_reports import DENSE, bad, report, row, rows

from cpgemm.bench.ratios import base_name, counterpart, floor_of, peers_of, speedup

ROWS = rows(DENSE)


def test_like_is_compared_with_like() -> None:
    for pdl, name in ((False, "deep_gemm"), (True, "deep_gemm pdl")):
        found = counterpart(ROWS, "deep_gemm", pdl)
        assert found is not None and found.contender == name and base_name(found) == "deep_gemm"
    plain_only = counterpart(ROWS, "cublaslt block", True)
    assert plain_only is not None and plain_only.contender == "cublaslt block"
    assert counterpart(ROWS, "nobody", True) is None


def test_a_variant_that_was_timed_is_preferred() -> None:
    made = [bad(DENSE, "deep_gemm pdl", "failed"), row(DENSE, "deep_gemm")]
    found = counterpart(made, "deep_gemm", True)
    assert found is not None and found.contender == "deep_gemm"


def test_speedup_is_theirs_over_ours() -> None:
    assert speedup(ROWS[0], ROWS[2]) == pytest.approx(1.5)
    assert speedup(ROWS[0], bad(DENSE, "cutlass", "absent")) is None
    assert speedup(bad(DENSE, "cpgemm", "wrong"), ROWS[2]) is None
    assert speedup(None, ROWS[2]) is None and speedup(ROWS[0], None) is None


def test_the_slower_floor_rules() -> None:
    plain, pdl = (floor_of(ROWS, ours) for ours in ROWS[:2])
    assert plain is not None and plain.kind == "mma" and plain.fraction == pytest.approx(0.7)
    # With PDL the memory floor is 6 us and the compute floor, which has no PDL, 7 us; ours 8 us.
    assert pdl is not None and pdl.kind == "mma" and pdl.fraction == pytest.approx(7 / 8)
    memory = floor_of([one for one in ROWS if one.role != "compute floor"], ROWS[1])
    assert memory is not None and memory.row.contender == "memory floor pdl"
    assert memory.fraction == pytest.approx(6 / 8)


def test_no_floor_without_a_time() -> None:
    assert floor_of(ROWS, bad(DENSE, "cpgemm", "wrong")) is None and floor_of(ROWS, None) is None
    assert floor_of([bad(DENSE, "memory floor", "failed")], ROWS[0]) is None


def test_peers_in_order_of_appearance() -> None:
    assert peers_of(report()) == ["cublaslt block", "deep_gemm", "cutlass"]
