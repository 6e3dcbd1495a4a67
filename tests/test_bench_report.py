"""The tables: on terminals of several widths, with and without rich, and as Markdown."""

from __future__ import annotations

import io
import re
import sys

import pytest
from bench_reports import DENSE, IMPORT, LARGE, MASKED, bad, report, row, rows

from cpgemm.bench.cases import suite
from cpgemm.bench.report import (
    Column,
    format_time,
    machine_lines,
    markdown,
    markdown_table,
    notes,
    print_report,
    tables,
)
from cpgemm.bench.result import Case, Report

WHOLE = [one for case in suite("all") if case.n for one in rows(case, 123.456)]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says of colours."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def shown(what: Report, width: int) -> str:
    file = io.StringIO()
    print_report(what, width=width, file=file)
    return file.getvalue()


def column(what: Report, head: str, table: int = 0) -> tuple[str, ...]:
    return next(c.cells for c in tables(what)[table].columns if " ".join(c.head) == head)


def heads(what: Report, table: int = 0) -> list[str]:
    return [" ".join(one.head) for one in tables(what)[table].columns]


# -------------------------------------------------------------------------------------- contents


def test_a_line_for_each_of_ours_and_a_table_for_each_suite() -> None:
    made = tables(report())
    assert [table.title for table in made] == ["dense", "masked"]
    assert column(report(), "case") == (
        "64x4096x7168", "64x4096x7168 pdl", "4096x7168x2048", "4096x7168x2048 pdl",
    )  # fmt: skip
    assert column(report(), "case", 1) == ("32x20x4096x4096", "32x20x4096x4096 pdl")


def test_figures_of_a_line() -> None:
    one = report(rows(DENSE, 10.0))
    assert column(one, "time") == ("10.00 us", "8.00 us")
    assert column(one, "spread") == ("1.0%", "1.0%")
    assert column(one, "TFLOPS") == ("376", "470")  # 2 * 64 * 4096 * 7168 / 10 us
    assert column(one, "GB/s") == ("3000", "3750")
    assert column(one, "over cublaslt block") == ("1.50", "1.88")
    assert column(one, "over deep_gemm") == ("1.20", "0.90"), "PDL against PDL"
    assert column(one, "of floor") == ("70% mma", "88% mma")
    assert column(one, "kernel time") == ("9.00 us", "7.20 us")
    assert column(one, "error") == ("0.00166", "0.00166")


def test_columns_without_content_are_left_out() -> None:
    jit = report([row(IMPORT, "cpgemm", 2.3e6, bytes=0.0, kernel_us=None, error=None)])
    assert heads(jit) == ["case", "time", "spread", "MHz", "W", "kernel"]
    assert column(jit, "case") == ("import",) and column(jit, "time") == ("2.30 s",)
    assert "over cutlass" not in heads(report()), "absent everywhere: said below the table"


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.5, "0.50 us"), (7.046, "7.05 us"), (99.99, "99.99 us"), (99.996, "100.0 us"),
        (231.94, "231.9 us"), (999.94, "999.9 us"), (999.96, "1.00 ms"), (19_700.0, "19.70 ms"),
        (2.3e6, "2.30 s"), (61e6, "61.00 s"), (3.6e9, "3600.0 s"),
    ],
)  # fmt: skip
def test_times(us: float, text: str) -> None:
    assert format_time(us) == text


# -------------------------------------------------------------------------------------- statuses


def mixed() -> Report:
    return report(
        [
            bad(DENSE, "cpgemm", "wrong", "64 rows of zeros", error=0.25),
            row(DENSE, "cpgemm pdl", 8.0),
            bad(DENSE, "deep_gemm", "failed", "out of memory"),
            bad(DENSE, "cublaslt block", "absent", "N % 128"),
            row(DENSE, "memory floor", 4.0),
            row(LARGE, "cpgemm", 100.0),
            row(LARGE, "deep_gemm", 90.0),
            row(LARGE, "cublaslt block", 120.0),
            bad(LARGE, "cutlass", "absent", "no nvcc"),
            bad(MASKED, "cutlass", "absent", "no nvcc"),
        ]
    )


def test_statuses_are_plain_and_a_wrong_result_has_no_time() -> None:
    what = mixed()
    assert column(what, "time") == ("WRONG", "8.00 us", "100.0 us")
    assert column(what, "over deep_gemm") == ("FAILED", "FAILED", "0.90")
    assert column(what, "over cublaslt block") == ("absent", "absent", "1.20")
    for head in ("spread", "TFLOPS", "GB/s", "of floor"):
        assert column(what, head)[0] == "", head
    for text in (shown(what, 160), markdown(what)):
        line = next(one for one in text.splitlines() if "WRONG" in one)
        assert not re.search(r"\d us|\d ms|\d%", line)


def test_what_is_said_beside_the_tables() -> None:
    said = notes(mixed())
    assert said == [
        "WRONG: dense 64x4096x7168, cpgemm: relative error 0.25000; 64 rows of zeros; "
        "dense_64x32_s16_w1_bfloat16",
        "FAILED: dense 64x4096x7168, deep_gemm: out of memory",
        "absent: cublaslt block: N % 128",
        "absent: cutlass: no nvcc (2 rows)",
    ]
    text = " ".join(shown(mixed(), 100).split())
    assert all(one in text for one in said)


def test_a_case_of_which_only_peers_were_timed() -> None:
    only = report([row(DENSE, "deep_gemm")])
    assert column(only, "case") == ("64x4096x7168 (peers only)",) and column(only, "time") == ("",)


def test_many_failures_are_counted() -> None:
    said = notes(report([bad(case, "cpgemm", "failed", "x") for case in suite("dense")]))
    assert len(said) == 21 and said[-1] == "and 22 more wrong or failed rows"


def test_an_interruption_is_said() -> None:
    assert notes(report(complete=False))[-1] == "The run was interrupted: 3 of 3 cases."
    assert "interrupted: 1 of 3 cases" in shown(report(rows(DENSE), complete=False), 100)
    assert "interrupted" not in shown(report(), 100)


def test_machine_versions_date_and_seed_are_shown() -> None:
    first, second, third = machine_lines(report())
    assert first == "Machine: NVIDIA H200, 132 SMs, 139.8 GiB, driver 580.1"
    assert "CuPy 14.2.0" in second and "commit 0123456789ab" in second and "torch 2.11.0" in second
    assert third == "Date: 2026-11-22 16:38 UTC; seed 5"
    assert machine_lines(report(machine={}))[2] == "Date: unknown; seed 5"
    assert "median of 5 windows of at least 10 ms" in " ".join(shown(report(), 120).split())


# -------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize("with_rich", [True, False])
@pytest.mark.parametrize("width", [60, 80, 100, 160, 240])
def test_every_line_fits(width: int, with_rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    text = shown(report(WHOLE), width)
    longest = max(text.splitlines(), key=lambda line: len(line.rstrip()))
    assert len(longest.rstrip()) <= width, longest
    assert "…" not in text and "..." not in text, "nothing is cut"
    assert ("─" in text) == with_rich


@pytest.mark.parametrize("width", [100, 160])
def test_the_usual_widths_show_all_that_counts_in_one_table(width: int) -> None:
    made = [*WHOLE, *(row(case, "cutlass", 99.0) for case in suite("dense"))]
    made = [one for one in made if (one.contender, one.status) != ("cutlass", "absent")]
    made += [row(case, "cublaslt tensor", 99.0) for case in suite("dense")]
    text = shown(report(made), width)
    assert "continued" not in text
    head = next(line for line in text.splitlines() if line.startswith("case"))
    for word in ("time", "spread", "TFLOPS", "GB/s", "block", "tensor", "deep_gemm", "cutlass"):
        assert word in head, word
    assert head.rstrip().endswith("floor") or width > 100
    assert ("MHz" in head) == (width == 160)
    line = next(line for line in text.splitlines() if line.startswith("4096x24576x1536 pdl"))
    assert line.split()[:8] == ["4096x24576x1536", "pdl", "98.76", "us", "1.0%", *line.split()[5:8]]


def test_a_narrow_terminal_gets_parts_that_name_the_cases() -> None:
    text = shown(report(), 50)
    assert "dense, continued" in text
    starts = [line for line in text.splitlines() if line.startswith("64x4096x7168 pdl")]
    assert len(starts) >= 2 and all(re.search(r"\d.*\d", one[16:]) for one in starts)
    assert "…" not in shown(report(WHOLE), 30), "too narrow even for one column: broken, not cut"


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    assert "\x1b" not in shown(mixed(), 160)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(mixed(), 160)
    for cell, style in (("WRONG", "1;31"), ("0.90", "31"), ("absent", "2")):
        assert re.search(rf"\x1b\[{style}m *{cell}\x1b", coloured), cell
    assert not re.search(r"\x1b\[31m *1\.20", coloured)


# -------------------------------------------------------------------------------------- Markdown


def test_markdown_has_the_same_content() -> None:
    text = markdown(mixed())
    for table in tables(mixed()):
        assert f"## {table.title}" in text
        assert markdown_table(table.columns) in text
    assert all(f"- {note}" in text for note in notes(mixed()))
    assert all(line in text for line in machine_lines(mixed()))
    bars = {}
    for line in text.splitlines():
        if line.startswith("|"):
            bars.setdefault(line.count("|"), []).append(line)
    assert sum(map(len, bars.values())) == 3 + 2 + 1 + 2, "heads, rules and rows of two tables"


def test_markdown_escapes_bars() -> None:
    text = markdown_table([Column(("a", "b"), ("x|y",), right=False), Column(("c",), ("1",))])
    assert text.splitlines() == ["| a b | c |", "| --- | ---: |", r"| x\|y | 1 |"]


def test_quantize_cases_keep_their_detail() -> None:
    case = Case("quantize", 4096, 0, 7168, 0, "bfloat16 1x128 pow2")
    made = report([row(case, "cpgemm"), row(case, "memory floor", 9.0)])
    assert column(made, "case") == ("4096x7168 bfloat16 1x128 pow2",)
    assert column(made, "of floor") == ("90% mem",)
