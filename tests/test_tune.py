"""Tuning: who wins, what is kept, many writers, the command line.  Times come from a stand-in."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_trials import FakeTrials
from test_tuned import made, write
from tiny_kernels import ROOT, run_cli

import cpgemm
from cpgemm import heuristics, settings, tune_cli, tuned, tuning
from cpgemm.__main__ import _parser, main
from cpgemm.cost_model import H200
from cpgemm.errors import ArgumentError, DeviceError
from cpgemm.problem import GemmProblem
from cpgemm.trials import candidates
from cpgemm.tune_cli import _problems
from cpgemm.tuned import lookup, path_for, read_file
from cpgemm.tuning import save, tune_problems

P = GemmProblem(64, 2112, 7168)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CPGEMM_TUNED")
    tuned._tables._said.clear()
    settings.changed()
    yield tmp_path
    monkeypatch.undo()
    settings.changed()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTrials:
    """A machine with an H200 on which the model's second choice is twice as fast as all others."""
    second = {
        p: candidates(p, H200)[1][0]
        for p in (P, GemmProblem(1, 2112, 7168), GemmProblem(8, 256, 512))
    }
    trials = FakeTrials(lambda p, config: 5.0 if config == second.get(p) else 10.0, jitter=0.02)
    monkeypatch.setattr(tuning, "require_hopper", lambda: None)
    monkeypatch.setattr("cpgemm.trials.GpuTrials", lambda *_args, **_options: trials)
    monkeypatch.setattr(tuning, "GpuTrials", lambda *_args, **_options: trials)
    monkeypatch.setattr(sys.modules["cpgemm.plan"], "current_machine", lambda: H200)
    monkeypatch.setattr(tuning, "current_machine", lambda: H200)
    return trials


def _tuned(trials: FakeTrials, *problems: GemmProblem, **options: Any) -> Any:
    *_, result = tune_problems(trials, problems, H200, seed=1, **options)
    return result


# ------------------------------------------------------------------------------------- who wins


@pytest.mark.parametrize(
    ("gain", "jitter", "wins"),
    [(0.0, 0.0, False), (1.0, 0.02, False), (1.9, 0.02, False), (2.2, 0.02, True), (1.0, 0, True)],
)
def test_the_winner_must_beat_the_spread(gain: float, jitter: float, wins: bool) -> None:
    """``gain``: by how many per cent the model's choice is slower; ``jitter``: of both."""
    names = [config.name for config, _ in candidates(P, H200)]
    us = {names[0]: 10 * (1 + gain / 100), names[1]: 10.0}
    result = _tuned(FakeTrials(lambda _p, c: us.get(c.name, 20.0), jitter=jitter), P)
    (choice,) = result.choices
    assert choice.model == names[0] and choice.kernel == (names[1] if wins else names[0])
    assert choice.us == pytest.approx(us[choice.kernel], rel=jitter / 2 + 1e-3)
    assert choice.model_us == pytest.approx(us[names[0]], rel=jitter / 2 + 1e-3)
    assert choice.spread_pct == pytest.approx(100 * jitter, abs=0.2)
    assert (choice.cpgemm, choice.pdl, choice.problem) == (cpgemm.__version__, False, P)


def test_a_wrong_result_of_the_models_choice_never_wins() -> None:
    model = heuristics.choose(P)
    trials = FakeTrials(
        lambda _p, c: 1.0 if c == model else 9.0, wrong=lambda c: "off by 1" if c == model else None
    )
    result = _tuned(trials, P)
    assert result.choices[0].kernel != model.name and result.choices[0].model_us is None
    assert result.wrong == (f"64x2112x7168: {model.name}: off by 1",)
    assert f"WRONG 64x2112x7168: {model.name}: off by 1" in str(result)


def test_only_the_models_first_candidates() -> None:
    trials = FakeTrials(lambda _p, _c: 3.0)
    _tuned(trials, P, best=2)
    assert trials.rounds[0][1] == [config.name for config, _ in candidates(P, H200)[:2]]
    with pytest.raises(ArgumentError, match="best: must be at least 1; got 0"):
        _tuned(trials, P, best=0)


# ------------------------------------------------------------------------------------ what is kept


def test_choices_are_kept_shape_by_shape_and_used(gpu: FakeTrials) -> None:
    path = path_for(H200)
    others = GemmProblem(1, 2112, 7168), GemmProblem(8, 256, 512)
    for count, result in enumerate(
        tune_problems(gpu, [P, *others], H200, seed=1, path=path), 1
    ):  # fmt: skip
        assert len(read_file(path, H200)[0]) == count == len(result.choices)
        assert cpgemm.plan_gemm(64, 2112, 7168).config.name == result.choices[0].kernel
    assert [c.kernel for c in result.choices] == [
        candidates(p, H200)[1][0].name for p in (P, *others)
    ]
    assert path.parent.name == "tuned" and {c.problem for c in result.choices} == {P, *others}


def test_new_choices_replace_those_of_the_same_shapes_only() -> None:
    path = write(made(64), made(64, 4096))
    again = made(64, at=-2)
    assert save([again, made(1)], H200, path) == []
    choices, _ = read_file(path, H200)
    assert set(choices) == {again, made(1), made(64, 4096)}
    assert lookup(P) == again, "and are used at once"


def test_a_stale_file_is_kept_beside(tmp_path: Path) -> None:
    path = write(made(1))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"kernels": "other"}))
    (note,) = save([made(64)], H200, path)
    old = path.with_name(path.name + ".old")
    assert (
        note == f"the file that was there was measured with another set of kernels; it is {old} now"
    )
    assert json.loads(old.read_text())["kernels"] == "other"
    assert read_file(path, H200)[0] == [made(64)]
    record["shapes"][0]["m"] = "many"
    path.write_text(json.dumps(record))
    (note,) = save([made(64)], H200, path)
    assert note == f"{path}: choices dropped: 1 (shape 1: m is 'many')"


def test_another_gpus_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    write(made(64), machine=heuristics.Machine("NVIDIA H100", 132, 1.9, 3.3, 13.0), path=path)
    before = path.read_text()
    with pytest.raises(ArgumentError, match=r"file: must be this GPU's; got .* is for NVIDIA H100"):
        save([made(1)], H200, path)
    assert path.read_text() == before


def test_a_file_that_cannot_be_written_is_said_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trials = FakeTrials(lambda _p, _c: 3.0)
    with pytest.raises(DeviceError, match="file: must be one that can be written"):
        _tuned(trials, P, path=tmp_path / "file" / "tuned.json")
    assert not trials.rounds


_WRITER = """
import sys
from pathlib import Path
from cpgemm.cost_model import H200
from cpgemm.tuning import save
from test_tuned import made
path, first = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for m in range(first, first + 10):
    save([made(m)], H200, path)
"""


def test_many_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    folders = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {folders!r}{_WRITER}"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(1 + 10 * at)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for at in range(4)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:  # all start at once
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            choices, faults = read_file(path, H200)  # raises for a half-written file
            assert not faults and len(choices) >= seen, "nobody's choices are lost"
            seen = len(choices)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert {choice.m for choice in read_file(path, H200)[0]} == set(range(1, 41))
    left = {p.name for p in tmp_path.iterdir()} - {"tuned.json", ".tuned.json.lock"}
    assert not left, "no temporary file stays"


# ----------------------------------------------------------------------------------- the interface


def test_from_python(gpu: FakeTrials) -> None:
    result = cpgemm.tune([1, 64], 2112, 7168)
    assert [choice.m for choice in result.choices] == [1, 64] and result.path == path_for(H200)
    assert cpgemm.plan_gemm(64, 2112, 7168).config.name == result.choices[1].kernel
    head, *rows = str(result).splitlines()
    assert head.split()[:5] == ["M", "x", "N", "x", "K"] and "100.0 %" in rows[0]
    assert "2 shapes on NVIDIA H200: another kernel than the model's choice is faster on 2" in rows
    page = result._repr_html_()
    assert page.count("<tr") == 3 and ">64x2112x7168</td>" in page and "model&#39;s" in page
    assert cpgemm.tune(8, 256, 512, keep=False).path is None
    assert lookup(GemmProblem(8, 256, 512)) is None
    with pytest.raises(ArgumentError, match="m, n, k: must not be 0 to be tuned"):
        cpgemm.tune(0, 256, 512)
    with pytest.raises(ArgumentError, match="m: must be at least one number of rows"):
        cpgemm.tune([], 256, 512)


def test_without_a_gpu() -> None:
    with pytest.raises(DeviceError, match="tune: timing kernels needs a Hopper GPU; got "):
        cpgemm.tune(64, 2112, 7168)
    assert not path_for(H200).exists()


@pytest.mark.parametrize("dry", [[], ["--check-model", "3"]])
def test_the_command_without_a_gpu(dry: list[str], tmp_path: Path) -> None:
    shape = [] if dry else ["64", "2112", "7168"]
    done = run_cli("tune", *shape, *dry, cache=tmp_path / "cache")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("cpgemm: tune: timing kernels needs a Hopper GPU; got ")
    assert "--dry-run lists the candidates" in done.stderr and not (tmp_path / "cache").exists()


def test_a_dry_run_lists_the_candidates(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "--m", "1,64", "--nk", "2112x7168,256X512", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for shape in ("1x2112x7168", "64x2112x7168", "1x256x512", "64x256x512"):
        m, n, k = map(int, shape.split("x"))
        offered = [config.name for config, _ in candidates(GemmProblem(m, n, k), H200)]
        assert [line.split()[1] for line in lines if line.startswith(f"{shape} ")] == offered
    assert "4 shapes, " in lines[-1] and "nothing was timed" in lines[-1]
    assert lines[-1].endswith(f"would go to {path_for(H200)}.")
    assert not path_for(H200).exists()
    assert main(["tune", "1", "256", "512", "--dry-run", "--file", "~/mine.json"]) == 0
    assert capsys.readouterr().out.endswith(f" {Path.home() / 'mine.json'}.\n")


def test_the_command(gpu: FakeTrials, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_text("dense 1 2112 7168\ndense 64 2112 7168\n")
    args = ["tune", "8", "256", "512", "64", "2112", "7168", "--rows", str(rows), "--rounds", "3"]
    assert main([*args, "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 shapes on NVIDIA H200, seed 4\n") and out.count("100.") == 3
    assert out.endswith(f"kept in {path_for(H200)}\n")
    assert {windows for _, _, windows in gpu.rounds} == {2, 3}
    assert len(read_file(path_for(H200), H200)[0]) == 3
    mine = tmp_path / "mine.json"
    assert main(["tune", "8", "256", "512", "--file", str(mine)]) == 0
    assert f"Used where CPGEMM_TUNED is {mine}." in capsys.readouterr().out
    assert len(read_file(mine, H200)[0]) == 1


def test_the_command_and_what_is_wrong(gpu: FakeTrials, capsys: pytest.CaptureFixture) -> None:
    bad = candidates(P, H200)[2][0]
    gpu.wrong = lambda config: "off by 1" if config == bad else None
    assert main(["tune", "64", "2112", "7168"]) == 1
    assert f"WRONG 64x2112x7168: {bad.name}: off by 1" in capsys.readouterr().out


def test_an_interrupted_command_keeps_what_it_has(
    gpu: FakeTrials, capsys: pytest.CaptureFixture
) -> None:
    us = gpu.us

    def interrupted(problem: GemmProblem, config: Any) -> float:
        if problem == P:
            raise KeyboardInterrupt
        return us(problem, config)

    gpu.us = interrupted
    assert main(["tune", "8", "256", "512", "64", "2112", "7168"]) == 130
    shown = capsys.readouterr()
    assert "Interrupted" in shown.err and "8x256x512" in shown.out and "1 shape on" in shown.out
    assert [choice.m for choice in read_file(path_for(H200), H200)[0]] == [8]


def test_the_suite_and_the_model_check(
    gpu: FakeTrials, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert main(["tune", "--suite", "dense", "--dry-run", "--best", "1"]) == 0
    assert "42 shapes, 42 candidates" in capsys.readouterr().out
    path = tmp_path / "check.json"
    assert main(["tune", "--check-model", "4", "--seed", "9", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 random shapes on NVIDIA H200, seed 9\n") and "% of 4 shapes" in out
    record = json.loads(path.read_text())
    assert record["seed"] == 9 and len(record["shapes"]) == 4 and record["rounds"] == 7
    assert not path_for(H200).exists(), "nothing is kept"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "M N K: one shape at least must be given; got none"),
        (["64", "2112"], "M N K: must be three numbers a shape; got [64, 2112]"),
        (["64", "2112", "7169"], "k: K must be a multiple of 16; got 7169"),
        (["--m", "64"], "--m: needs --nk too"),
        (["--nk", "64x64"], "--nk: needs --m too"),
        (["64", "64", "64", "--json", "x"], "--json: belongs to --check-model"),
        (["64", "64", "64", "--time-limit", "5"], "--time-limit: belongs to --check-model"),
        (["64", "64", "64", "--check-model", "5"], "--check-model: draws shapes of its own"),
        (["--check-model", "5", "--dry-run"], "--check-model: draws shapes of its own"),
        (["--rows", "/nowhere"], "--rows: must name a readable text file"),
    ],
)
def test_misuse(args: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", *args]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--nk", "64"], "must be NxK, such as 4096x7168; got '64'"),
        (["--m", "1,x"], "must be a positive number; got 'x'"),
    ],
)
def test_misuse_that_argparse_sees(
    args: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["tune", *args])
    assert says in capsys.readouterr().err


def test_the_commands_of_the_page_parse() -> None:
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("python -m cpgemm ")]
    assert len(lines) == 6
    for line in lines:
        args = _parser().parse_args(shlex.split(line, comments=True)[3:])
        assert args.handler is tune_cli.run and (args.check_model or args.rows or _problems(args))


def test_gains_within_the_spread_are_in_brackets() -> None:
    names = [config.name for config, _ in candidates(P, H200)]
    us = {names[0]: 10.1, names[1]: 10.0}
    text = str(_tuned(FakeTrials(lambda _p, c: us.get(c.name, 20.0), jitter=0.02), P))
    assert "(1.0 %)" in text and "in brackets: not more than the spread" in text
    text = str(_tuned(FakeTrials(lambda _p, c: us.get(c.name, 20.0)), P))
    assert "1.0 %" in text and "(" not in text


def test_only_dense_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = tmp_path / "rows"
    rows.write_text("dense 64 4096 7168\nmasked 4x20 4096 7168\n")
    assert main(["tune", "--rows", str(rows)]) == 2
    assert "only dense cases can be tuned; got masked" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu(tmp_path: Path) -> None:
    result = cpgemm.tune([16, 200], 512, 1024, rounds=3, window_ms=1.0)
    assert not result.wrong and len(result.choices) == 2
    assert result.path is not None and result.path.exists()
    for choice in result.choices:
        assert cpgemm.plan_gemm(choice.m, 512, 1024).config.name == choice.kernel
        assert choice.us > 0.5
    print(result)
