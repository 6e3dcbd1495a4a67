"""How good the cost model's choices are: random shapes, all candidates timed on this GPU.

    python -m cpgemm tune --check-model 200 --seed 1 --json check.json

M is between 1 and 8192, N between 256 and 32768, K between 512 and 16384, each log-uniform.  Three
N of four are multiples of 128 (what models have), the others of 8; three K of four are multiples of
128, the others of 16.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpgemm.cost_model import Machine
from cpgemm.problem import GemmProblem, OutDtype
from cpgemm.trials import Contest, Trials, contest, short_name

__all__ = ["ModelCheck", "check_model", "random_problems"]

SCHEMA = 1
LIMIT_PCT = 5.0
"""A choice within this of the best one is a good one."""

ROUNDS, WINDOW_MS = 7, 5.0

_ROWS, _COLUMNS, _DEPTHS = (1, 8192), (256, 32768), (512, 16384)
_USUAL, _LEAST_N, _LEAST_K = 128, 8, 16
_WORST = 12  # lines of the table


def random_problems(
    count: int, *, seed: int, out_dtype: OutDtype = "bfloat16", accumulate: bool = False
) -> list[GemmProblem]:
    """``count`` problems with sizes as this module says; the same ones for the same seed."""
    rng = random.Random(seed)

    def size(limits: tuple[int, int], least: int) -> int:
        low, high = limits
        unit = least if least == 1 or rng.random() < 0.25 else _USUAL
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(round(value / unit) * unit, low), high)

    return [
        GemmProblem(
            size(_ROWS, 1), size(_COLUMNS, _LEAST_N), size(_DEPTHS, _LEAST_K), out_dtype, accumulate
        )
        for _ in range(count)
    ]


@dataclasses.dataclass
class ModelCheck:
    """How shapes are timed, and the outcomes so far.

    ``machine``: whose model chooses; ``rounds`` windows of ``window_ms`` milliseconds each;
    ``seconds``: what measuring the ``contests`` took.
    """

    seed: int
    machine: Machine
    rounds: int = ROUNDS
    window_ms: float = WINDOW_MS
    contests: list[Contest] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def share(self, limit_pct: float = LIMIT_PCT) -> float:
        """The share of shapes on which the model's choice is within ``limit_pct`` of the best."""
        good = sum(one.ratio <= 1 + limit_pct / 100 for one in self.contests)
        return good / len(self.contests) if self.contests else math.nan

    def worst(self) -> list[Contest]:
        """The contests, those with the worst choices first."""
        return sorted(self.contests, key=lambda one: -one.ratio)

    @property
    def wrong(self) -> list[tuple[GemmProblem, str, str]]:
        """Problem, configuration, and what is wrong with its result."""
        return [(one.problem, *item) for one in self.contests for item in one.wrong.items()]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the summary, and for each shape all times by the names of configurations."""
        from cpgemm.machine import describe

        return {
            "schema": SCHEMA, "seed": self.seed, "machine": describe().as_dict(),
            "model": dataclasses.asdict(self.machine), "rounds": self.rounds,
            "window_ms": self.window_ms, "seconds": round(self.seconds, 1),
            "limit_pct": LIMIT_PCT, "share": self.share() if self.contests else None,
            "shapes": [_shape(one) for one in self.contests],
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Write ``as_dict`` as JSON, a line for each shape."""
        record = self.as_dict()
        shapes = record.pop("shapes")
        head = json.dumps(record, indent=1, allow_nan=False)
        lines = ",\n".join(f"  {json.dumps(shape, allow_nan=False)}" for shape in shapes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head[:-2]},\n "shapes": [\n{lines}\n ]\n}}\n', encoding="utf-8")

    def print(self) -> None:
        """The worst choices as a table, and the summary."""
        from cpgemm.console import print_table

        columns = ("M x N x K", "the model's choice", "us", "best", "us", "slower by")
        rows = []
        for one in self.worst()[:_WORST]:
            p, chosen = one.problem, one.timings.get(one.choice)
            rows.append((
                f"{p.m}x{p.n}x{p.k}", short_name(one.choice),
                f"{chosen.median_us:.1f}" if chosen else "wrong",
                short_name(one.best), f"{one.timings[one.best].median_us:.1f}",
                f"{100 * (one.ratio - 1):.1f} %" if math.isfinite(one.ratio) else "",
            ))  # fmt: skip
        print_table(columns, rows, numbers=("us", "slower by"), whole=columns)
        ratios = [one.ratio for one in self.contests if math.isfinite(one.ratio)]
        mean = 100 * (statistics.geometric_mean(ratios) - 1) if ratios else math.nan
        print(
            f"\n{self.share():.1%} of {len(self.contests)} shapes: the model's choice is within "
            f"{LIMIT_PCT:g} % of the best; slower by {mean:.2f} % in the mean; "
            f"seed {self.seed}, {self.seconds:.0f} s"
        )
        for problem, name, why in self.wrong:
            print(f"WRONG {problem.m}x{problem.n}x{problem.k}: {name}: {why}")


def _shape(one: Contest) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one.problem), "choice": one.choice, "best": one.best,
        "ratio": round(one.ratio, 4) if math.isfinite(one.ratio) else None,
        "us": {name: round(timing.median_us, 3) for name, timing in one.timings.items()},
        "spread_pct": {name: round(one.timings[name].spread_pct, 2) for name in one.finalists},
        "predicted_us": {name: round(us, 3) for name, us in one.predicted_us.items()},
        "wrong": dict(one.wrong),
    }  # fmt: skip


def check_model(
    trials: Trials,
    problems: Sequence[GemmProblem],
    check: ModelCheck,
    *,
    limit_s: float = math.inf,
    done: Callable[[str], None] = lambda _name: None,
) -> ModelCheck:
    """Time the candidates for each of ``problems``; begins none after ``limit_s`` seconds.

    ``check`` says how, and is filled as the work goes on, so that what was measured survives an
    interruption; it is returned.  ``done`` is called with each shape's name.
    """
    order, start = random.Random(check.seed), time.monotonic()
    for problem in problems:
        if time.monotonic() - start > limit_s:
            break
        outcome = contest(
            trials, problem, check.machine, rounds=check.rounds, window_ms=check.window_ms,
            order=order,
        )  # fmt: skip
        check.contests.append(outcome)
        check.seconds = time.monotonic() - start
        done(f"{problem.m}x{problem.n}x{problem.k}")
    return check
