"""Tables and progress bars: with rich where it is installed, plain text where it is not."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

__all__ = ["positive", "print_table", "progress"]

_NARROWEST = 20  # columns of a terminal that a wrapped cell gets at least


def positive(text: str) -> int:
    """A command line's positive integer, for ``argparse``'s ``type``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text!r}")
    return value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()
) -> None:
    """Print ``rows`` under ``columns`` on stdout; columns named in ``numbers`` align right.

    On a terminal, text columns after the first wrap; names and numbers never do.  Where those alone
    are too wide, plain lines are printed, which the terminal breaks and the user can widen.
    """
    widths = [
        max([len(column), *(len(row[at]) for row in rows)]) for at, column in enumerate(columns)
    ]
    fixed = [at == 0 or column in numbers for at, column in enumerate(columns)]
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
    for line in (columns, *rows):
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr over ``total`` steps; call what it yields once a step, with its name.

    Shown on a terminal with rich only, so that logs and pipes stay clean.
    """
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
