"""Two reports against each other."""

from __future__ import annotations

import dataclasses
import io

import pytest
from bench_reports import DENSE, IMPORT, LARGE, MASKED, METHOD, bad, report, row, rows

from cpgemm.bench.compare import Change, Comparison, compare, print_comparison
from cpgemm.bench.result import Report


def changed(us: float, spread: float = 1.0, before_spread: float = 1.0) -> Comparison:
    """A row of ours that took 100 us."""
    return compare(
        report([row(DENSE, "cpgemm", 100.0, spread_pct=before_spread)]),
        report([row(DENSE, "cpgemm", us, spread_pct=spread)]),
        limit_pct=5.0,
    )


def shown(found: Comparison, width: int = 120) -> str:
    file = io.StringIO()
    print_comparison(found, width, file)
    return file.getvalue()


def test_a_report_is_equal_to_itself() -> None:
    found = compare(report(), report(), limit_pct=0.0)
    assert {change.verdict for change in found.changes} == {"same"} and len(found.changes) == 24
    lists = (found.broken, found.mended, found.missing, found.added, found.warnings)
    assert found.exit_code == 0 and not any(lists)
    assert shown(found).startswith("24 rows compared, 24 within their noise")


@pytest.mark.parametrize(
    ("us", "spread", "verdict", "regression"),
    [
        (101.3, 1.0, "same", False),  # noise sqrt(2) %
        (101.5, 1.0, "slower", False),  # beyond the noise, within the limit
        (98.7, 1.0, "same", False),
        (98.5, 1.0, "faster", False),
        (106.0, 1.0, "slower", True),
        (104.9, 1.0, "slower", False),
        (106.0, 6.0, "same", False),  # noise sqrt(37) %, 6.08
        (106.2, 6.0, "slower", True),
        (60.0, 1.0, "faster", False),
    ],
)
def test_noise_and_limit(us: float, spread: float, verdict: str, regression: bool) -> None:
    found = changed(us, spread)
    assert [change.verdict for change in found.changes] == [verdict]
    assert len(found.regressions) == regression == found.exit_code
    assert ("REGRESSION" in shown(found)) == regression


def test_noise_is_the_root_of_the_sum_of_squares() -> None:
    change = changed(110.0, spread=4.0, before_spread=3.0).changes[0]
    assert change.noise_pct == pytest.approx(5.0) and change.change_pct == pytest.approx(10.0)


def test_a_row_without_a_spread_needs_more_than_the_limit() -> None:
    pairs = [
        [report([row(IMPORT, "cpgemm", us, spread_pct=None)]) for us in (100.0, after)]
        for after in (104.0, 110.0)
    ]
    small, large = (compare(*pair, limit_pct=5.0) for pair in pairs)
    assert small.changes[0].verdict == "same" and large.changes[0].verdict == "slower"
    assert (small.exit_code, large.exit_code) == (0, 1)


def test_peers_and_floors_never_are_a_regression_but_stand_beside_ours() -> None:
    after = [dataclasses.replace(one, us=one.us and one.us * 1.5) for one in rows(DENSE)]
    after[0] = row(DENSE, "cpgemm", 10.2)
    after[1] = row(DENSE, "cpgemm pdl", 8.0)
    found = compare(report(rows(DENSE)), report(after), limit_pct=5.0)
    assert found.exit_code == 0 and found.changes[0].others_pct == pytest.approx(50.0)
    assert {one.verdict for one in found.changes if not one.ours} == {"slower"}
    text = shown(found)
    assert text.index("+2.0%") < text.index("deep_gemm"), "ours first"
    assert "+50.0%" in text


@pytest.mark.parametrize("status", ["wrong", "failed", "absent"])
def test_a_row_of_ours_that_broke_fails(status: str) -> None:
    found = compare(
        report(rows(DENSE)), report([bad(DENSE, "cpgemm", status, "why"), *rows(DENSE)[1:]]),
        limit_pct=50.0,
    )  # fmt: skip
    assert found.broken == [f"dense 64x4096x7168, cpgemm: {status} (why)"] and found.exit_code == 1
    assert f"broken: dense 64x4096x7168, cpgemm: {status} (why)" in shown(found)
    back = compare(
        report([bad(DENSE, "cpgemm", status)]), report([row(DENSE, "cpgemm")]), limit_pct=5.0
    )
    assert back.exit_code == 0 and back.mended == [f"dense 64x4096x7168, cpgemm: was {status}"]


def test_a_peer_that_went_away_is_only_said() -> None:
    after = [*rows(DENSE)[:2], bad(DENSE, "cublaslt block", "absent"), *rows(DENSE)[3:]]
    found = compare(report(rows(DENSE)), report(after), limit_pct=5.0)
    assert found.exit_code == 0 and not found.broken
    assert found.warnings == ["dense 64x4096x7168, cublaslt block: absent in the second report"]


def test_rows_of_one_report_only_are_listed() -> None:
    found = compare(
        report([row(DENSE, "cpgemm"), row(LARGE, "cpgemm")]),
        report([row(DENSE, "cpgemm"), row(MASKED, "cpgemm pdl")]),
        limit_pct=5.0,
    )
    assert found.missing == ["dense 4096x7168x2048, cpgemm"] and found.exit_code == 0
    assert found.added == ["masked 32x20x4096x4096, cpgemm pdl"]
    text = shown(found)
    assert "missing in the second report: dense 4096x7168x2048, cpgemm" in text
    assert "new in the second report: masked 32x20x4096x4096, cpgemm pdl" in text


def test_differing_machines_methods_and_interruptions_are_warned_about() -> None:
    def warned(other: Report) -> str:
        return " ".join(compare(report(), other, limit_pct=5.0).warnings)

    machine = {**report().machine, "gpu": "NVIDIA H100", "driver": "570"}
    assert warned(report(machine=machine)) == (
        "The machines differ: gpu NVIDIA H200 and NVIDIA H100; driver 580.1 and 570."
    )
    later = {**report().machine, "commit": "fedcba987654", "date": "later", "cpgemm": "9"}
    assert warned(report(machine=later)) == "", "another commit is what a comparison is for"
    assert "methods differ: windows 5 and 3" in warned(report(method={**METHOD, "windows": 3}))
    assert warned(report(complete=False)) == "The second run was interrupted."
    found = compare(report(), report(machine=machine), limit_pct=5.0)
    assert shown(found).startswith("warning: The machines differ")


@pytest.mark.parametrize("width", [60, 100, 160])
def test_every_line_of_the_tables_fits(width: int) -> None:
    after = [dataclasses.replace(one, us=one.us and one.us * 2) for one in report().rows]
    text = shown(compare(report(), report(after), limit_pct=5.0), width)
    lines = [line.rstrip() for line in text.splitlines() if line.startswith(("case", "dense"))]
    assert lines and max(map(len, lines)) <= width and text.count("REGRESSION") >= 6


def test_changes_say_their_direction() -> None:
    change = Change(DENSE, "cpgemm", True, 10.0, 12.0, 1.0)
    assert change.change_pct == pytest.approx(20.0) and change.verdict == "slower"
