"""Candidates, the two rounds of a contest, the trials on a GPU."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import pytest
from bench_fakes import Gpu
from fake_trials import FakeTrials

from cpgemm.cost_model import H200, predict
from cpgemm.errors import DeviceError
from cpgemm.heuristics import choose, configurations, explain
from cpgemm.plan import GemmPlan
from cpgemm.problem import GemmProblem
from cpgemm.reference import gemm_reference
from cpgemm.timing import rotations
from cpgemm.trials import (
    GpuTrials,
    candidates,
    contest,
)


def test_candidates_begin_with_the_choice_and_leave_out_the_hopeless() -> None:
    problem = GemmProblem(4096, 7168, 2048)
    offered = candidates(problem, H200)
    names = [config.name for config, _ in offered]
    assert names[0] == choose(problem).name and len(set(names)) == len(names)
    left = {c for c in configurations("bfloat16") if c.name not in names}
    assert left and all(predict(problem, c).predicted_us >= 3 * offered[0][1] for c in left)
    assert [config.name for config, _ in candidates(problem, H200, 3)] == names[:3]


def test_candidates_that_the_model_does_not_consider_come_last() -> None:
    for problem in (GemmProblem(4096, 7168, 2048), GemmProblem(33, 4096, 512)):
        considered = [c.config for c in explain(problem.m, problem.n, problem.k).candidates]
        offered = [config for config, _ in candidates(problem, H200)]
        kept = [config for config in considered if config in offered]
        assert offered[: len(kept)] == kept
        others = [predict(problem, config).predicted_us for config in offered[len(kept) :]]
        assert others and others == sorted(others)


def _by_name(slow: dict[str, float]) -> FakeTrials:
    return FakeTrials(lambda _problem, config: slow.get(config.name, 100.0))


def test_a_contest_times_slow_ones_once() -> None:
    problem = GemmProblem(4096, 7168, 2048)
    names = [config.name for config, _ in candidates(problem, H200)]
    trials = _by_name({names[1]: 80.0, names[2]: 121.0, names[3]: 119.0})
    outcome = contest(trials, problem, H200, rounds=7, window_ms=5.0, order=random.Random(1))
    assert [(posed, windows) for posed, _, windows in trials.rounds] == [(problem, 2), (problem, 7)]
    assert trials.rounds[0][1] == names
    assert names[2] not in trials.rounds[1][1] and names[3] in trials.rounds[1][1]
    assert (outcome.choice, outcome.best) == (names[0], names[1])
    assert outcome.ratio == pytest.approx(1.25)
    assert set(outcome.timings) == set(names) == set(outcome.predicted_us)


def test_the_choice_is_always_timed_again() -> None:
    problem = GemmProblem(64, 2112, 7168)
    choice = choose(problem).name
    trials = _by_name({choice: 900.0})
    outcome = contest(trials, problem, H200, rounds=3, window_ms=1.0, order=random.Random(1))
    assert choice in outcome.finalists and outcome.ratio == pytest.approx(9.0)


def test_wrong_results_are_not_timed() -> None:
    problem = GemmProblem(64, 2112, 7168)
    choice = choose(problem).name
    trials = _by_name({choice: 1.0})
    trials.wrong = lambda config: "off by 1" if config.name == choice else None
    outcome = contest(trials, problem, H200, rounds=3, window_ms=1.0, order=random.Random(1))
    assert dict(outcome.wrong) == {choice: "off by 1"} and choice not in outcome.timings
    assert outcome.best != choice and math.isinf(outcome.ratio)
    trials.wrong = lambda _config: "off by 1"
    with pytest.raises(DeviceError, match="one kernel at least must give a right result"):
        contest(trials, problem, H200, rounds=3, window_ms=1.0, order=random.Random(1))


def test_the_gpus_trials_with_a_stand_in_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches compute by the reference path; the times are those of the stand-in."""
    problems = [GemmProblem(2, 256, 512), GemmProblem(65, 136, 144, "bfloat16", True)]
    names = [config.name for config in configurations("bfloat16")]
    us = {name: 20.0 + at for at, name in enumerate(names)}
    gpu = Gpu(us)
    module = gpu.module()
    module.asarray, module.empty = np.asarray, np.empty
    monkeypatch.setitem(sys.modules, "cupy", module)
    prepared: list[tuple[GemmProblem, str]] = []

    def prepare(plan: Any, a: Any, b: Any, out: Any, c: Any, framework: str) -> Any:
        assert framework == "cupy" and plan.machine == H200
        prepared.append((plan.problem, plan.config.name))
        call = gpu.call(plan.config.name)

        def launch() -> None:
            if gpu.capturing is None:
                out[...] = gemm_reference(a, b, c=c)
                if plan.config.name == names[-1]:
                    out[0, 0] = np.nan
            call()

        return launch

    monkeypatch.setattr(GemmPlan, "prepare", prepare)
    trials = GpuTrials(problems, H200, seed=6)
    for problem in problems:  # expectations of one are not those of the other
        offered = {config.name for config, _ in candidates(problem, H200)}
        assert names[-1] in offered
        prepared.clear()
        outcome = contest(trials, problem, H200, rounds=3, window_ms=0.1, order=random.Random(1))
        assert set(outcome.wrong) == {names[-1]} and "NaN" in outcome.wrong[names[-1]]
        assert outcome.best == min(offered - {names[-1]}, key=us.__getitem__)
        for name, timing in outcome.timings.items():
            assert timing.median_us == pytest.approx(us[name])
            assert len(timing.windows) == (3 if name in outcome.finalists else 2)
        # Each once for each set of operands, however often it is timed.
        sets = rotations(problem.bytes)
        assert sorted(prepared) == sorted((problem, name) for name in offered for _ in range(sets))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_trials(dtype: Any) -> None:
    import cupy

    from cpgemm.plan import current_machine

    problems = [GemmProblem(*s, dtype, True) for s in [(1, 256, 512), (130, 264, 1040)]]
    machine = current_machine()
    trials = GpuTrials(problems, machine, seed=5)
    for problem in problems:
        outcome = contest(
            trials, problem, machine, rounds=3, window_ms=0.5, order=random.Random(1)
        )  # fmt: skip
        assert not outcome.wrong and outcome.ratio >= 1
        assert all(timing.median_us > 0.5 for timing in outcome.timings.values())
    trials._sets[0].b.scales[0, 0] *= 100
    cupy.cuda.Device().synchronize()  # the trials have a stream of their own
    assert trials.why_wrong(choose(problems[-1], machine)) is not None, "not what was expected"
