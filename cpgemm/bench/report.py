"""A report as tables: for the terminal, with rich where it is installed, and as Markdown."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from cpgemm.bench.ratios import base_name, counterpart, floor_of, peers_of, speedup
from cpgemm.bench.result import Case, Report, Row
from cpgemm.machine import MachineRecord

__all__ = [
    "Column", "Table", "format_time", "machine_lines", "markdown", "method_line", "notes",
    "print_report", "print_table", "report_text", "tables",
]  # fmt: skip

LEGEND = (
    "time: median per call, launch gaps included; spread: (largest - smallest window) / median. "
    "GB/s: bytes that must move at least (operands, scales, result) over the time. over X: X's "
    "time over ours, above 1 ours is faster; a row with pdl stands against X with PDL where X has "
    "it. of floor: time of the slower floor over ours; mem: a kernel that only moves the data, "
    "mma: one that only multiplies."
)
_MOST_NOTES = 20
_SHOUTED = {"wrong": "WRONG", "failed": "FAILED", "absent": "absent"}


@dataclass(frozen=True)
class Column:
    """A column of texts: ``head`` is words that stand below each other on a terminal.

    ``optional`` columns are left out where the terminal is too narrow, the highest first; 0 stays.
    """

    head: tuple[str, ...]
    cells: tuple[str, ...]
    right: bool = True
    optional: int = 0

    @property
    def width(self) -> int:
        """Characters of the widest text."""
        return max(map(len, (*self.head, *self.cells)))


@dataclass(frozen=True)
class Table:
    """The rows of one suite; the first column names the case."""

    title: str
    columns: tuple[Column, ...]


def tables(report: Report) -> list[Table]:
    """One table for each suite: a line for each of our contenders of each case."""
    names = dict.fromkeys(case.suite for case in report.cases())
    return [_table(report, name) for name in names]


def _table(report: Report, name: str) -> Table:
    lines: list[tuple[Case, Row | None, list[Row]]] = []
    for case in report.cases():
        if case.suite == name:
            rows = report.of(case)
            lines += [(case, row, rows) for row in rows if row.role == "ours"] or [
                (case, None, rows)
            ]
    ours = [line[1] for line in lines]
    columns = [
        Column(("case",), tuple(_label(case, row) for case, row, _ in lines), right=False),
        Column(("time",), tuple(map(_time, ours))),
        Column(("spread",), _each(ours, "spread_pct", "{:.1f}%".format)),
        Column(("kernel", "time"), _each(ours, "kernel_us", format_time), optional=1),
        Column(("TFLOPS",), _each(ours, "tflops", _rate)),
        Column(("GB/s",), _each(ours, "gbs", "{:.0f}".format)),
    ]
    for peer in peers_of(report):
        found = [counterpart(rows, peer, bool(row and row.pdl)) for _, row, rows in lines]
        if any(other and other.status != "absent" for other in found):
            cells = tuple(
                _against(row, other) for (_, row, _), other in zip(lines, found, strict=True)
            )
            columns.append(Column(("over", *peer.split()), cells))
    floors = [floor_of(rows, row) for _, row, rows in lines]
    columns += [
        Column(
            ("of", "floor"),
            tuple(f"{floor.fraction:.0%} {floor.kind}" if floor else "" for floor in floors),
        ),
        Column(("MHz",), _each(ours, "clock_mhz", "{:.0f}".format), optional=3),
        Column(("W",), _each(ours, "power_w", "{:.0f}".format), optional=4),
        Column(("error",), _each(ours, "error", "{:.5f}".format), optional=2),
        Column(("kernel",), tuple(row.kernel if row else "" for row in ours), False, 5),
    ]
    return Table(name, tuple(c for at, c in enumerate(columns) if at < 2 or any(c.cells)))


def _label(case: Case, row: Row | None) -> str:
    """The case without its suite, which is the table's title; what else tells our lines apart."""
    name = case.name.removeprefix(case.suite).strip()
    extra = row.contender.removeprefix("cpgemm").strip() if row else "(peers only)"
    return f"{name} {extra}".strip()


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return format_time(row.us) if row.us else _SHOUTED.get(row.status, row.status)


def _against(ours: Row | None, other: Row | None) -> str:
    if other is None:
        return ""
    if other.status != "ok":
        return _SHOUTED[other.status]
    ratio = speedup(ours, other)
    return "" if ratio is None else f"{ratio:.2f}"


def _each(rows: Sequence[Row | None], name: str, text: Callable[[float], str]) -> tuple[str, ...]:
    values = [None if row is None else getattr(row, name) for row in rows]
    return tuple("" if value is None else text(value) for value in values)


def _rate(tflops: float) -> str:
    return f"{tflops:.0f}" if tflops >= 99.5 else f"{tflops:.1f}"


def format_time(us: float) -> str:
    """Three or four digits and a unit: ``7.05 us``, ``231.9 us``, ``10.80 ms``, ``2.30 s``."""
    for unit, factor in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        value = us / factor
        if value < 999.95 or unit == "s":
            break
    return f"{value:.2f} {unit}" if value < 99.995 else f"{value:.1f} {unit}"


# ------------------------------------------------------------------------------------ what is said


def notes(report: Report) -> list[str]:
    """What no number shows: wrong and failed rows, what is absent and why, an interruption."""
    bad = [
        f"{_SHOUTED[row.status]}: {row.case.name}, {row.contender}: {_why(row)}"
        for row in report.rows
        if row.status in ("wrong", "failed")
    ]
    if len(bad) > _MOST_NOTES:
        bad[_MOST_NOTES:] = [f"and {len(bad) - _MOST_NOTES} more wrong or failed rows"]
    absent: dict[tuple[str, str], int] = {}
    for row in report.rows:
        if row.status == "absent":
            key = (base_name(row), row.reason or "no reason given")
            absent[key] = absent.get(key, 0) + 1
    lines = bad + [
        f"absent: {name}: {why}" + (f" ({count} rows)" if count > 1 else "")
        for (name, why), count in absent.items()
    ]
    if not report.complete:
        asked = report.method.get("cases")
        of = f" of {asked}" if isinstance(asked, int) else ""
        lines.append(f"The run was interrupted: {len(report.cases())}{of} cases.")
    return lines


def _why(row: Row) -> str:
    parts = [] if row.error is None else [f"relative error {row.error:.5f}"]
    return "; ".join([*parts, *filter(None, (row.reason, row.kernel))]) or "no reason given"


def machine_lines(report: Report) -> list[str]:
    """Machine; software; date and seed."""
    fields: dict[str, Any] = {
        one.name: report.machine.get(one.name) for one in dataclasses.fields(MachineRecord)
    }
    record = MachineRecord(**fields)
    torch = f", torch {record.torch}" if record.torch else ""
    return [
        f"Machine: {record.hardware}",
        f"Software: {record.software}{torch}",
        f"Date: {record.date or 'unknown'}; seed {report.seed}",
    ]


def method_line(report: Report) -> str:
    """How the times were taken, from what the report says of it."""
    windows, length = report.method.get("windows"), report.method.get("window_ms")
    how = f", median of {windows} windows of at least {length:g} ms" if windows and length else ""
    return (
        "Method: CUDA graphs over rotating operands, contenders of a case interleaved in random "
        f"order{how}. Only ratios within a case mean something. See docs/benchmarks/method.md."
    )


# ------------------------------------------------------------------------------------ terminal


def print_report(
    report: Report,
    *,
    width: int | None = None,
    file: TextIO | None = None,
    plain: bool = False,
) -> None:
    """Print all tables and what is to be said, on stdout by default, for ``width`` columns.

    ``plain``: without rich, whether it is installed or not.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    file = file or sys.stdout
    for table in tables(report):
        print_table(table, width, file, plain=plain)
    texts = [*notes(report), LEGEND, *machine_lines(report)]
    if report.method.get("windows"):
        texts.insert(-3, method_line(report))
    for text in texts:
        print(textwrap.fill(text, min(width, 120), subsequent_indent="  "), file=file)


def report_text(report: Report, width: int = 120) -> str:
    """What ``print_report`` prints, as plain text."""
    file = io.StringIO()
    print_report(report, width=width, file=file, plain=True)
    return file.getvalue().rstrip("\n")


def _parts(table: Table, width: int) -> Iterator[Table]:
    """The table without optional columns, then in parts that name the cases, to fit ``width``."""
    columns = list(table.columns)
    while _total(columns, 2) > width and any(column.optional for column in columns):
        columns.remove(max(columns, key=lambda column: column.optional))
    first, rest = columns[0], columns[1:]
    title = table.title
    while rest:
        count = len(rest)
        while count > 1 and _total([first, *rest[:count]]) > width:
            count -= 1
        yield Table(title, (first, *rest[:count]))
        rest, title = rest[count:], f"{table.title}, continued"


def _total(columns: Sequence[Column], gap: int = 1) -> int:
    return sum(column.width for column in columns) + gap * (len(columns) - 1)


def print_table(table: Table, width: int, file: TextIO, *, plain: bool = False) -> None:
    """Print one table, in parts where it is too wide; with rich where it is installed."""
    for part in _parts(table, width):
        _print_part(part, width, file, plain)


def _print_part(table: Table, width: int, file: TextIO, plain: bool) -> None:
    gap = 2 if _total(table.columns, 2) <= width else 1
    width = max(width, _total(table.columns, gap))  # rather broken by the terminal than cut
    try:
        from rich.console import Console
    except ImportError:
        plain = True
    if plain:
        _print_plain(table, gap, file)
        return
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    # The box itself puts one blank between columns.
    shown = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        show_edge=False, padding=(0, gap - 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for column in table.columns:
        head = Text("\n".join(column.head))
        justify: Any = "right" if column.right else "left"
        shown.add_column(head, justify=justify, no_wrap=True, vertical="bottom")
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        heads = [column.head[0] for column in table.columns]
        shown.add_row(*(Text(c, _style(h, c)) for h, c in zip(heads, cells, strict=True)))
    # In a notebook rich would show HTML whatever the file.
    Console(file=file, width=width, force_jupyter=False).print(shown, "")


def _style(head: str, cell: str) -> str:
    if cell in ("WRONG", "FAILED"):
        return "bold red"
    if head == "over" and cell[:1].isdigit() and float(cell) < 1:
        return "red"
    return "dim" if cell == "absent" else ""


def _print_plain(table: Table, gap: int, file: TextIO) -> None:
    depth = max(len(column.head) for column in table.columns)
    heads = [("",) * (depth - len(column.head)) + column.head for column in table.columns]
    lines = [*zip(*heads, strict=True), *zip(*(c.cells for c in table.columns), strict=True)]
    print(table.title, file=file)
    for cells in lines:
        aligned = [
            cell.rjust(column.width) if column.right else cell.ljust(column.width)
            for cell, column in zip(cells, table.columns, strict=True)
        ]
        print((" " * gap).join(aligned).rstrip(), file=file)
    print(file=file)


# ------------------------------------------------------------------------------------ Markdown


def markdown(report: Report) -> str:
    """All tables with all columns, and what the terminal says beside them."""
    parts = ["# Benchmark"]
    for table in tables(report):
        parts += [f"## {table.title}", markdown_table(table.columns)]
    said = notes(report)
    if said:
        parts.append("\n".join(f"- {text}" for text in said))
    parts += [LEGEND, method_line(report), "  \n".join(machine_lines(report))]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[Column]) -> str:
    """The lines of a Markdown table."""
    heads = [" ".join(column.head) for column in columns]
    rule = ["---:" if column.right else "---" for column in columns]
    rows = [heads, rule, *zip(*(column.cells for column in columns), strict=True)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows
    )
