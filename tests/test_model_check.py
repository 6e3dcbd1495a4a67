"""The check of the cost model: shapes, shares, JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from fake_trials import FakeTrials

from cpgemm.cost_model import H200, predict
from cpgemm.heuristics import choose, configurations
from cpgemm.model_check import ModelCheck, check_model, random_problems
from cpgemm.problem import GemmProblem


def test_shapes_are_log_uniform_within_the_limits() -> None:
    problems = random_problems(2000, seed=7)
    assert problems == random_problems(2000, seed=7) != random_problems(2000, seed=8)
    for size, low, high, unit in (("m", 1, 8192, 1), ("n", 256, 32768, 8), ("k", 512, 16384, 16)):
        values = [getattr(problem, size) for problem in problems]
        assert low <= min(values) < 2 * low + 2 and high / 2 < max(values) <= high
        assert all(value % unit == 0 for value in values)
        # Half of the values lie below the geometric middle: 4 standard deviations of 2000 draws.
        below = sum(value < math.sqrt(low * high) for value in values) / 2000
        assert 0.455 < below < 0.545, size
        usual = sum(value % 128 == 0 for value in values) / 2000
        assert usual < 0.1 if size == "m" else 0.7 < usual < 0.85


def _predicted(problem: GemmProblem, config: object) -> float:
    return predict(problem, config).predicted_us  # type: ignore[arg-type]


def test_a_perfect_model_is_always_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Times as the model predicts them, but for what it would not consider at all."""
    suited = {problem: choose(problem) for problem in random_problems(12, seed=2)}

    def us(problem: GemmProblem, config: object) -> float:
        chosen = _predicted(problem, suited[problem])
        return max(_predicted(problem, config), chosen)

    check = check_model(FakeTrials(us, jitter=0.01), list(suited), ModelCheck(2, H200))
    assert check.share() == 1.0 and len(check.contests) == 12
    path = tmp_path / "new" / "check.json"
    check.write(path)
    record = json.loads(path.read_text())
    assert (record["schema"], record["share"], record["seed"]) == (1, 1.0, 2)
    names = {config.name for config in configurations("bfloat16")}
    for shape, one in zip(record["shapes"], check.contests, strict=True):
        assert (shape["m"], shape["n"], shape["k"]) == (
            one.problem.m, one.problem.n, one.problem.k
        )  # fmt: skip
        assert set(shape["spread_pct"]) <= set(shape["us"]) <= names
        assert shape["choice"] in shape["us"] and shape["best"] in shape["us"]
        assert set(shape["us"]) == set(shape["predicted_us"])
    # A line for each shape.
    assert sum(line.startswith('  {"m"') for line in path.read_text().splitlines()) == 12
    check.print()
    assert "100.0% of 12 shapes" in capsys.readouterr().out


def test_bad_choices_are_counted_and_shown(capsys: pytest.CaptureFixture) -> None:
    problems = random_problems(8, seed=3)
    slow = set(problems[:3])  # 20 % slower than everything else; the others 4 %

    def us(problem: GemmProblem, config: object) -> float:
        factor = 1.2 if problem in slow else 1.04
        return 50 * factor if config == choose(problem) else 50.0

    check = check_model(FakeTrials(us), problems, ModelCheck(3, H200))
    assert check.share() == 5 / 8 and check.share(25) == 1.0
    assert {one.problem for one in check.worst()[:3]} == slow
    check.print()
    out = capsys.readouterr().out
    assert out.count("20.0 %") == 3 and out.count("4.0 %") >= 5 and "62.5% of 8 shapes" in out


def test_it_stops_in_time_and_keeps_what_it_has() -> None:
    problems = random_problems(5, seed=4)
    late = check_model(FakeTrials(_predicted), problems, ModelCheck(4, H200), limit_s=-1)
    assert late.contests == []

    def us(problem: GemmProblem, config: object) -> float:
        if problem == problems[2]:
            raise KeyboardInterrupt
        return 10.0

    into = ModelCheck(4, H200, 3, 1.0)
    with pytest.raises(KeyboardInterrupt):
        check_model(FakeTrials(us), problems, into)
    assert [one.problem for one in into.contests] == problems[:2]


def test_wrong_results_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    problems = random_problems(2, seed=5)
    bad = choose(problems[0])
    trials = FakeTrials(lambda _p, _c: 10.0, wrong=lambda c: "off by 1" if c == bad else None)
    check = check_model(trials, problems, ModelCheck(5, H200))
    assert (problems[0], bad.name, "off by 1") in check.wrong and check.share() < 1
    check.print()
    assert f"{bad.name}: off by 1" in capsys.readouterr().out
    check.write(tmp_path / "check.json")
    assert json.loads((tmp_path / "check.json").read_text())["shapes"][0]["ratio"] is None
