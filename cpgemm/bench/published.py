"""DeepGEMM's published tables side by side with a report of this benchmark, as a page.

``publish`` writes the page, the report and the plots into a folder; ``disagreements`` says where a
page and a report differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from cpgemm.bench.published_deepgemm import COMMITS, TABLE, Figures, Published, bytes_counted
from cpgemm.bench.ratios import counterpart, floor_of, speedup
from cpgemm.bench.report import (
    Column,
    format_time,
    machine_lines,
    markdown,
    markdown_table,
    method_line,
    notes,
)
from cpgemm.bench.result import Report, Row, write_report, write_text

__all__ = ["JSON_NAME", "PAGE_NAME", "disagreements", "page", "publish"]

PAGE_NAME, JSON_NAME, TABLES_NAME = "published.md", "bench.json", "bench.md"

_TITLES = {
    "dense": "Dense", "contiguous": "Grouped, contiguous", "masked": "Grouped, masked"
}  # fmt: skip
_TREE = "https://github.com/deepseek-ai/DeepGEMM/blob"
_IMAGE = re.compile(r'(?:srcset|src)="([^"]+)"')
_NONE = "not measured"


def publish(report: Report, folder: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.md`` (all rows), ``published.md`` and the plots.

    Returns their paths.  Raises ``MissingDependencyError`` without matplotlib.
    """
    from cpgemm.bench.plots import write_plots

    paths = [folder / name for name in (JSON_NAME, TABLES_NAME, PAGE_NAME)]
    write_report(report, paths[0])
    plots = list(write_plots(report, folder, formats=("png",)))
    write_text(paths[1], markdown(report))
    pictures = [path.name for path in plots if path.suffix == ".png"]
    write_text(paths[2], page(report, pictures))
    return [*paths, *plots]


def disagreements(text: str, report: Report) -> list[str]:
    """Lines of a page that are not what ``page`` makes of ``report``; the page's own pictures are
    taken as they are.  Empty: they agree.
    """
    pictures = list(dict.fromkeys(_IMAGE.findall(text)))
    wanted = page(report, pictures).splitlines()
    return [
        f"line {at}: the page has {got!r}, the report makes {want!r}"
        for at, (got, want) in enumerate(itertools.zip_longest(text.splitlines(), wanted), 1)
        if got != want
    ]


def page(report: Report, pictures: Sequence[str] = ()) -> str:
    """The page: three tables, what the first edition had otherwise, pictures beside it."""
    gpu = report.machine.get("gpu") or "a machine without a GPU"
    parts = [
        f"# DeepGEMM's published tables, and cpgemm on {gpu}",
        f"Made from [{JSON_NAME}]({JSON_NAME}) by `python -m cpgemm bench --from {JSON_NAME} "
        f"--publish .`; do not edit. All rows: [{TABLES_NAME}]({TABLES_NAME}).",
        _EXPLANATION.format(
            first=f"{_TREE}/{COMMITS['first']}/README.md",
            last=f"{_TREE}/{COMMITS['last']}/README.md",
        ),
        "  \n".join(machine_lines(report)),
    ]
    for suite, title in _TITLES.items():
        rows = [row for row in TABLE if row.case.suite == suite]
        parts += [f"## {title}", markdown_table(_columns(report, rows))]
    parts += ["## What the first edition had", _FIRST, markdown_table(_first_columns())]
    if pictures:
        parts += ["## Pictures", "\n\n".join(_pictures(pictures))]
    cases = {row.case for row in TABLE}
    said = notes(
        Report(report.machine, report.seed, report.method,
               [row for row in report.rows if row.case in cases], report.complete)
    )  # fmt: skip
    if said:
        parts += ["## What is lacking", "\n".join(f"- {text}" for text in said)]
    return "\n\n".join([*parts, method_line(report)]) + "\n"


_EXPLANATION = """\
The columns "published" repeat the README of DeepGEMM of 9 April 2025 ([last edition]({last}) with
tables): one H800 SXM5, NVCC 12.8; "over CUTLASS" there is over an implementation of DeepSeek's own
with CUTLASS 3.6. The columns "cpgemm" are this run's. To be read with care:

- The GPUs differ: an H800 computes like an H200 and has slower memory. Only ratios to a baseline on
  the same GPU compare kernels; "over deep_gemm" is to DeepGEMM itself in this run.
- The baselines differ: this run's is CUTLASS's own block-scaled collective for Hopper.
- The clocks differ: the published times are of the kernel alone, each call after a fill of 8 GB, in
  which the tensor cores rest. Ours are of calls back to back in a CUDA graph, gaps included.
- GB/s counts both operands and the result on both sides, no scales.

"PDL": with programmatic dependent launch. "over": the other's time over ours. "of floor": the time
of the slower floor over ours (mem: a kernel that only moves the data, mma: one that only
multiplies)."""
_FIRST = (
    "Rows of the [first edition]({}) (25 February 2025) that differ from the last; the others are "
    "the same.".format(f"{_TREE}/{COMMITS['first']}/README.md")
)


def _columns(report: Report, published: Sequence[Published]) -> list[Column]:
    lines = [(one, report.of(one.case)) for one in published]
    plain = [_ours(rows, pdl=False) for _, rows in lines]
    with_pdl = [_ours(rows, pdl=True) for _, rows in lines]
    ours = [one or other for one, other in zip(plain, with_pdl, strict=True)]
    columns = [
        *_sizes(published),
        *_figures("published", [one.last for one in published]),
        Column(("cpgemm time",), tuple(map(_time, plain))),
        Column(("TFLOPS",), tuple(_rate(row) for row in plain)),
    ]
    if any(row and row.kernel_us for row in plain):
        cells = tuple(_rate(row, kernel_alone=True) for row in plain)
        columns.append(Column(("TFLOPS of the kernel alone",), cells))
    columns += [
        Column(("TFLOPS with PDL",), tuple(map(_rate, with_pdl))),
        Column(("GB/s",), tuple(map(_bandwidth, ours))),
    ]
    for head, base in (("over CUTLASS", "cutlass"), ("over deep_gemm", "deep_gemm")):
        cells = tuple(_over(row, rows, base) for row, (_, rows) in zip(ours, lines, strict=True))
        columns.append(Column((head,), cells))
    floors = [floor_of(rows, row) for row, (_, rows) in zip(ours, lines, strict=True)]
    cells = tuple(f"{floor.fraction:.0%} {floor.kind}" if floor else "" for floor in floors)
    return [*columns, Column(("of floor",), cells)]


def _first_columns() -> list[Column]:
    changed = [row for row in TABLE if row.first != row.last]
    return [
        Column(("layout",), tuple(row.case.suite for row in changed), right=False),
        *_sizes(changed),
        *_figures("published", [row.first for row in changed]),
    ]


def _sizes(rows: Sequence[Published]) -> list[Column]:
    columns = [
        Column((name,), tuple(str(getattr(row.case, field)) for row in rows))
        for name, field in (("M", "m"), ("N", "n"), ("K", "k"))
    ]
    if any(row.case.groups for row in rows):
        groups = Column(("groups",), tuple(str(row.case.groups or "-") for row in rows))
        columns.insert(0, groups)
    return columns


def _figures(whose: str, figures: Sequence[Figures]) -> list[Column]:
    return [
        Column((f"{whose} TFLOPS",), tuple(str(one.tflops) for one in figures)),
        Column((f"{whose} GB/s",), tuple(str(one.gbs) for one in figures)),
        Column((f"{whose} over CUTLASS",), tuple(f"{one.speedup:.1f}" for one in figures)),
    ]


def _ours(rows: Sequence[Row], *, pdl: bool) -> Row | None:
    found = [row for row in rows if row.role == "ours" and row.pdl == pdl]
    return found[0] if found else None


def _time(row: Row | None) -> str:
    if row is None:
        return _NONE
    return format_time(row.us) if row.us else row.status


def _rate(row: Row | None, *, kernel_alone: bool = False) -> str:
    us = row and (row.kernel_us if kernel_alone else row.us)
    return f"{row.case.flops / us / 1e6:.0f}" if row and us else ""


def _bandwidth(row: Row | None) -> str:
    return f"{bytes_counted(row.case) / row.us / 1e3:.0f}" if row and row.us else ""


def _over(ours: Row | None, rows: Sequence[Row], base: str) -> str:
    other = counterpart(rows, base, bool(ours and ours.pdl))
    if ours is None or other is None:
        return ""
    ratio = speedup(ours, other)
    if ratio is not None:
        return f"{ratio:.2f}"
    return "" if other.status == "ok" else other.status


def _pictures(names: Sequence[str]) -> list[str]:
    """One ``picture`` for each pair of a light and a dark image; the reader's theme chooses."""
    shown = []
    for name in names:
        stem, _, ending = name.rpartition(".")
        if stem.endswith("dark") and f"{stem[:-4]}light.{ending}" in names:
            continue
        dark = f"{stem[:-5]}dark.{ending}" if stem.endswith("light") else ""
        text = stem.removesuffix("light").strip("-_. ").replace("_", " ").replace("-", " ")
        image = f'<img src="{name}" alt="{text}">'
        if dark in names:
            source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            image = f"<picture>{source}{image}</picture>"
        shown.append(image)
    return shown
