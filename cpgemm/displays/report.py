"""A benchmark's ``Report`` in a notebook: the tables of the terminal, with all columns."""

from __future__ import annotations

from cpgemm.bench.report import LEGEND, Table, machine_lines, method_line, notes, tables
from cpgemm.bench.result import Report
from cpgemm.console import counted
from cpgemm.displays.html import RED, Markup, card, element, folded, note, table

__all__ = ["report_html"]

_BAD = f"color:{RED};font-weight:600"


def report_html(report: Report) -> str:
    """The display of a report."""
    counts = f"{counted(len(report.cases()), 'case')}, {counted(len(report.rows), 'row')}"
    state = "" if report.complete else ", interrupted"
    said = [note(text) for text in notes(report)]
    under = [note(text) for text in (LEGEND, method_line(report), *machine_lines(report))]
    return card(
        "Benchmark",
        f"{counts}{state}",
        *(_table(one) for one in tables(report)),
        *said,
        folded("what the columns mean, and the machine", *under),
    )


def _table(one: Table) -> Markup:
    heads = [" ".join(column.head) for column in one.columns]
    rows = [
        [_cell(head, text) for head, text in zip(heads, cells, strict=True)]
        for cells in zip(*(column.cells for column in one.columns), strict=True)
    ]
    numbers = [head for head, column in zip(heads, one.columns, strict=True) if column.right]
    return table(heads, rows, numbers=numbers, caption=one.title)


def _cell(head: str, text: str) -> object:
    if text in ("WRONG", "FAILED"):
        return element("span", text, style=_BAD)
    if head.startswith("over ") and text[:1].isdigit() and float(text) < 1:
        return element("span", text, style=f"color:{RED}")
    return text
