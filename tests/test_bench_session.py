"""How one case is measured: checked, timed in turns, and every outcome told in its row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import bench_fakes
import pytest

from cpgemm.bench.contenders import NAMES, Absent, Contender
from cpgemm.bench.result import Case, Row
from cpgemm.bench.session import Session

CASE = Case("dense", 64, 128, 256)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> bench_fakes.Gpu:
    fake = bench_fakes.Gpu({"ours": 10.0, "theirs": 20.0, "floor": 5.0})
    monkeypatch.setitem(sys.modules, "cupy", fake.module())
    for name in ("torch", "cupti", "pynvml"):
        monkeypatch.setitem(sys.modules, name, None)
    return fake


def session(names: tuple[str, ...] = NAMES) -> Session:
    return Session(names, seed=1, windows=5, window_ms=0.1)


def measure(
    made: Session,
    makers: dict[str, Callable[[], Contender]],
    errors: dict[str, float],
) -> dict[str, Row]:
    def check(contender: Contender) -> tuple[float, float]:
        contender.calls[0]()
        return errors[contender.name], 0.002

    with made, made.working():
        rows = made.measure(CASE, makers, check=check, nbytes=1e6)
    assert [row.contender for row in rows] == sorted(
        (row.contender for row in rows), key=NAMES.index
    )
    return {row.contender: row for row in rows}


def test_every_outcome(gpu: bench_fakes.Gpu) -> None:
    def absent() -> Contender:
        raise Absent("not installed")

    def breaks() -> Contender:
        raise ValueError("no such layout\ndetails")

    def breaks_in_capture() -> None:
        if gpu.capturing is not None:
            raise RuntimeError("not in a capture")

    checked: list[str] = []

    def ours() -> Contender:
        return Contender("cpgemm", [gpu.call("ours")], kernel="dense_1x1")

    def floor() -> Contender:
        checked.append("floor")
        return Contender("memory floor", [gpu.call("floor")], checked=False)

    rows = measure(
        session(),
        {
            "memory floor": floor,
            "cutlass": lambda: Contender("cutlass", [breaks_in_capture]),
            "deep_gemm": absent,
            "cublaslt tensor": breaks,
            "cublaslt block": lambda: Contender("cublaslt block", [gpu.call("theirs")]),
            "deep_gemm pdl": lambda: Contender("deep_gemm pdl", [gpu.call("theirs")]),
            "cpgemm": ours,
        },
        {"cpgemm": 0.0016, "cublaslt block": 0.1, "cutlass": 0.0, "deep_gemm pdl": float("nan")},
    )
    right = rows["cpgemm"]
    assert (right.status, right.role, right.kernel, right.error) == (
        "ok", "ours", "dense_1x1", 0.0016,
    )  # fmt: skip
    assert right.us == pytest.approx(10) and len(right.windows_us) == 5 and right.bytes == 1e6
    assert rows["memory floor"].us == pytest.approx(5) and rows["memory floor"].error is None
    assert rows["memory floor"].role == "memory floor"
    wrong = rows["cublaslt block"]
    assert (wrong.status, wrong.us, wrong.error) == ("wrong", None, 0.1)
    assert wrong.reason == "off by 0.10000 (at most 0.002)"
    unwritten = rows["deep_gemm pdl"]
    assert (unwritten.status, unwritten.error, unwritten.pdl) == ("wrong", None, True)
    assert "not written everywhere" in unwritten.reason
    assert (rows["deep_gemm"].status, rows["deep_gemm"].reason) == ("absent", "not installed")
    assert (rows["cublaslt tensor"].status, rows["cublaslt tensor"].reason) == (
        "failed", "no such layout",
    )  # fmt: skip
    assert (rows["cutlass"].status, rows["cutlass"].reason) == ("failed", "not in a capture")
    assert gpu.ran.count("theirs") == 2, "what is wrong is not timed"
    assert gpu.freed == 1 and not gpu.inside


def test_only_what_the_run_wants_is_made(gpu: bench_fakes.Gpu) -> None:
    def not_asked() -> Contender:
        raise AssertionError("made")

    rows = measure(
        session(("cpgemm",)),
        {"cpgemm": lambda: Contender("cpgemm", [gpu.call("ours")]), "cutlass": not_asked},
        {"cpgemm": 0.0},
    )
    assert list(rows) == ["cpgemm"]


def test_nothing_ready(gpu: bench_fakes.Gpu) -> None:
    def absent() -> Contender:
        raise Absent("gone")

    assert measure(session(), {"cutlass": absent}, {})["cutlass"].status == "absent"


def test_ctrl_c_is_no_failure_of_a_contender(gpu: bench_fakes.Gpu) -> None:
    def interrupted() -> Contender:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(session(), {"cpgemm": interrupted}, {})
    assert not gpu.inside


def test_clock_and_power_stand_in_the_rows(
    gpu: bench_fakes.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", bench_fakes.nvml(lambda: 1700, lambda: 600))
    made = session(("cpgemm",))
    slow = gpu.call("ours")

    def call() -> None:
        slow()

    # Graphs of the stand-in end at once: wait for samples in a window instead.
    real = made._time

    def waits(ready: Any, failures: Any) -> Any:
        timings = real(ready, failures)
        assert made._sampler is not None
        samples = made._sampler.samples
        samples.clocks.setdefault("cpgemm", []).extend([1700.0] * 3)
        samples.powers.append(600.0)
        return timings

    monkeypatch.setattr(made, "_time", waits)
    row = measure(made, {"cpgemm": lambda: Contender("cpgemm", [call])}, {"cpgemm": 0})["cpgemm"]
    assert (row.clock_mhz, row.power_w) == (1700, 600)


def test_the_quickest(gpu: bench_fakes.Gpu) -> None:
    def breaks() -> None:
        raise RuntimeError

    made = session()
    with made, made.working():
        candidates = {
            "a": [gpu.call("theirs")], "b": [gpu.call("ours")], "c": [breaks]
        }  # fmt: skip
        assert made.quickest(candidates) == "b"
        with pytest.raises(RuntimeError, match="no variant"):
            made.quickest({"c": [breaks]})


def test_host_time_counts_every_call(gpu: bench_fakes.Gpu) -> None:
    taken: list[str] = []
    made = session()
    timing = made.host_timing([lambda: taken.append("a"), lambda: taken.append("b")], 7)
    assert len(timing.windows) == 5 and len(taken) == 35
    assert taken[:7] == list("abababa")
