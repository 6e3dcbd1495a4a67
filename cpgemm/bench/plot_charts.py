"""The charts of a benchmark as figures: grouped bars, roofline, bandwidth against M."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpgemm.bench.plot_data import LARGE, Bar, Group, Panel, Point, Roofs, Sweep, spaced
from cpgemm.plot_style import Page, Theme, bar_place, style_of, text_inches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EVERY_PRODUCT", "BarChart", "bar_chart", "decode", "panel_height", "roofline"]

EVERY_PRODUCT = "Roofline: every product of the run"
_BAR = 0.155  # inches; labels of 7.5 points fit without touching
_BETWEEN = 0.12  # inches between groups of bars
_PANEL_HEAD, _PANEL_FOOT = 0.35, 0.5  # inches for a panel's title and its axis
_LINE = 0.15  # inches of a line of a group's label
_LOW_PAGE = 8.5  # inches of panels below each other


@dataclass(frozen=True)
class BarChart:
    """Texts of a bar chart; ``show`` writes a value, ``line`` is the value to compare with."""

    title: str
    captions: tuple[str, ...]
    axis: str
    show: Callable[[float], str]
    line: float


# ------------------------------------------------------------------------------------------ bars


def _group_height(group: Group) -> float:
    return max(_BAR * len(group.bars), _LINE * (group.label.count("\n") + 1)) + _BETWEEN


def panel_height(panel: Panel) -> float:
    """Inches that a panel takes with its title and its axis."""
    return _PANEL_HEAD + sum(map(_group_height, panel.groups)) + _PANEL_FOOT


def bar_chart(theme: Theme, chart: BarChart, panels: Sequence[Panel]) -> Figure:
    """Horizontal bars, panels filling columns from the top: every text stays level."""
    from matplotlib.patches import Patch

    bars = [bar for panel in panels for group in panel.groups for bar in group.bars]
    labels = {
        bar.label: bar
        for bar in sorted(bars, key=lambda bar: bar_place(bar.contender))
        if bar.value
    }
    handles = [
        Patch(facecolor=style.color, hatch="////" if style.pdl else None, label=label)
        for label, style in ((text, style_of(theme, bar.contender)) for text, bar in labels.items())
    ]
    columns = _columns(panels)
    width = {1: 8.0, 2: 10.5, 3: 12.6}[len(columns)]
    content = max(map(_column_height, columns))
    page = Page(theme, chart.title, chart.captions, handles, width=width, content=content)
    each = page.room / len(columns)
    names = 0.15 + max(text_inches(g.label) for panel in panels for g in panel.groups)
    wide = each - names - 0.35
    most = max(bar.high for bar in bars if bar.value)
    values = max(_label_inches(chart.show(bar.value)) for bar in bars if bar.value)
    limit = max(most, chart.line) / (1 - values / wide)
    places = [
        (panel, at * each + names, _column_height(column[:index]))
        for at, column in enumerate(columns)
        for index, panel in enumerate(column)
    ]
    for panel, left, top in places:
        height = panel_height(panel) - _PANEL_HEAD - _PANEL_FOOT
        axes = page.axes(left, top + _PANEL_HEAD, wide, height)
        axes.set_title(panel.title)
        axes.set_xlabel(chart.axis)
        axes.set_xlim(0, limit)
        axes.set_ylim(height, 0)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.axvline(chart.line, color=theme.ink, linewidth=1.1, zorder=3)
        at, centers = 0.0, []
        for group in panel.groups:
            tall = _group_height(group)
            centers.append(at + tall / 2)
            start = at + (tall - _BAR * len(group.bars)) / 2
            for index, bar in enumerate(group.bars):
                _bar(axes, theme, bar, start + _BAR * (index + 0.5), chart, limit / wide)
            at += tall
        axes.set_yticks(centers, [group.label for group in panel.groups])
    return page.figure


def _columns(panels: Sequence[Panel]) -> list[list[Panel]]:
    """One to three columns, read downwards: as few as keep the page low, as even as can be."""
    heights = sorted(
        _column_height(panels[start:end])
        for start in range(len(panels))
        for end in range(start + 1, len(panels) + 1)
    )
    columns = [list(panels)]
    for count in (2, 3):
        if max(map(_column_height, columns)) > _LOW_PAGE:
            tries = (_filled(panels, height) for height in heights)
            columns = next(each for each in tries if len(each) <= count)
    return columns


def _filled(panels: Sequence[Panel], height: float) -> list[list[Panel]]:
    columns: list[list[Panel]] = [[]]
    for panel in panels:
        if columns[-1] and _column_height([*columns[-1], panel]) > height + 1e-9:
            columns.append([])
        columns[-1].append(panel)
    return columns


def _column_height(panels: Sequence[Panel]) -> float:
    return sum(map(panel_height, panels))


def _label_inches(text: str) -> float:
    return 0.1 + text_inches(text, 7.5)


def _bar(axes: Axes, theme: Theme, bar: Bar, y: float, chart: BarChart, per_inch: float) -> None:
    from matplotlib.patheffects import withStroke

    text: dict[str, Any] = {
        "xytext": (3, 0),
        "textcoords": "offset points",
        "va": "center_baseline",
        "fontsize": 7.5,
        "zorder": 5,
        "bbox": {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.2},  # hides grid lines
    }

    def write(words: str, end: float, **more: Any) -> None:
        # What would lie on the line goes behind it.
        crosses = chart.line - per_inch * _label_inches(words) < end < chart.line
        axes.annotate(words, (chart.line if crosses else end, y), **text, **more)

    if not bar.value:
        write(bar.note, 0.0, color=theme.muted, style="italic")
        return
    style = style_of(theme, bar.contender)
    axes.barh(
        y,
        bar.value,
        height=0.86 * _BAR,
        color=style.color,
        hatch="////" if style.pdl else None,
        edgecolor=theme.paper,
        linewidth=0,
        zorder=2,
    )
    if bar.high - bar.low > 0.02 * axes.get_xlim()[1]:  # else no more than a dot
        axes.plot(
            [bar.low, bar.high],
            [y, y],
            color=theme.ink,
            linewidth=0.9,
            zorder=4,
            path_effects=[withStroke(linewidth=2.3, foreground=theme.paper)],
        )
    write(chart.show(bar.value), max(bar.high, bar.value))


# -------------------------------------------------------------------------------------- roofline


def roofline(
    theme: Theme,
    machine: str,
    points: Sequence[Point],
    best: Roofs,
    *,
    title: str = EVERY_PRODUCT,
) -> Figure:
    """Rows of ours filled, peers hollow, the roofs as lines, each row's own floor as a dash."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    names = dict.fromkeys(
        point.row.contender
        for point in sorted(
            points, key=lambda p: (p.row.role != "ours", bar_place(p.row.contender))
        )
    )
    ours = {point.row.contender for point in points if point.row.role == "ours"}
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        style = style_of(theme, name)
        looks[name] = {
            "marker": style.marker,
            "linestyle": "none",
            "color": style.color,
            "markerfacecolor": style.color if name in ours else "none",
            "markeredgecolor": theme.paper if name in ours else style.color,
            "markeredgewidth": 0.5 if name in ours else 1.0,
            # With PDL a row lies close to the one without: small marks on large ones show both.
            "markersize": (8.0 if name in ours else 5.5) * (0.55 if style.pdl else 1.0),
        }
    tick: dict[str, Any] = {
        "marker": "_",
        "linestyle": "none",
        "color": theme.muted,
        "markersize": 10,
    }
    limits = {(p.intensity, p.limit) for p in points if p.limit and p.row.role == "ours"}
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    if limits:
        handles.append(Line2D([], [], label="floor of a row", **tick))
    caption = "Intensity: operations over the bytes that must move (operands, scales, D)."
    marks = _marks(points)
    caption += " On top: where dense rows of that M lie." if marks else ""
    page = Page(
        theme,
        title,
        (machine, caption),
        handles,
        width=11.0,
        content=6.85,
    )
    axes = page.axes(0.6, 0.45, page.room - 0.7, 5.9)
    low = min(p.intensity for p in points) / 1.5
    high = max(p.intensity for p in points) * 1.5
    if best.gbs and best.tflops:
        high = max(high, 3e3 * best.tflops / best.gbs)
    top = max([p.tflops for p in points] + ([best.tflops] if best.tflops else [])) * 1.7
    bottom = min(p.tflops for p in points) / 1.7
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    axes.set_xlabel("arithmetic intensity (FLOP per byte)")
    axes.set_ylabel("TFLOPS")
    for which in (axes.xaxis, axes.yaxis):
        which.set_major_locator(LogLocator(subs=(1, 2, 5)))
        which.set_major_formatter(_plain)
        which.set_minor_formatter(NullFormatter())
    _draw_roofs(axes, theme, best, low, high, bottom, top)
    if limits:
        axes.plot(*zip(*sorted(limits), strict=True), zorder=2.5, **tick)
    for name, look in looks.items():
        at = [(p.intensity, p.tflops) for p in points if p.row.contender == name]
        axes.plot(*zip(*at, strict=True), zorder=4 if name in ours else 3, **look)
    kept = spaced([place for place, _ in marks], 0.6 * math.log10(high / low) / (page.room - 0.7))
    if kept:
        upper = axes.secondary_xaxis("top")
        upper.set_xticks(
            [10 ** marks[at][0] for at in kept], [f"M = {marks[at][1]}" for at in kept]
        )
        upper.minorticks_off()
        upper.spines["top"].set_visible(False)
        upper.tick_params(color=theme.muted, labelcolor=theme.muted)
    return page.figure


def _plain(value: float, _position: float) -> str:
    return f"{value:g}"


def _draw_roofs(
    axes: Axes, theme: Theme, best: Roofs, low: float, high: float, bottom: float, top: float
) -> None:
    ridge = 1e3 * best.tflops / best.gbs if best.gbs and best.tflops else None
    text: dict[str, Any] = {"textcoords": "offset points", "color": theme.ink, "fontsize": 8.5}
    line: dict[str, Any] = {"color": theme.ink, "linewidth": 1.4, "zorder": 2}
    if best.gbs:
        end = min(high, ridge or high)
        axes.plot([low, end], [low * best.gbs / 1e3, end * best.gbs / 1e3], **line)
        # Where the line enters the axes; points lie below it.
        start = max(low, bottom * 1e3 / best.gbs) * 1.06
        inches = axes.get_window_extent()
        slope = inches.height / math.log(top / bottom) / (inches.width / math.log(high / low))
        axes.annotate(
            f"memory: {best.gbs / 1e3:.2f} TB/s ({best.gbs_source})",
            (start, start * best.gbs / 1e3),
            xytext=(0, 5),
            rotation=math.degrees(math.atan(slope)),
            rotation_mode="anchor",
            **text,
        )
    if best.tflops:
        axes.plot([ridge or low, high], [best.tflops, best.tflops], **line)
        axes.annotate(
            f"compute: {best.tflops:.0f} TFLOPS ({best.tflops_source})",
            (high, best.tflops),
            xytext=(-2, 5),
            ha="right",
            **text,
        )


def _marks(points: Sequence[Point]) -> list[tuple[float, int]]:
    """Mean logarithm of the intensity of dense decode rows, and their M, in increasing order."""
    found: dict[int, list[float]] = {}
    for point in points:
        case = point.row.case
        if point.row.role == "ours" and case.suite == "dense" and case.m < LARGE:
            found.setdefault(case.m, []).append(math.log10(point.intensity))
    return sorted((sum(logs) / len(logs), m) for m, logs in found.items())


# ------------------------------------------------------------------------------ decode bandwidth


def decode(theme: Theme, machine: str, median: str, sweeps: Sequence[Sweep]) -> Figure:
    """A panel for each (N, K), all with the same axes."""
    from matplotlib.lines import Line2D

    floors = set().union(*(sweep.floors for sweep in sweeps))
    names = sorted(
        {name for sweep in sweeps for name in sweep.lines},
        key=lambda name: (name in floors, not name.startswith("cpgemm"), bar_place(name)),
    )
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        style = style_of(theme, name)
        ours = name.startswith("cpgemm")
        if name in floors:
            looks[name] = {"color": theme.muted, "linewidth": 2.2, "zorder": 2}
        else:
            looks[name] = {
                "color": style.color,
                "marker": style.marker,
                "markersize": 5.0 if ours else 4.5,
                "markerfacecolor": style.color if ours else theme.paper,
                "linewidth": 1.8 if ours else 1.0,
                "zorder": 4 if ours else 3,
            }
        looks[name]["linestyle"] = style.line
    caption = f"N x K bytes of weights over the time of the call, {median}"
    caption += "; the floor only streams both operands and writes D." if floors else "."
    columns = min(3, len(sweeps))
    each, tall = 4.4, 3.1
    page = Page(
        theme,
        "Decode: bandwidth of the weights",
        (machine, caption),
        [Line2D([], [], label=name, **look) for name, look in looks.items()],
        width=0.5 + max(7.0, each * columns),
        content=tall * math.ceil(len(sweeps) / columns),
    )
    each = page.room / columns
    most = max(rate for sweep in sweeps for line in sweep.lines.values() for _, rate in line)
    rows = sorted({m for sweep in sweeps for line in sweep.lines.values() for m, _ in line})
    wide = each - 0.85
    span = math.log2(rows[-1] / rows[0]) + 0.8
    logs = [math.log2(m) for m in rows]
    ticks = [rows[at] for at in spaced(logs, 0.3 * span / wide)]
    for index, sweep in enumerate(sweeps):
        down, across = divmod(index, columns)
        axes = page.axes(across * each + 0.6, down * tall + 0.4, wide, tall - 0.95)
        axes.set_title(sweep.title)
        axes.set_xscale("log", base=2)
        axes.set_xlim(rows[0] / 2**0.4, rows[-1] * 2**0.4)
        axes.set_ylim(0, 1.06 * most)
        axes.set_xticks(ticks, [str(m) for m in ticks])
        axes.minorticks_off()
        axes.set_xlabel("M (rows of A)")
        axes.set_ylabel("GB/s of the weights")
        for name in names:
            if name in sweep.lines:
                lone = {"marker": "_"} if name in floors and len(sweep.lines[name]) == 1 else {}
                axes.plot(*zip(*sweep.lines[name], strict=True), **{**looks[name], **lone})
    return page.figure
