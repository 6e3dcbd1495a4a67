"""The pipeline timeline of one tile: producer, stages and consumers over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpgemm.config import SplitKernelConfig
from cpgemm.cost_model import predict, tile_times
from cpgemm.pictures.timeline import Timeline, play
from cpgemm.plot_style import Page, Theme, drawing, require_matplotlib, text_inches, theme_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpgemm.plan import GemmPlan

__all__ = ["pipeline"]

_WIDTH, _LANE = 11.0, 0.3  # inches
_FIRST, _LAST = 10, 4  # k-blocks at either end of a tile that has more than _WHOLE
_WHOLE = 16
_LABEL = 1.15  # inches left of the axes
_GAP = 0.35  # inches between the two ends


def pipeline(plan: GemmPlan, *, theme: str = "light") -> Figure:
    """Producer and consumers of one block over the ring of stages, for one tile.

    Times are the model's (``cost_model.tile_times``): a stage lands as often as L2 or DRAM can
    serve all blocks, a k-block takes its multiplications and promotions; the latency of a load and
    barriers are not drawn.  Of a tile with more than 16 k-blocks the first 10 and the last 4 are
    shown, at one scale.  Needs no GPU.

    ``plan``: of ``plan_gemm``.  ``theme``: "light" or "dark"; anything else raises
    ``ArgumentError``.
    """
    require_matplotlib()
    colors = theme_named(theme)
    with drawing(colors):
        figure = _draw(plan, colors)
        figure.draw_without_rendering()
    return figure


def _colors(theme: Theme) -> dict[str, str]:
    known = theme.colors
    return {
        "load": known["cublaslt block"], "full": theme.spare[1], "multiply": known["cpgemm"],
        "promote": known["deep_gemm"], "epilogue": known["cublaslt tensor"],
    }  # fmt: skip


_NAMES = {
    "load": "TMA load",
    "full": "stage full",
    "multiply": "wgmma",
    "promote": "promotion and waiting",
    "epilogue": "epilogue",
}


def _draw(plan: GemmPlan, theme: Theme) -> Figure:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    problem, config = plan.problem, plan.config
    times = tile_times(problem, config, plan.machine)
    split = isinstance(config, SplitKernelConfig)
    ahead = not split and predict(problem, config, plan.machine).waves > 1
    line = play(
        times, stages=config.stages, consumers=config.consumers, waves=config.waves, ahead=ahead
    )
    colors = _colors(theme)
    names = {**_NAMES, "epilogue": "sum over the cluster" if split else "epilogue"}
    handles = [Patch(facecolor=colors[what], label=names[what]) for what in names]
    if ahead:
        label = "load for the next tile"
        handles.append(Patch(facecolor="none", edgecolor=colors["load"], label=label))
    slower = "multiplying" if times.multiply_us >= times.load_us else "loading"
    captions = [
        f"{config.name} on {plan.machine.name}. Model's times: a k-block of 128 is loaded in "
        f"{times.load_us:.3f} us and multiplied in {times.multiply_us:.3f} us: {slower} decides.",
        "Numbers: k-blocks. Latency and barriers are not drawn.",
    ]
    windows = _windows(line, times.k_blocks)
    if len(windows) > 1:
        captions[1] += (
            f" Of {times.k_blocks} k-blocks the first {_FIRST} and the last {_LAST} are shown."
        )
    lanes = ["TMA", *(f"stage {at}" for at in range(config.stages))]
    lanes += [f"consumer {at}" for at in range(config.consumers)]
    title = f"One tile of {problem.m} x {problem.n} x {problem.k} through the pipeline"
    high = _LANE * len(lanes)
    page = Page(theme, title, captions, handles, width=_WIDTH, content=high + 0.8)
    room = page.room - _LABEL - _GAP * (len(windows) - 1) - 0.1
    whole = sum(end - start for start, end in windows)
    left = _LABEL
    for at, (start, end) in enumerate(windows):
        wide = room * (end - start) / whole
        axes = page.axes(left, 0.3, wide, high)
        axes.set(xlim=(start, end), ylim=(len(lanes) - 0.5, -0.5))
        axes.set_yticks(range(len(lanes)), lanes if at == 0 else [""] * len(lanes))
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(max(2, int(wide / 0.8)), steps=[1, 2, 5, 10]))
        if at == 0:
            axes.set_xlabel("time (us, from the first load)", loc="left")
        else:
            axes.spines["left"].set_linestyle((0, (2, 2)))
        _spans(axes, theme, line, times.k_blocks, config.stages, whole / room)
        left += wide + _GAP
    return page.figure


def _windows(line: Timeline, k_blocks: int) -> list[tuple[float, float]]:
    end = line.end * 1.005
    if k_blocks <= _WHOLE:
        return [(0.0, end)]
    return [(0.0, line.done[_FIRST - 1]), (line.done[k_blocks - _LAST - 1], end)]


def _spans(
    axes: Axes, theme: Theme, line: Timeline, k_blocks: int, stages: int, per_inch: float
) -> None:
    low, high = axes.get_xlim()
    colors = _colors(theme)
    for span in line.spans:
        if span.end <= low or span.start >= high:
            continue
        start, end = max(span.start, low), min(span.end, high)
        later = span.what == "load" and span.k_block >= k_blocks
        look: dict[str, Any] = (
            {"facecolor": theme.paper, "edgecolor": colors["load"], "linewidth": 0.8}
            if later
            else {"facecolor": colors[span.what], "edgecolor": theme.paper, "linewidth": 0.5}
        )
        on_stage = span.what in ("load", "full")
        lane = 1 + span.lane if on_stage else 1 + stages + span.lane
        for at in (0, lane) if span.what == "load" else (lane,):
            axes.barh(at, end - start, left=start, height=0.74, **look)
        words = str(span.k_block)
        whole = (start, end) == (span.start, span.end)
        if (
            span.what == "full"
            and whole
            and text_inches(words, 7) + 0.06 < (end - start) / per_inch
        ):
            axes.text(
                (start + end) / 2, lane, words, ha="center", va="center_baseline", fontsize=7,
                color=theme.paper,
            )  # fmt: skip
