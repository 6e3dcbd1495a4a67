"""A stand-in for the GPU that times configurations: what each takes is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cpgemm.config import KernelConfig
from cpgemm.problem import GemmProblem
from cpgemm.timing import Timing, summarize


class FakeTrials:
    """``Trials``: ``us`` gives medians in microseconds, ``jitter`` the spread as a share of them.

    ``rounds`` holds what each call of ``time`` was asked for: problem, names, windows.
    """

    def __init__(
        self,
        us: Callable[[GemmProblem, KernelConfig], float],
        *,
        jitter: float = 0.0,
        wrong: Callable[[KernelConfig], str | None] = lambda _config: None,
    ) -> None:
        self.us, self.jitter, self.wrong = us, jitter, wrong
        self.rounds: list[tuple[GemmProblem, list[str], int]] = []
        self.problem: GemmProblem | None = None

    def pose(self, problem: GemmProblem) -> None:
        self.problem = problem

    def why_wrong(self, config: KernelConfig) -> str | None:
        assert self.problem is not None
        return self.wrong(config)

    def time(
        self, configs: Sequence[KernelConfig], *, windows: int, window_ms: float, seed: int
    ) -> dict[str, Timing]:
        assert self.problem is not None and window_ms > 0
        rng = random.Random(seed)
        self.rounds.append((self.problem, [config.name for config in configs], windows))
        timings = {}
        for config in configs:
            us = self.us(self.problem, config)
            taken = [us * (1 + self.jitter * (at / (windows - 1) - 0.5)) for at in range(windows)]
            rng.shuffle(taken)
            timings[config.name] = summarize(taken)
        return timings
