"""DeepGEMM's published tables, and the page that sets them beside a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from bench_reports import bad, report, row, rows

from cpgemm.bench import published
from cpgemm.bench.published import JSON_NAME, PAGE_NAME, disagreements, page, publish
from cpgemm.bench.published_deepgemm import COMMITS, TABLE, Published, bytes_counted
from cpgemm.bench.report import format_time
from cpgemm.bench.result import Case, Report, read_report

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
KEPT = sorted(path.parent for path in FOLDER.glob(f"*/{JSON_NAME}"))
PICTURES = ("speedup_large_light.png", "roofline_light.png", "roofline_dark.png")


def whole(**fields: Any) -> Report:
    made = [one for line in TABLE for one in rows(line.case, line.case.flops / 1e9)]
    return report(made, **fields)


def figures(text: str, one: Published) -> list[str]:
    """The cells of a case in the page's tables, without its sizes."""
    sizes = [str(size) for size in (one.case.groups, one.case.m, one.case.n, one.case.k) if size]
    titles = {"dense": "Dense", "contiguous": "Grouped, contiguous", "masked": "Grouped, masked"}
    section = text.partition(f"## {titles[one.case.suite]}\n")[2].partition("\n## ")[0]
    lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return next(cells[len(sizes) :] for cells in lines if cells[: len(sizes)] == sizes)


# ----------------------------------------------------------------------------- the published data


def test_the_tables_are_whole() -> None:
    counts = {
        name: sum(one.case.suite == name for one in TABLE)
        for name in ("dense", "contiguous", "masked")
    }
    assert counts == {"dense": 18, "contiguous": 4, "masked": 6}
    assert len({one.case for one in TABLE}) == 28
    assert {one.case.m for one in TABLE if one.case.suite == "dense"} == {64, 128, 4096}


@pytest.mark.parametrize("edition", ["first", "last"])
def test_both_published_rates_are_of_one_time(edition: str) -> None:
    """TFLOPS and GB/s of a row were computed from one time: a slip of the pen shows here."""
    for one in TABLE:
        said = getattr(one, edition)
        lowest, highest = ((said.tflops + half) / one.case.flops for half in (-0.5, 0.5))
        gbs = [bytes_counted(one.case) * rate * 1e3 for rate in (lowest, highest)]
        assert gbs[0] - 0.5 <= said.gbs <= gbs[1] + 0.5, one


def test_some_rows_as_published() -> None:
    by_case = {one.case: one for one in TABLE}
    deep = by_case[Case("dense", 4096, 7168, 16384)]
    assert deep.first == (1358, 343, 1.2) and deep.last == (1520, 384, 1.4)
    assert by_case[Case("dense", 64, 2112, 7168)].last == (206, 1688, 2.7)
    assert by_case[Case("contiguous", 4096, 4096, 7168, 8)].last == (1346, 516, 1.3)
    assert by_case[Case("masked", 256, 7168, 2048, 4)].last == (815, 2047, 1.2)
    changed = [one for one in TABLE if one.first != one.last]
    assert {(one.case.suite, one.case.m) for one in changed} == {
        ("dense", 4096), ("contiguous", 8192), ("contiguous", 4096)
    }  # fmt: skip
    assert len(changed) == 10 and all(re.fullmatch("[0-9a-f]{40}", c) for c in COMMITS.values())


# ---------------------------------------------------------------------------------------- the page


def test_every_published_row_stands_beside_ours() -> None:
    text = page(whole())
    for one in TABLE:
        cells = figures(text, one)
        assert cells[:3] == [str(one.last.tflops), str(one.last.gbs), f"{one.last.speedup:.1f}"]
        us = one.case.flops / 1e9  # 1000 TFLOPS
        assert cells[3:7] == [format_time(us), "1000", "1111", "1250"]
        assert cells[7] == f"{bytes_counted(one.case) / us / 1e3:.0f}", "counted as published"
        assert cells[8:] == ["absent", "1.20", "70% mma"]


def test_the_page_names_source_machine_and_caveats() -> None:
    text = page(whole())
    assert all(f"/blob/{commit}/README.md" in text for commit in COMMITS.values())
    for words in ("NVIDIA H200", "driver 580.1", "seed 5", "H800", "over deep_gemm", "CUTLASS 3.6"):
        assert words in text, words
    assert "absent: cutlass: nvcc is not on PATH (28 rows)" in text
    first = text.partition("## What the first edition had")[2].partition("\nMethod")[0]
    assert first.count("\n| ") == 12 and "| 1358 | 343 | 1.2 |" in first


def test_wrong_and_missing_rows_have_no_figures() -> None:
    kept = [one for one in whole().rows if one.case not in (TABLE[0].case, TABLE[1].case)]
    made = report([*kept, bad(TABLE[0].case, "cpgemm", "wrong", "zeros", error=0.5)])
    text = page(made)
    assert figures(text, TABLE[0])[3:] == ["wrong", *[""] * 7]
    assert figures(text, TABLE[1])[3:] == ["not measured", *[""] * 7]
    assert "WRONG: dense 64x2112x7168, cpgemm: relative error 0.50000; zeros" in text
    assert "interrupted" in page(whole(complete=False))


def test_a_run_with_pdl_alone() -> None:
    made = [one for one in whole().rows if one.pdl or one.role != "ours"]
    cells = figures(page(report(made)), TABLE[0])
    assert cells[3:6] == ["not measured", "", "1250"] and cells[-1] in ("87% mma", "88% mma")


def test_rows_of_other_sizes_change_nothing() -> None:
    more = [*whole().rows, row(Case("dense", 7, 8, 16), "cpgemm")]
    assert page(report(more)) == page(whole())


def test_pictures_follow_the_theme() -> None:
    text = page(whole(), PICTURES)
    assert text.count("<img ") == 2 and text.count("<picture>") == 1
    assert 'srcset="roofline_dark.png"><img src="roofline_light.png" alt="roofline">' in text
    assert '<img src="speedup_large_light.png" alt="speedup large">' in text
    assert "Pictures" not in page(whole())


def test_page_and_report_agree_or_not() -> None:
    text = page(whole(), PICTURES)
    assert disagreements(text, whole()) == []
    assert disagreements(text.replace("| 1000 |", "| 1001 |", 1), whole()) != []
    slower = [*whole().rows]
    slower[0] = row(slower[0].case, "cpgemm", 2 * (slower[0].us or 0))
    found = disagreements(text, report(slower))
    assert len(found) == 1 and re.match(r"line \d+: the page has '\| 64 \| 2112 \| 7168", found[0])
    assert "line 4" in disagreements("\n".join(text.splitlines()[:4]), whole())[0]


def test_publish_writes_what_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []

    def write_plots(_report: Report, folder: Path, **_options: object) -> list[Path]:
        drawn.extend(folder / name for name in (*PICTURES, "roofline_light.svg"))
        for path in drawn:
            path.touch()
        return drawn

    monkeypatch.setattr("cpgemm.bench.plots.write_plots", write_plots)
    written = publish(whole(), tmp_path / "h200")
    assert {path.name for path in written} == {
        PAGE_NAME, JSON_NAME, "bench.md", *(path.name for path in drawn)
    }  # fmt: skip
    assert all(path.exists() for path in written)
    text = (tmp_path / "h200" / PAGE_NAME).read_text(encoding="utf-8")
    assert disagreements(text, read_report(tmp_path / "h200" / JSON_NAME)) == []
    assert "roofline_light.svg" not in text and "roofline_light.png" in text
    assert published.PAGE_NAME == "published.md"


# ----------------------------------------------------------------------- what is kept in this tree

NONE_KEPT = pytest.param(None, marks=pytest.mark.skip(reason=f"no {JSON_NAME} in docs/benchmarks"))


@pytest.mark.parametrize("folder", KEPT or [NONE_KEPT], ids=lambda path: path and path.name)
def test_the_kept_page_says_what_the_kept_json_holds(folder: Path) -> None:
    made = read_report(folder / JSON_NAME)
    text = (folder / PAGE_NAME).read_text(encoding="utf-8")
    assert disagreements(text, made) == []
    assert made.complete and made.machine["gpu"], "a page is made of a complete run on a GPU"
    for one in TABLE:
        ours = [line for line in made.of(one.case) if line.role == "ours"]
        assert ours and all(line.status == "ok" for line in ours), one.case.name
    for name in re.findall(r'(?:src|srcset)="([^"]+)"', text):
        assert (folder / name).exists(), name
