"""Configurations of the finite set against each other on one problem: right, and how fast.

``contest`` times in two rounds: a quick one, and a longer one among those that came within half of
the best's time.  What measures is an argument, so that everything but ``GpuTrials`` runs anywhere.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cpgemm.config import KernelConfig
from cpgemm.cost_model import Machine, predict
from cpgemm.errors import CompileError, DeviceError, reject
from cpgemm.heuristics import configurations, explain
from cpgemm.plan import GemmPlan
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.timing import Timing, time_interleaved
from cpgemm.trial_operands import (
    OperandMemory,
    OperandSet,
    bytes_of_sets,
    poison,
    sample_of,
    wanted,
    why_wrong,
)

__all__ = [
    "Contest",
    "GpuTrials",
    "Trials",
    "candidates",
    "contest",
    "short_name",
]

_HOPELESS = 3.0  # times the prediction for the model's choice: not even tried
_QUICK_WINDOWS, _QUICK_WINDOW_MS = 2, 0.5
_SLOW = 1.5  # times the best of the quick round: not timed again


# ------------------------------------------------------------------------------------- the trials


class Trials(Protocol):
    """What tries configurations on one problem after another."""

    def pose(self, problem: GemmProblem) -> None:
        """Make ``problem`` the one that the other methods are about."""

    def why_wrong(self, config: KernelConfig) -> str | None:
        """What is wrong with the configuration's result; None when it is right."""

    def time(
        self, configs: Sequence[KernelConfig], *, windows: int, window_ms: float, seed: int
    ) -> dict[str, Timing]:
        """The ``Timing`` of each by its name, interleaved."""


class GpuTrials:
    """``Trials`` on CuPy's current device, a Hopper GPU, for any of ``problems``."""

    def __init__(self, problems: Sequence[GemmProblem], machine: Machine, *, seed: int) -> None:
        import cupy

        self._cupy, self._machine = cupy, machine
        self._stream = cupy.cuda.Stream(non_blocking=True)
        try:
            with self._stream:
                self._memory = OperandMemory(problems, seed=seed, xp=cupy)
        except cupy.cuda.memory.OutOfMemoryError as error:
            needed = max(sum(bytes_of_sets(problem)) for problem in problems) / 1e9
            raise DeviceError(
                f"device: the largest shape needs {needed:.1f} GB of its memory; got {error}. "
                "Leave that shape out."
            ) from error
        self._problem = problems[0]
        self._sets: list[OperandSet] = []
        self._launches: dict[str, list[Any]] = {}

    def pose(self, problem: GemmProblem) -> None:
        """Make ``problem`` the one that the other methods are about."""
        self._problem = problem
        with self._stream:
            self._sets = self._memory.sets(problem)
        self._launches = {}
        self.__dict__.pop("_wanted", None)

    def why_wrong(self, config: KernelConfig) -> str | None:
        """What is wrong with the configuration's result; None when it is right."""
        one = self._sets[0]
        try:
            launches = self._prepared(config)
        except CompileError as error:
            return str(error).partition("\n")[0]
        with self._stream:
            poison(one.out)
            launches[0]()
            self._stream.synchronize()
            return why_wrong(one.out, self._sample, self._wanted)

    def time(
        self, configs: Sequence[KernelConfig], *, windows: int, window_ms: float, seed: int
    ) -> dict[str, Timing]:
        """The ``Timing`` of each by its name, interleaved."""
        return time_interleaved(
            {config.name: self._prepared(config) for config in configs},
            windows=windows, window_ms=window_ms, seed=seed, stream=self._stream,
        )  # fmt: skip

    def _prepared(self, config: KernelConfig) -> list[Any]:
        """The launch on each set of operands."""
        if config.name not in self._launches:
            plan = GemmPlan(self._problem, config, self._machine)
            with self._stream:
                self._launches[config.name] = [
                    plan.prepare(one.a, one.b, one.out, one.c, "cupy") for one in self._sets
                ]
        return self._launches[config.name]

    @property
    def _sample(self) -> tuple[Any, Any]:
        return sample_of(self._problem)

    @functools.cached_property
    def _wanted(self) -> Any:
        return wanted(self._sets[0], self._sample)


# ------------------------------------------------------------------------------------ the contest


@dataclass(frozen=True)
class Contest:
    """The outcome for one problem; dictionaries by the names of configurations.

    ``choice``: the model's.  ``predicted_us``: of all candidates.  ``timings``:
    of all that were timed.  ``finalists``: those timed in the long round; only their times are good
    to a per cent.  ``wrong``: what is wrong with the results of others.
    """

    problem: GemmProblem
    choice: str
    predicted_us: Mapping[str, float]
    timings: Mapping[str, Timing]
    finalists: tuple[str, ...]
    wrong: Mapping[str, str]

    @property
    def best(self) -> str:
        """The fastest right configuration."""
        return min(self.finalists, key=lambda name: self.timings[name].median_us)

    @property
    def ratio(self) -> float:
        """Time of the model's choice over the best time; infinite where the choice is wrong."""
        if self.choice not in self.finalists:
            return math.inf
        return self.timings[self.choice].median_us / self.timings[self.best].median_us


def short_name(name: str) -> str:
    """A configuration's name without its output dtype, for tables of one dtype."""
    return re.sub(f"_({'|'.join(OUT_DTYPES)})$", "", name)


def candidates(problem: GemmProblem, machine: Machine, best: int | None = None) -> list[Any]:
    """(configuration, predicted microseconds) of what runs ``problem``, the model's choice first.

    Those that the model considers come in its order, then all others: it may be wrong about them.
    Left out are those predicted to take three times as long as its choice.  ``best``: only the
    first ones.
    """
    if best is not None and best < 1:
        reject("best", "must be at least 1", best, "Leave it out for all candidates.")
    p = problem
    considered = explain(
        p.m, p.n, p.k, out_dtype=p.out_dtype, accumulate=p.accumulate, machine=machine
    ).candidates
    names = {candidate.config.name for candidate in considered}
    others = [
        predict(problem, config, machine)
        for config in configurations(problem.out_dtype)
        if config.name not in names
        and config.why_not(problem) is None
        and config.cluster <= machine.sms
    ]
    others.sort(key=lambda candidate: candidate.predicted_us)
    limit = _HOPELESS * considered[0].predicted_us
    return [
        (candidate.config, candidate.predicted_us)
        for candidate in (*considered, *others)[:best]
        if candidate.predicted_us < limit
    ]


def contest(
    trials: Trials,
    problem: GemmProblem,
    machine: Machine,
    *,
    rounds: int,
    window_ms: float,
    order: random.Random,
    best: int | None = None,
    done: Callable[[str], None] = lambda _name: None,
) -> Contest:
    """Try the candidates for ``problem``.

    ``rounds`` windows of ``window_ms`` milliseconds in the long round, in an order that ``order``
    decides.  ``best``: only the first ones by the model.  ``done`` is called with the name of each
    candidate when its result has been checked.  Raises ``DeviceError`` when no candidate
    gives a right result.
    """
    offered = candidates(problem, machine, best)
    choice = offered[0][0].name
    trials.pose(problem)
    right: list[KernelConfig] = []
    wrong: dict[str, str] = {}
    for config, _ in offered:
        why = trials.why_wrong(config)
        if why is None:
            right.append(config)
        else:
            wrong[config.name] = why
        done(config.name)
    if not right:
        raise DeviceError(
            f"device: one kernel at least must give a right result for {problem}; got "
            f"{'; '.join(f'{name}: {why}' for name, why in wrong.items())}. "
            "Run: python -m cpgemm doctor"
        )
    timings = trials.time(
        right, windows=_QUICK_WINDOWS, window_ms=_QUICK_WINDOW_MS, seed=order.randrange(2**32)
    )
    limit = _SLOW * min(timing.median_us for timing in timings.values())
    finalists = [
        config for config in right
        if timings[config.name].median_us <= limit or config.name == choice
    ]  # fmt: skip
    timings |= trials.time(
        finalists, windows=rounds, window_ms=window_ms, seed=order.randrange(2**32)
    )
    names = tuple(config.name for config in finalists)
    predicted = {config.name: us for config, us in offered}
    return Contest(problem, choice, predicted, timings, names, wrong)
