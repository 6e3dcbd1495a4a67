"""A ``GemmPlan`` and an ``Explanation`` in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpgemm.cost_model import Candidate, predict
from cpgemm.displays.config import config_facts, tile_drawing
from cpgemm.displays.html import BLUE, Markup, card, element, facts, folded, note, svg, table
from cpgemm.heuristics import Explanation
from cpgemm.tuned import TunedExplanation

if TYPE_CHECKING:
    from cpgemm.plan import GemmPlan
    from cpgemm.problem import GemmProblem

__all__ = ["explanation_html", "plan_html"]

_COLUMNS = ("kernel", "predicted us", "", "tiles", "waves", "compute us", "L2 us", "DRAM us")
_NUMBERS = tuple(name for name in _COLUMNS if name not in ("kernel", ""))


def _posed(problem: GemmProblem) -> str:
    sizes = f"{problem.m} x {problem.n} x {problem.k}"
    return f"{sizes} -> {problem.out_dtype}{' + C' if problem.accumulate else ''}"


def _predicted(found: Explanation, candidate: Candidate) -> Markup:
    problem = found.problem
    tiles = candidate.config.tiles(problem)
    return facts(
        [
            ("predicted", f"{candidate.predicted_us:.1f} us, bound by {candidate.bound}"),
            (
                "floor",
                f"{found.floor_us:.1f} us, {found.floor_us / candidate.predicted_us:.0%} of it",
            ),
            ("rate", f"{problem.flops / candidate.predicted_us / 1e6:.0f} TFLOPS"),
            ("work", f"{problem.flops / 1e9:.1f} GFLOP, {problem.bytes / 1e6:.1f} MB"),
            ("tiles", str(tiles)),
            ("waves", str(candidate.waves)),
        ]
    )


def _candidates(found: Explanation) -> Markup:
    slowest = max(candidate.predicted_us for candidate in found.candidates)
    rows = [
        (
            one.config.name,
            f"{one.predicted_us:.1f}",
            _length(one.predicted_us / slowest),
            str(one.config.tiles(found.problem)),
            str(one.waves),
            f"{one.compute_us:.1f}",
            f"{one.l2_us:.1f}",
            f"{one.dram_us:.1f}",
        )
        for one in found.candidates
    ]
    configs = [one.config for one in found.candidates]
    mine = found.choice.config  # a measured one need not be first, nor a candidate of the model
    strong = configs.index(mine) if mine in configs else None
    return table(_COLUMNS, rows, numbers=_NUMBERS, strong=strong)


def _measured(found: Explanation) -> list[Markup]:
    return [note(f"Choice {found.measured}.")] if isinstance(found, TunedExplanation) else []


def _length(share: float) -> Markup:
    bar = element("rect", width=f"{70 * share:.1f}", height=8, y=1, fill=BLUE, fill_opacity=".7")
    return svg(70, 10, "predicted time", bar)


_FLOOR = (
    "The floor is the larger of the fewest bytes over the memory's bandwidth and the operations "
    "over the FP8 rate that power allows; launch not counted. Times are the model's, on "
)


def explanation_html(found: Explanation) -> str:
    """The display of an explanation."""
    return card(
        "Choice of a kernel",
        f"{_posed(found.problem)} on {found.machine.name}: {found.choice.config.name}",
        _predicted(found, found.choice),
        _candidates(found),
        *_measured(found),
        note(f"{_FLOOR}{found.machine.name}."),
    )


def plan_html(plan: GemmPlan) -> str:
    """The display of a plan."""
    found = plan.explain()
    mine = predict(plan.problem, plan.config, plan.machine)
    return card(
        "GemmPlan",
        f"{_posed(plan.problem)} with {plan.config.name}",
        _predicted(found, mine),
        facts(config_facts(plan.config)),
        tile_drawing(plan.config),
        folded(f"{len(found.candidates)} candidates", _candidates(found)),
        *_measured(found),
        note(f"{_FLOOR}{plan.machine.name}."),
    )
