"""Tables and progress bars: with rich where it is installed, plain text where it is not.

In a notebook rich would print tables as HTML and need ipywidgets for bars: tables are plain text
there, and bars are displays of our own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

__all__ = ["counted", "in_notebook", "positive", "print_table", "progress", "table_text"]

_NARROWEST = 20  # columns of a terminal that a wrapped cell gets at least


def in_notebook() -> bool:
    """Whether output goes to a cell of a notebook: IPython runs here within a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def positive(text: str) -> int:
    """A command line's positive integer, for ``argparse``'s ``type``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text!r}")
    return value


def counted(count: int, noun: str) -> str:
    """``1 shape``, ``2 shapes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """Print ``rows`` under ``columns`` on stdout; columns named in ``numbers`` align right.

    On a terminal, text columns after the first wrap, but for those named in ``whole``; names and
    numbers never do.  Where those alone are too wide, plain lines are printed, which the terminal
    breaks and the user can widen.
    """
    widths = _widths(columns, rows)
    fixed = [at == 0 or column in (*numbers, *whole) for at, column in enumerate(columns)]
    if sys.stdout.isatty() and _has_rich():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        needed = sum(
            (width if stays else min(width, _NARROWEST)) + 2
            for width, stays in zip(widths, fixed, strict=True)
        )
        if needed <= console.width:
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
            for column, stays in zip(columns, fixed, strict=True):
                justify: Literal["left", "right"] = "right" if column in numbers else "left"
                table.add_column(column, justify=justify, no_wrap=stays)
            for row in rows:
                # Text, not markup: a cell such as "cpgemm[cuda12]" is no style.
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
            return
    print(table_text(columns, rows, numbers=numbers))


def table_text(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()
) -> str:
    """The table as plain lines; columns named in ``numbers`` align right."""
    widths = _widths(columns, rows)
    lines = []
    for line in (columns, *rows):
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max([len(column), *(len(row[at]) for row in rows)]) for at, column in enumerate(columns)
    ]


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar over ``total`` steps; call what it yields once a step, with its name.

    On a terminal with rich: on stderr, gone when all is done.  In a notebook: one display under the
    cell, updated in place, of which a line stays.  Elsewhere nothing, so that logs and pipes stay
    clean.
    """
    if in_notebook():
        from cpgemm.displays.progress import NotebookBar

        shown = NotebookBar(label, total)
        try:
            yield shown
        finally:
            shown.close()
        return
    if not (sys.stderr.isatty() and _has_rich()):
        yield lambda _name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, step="")
        yield lambda name: bar.update(task, advance=1, step=name)


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True
