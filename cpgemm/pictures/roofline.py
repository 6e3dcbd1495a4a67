"""The roofline of a benchmark's report, or of plans with their predicted times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpgemm.bench import plot_charts, plot_data
from cpgemm.bench.plot_data import Point, Roofs
from cpgemm.bench.result import Case, Report, Row
from cpgemm.cost_model import predict
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.plan import GemmPlan
from cpgemm.plot_style import drawing, require_matplotlib, theme_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["roofline"]

_MEND = "Give a benchmark's Report, or plans of plan_gemm."


def roofline(source: Report | GemmPlan | Sequence[GemmPlan], *, theme: str = "light") -> Figure:
    """TFLOPS against FLOP per byte, under the roofs of the machine.

    ``source``: a benchmark's report (every product that was timed, peers and floors included) or
    plans of one machine, whose predicted times are drawn under the model's roofs.  ``theme``:
    "light" or "dark".  Raises ``ArgumentTypeError`` for another ``source``, ``ArgumentError`` for
    another theme, when there is nothing to draw, or for plans of several machines.
    """
    require_matplotlib()
    colors = theme_named(theme)
    if isinstance(source, Report):
        points = plot_data.roofline_points(source)
        if not points:
            reject("source", "must hold a product that was timed", "none", _MEND)
        texts = (plot_data.machine_line(source), plot_data.roofs(source))
        title = plot_charts.EVERY_PRODUCT
    else:
        plans = _plans(source)
        points = [_predicted(plan) for plan in plans]
        machine = plans[0].machine
        roofs = Roofs(1e3 * machine.dram_tbs, machine.peak_tflops, "model", "model")
        texts = (f"{machine.name}, {machine.sms} multiprocessors; times predicted, not run", roofs)
        title = "Roofline: predicted"
    with drawing(colors):
        figure = plot_charts.roofline(colors, texts[0], points, texts[1], title=title)
        figure.draw_without_rendering()
    return figure


def _plans(source: Any) -> list[GemmPlan]:
    plans = [source] if isinstance(source, GemmPlan) else source
    if not isinstance(plans, Sequence) or not all(isinstance(plan, GemmPlan) for plan in plans):
        kind = type(source).__qualname__
        reject("source", "must be a Report or plans", kind, _MEND, kind=ArgumentTypeError)
    if len({plan.machine for plan in plans}) != 1:
        reject("source", "must be plans of one machine", f"{len(plans)} plans", _MEND)
    return list(plans)


def _predicted(plan: GemmPlan) -> Point:
    problem = plan.problem
    us = predict(problem, plan.config, plan.machine).predicted_us
    row = Row(
        Case("dense", problem.m, problem.n, problem.k), "cpgemm", "ours", us=us,
        bytes=problem.bytes, kernel=plan.config.name,
    )  # fmt: skip
    limit = problem.flops / plan.explain().floor_us / 1e6
    return Point(row, problem.flops / problem.bytes, problem.flops / us / 1e6, limit)
