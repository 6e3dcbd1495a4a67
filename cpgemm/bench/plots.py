"""Pictures of a benchmark's report: speedups, roofline, decode bandwidth, grouped products.

Each picture is written as PNG and SVG, on a light and on a dark background::

    speedup_large       peers' times over cpgemm's, 512 rows and more
    speedup_decode      the same, fewer rows
    roofline            TFLOPS against FLOP per byte, every row of a product
    decode_bandwidth    GB/s of the weights against M, for each (N, K)
    grouped_floor       grouped products as a share of what the floors allow

matplotlib comes with the extra ``plot``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpgemm.bench import plot_charts, plot_data
from cpgemm.bench.plot_charts import BarChart
from cpgemm.bench.plot_data import LARGE, Panel
from cpgemm.bench.result import Report
from cpgemm.errors import reject
from cpgemm.plot_style import THEMES, Theme, drawing, require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures", "write_plots"]

_FULL = 45.0  # inches of bar panels on a page, in all columns; more go to another page
_SWEEPS = 24  # panels of decode bandwidth on a page


def write_plots(
    report: Report, folder: Path, *, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw what ``report`` has rows for into ``folder`` (made if need be); return what was written.

    A picture without rows is left out.  Long reports spread over numbered pages.  The same report
    gives the same files with the same matplotlib.  Raises ``MissingDependencyError`` without
    matplotlib and ``ArgumentError`` for a folder that cannot be written.
    """
    require_matplotlib()
    written: list[Path] = []
    for theme in THEMES:
        with drawing(theme):
            for name, figure in figures(report, theme):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    written += save(figure, folder / f"{name}_{theme.name}", formats)
                except OSError as error:
                    reject("folder", "must be a folder that can be written", error, "Name another.")
    return written


def figures(report: Report, theme: Theme) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each picture, one at a time; call within ``drawing(theme)``."""
    windows = report.method.get("windows")
    median = f"median of {windows} windows" if windows else "median"
    machine = plot_data.machine_line(report)
    same = (
        "Time of the peer over time of cpgemm, both with PDL or both without; "
        f"{median}, thin lines: smallest and largest ratio of one round."
    )
    for name, what, large in (
        ("speedup_large", f"{LARGE} rows and more", True),
        ("speedup_decode", f"fewer than {LARGE} rows", False),
    ):
        chart = BarChart(
            f"Speed of cpgemm over its peers, {what}",
            (machine, same),
            "speedup (above 1: cpgemm is faster)",
            lambda value: f"{value:.2f}",
            1.0,
        )
        yield from _pages(theme, name, chart, plot_data.speedup_panels(report, large=large))
    points = plot_data.roofline_points(report)
    if points:
        best = plot_data.roofs(report)
        yield "roofline", plot_charts.roofline(theme, machine, points, best)
    sweeps = plot_data.bandwidths(report)
    for at in range(0, len(sweeps), _SWEEPS):
        figure = plot_charts.decode(theme, machine, median, sweeps[at : at + _SWEEPS])
        yield _numbered("decode_bandwidth", at // _SWEEPS), figure
    share = (
        "Time of the floor over time of the contender, in brackets which floor: the larger of "
        "streaming both operands and writing D (memory) and of the arithmetic alone (compute); "
        f"{median}, thin lines: its windows."
    )
    chart = BarChart(
        "Grouped products against the floor",
        (machine, share),
        "share of the floor's speed (%)",
        lambda value: f"{value:.0f} %",
        100.0,
    )
    yield from _pages(theme, "grouped_floor", chart, plot_data.floor_panels(report))


def _pages(
    theme: Theme, name: str, chart: BarChart, panels: Sequence[Panel]
) -> Iterator[tuple[str, Figure]]:
    pages: list[list[Panel]] = []
    used = math.inf
    for panel in panels:
        height = plot_charts.panel_height(panel)
        if used + height > _FULL:
            pages.append([])
            used = 0.0
        pages[-1].append(panel)
        used += height
    for at, page in enumerate(pages):
        yield _numbered(name, at), plot_charts.bar_chart(theme, chart, page)


def _numbered(name: str, page: int) -> str:
    return f"{name}_{page + 1}" if page else name
