"""``python -m cpgemm bench`` over a made-up runner: options, reports, Ctrl-C, no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench_reports import bad, report, row, rows

from cpgemm.bench import cli
from cpgemm.bench.cases import suite
from cpgemm.bench.cli import add_parser, run
from cpgemm.bench.result import Case, Report, Row, read_report, write_report
from cpgemm.errors import ArgumentError, DeviceError, MissingDependencyError

Behaviour = Callable[[Case], list[Row]]


class Runner:
    """Stands in for ``cpgemm.bench.run``: what it was asked, and rows of ``behaviour``."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.options: dict[str, Any] = {}
        self.behaviour: Behaviour = rows
        self.closed = False

    def run_suites(
        self, cases: Sequence[Case], *, progress: Callable[[str], None], **options: Any
    ) -> Iterator[Row]:
        self.cases, self.options = list(cases), options
        try:
            for case in cases:
                yield from self.behaviour(case)
                progress(case.name)
        finally:
            self.closed = True


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """On a machine with a Hopper GPU, as far as the command can tell."""
    made = Runner()
    module = types.ModuleType("cpgemm.bench.run")
    module.run_suites = made.run_suites  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli.machine, "why_no_hopper", lambda: None)
    monkeypatch.setenv("COLUMNS", "160")
    return made


@pytest.fixture
def no_gpu(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(cli.machine, "why_no_hopper", lambda: "no driver")
    return runner


def parse(*texts: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *map(str, texts)])


def bench(*texts: object) -> int:
    args = parse(*texts)
    assert args.handler is run
    return run(args)


# --------------------------------------------------------------------------------- what is measured


def test_dense_is_the_default(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 0
    assert tuple(runner.cases) == suite("dense") and runner.closed
    options = {**runner.options, "seed": None}
    assert options == {"seed": None, "windows": 7, "window_ms": 10.0, "pdl": (False, True)}
    shown = capsys.readouterr()
    assert "42 cases" in shown.out and "64x4096x7168 pdl" in shown.out
    assert "42/42 dense 4096x7168x2048" in shown.err, "a log shows progress too"


@pytest.mark.parametrize(
    ("texts", "cases"),
    [
        (("masked", "jit"), suite("masked") + suite("jit")),
        (("all",), suite("all")),
        (("--m", 64, "--n", 4096, "--k", 7168), (Case("dense", 64, 4096, 7168),)),
        (
            ("masked", "--groups", 3, "--m", 4, "--n", 8, "--k", 16),
            (Case("masked", 4, 8, 16, 3),),
        ),
    ],
)
def test_cases(runner: Runner, texts: tuple[object, ...], cases: tuple[Case, ...]) -> None:
    assert bench(*texts) == 0
    assert tuple(runner.cases) == cases


def test_a_rows_file_alone_and_with_others(runner: Runner, tmp_path: Path) -> None:
    mine = tmp_path / "rows.txt"
    mine.write_text("dense 3 8 16\ncontiguous 2x5 8 16\n")
    own = (Case("dense", 3, 8, 16), Case("contiguous", 5, 8, 16, 2))
    assert bench("--rows", mine) == 0 and tuple(runner.cases) == own
    assert bench("contiguous", "--rows", mine) == 0
    assert tuple(runner.cases) == suite("contiguous") + own
    assert bench("--m", 1, "--n", 8, "--k", 16, "--rows", mine) == 0
    assert tuple(runner.cases) == (Case("dense", 1, 8, 16), *own)


def test_options_reach_the_runner(runner: Runner) -> None:
    assert bench("--quick", "--seed", 7, "--no-pdl", "--peers", "cublaslt,deep_gemm") == 0
    assert runner.options == {
        "seed": 7, "windows": 5, "window_ms": 2.0, "pdl": (False,),
        "peers": ("cublaslt block", "cublaslt tensor", "deep_gemm"),
    }  # fmt: skip
    assert bench("--pdl", "--peers", "none") == 0
    assert runner.options["pdl"] == (True,) and runner.options["peers"] == ()


def test_two_runs_have_seeds_of_their_own(runner: Runner) -> None:
    seeds = set()
    for _ in range(3):
        bench("contiguous")
        seeds.add(runner.options["seed"])
    assert len(seeds) == 3


# ------------------------------------------------------------------------------------ what is made


def test_files(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "bench.json"
    assert bench("contiguous", "--json", out, "--markdown", tmp_path / "b.md", "--seed", 9) == 0
    made = read_report(out)
    assert made.complete and made.seed == 9 and made.cases() == runner.cases
    assert made.machine["python"] and made.machine["date"]
    assert made.method["suites"] == ["contiguous"] and made.method["cases"] == 4
    assert (made.method["windows"], made.method["pdl"]) == (7, [False, True])
    assert made.method["peers"] == "all" and made.method["without_gpu"] is None
    text = (tmp_path / "b.md").read_text(encoding="utf-8")
    assert "## contiguous" in text and "seed 9" in text
    said = capsys.readouterr().out
    assert f"written: {out}" in said and "written: " + str(tmp_path / "b.md") in said


def test_a_report_read_from_a_file_is_shown_and_nothing_measured(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(report(), tmp_path / "a.json")
    args = ("--from", tmp_path / "a.json", "--markdown", tmp_path / "a.md")
    assert bench(*args) == 0 and not runner.cases
    assert "32x20x4096x4096 pdl" in capsys.readouterr().out
    assert "## masked" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_plots_and_the_page(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Report, Path]] = []

    def write_plots(made: Report, folder: Path, **_options: object) -> list[Path]:
        asked.append((made, folder))
        return [folder / "roofline_light.png"]

    monkeypatch.setattr("cpgemm.bench.plots.write_plots", write_plots)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _name: object())
    page = tmp_path / "h200"
    assert bench("contiguous", "--plot", tmp_path / "plots", "--publish", page) == 0
    assert [folder for _, folder in asked] == [tmp_path / "plots", page]
    assert len(asked[0][0].rows) == 4 * len(rows(Case("dense")))
    assert "roofline_light.png" in (page / "published.md").read_text(encoding="utf-8")
    assert read_report(page / "bench.json").complete


# ------------------------------------------------------------------------------- wrong, interrupted


@pytest.mark.parametrize(
    ("contender", "status", "code"),
    [
        ("cpgemm", "wrong", 1), ("cpgemm pdl", "failed", 1), ("cpgemm", "absent", 0),
        ("deep_gemm", "wrong", 0), ("cutlass", "failed", 0),
    ],
)  # fmt: skip
def test_exit_code(
    runner: Runner, contender: str, status: str, code: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def behaviour(case: Case) -> list[Row]:
        return [bad(case, contender, status, "why"), row(case, "cublaslt block")]

    runner.behaviour = behaviour
    assert bench("contiguous", "--json", tmp_path / "b.json") == code
    assert bench("--from", tmp_path / "b.json") == code
    assert "why" in capsys.readouterr().out


def interrupt_at(number: int) -> Behaviour:
    """Rows of the first cases, then Ctrl-C amid the rows of a case."""
    seen: list[Case] = []

    def behaviour(case: Case) -> list[Row]:
        seen.append(case)
        if len(seen) == number:
            raise KeyboardInterrupt
        return rows(case)

    return behaviour


def test_ctrl_c_keeps_what_there_is(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.behaviour = interrupt_at(3)
    files = ("--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md")
    assert bench("contiguous", *files) == 130
    assert runner.closed
    made = read_report(tmp_path / "b.json")
    assert not made.complete and made.cases() == list(suite("contiguous")[:2])
    shown = capsys.readouterr()
    assert "Interrupted" in shown.err
    for text in (" ".join(shown.out.split()), (tmp_path / "b.md").read_text(encoding="utf-8")):
        assert "The run was interrupted: 2 of 4 cases." in text
        assert "4x8192x7168x2048 pdl" in text


SIGNALLED = """
import signal, sys, types
sys.path.insert(0, sys.argv[1])
from bench_reports import rows

def run_suites(cases, *, progress, **options):
    for number, case in enumerate(cases):
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        yield from rows(case)
        progress(case.name)

module = types.ModuleType("cpgemm.bench.run")
module.run_suites = run_suites
sys.modules[module.__name__] = module

import argparse
from cpgemm import machine
from cpgemm.bench.cli import add_parser
machine.why_no_hopper = lambda: None
parser = argparse.ArgumentParser()
add_parser(parser.add_subparsers())
args = parser.parse_args(["bench", "contiguous", "--json", sys.argv[2]])
sys.exit(args.handler(args))
"""


def test_ctrl_c_as_a_signal_to_a_process(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(folder), str(tmp_path / "b.json")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder.parent)},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "Interrupted" in done.stderr
    assert len(read_report(tmp_path / "b.json").cases()) == 3
    assert "3 of 4 cases" in done.stdout


def test_ctrl_c_before_the_first_row(runner: Runner, tmp_path: Path) -> None:
    runner.behaviour = interrupt_at(1)
    assert bench("contiguous", "--json", tmp_path / "b.json") == 130
    assert read_report(tmp_path / "b.json").rows == []


def test_ctrl_c_leaves_a_published_page_alone(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _name: object())
    runner.behaviour = interrupt_at(2)
    assert bench("contiguous", "--publish", tmp_path) == 130
    assert not list(tmp_path.iterdir())
    assert "left as it was" in capsys.readouterr().out


def test_a_crash_keeps_what_there_is_too(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behaviour(case: Case) -> list[Row]:
        if case.groups == 8:
            raise MemoryError("device")
        return rows(case)

    runner.behaviour = behaviour
    with pytest.raises(MemoryError):
        bench("contiguous", "--json", tmp_path / "b.json")
    made = read_report(tmp_path / "b.json")
    assert not made.complete and len(made.cases()) == 2
    assert "4x8192x7168x2048 pdl" in capsys.readouterr().out


def test_the_file_grows_with_every_case(runner: Runner, tmp_path: Path) -> None:
    """A run that is killed has lost no more than the case it was at."""
    path, found = tmp_path / "b.json", []

    def behaviour(case: Case) -> list[Row]:
        found.append(len(read_report(path).cases()) if path.exists() else 0)
        return rows(case)

    runner.behaviour = behaviour
    bench("contiguous", "--json", path)
    assert found == [0, 0, 1, 2] and len(read_report(path).cases()) == 4


# ------------------------------------------------------------------------------------ without a GPU


def test_without_a_gpu_it_says_what_it_cannot_do(
    no_gpu: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("all", "--json", tmp_path / "b.json") == 0
    assert {case.suite for case in no_gpu.cases} == {"dense", "quantize", "jit"}
    out = " ".join(capsys.readouterr().out.split())
    assert "No Hopper GPU (no driver): kernels, peers and floors cannot be timed here." in out
    assert "4 of contiguous, 11 of masked, " in out and "7 of host" in out
    made = read_report(tmp_path / "b.json")
    assert made.method["without_gpu"] == "no driver"
    assert made.method["cases"] == len(no_gpu.cases) < len(suite("all"))


def test_without_a_gpu_the_default_shows_all_that_works(no_gpu: Runner) -> None:
    assert bench() == 0
    assert {case.suite for case in no_gpu.cases} == {"dense", "jit"}
    assert set(suite("jit")) <= set(no_gpu.cases)
    assert bench("jit") == 0 and tuple(no_gpu.cases) == suite("jit")
    assert bench("--m", 4096, "--n", 7168, "--k", 2048) == 0
    assert no_gpu.cases == [Case("dense", 4096, 7168, 2048)], "a size asked for is not too large"


def test_without_a_gpu_and_without_a_case(no_gpu: Runner) -> None:
    with pytest.raises(DeviceError, match="all 7 cases need a Hopper GPU; got no driver"):
        bench("host")
    assert not no_gpu.cases


def test_without_a_gpu_nothing_is_published(
    no_gpu: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ArgumentError, match="--publish: needs a run on a Hopper GPU; got no dr"):
        bench("--publish", tmp_path)
    assert not no_gpu.cases


# -------------------------------------------------------------------------------------- comparisons


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    write_report(report(), before)
    slower = report([row(report().rows[0].case, "cpgemm", 10.8), *report().rows[1:]])
    write_report(slower, after)
    assert bench("--compare", before, after) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert bench("--compare", before, after, "--limit", 10) == 0
    assert bench("--compare", after, before) == 0
    out = capsys.readouterr().out
    assert "+8.0%" in out and "-7.4%" in out and "REGRESSION" not in out


# -------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("fast",), "suite: must be one of dense, contiguous"),
        (("--m", 64), "--n: is needed for a shape of dense"),
        (("--m", 64, "--n", 4096, "--k", 100), "K must be a multiple of 16; got 100"),
        (("--rows", "/nowhere/rows"), "--rows: must name a readable text file"),
        (("--from", "/nowhere/a.json"), "report: must be a readable file"),
        (("--from", "a.json", "dense", "--seed", 1), "--from: measures nothing; got --seed, dense"),
        (("--compare", "a", "b", "--quick"), "--compare: measures nothing; got --quick too"),
        (("--compare", "a", "b", "--no-pdl"), "--compare: measures nothing; got --pdl too"),
        (("--compare", "a", "b", "--json", "c"), "--compare: only prints; got --json too"),
        (("--compare", "a", "b", "--from", "c"), "--compare: only prints; got --from too"),
        (("--json", "/dev/null/b.json"), "--json: must be in a folder that can be written"),
        (("--plot", "/dev/null/plots"), "--plot: must be in a folder that can be written"),
    ],
)
def test_options_are_checked_first(runner: Runner, texts: tuple[object, ...], says: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        bench(*texts)
    assert says in str(caught.value) and not runner.cases


def test_plots_need_matplotlib(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "cpgemm\[plot\]"'):
        bench("--plot", tmp_path)
    assert not runner.cases, "said before anything is measured"


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("--m", "0"), "must be a positive number; got '0'"),
        (("--peers", "cublas"), "none or some of cublaslt, deep_gemm, cutlass; got 'cublas'"),
        (("--limit", "-1"), "must be a number of per cent from 0 on; got '-1'"),
        (("--limit", "nan"), "must be a number of per cent from 0 on; got 'nan'"),
        (("--seed", "-3"), "must be a whole number from 0 on; got '-3'"),
        (("--compare", "a.json"), "expected 2 arguments"),
    ],
)
def test_options_that_argparse_refuses(
    texts: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*texts)
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_json_of_an_interrupted_run_is_complete_json(runner: Runner, tmp_path: Path) -> None:
    runner.behaviour = interrupt_at(2)
    bench("contiguous", "--json", tmp_path / "b.json")
    record = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert record["schema_version"] == 1 and record["complete"] is False
