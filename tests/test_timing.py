"""Statistics of timings on any machine, the order of GPU calls with a stand-in for CuPy."""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cpgemm.errors import ArgumentError, DeviceError
from cpgemm.timing import (
    interleave,
    rotations,
    summarize,
    time_host,
    time_interleaved,
    window_plan,
)


def test_summary() -> None:
    timing = summarize([4.0, 2.0, 3.0])
    assert (timing.median_us, timing.windows) == (3.0, (4.0, 2.0, 3.0))
    assert timing.spread_pct == pytest.approx(200.0 / 3)
    assert summarize([5.0]).spread_pct == 0.0
    assert summarize([1.0, 2.0]).median_us == 1.5
    assert summarize([0.0]).spread_pct == 0.0
    with pytest.raises(ArgumentError, match="windows: must not be empty"):
        summarize([])


@pytest.mark.parametrize(
    ("size", "sets"),
    [(0, 32), (1, 32), (5.6e6, 32), (6e6, 30), (15.9e6, 12), (90e6, 2), (180e6, 2), (1e9, 2)],
)
def test_rotations(size: float, sets: int) -> None:
    assert rotations(size) == sets


def test_rotations_fill_three_times_l2() -> None:
    for size in (7e6, 12.5e6, 33e6, 61e6):
        assert rotations(size) * size >= 3 * 60e6 > (rotations(size) - 1) * size
    assert rotations(10e6, l2_bytes=10e6) == 3


@pytest.mark.parametrize(
    ("pass_us", "calls", "window_us", "wanted"),
    [
        (100.0, 10, 10_000.0, (100, 1)),  # 1000 calls in one graph
        (20_000.0, 2, 10_000.0, (1, 1)),  # one pass is more than a window
        (3.0, 1, 30_000.0, (4096, 3)),  # more calls than one graph takes
        (30.0, 32, 30_000.0, (128, 8)),
        (0.0, 5000, 10.0, (1, 10_000)),  # more operand sets than a graph's calls: still a pass
    ],
)
def test_window_plan(pass_us: float, calls: int, window_us: float, wanted: tuple[int, int]) -> None:
    per_graph, launches = window_plan(pass_us, calls, window_us)
    assert (per_graph, launches) == wanted
    assert per_graph * launches * max(pass_us, 1e-3) >= window_us


def test_interleaving_goes_round_by_round_in_random_order() -> None:
    taken: list[str] = []

    def replay(name: str, times: Iterator[float]) -> Callable[[], float]:
        def run() -> float:
            taken.append(name)
            return next(times)

        return run

    replays = {name: replay(name, iter(range(at, 100))) for at, name in enumerate("abcd")}
    timings = interleave(replays, 20, random.Random(5))
    rounds = [taken[at : at + 4] for at in range(0, len(taken), 4)]
    assert len(rounds) == 20 and all(sorted(order) == list("abcd") for order in rounds)
    assert len({tuple(order) for order in rounds}) > 5
    assert list(timings) == list("abcd")
    assert timings["c"].windows == tuple(range(2, 22))


def test_host_timing_stops_when_enough() -> None:
    calls: list[None] = []
    assert len(time_host(lambda: calls.append(None), windows=4).windows) == 4 == len(calls)
    timing = time_host(lambda: sum(range(10_000)), windows=1000, enough_s=1e-3)
    assert 1 <= len(timing.windows) < 1000 and timing.median_us > 0


# --------------------------------------------------------------------- the GPU path, without a GPU


class FakeGpu:
    """Enough of CuPy to follow what is enqueued: every call takes ``us[name]``, a launch 0."""

    def __init__(self, us: dict[str, float]) -> None:
        self.us = us
        self.clock = 0.0
        self.capturing: list[str] | None = None
        self.ran: list[str] = []
        self.graphs: list[list[str]] = []
        self.inside: list[str] = []

    def call(self, name: str) -> Callable[[], None]:
        def run() -> None:
            assert self.inside, "outside the stream"
            if self.capturing is not None:
                self.capturing.append(name)
            else:
                self.run(name)

        return run

    def run(self, name: str) -> None:
        self.ran.append(name)
        self.clock += self.us[name]

    @contextlib.contextmanager
    def entered(self, what: str) -> Iterator[None]:
        self.inside.append(what)
        yield
        self.inside.remove(what)

    def module(self) -> Any:
        gpu = self

        class Graph:
            def __init__(self, calls: list[str]) -> None:
                self.calls = calls

            def launch(self, stream: Any = None) -> None:
                assert isinstance(stream, Stream)
                for name in self.calls:
                    gpu.run(name)

        class Stream:
            ptr = 42

            def __init__(self, non_blocking: bool = False) -> None:
                assert non_blocking

            def __enter__(self) -> Any:
                self.context = gpu.entered("cupy")
                self.context.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.context.__exit__(None, None, None)

            def begin_capture(self) -> None:
                assert gpu.capturing is None
                gpu.capturing = []

            def end_capture(self) -> Graph:
                assert gpu.capturing is not None
                captured, gpu.capturing = gpu.capturing, None
                gpu.graphs.append(captured)
                return Graph(captured)

            def synchronize(self) -> None:
                assert gpu.capturing is None

        class Event:
            at = 0.0

            def record(self, stream: Any) -> None:
                assert isinstance(stream, Stream)
                self.at = gpu.clock

            def synchronize(self) -> None:
                pass

        runtime = types.SimpleNamespace(
            CUDARuntimeError=RuntimeError, getDevice=lambda: 0, deviceSynchronize=lambda: None
        )
        cuda = types.SimpleNamespace(
            Stream=Stream,
            Event=Event,
            runtime=runtime,
            get_elapsed_time=lambda start, stop: (stop.at - start.at) / 1e3,
        )
        module: Any = types.ModuleType("cupy")
        module.cuda = cuda
        module.ndarray = type("ndarray", (), {})
        return module


def test_contenders_are_captured_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu({"ours": 10.0, "theirs0": 20.0, "theirs1": 40.0})
    monkeypatch.setitem(sys.modules, "cupy", gpu.module())
    seen: list[Any] = []

    def context(stream: Any) -> contextlib.AbstractContextManager[None]:
        seen.append(stream)
        return gpu.entered("torch")

    timings = time_interleaved(
        {"ours": [gpu.call("ours")], "theirs": [gpu.call("theirs0"), gpu.call("theirs1")]},
        windows=5,
        window_ms=1.2,
        seed=3,
        context=context,
    )
    assert timings["ours"].windows == pytest.approx((10.0,) * 5)
    assert timings["theirs"].median_us == pytest.approx(30.0), "each operand set alike"
    # Warm-up precedes capture, and a window holds as many calls as fill 1.2 ms.
    assert gpu.ran[0] == "ours"
    assert [len(graph) for graph in gpu.graphs] == [1, 120, 2, 40]
    assert gpu.graphs[3] == ["theirs0", "theirs1"] * 20
    assert seen[0].ptr == 42 and not gpu.inside


def test_a_call_that_breaks_in_capture_is_the_error_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu({"call": 1.0})
    monkeypatch.setitem(sys.modules, "cupy", gpu.module())

    def breaks() -> None:
        gpu.call("call")()
        if gpu.capturing is not None:
            raise ValueError("not in a capture")

    with pytest.raises(ValueError, match="not in a capture"):
        time_interleaved({"call": [breaks]})
    assert gpu.capturing is None and not gpu.inside


def test_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="windows: must be at least 1; got 0"):
        time_interleaved({}, windows=0)
    with pytest.raises(ArgumentError, match="window_ms: must be positive; got -1"):
        time_interleaved({}, window_ms=-1)
    with pytest.raises(ArgumentError, match=r"contenders: .* got none for 'a'"):
        time_interleaved({"a": []})
    module = FakeGpu({}).module()

    def no_device() -> int:
        raise RuntimeError("no CUDA-capable device is detected")

    module.cuda.runtime.getDevice = no_device
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(DeviceError, match="needs a GPU; got no CUDA-capable device"):
        time_interleaved({"a": [lambda: None]})


@pytest.mark.gpu
def test_copies_of_twice_the_bytes_take_about_twice_as_long() -> None:
    import cupy

    def copies(size: int) -> list[Callable[[], object]]:
        pairs = [
            (cupy.zeros(size, cupy.uint8), cupy.zeros(size, cupy.uint8))
            for _ in range(rotations(2 * size))
        ]

        def copier(source: Any, target: Any) -> Callable[[], object]:
            return lambda: target.data.copy_from_device_async(source.data, size)

        return [copier(*pair) for pair in pairs]

    timings = time_interleaved({"one": copies(64 << 20), "two": copies(128 << 20)}, windows=5)
    assert 1.7 < timings["two"].median_us / timings["one"].median_us < 2.3
    assert timings["one"].spread_pct < 20
    terabytes_per_s = 2 * (64 << 20) / timings["one"].median_us / 1e6
    assert 1.0 < terabytes_per_s < 5.5, "a copy reads and writes device memory, not L2"
