"""The tile schedule: blocks over time, and D's tiles in the colours of their turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cpgemm.config import SplitKernelConfig
from cpgemm.cost_model import predict
from cpgemm.pictures.schedule import Place, grid, places
from cpgemm.plot_style import Page, Theme, drawing, require_matplotlib, theme_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpgemm.plan import GemmPlan

__all__ = ["tile_schedule"]

_WIDTH, _HIGH = 11.0, 4.6  # inches of the page, of the axes
_LEFT, _RIGHT = 5.2, 3.6  # inches of the two axes
_CELLS, _LINED = 6000, 60  # tiles and turns, up to which each has an outline


def tile_schedule(plan: GemmPlan, *, theme: str = "light") -> Figure:
    """Which block computes which tile when, in the order of the kernel's own scheduler.

    Left: blocks (one on each multiprocessor) over time, coloured by turn.  The time is what the
    model predicts, shared evenly among the turns.  Right: the tiles of D, in the colours of their
    turns; the line walks through those of the first turn.  Needs no GPU.

    ``plan``: of ``plan_gemm``.  ``theme``: "light" or "dark"; anything else raises
    ``ArgumentError``.
    """
    require_matplotlib()
    colors = theme_named(theme)
    with drawing(colors):
        figure = _draw(plan, colors)
        figure.draw_without_rendering()  # makes all ticks in these colours
    return figure


def _draw(plan: GemmPlan, theme: Theme) -> Figure:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    problem, config, sms = plan.problem, plan.config, plan.machine.sms
    found = predict(problem, config, plan.machine)
    schedule = list(places(problem, config, sms))
    split = isinstance(config, SplitKernelConfig)
    blocks = config.blocks(config.tiles(problem), sms)
    lanes = blocks if split else sms
    turns = 1 + max(place.turn for place in schedule)
    busy, tiles = _filled(schedule, grid(problem, config), lanes, turns)
    idle, padding = int(np.isnan(busy).sum()), int((busy < 0).sum())
    said = _said(blocks, turns, 1 - (idle + padding) / busy.size)
    if split:
        said = f"{blocks} blocks run at once; the K of each tile is split over {config.cluster}."
    captions = [
        f"{config.name} on {plan.machine.name}, {sms} multiprocessors; predicted "
        f"{found.predicted_us:.1f} us, bound by {found.bound}.",
        said,
    ]
    handles = [Patch(facecolor=theme.muted, label="launch and other fixed time")]
    if idle:
        handles.append(Patch(facecolor=theme.grid, label="idle"))
    if padding:
        label = "outside of D (pads a cluster)"
        handles.append(Patch(facecolor=theme.spare[0], label=label))
    title = f"Tile schedule of {problem.m} x {problem.n} x {problem.k}"
    page = Page(theme, title, captions, handles, width=_WIDTH, content=_HIGH + 0.8)
    look = _look(theme, turns)

    left = page.axes(0.65, 0.35, _LEFT, _HIGH)
    left.set_title("Blocks over time")
    begin = found.launch_us
    edges = begin + (found.predicted_us - begin) / turns * np.arange(turns + 1)
    left.barh(lanes / 2, begin, height=lanes, color=theme.muted)
    left.pcolormesh(edges, np.arange(lanes + 1), busy, **look)
    for edge in edges[1:-1] if turns <= _LINED else ():
        left.axvline(edge, color=theme.paper, linewidth=1.0)
    left.set(xlim=(0, found.predicted_us), ylim=(lanes, 0), xlabel="time (us, predicted)")
    left.set_ylabel("block" if split else "multiprocessor, one block on each")

    right = page.axes(_WIDTH - 0.6 - _RIGHT, 0.35, _RIGHT, _HIGH)
    right.set_title("Tiles of D, in the colours of their turns")
    rows, columns = tiles.shape
    lines: dict[str, Any] = (
        {"edgecolors": theme.paper, "linewidth": 0.3} if tiles.size <= _CELLS else {}
    )
    right.pcolormesh(np.arange(columns + 1), np.arange(rows + 1), tiles, **look, **lines)
    _walk(right, schedule, config.cluster)
    right.set(xlim=(0, columns), ylim=(rows, 0))
    right.set_xlabel(f"columns of tiles ({config.block_n} columns of D each)")
    right.set_ylabel(f"rows of tiles ({config.block_m} rows of D each)")
    for axes in (left, right):
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    right.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return page.figure


def _filled(
    schedule: Sequence[Place], shape: tuple[int, int], lanes: int, turns: int
) -> tuple[np.ndarray, np.ndarray]:
    """The turn of each (block, turn) that works (-1: outside of D; NaN: idle) and of each tile."""
    busy = np.full((lanes, turns), np.nan)
    tiles = np.full(shape, np.nan)
    for place in schedule:
        inside = place.row < shape[0] and place.column < shape[1]
        busy[place.block, place.turn] = place.turn if inside else -1
        if inside:
            tiles[place.row, place.column] = place.turn
    return busy, tiles


def _walk(axes: Axes, schedule: Sequence[Place], cluster: int) -> None:
    """A line through the tiles of the first turn, those of a cluster taken together."""
    first = np.array([(place.column, place.row) for place in schedule if place.turn == 0])
    centers = first.reshape(-1, cluster, 2).mean(axis=1) + 0.5
    # Light on dark: the map begins with its dark end.
    axes.plot(*centers.T, color="#000000", linewidth=2.0, zorder=3)
    axes.plot(*centers.T, color="#ffffff", linewidth=0.9, zorder=4)
    axes.plot(*centers[:1].T, marker="o", markersize=4, color="#ffffff", zorder=5)


def _said(blocks: int, turns: int, used: float) -> str:
    each = "a tile each, in one turn" if turns == 1 else f"tiles in {turns} turns"
    return f"{blocks} blocks take {each}; {used:.0%} of the multiprocessors' turns work on D."


def _look(theme: Theme, turns: int) -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # The ends of the map that would vanish in the paper are left out.
    low, high = (0.0, 0.88) if theme.name == "light" else (0.2, 1.0)
    shades = colormaps["viridis"](np.linspace(low, high, turns) if turns > 1 else [0.45])
    cmap = ListedColormap(shades).with_extremes(under=theme.spare[0], bad=theme.grid)
    return {"cmap": cmap, "vmin": -0.5, "vmax": turns - 0.5}
