"""What differs between two kernels: source, resources, instructions."""

from __future__ import annotations

import difflib
import functools
import html
from collections.abc import Iterator, Mapping, Sequence

from cpgemm.console import table_text
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.kernel_view import Kernel

__all__ = ["KernelDifference", "diff"]

Row = tuple[str, str, str]


class KernelDifference:
    """The differences of kernel ``a`` and kernel ``b``, each worked out when it is asked for.

    - ``source``: unified difference of the rendered texts; empty when they are equal
    - ``resources``: (name, in a, in b) of each resource that differs
    - ``counts``: (kind, in a, in b) of each count that differs, in the kernel as a whole
    - ``main_loop``: the same for one turn of the main loops
    """

    def __init__(self, a: Kernel, b: Kernel) -> None:
        self.a, self.b = a, b

    @functools.cached_property
    def source(self) -> str:
        """Unified difference of the rendered texts; empty when they are equal."""
        lines = difflib.unified_diff(
            self.a.source.splitlines(),
            self.b.source.splitlines(),
            self.a.name,
            self.b.name,
            lineterm="",
        )
        return "\n".join(lines)

    @functools.cached_property
    def resources(self) -> tuple[Row, ...]:
        """(name, in a, in b) of the resources that differ."""
        pairs = zip(self.a.resources.rows(), self.b.resources.rows(), strict=True)
        return tuple((name, one, other) for (name, one), (_, other) in pairs if one != other)

    @functools.cached_property
    def counts(self) -> tuple[Row, ...]:
        """(kind, in a, in b) of the counts that differ, over the whole kernel."""
        return _changed(self.a.counts.whole, self.b.counts.whole)

    @functools.cached_property
    def main_loop(self) -> tuple[Row, ...]:
        """(kind, in a, in b) of the counts that differ, in one turn of the main loop."""
        return _changed(self.a.counts.main_loop, self.b.counts.main_loop)

    def _tables(self) -> Iterator[tuple[str, tuple[Row, ...]]]:
        yield "resource", self.resources
        yield "instructions", self.counts
        yield "in a turn of the main loop", self.main_loop

    def __str__(self) -> str:
        names = ("a: " + self.a.name, "b: " + self.b.name)
        parts = ["\n".join(names), self.source or "The rendered sources are equal."]
        for title, rows in self._tables():
            if rows:
                cells = [(*row, _change(*row[1:])) for row in rows]
                columns = (title, "a", "b", "b - a")
                parts.append(table_text(columns, cells, numbers=_numeric(columns, cells)))
            else:
                parts.append(f"{title}: no difference")
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return f"<KernelDifference of {self.a.name} and {self.b.name}; print it>"

    def _repr_html_(self) -> str:
        """For notebooks: the tables, and the difference of the sources folded away."""
        parts = [f"<b>a: {html.escape(self.a.name)}<br>b: {html.escape(self.b.name)}</b>"]
        for title, rows in self._tables():
            cells = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            heads = "".join(f"<th>{html.escape(head)}</th>" for head in (title, "a", "b"))
            parts.append(
                f"<table><tr>{heads}</tr>{cells}</table>"
                if rows
                else f"<p>{html.escape(title)}: no difference</p>"
            )
        source = "".join(
            f'<span style="{_style(line)}">{html.escape(line)}</span>\n'
            for line in self.source.splitlines()
        )
        parts.append(
            f"<details><summary>source</summary><pre>{source}</pre></details>"
            if source
            else "<p>The rendered sources are equal.</p>"
        )
        return f"<div>{''.join(parts)}</div>"


def diff(a: Kernel, b: Kernel) -> KernelDifference:
    """Compare kernels ``a`` and ``b``; ``print`` shows sources, resources and instructions.

    Needs no GPU.  Sources are compared at once; resources and counts compile the kernels when they
    are asked for.  Raises ``ArgumentTypeError`` for anything but kernels.
    """
    for name, kernel in (("a", a), ("b", b)):
        if not isinstance(kernel, Kernel):
            reject(
                name,
                "must be a Kernel",
                type(kernel).__qualname__,
                "Give cpgemm.kernel(...), plan.kernel or cpgemm.kernel_from_template(...).",
                kind=ArgumentTypeError,
            )
    return KernelDifference(a, b)


def _changed(one: Mapping[str, int] | None, other: Mapping[str, int] | None) -> tuple[Row, ...]:
    kinds = dict.fromkeys([*(one or {}), *(other or {})])

    def shown(counts: Mapping[str, int] | None, kind: str) -> str:
        return "no loop" if counts is None else str(counts.get(kind, 0))

    rows = ((kind, shown(one, kind), shown(other, kind)) for kind in kinds)
    return tuple(row for row in rows if row[1] != row[2])


def _change(one: str, other: str) -> str:
    try:
        return f"{int(other) - int(one):+d}"
    except ValueError:
        return ""


def _numeric(columns: tuple[str, ...], cells: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The columns that align right: those of whole tables of numbers."""
    numbers = all(row[-1] for row in cells)
    return columns[1:] if numbers else ()


def _style(line: str) -> str:
    if line.startswith(("+++", "---", "@@")):
        return "color:#6e7781"
    return {"+": "color:#116329", "-": "color:#a40e26"}.get(line[:1], "")
