"""Measured choices: the file, what it is looked up for, what is left aside, what is explained."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cpgemm
from cpgemm import heuristics, settings, tuned
from cpgemm.cost_model import H200, Machine
from cpgemm.heuristics import configurations
from cpgemm.problem import GemmProblem
from cpgemm.tuned import TunedChoice, UnusableFile, digest, lookup, path_for, read_file, text_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, measured choices in force."""
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CPGEMM_TUNED")
    tuned._tables._said.clear()
    settings.changed()
    yield tmp_path
    monkeypatch.undo()
    settings.set_tuned(None)
    settings.set_sms(None)


def made(
    m: int, n: int = 2112, k: int = 7168, *, at: int = -1, dtype: Any = "bfloat16", c: bool = False
) -> TunedChoice:
    """A choice that the model would not make: the slowest but ``at`` of its candidates."""
    candidates = heuristics.explain(m, n, k, out_dtype=dtype, accumulate=c).candidates
    return TunedChoice(
        m, n, k, dtype, c, candidates[at].config.name, 7.25, candidates[0].config.name, 9.5, 1.5,
        False, "0.1.0", "2026-11-22 12:00",
    )  # fmt: skip


def write(*choices: TunedChoice, machine: Machine = H200, path: Path | None = None) -> Path:
    path = path_for(machine) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(choices, machine))
    settings.changed()
    return path


def test_the_file_is_readable_and_reads_back(cache: Path) -> None:
    choices = [made(64), made(16), made(64, 4096), made(64, dtype="float32"), made(64, c=True)]
    choices.append(dataclasses.replace(made(128), model_us=None))
    path = write(*choices)
    assert path == cache / "tuned" / "nvidia-h200-132-sms.json"
    lines = path.read_text().splitlines()
    assert lines[:6] == [
        "{", ' "schema": 1,', ' "gpu": "NVIDIA H200",', ' "sms": 132,', 
        f' "kernels": "{digest()}",', ' "shapes": [',
    ]  # fmt: skip
    assert lines[-2:] == [" ]", "}"] and len(lines) == 6 + len(choices) + 2, "a line for each shape"
    found, faults = read_file(path, H200)
    assert set(found) == set(choices) and not faults
    assert [(c.n, c.k, c.out_dtype, c.accumulate, c.m) for c in found] == sorted(
        (c.n, c.k, c.out_dtype, c.accumulate, c.m) for c in choices
    )
    assert read_file(write(), H200) == ([], [])


def test_the_digest_is_of_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    known = tuned._by_name
    monkeypatch.setattr(tuned, "_by_name", lambda dtype: dict(list(known(dtype).items())[1:]))
    digest.cache_clear()
    try:
        assert digest() != before and len(before) == len(digest()) == 16
    finally:
        digest.cache_clear()


def test_a_measured_choice_is_used_and_no_other_shape_is_touched() -> None:
    problem = GemmProblem(64, 2112, 7168)
    model = heuristics.choose(problem)
    assert lookup(problem) is None and tuned.choose(problem) == model, "no file: the model"
    choice = made(64)
    write(choice)
    assert tuned.choose(problem) == choice.config != model
    assert heuristics.choose(problem) == model, "the model itself stays pure"
    for other in (
        GemmProblem(64, 2120, 7168), GemmProblem(64, 2112, 7184), GemmProblem(65, 2112, 7168),
        GemmProblem(64, 2112, 7168, "float32"), GemmProblem(64, 2112, 7168, "bfloat16", True),
    ):  # fmt: skip
        assert lookup(other) is None and tuned.choose(other) == heuristics.choose(other)


def test_other_rows_take_the_nearest_with_as_many_tiles() -> None:
    write(made(1), made(16), made(48), made(65, at=-2), made(192), made(100, 4096))

    def found(m: int, n: int = 2112) -> int | None:
        choice = lookup(GemmProblem(m, n, 7168))
        return None if choice is None else choice.m

    assert [found(m) for m in (1, 8, 9, 16, 31, 32, 33, 48, 64)] == [
        1, 1, 16, 16, 16, 48, 48, 48, 48
    ]  # fmt: skip  # of two as near, the one with more rows
    assert [found(m) for m in (65, 128, 129, 192, 193)] == [65, 65, 192, 192, None]
    assert found(64, 4096) is None and found(128, 4096) == 100
    for m in range(1, 257):
        taken = lookup(GemmProblem(m, 2112, 7168))
        if taken is not None:
            problems = GemmProblem(m, 2112, 7168), taken.problem
            for config in configurations("bfloat16"):
                assert len({config.tiles(problem) for problem in problems}) == 1, "same tiles"


def test_plans_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cpgemm.plan"], "current_machine", lambda: H200)
    model = cpgemm.plan_gemm(64, 2112, 7168).config
    choice = made(64)
    write(choice)
    plan = cpgemm.plan_gemm(64, 2112, 7168)
    assert plan.config == choice.config != model
    assert "measured at M = 64: 7.2 us" in str(plan.explain())
    assert cpgemm.plan_gemm(64, 2112, 7168, config=model).config == model
    settings.set_tuned(False)
    assert cpgemm.plan_gemm(64, 2112, 7168).config == model
    settings.set_tuned(None)
    assert cpgemm.plan_gemm(64, 2112, 7168).config == choice.config
    monkeypatch.setenv("CPGEMM_TUNED", "0")
    settings.changed()
    assert cpgemm.plan_gemm(64, 2112, 7168).config == model


def test_explanations_say_so(capsys: pytest.CaptureFixture) -> None:
    from cpgemm.__main__ import main

    plain = str(cpgemm.explain(64, 2112, 7168))
    assert "measured" not in plain
    choice = made(48)
    write(choice, dataclasses.replace(made(128, at=0), model_us=7.25))
    explanation = cpgemm.explain(64, 2112, 7168)
    assert explanation.choice.config == choice.config
    first, second, *rest = str(explanation).splitlines()
    assert first.endswith(choice.kernel)
    assert second == f"measured at M = 48: 7.2 us, {choice.model} 9.5 us (2026-11-22 12:00)"
    assert rest[1:] == plain.splitlines()[2:], "the model's predictions stay as they are"
    assert all(len(line) <= 100 for line in str(explanation).splitlines())
    assert main(["explain", "64", "2112", "7168"]) == 0
    assert capsys.readouterr().out == f"{explanation}\n"
    assert "the model's choice; none was faster" in str(cpgemm.explain(128, 2112, 7168))


def test_a_choice_that_the_model_would_not_consider() -> None:
    outside = next(c for c in configurations("bfloat16") if c.cluster == 4)
    assert outside not in {c.config for c in heuristics.explain(512, 2112, 7168).candidates}
    write(dataclasses.replace(made(512), kernel=outside.name))
    assert cpgemm.explain(512, 2112, 7168).choice.config == outside
    assert cpgemm.plan_gemm(512, 2112, 7168).config == outside


def test_no_file_costs_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []
    monkeypatch.setattr(
        tuned, "read_file", lambda path, machine: (looks.append(path), read_file(path, machine))[1]
    )
    settings.changed()
    for m in range(1, 50):
        tuned.choose(GemmProblem(m, 2112, 7168))
    assert len(looks) == 1


def _complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    for m in (64, 64, 100):
        problem = GemmProblem(m, 2112, 7168)
        assert tuned.choose(problem) == heuristics.choose(problem)
    settings.changed()
    assert lookup(GemmProblem(64, 2112, 7168)) is None
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "has schema 2, not 1"),
        ({"schema": None}, "has schema None, not 1"),
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "is for NVIDIA H100 80GB HBM3 with 132 multiprocessors"),
        ({"sms": 78}, "is for NVIDIA H200 with 78 multiprocessors, not NVIDIA H200 with 132"),
        ({"kernels": "0" * 16}, "was measured with another set of kernels"),
        ({"shapes": {}}, "is not a list of measured choices"),
    ],
)
def test_a_stale_or_foreign_file_is_left_aside(
    change: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(made(64))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    settings.changed()
    with caplog.at_level(logging.WARNING, "cpgemm"):
        (line,) = _complaints(caplog)
    assert says in line and str(path) in line and "\n" not in line
    with pytest.raises(UnusableFile) as caught:
        read_file(path, H200)
    assert caught.value.foreign == ("gpu" in change or "sms" in change)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 1}', "\x00", "[" * 100_000, '{"schema": 1, "sha']
)
def test_a_damaged_file_is_left_aside(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(made(64))
    path.write_text(text)
    settings.changed()
    with caplog.at_level(logging.WARNING, "cpgemm"):
        (line,) = _complaints(caplog)
    assert str(path) in line and "the cost model chooses kernels" in line


def test_bytes_and_folders_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    path = write()
    path.write_bytes(b"\xff\xfe\x00")
    settings.changed()
    with caplog.at_level(logging.WARNING, "cpgemm"):
        assert len(_complaints(caplog)) == 1
    path.unlink()
    path.mkdir()
    settings.changed()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cpgemm"):
        assert len(_complaints(caplog)) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kernel": "dense_999x128"}, "'dense_999x128' is no kernel for 'bfloat16'"),
        ({"out_dtype": "float32"}, "is no kernel for 'float32'"),
        ({"out_dtype": "float16"}, "is no kernel for 'float16'"),
        ({"n": 2113}, "N must be a multiple of 8"),
        ({"m": 0}, "an empty product needs no kernel"),
        ({"m": "64"}, "m is '64'"),
        ({"m": True}, "m is True"),
        ({"k": -128}, "must be between 0"),
        ({"us": float("nan")}, "us is nan"),
        ({"us": 0.0}, "us is 0.0"),
        ({"us": None}, "us is None"),
        ({"accumulate": 1}, "accumulate is 1"),
    ],
)
def test_a_damaged_entry_is_left_out_alone(
    change: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(made(64), made(64, 4096))
    record = json.loads(path.read_text())
    record["shapes"][0] |= change
    path.write_text(json.dumps(record))
    settings.changed()
    with caplog.at_level(logging.WARNING, "cpgemm"):
        (line,) = _complaints(caplog)
    assert says in line and "measured choices left out: 1 " in line
    assert lookup(GemmProblem(64, 4096, 7168)) is not None


def test_entries_that_lack_a_field_or_are_none(caplog: pytest.LogCaptureFixture) -> None:
    path = write(made(64), made(64, 4096))
    record = json.loads(path.read_text())
    del record["shapes"][0]["kernel"]
    record["shapes"][1] = 7
    path.write_text(json.dumps(record))
    settings.changed()
    with caplog.at_level(logging.WARNING, "cpgemm"):
        (line,) = _complaints(caplog)
    assert "measured choices left out: 2 (shape 1: lacks kernel)" in line


def test_a_file_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.json"
    monkeypatch.setenv("CPGEMM_TUNED", str(path))
    settings.changed()
    assert path_for(H200) == path
    with caplog.at_level(logging.WARNING, "cpgemm"):
        assert _complaints(caplog) == [
            f"cpgemm: CPGEMM_TUNED: {path} does not exist; the cost model chooses kernels."
        ]
    choice = made(64)
    write(choice, path=path)
    assert tuned.choose(choice.problem) == choice.config


def test_a_limit_of_multiprocessors_is_another_machine(caplog: pytest.LogCaptureFixture) -> None:
    write(made(64))
    fewer = dataclasses.replace(H200, sms=64)
    with caplog.at_level(logging.WARNING, "cpgemm"):
        assert lookup(GemmProblem(64, 2112, 7168), fewer) is None
    assert not caplog.records and path_for(fewer).name == "nvidia-h200-64-sms.json"
