"""Clock and power: filed under what runs, absent where nothing can be asked."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_fakes
import pytest

from cpgemm.bench.sampler import Sampler, Samples, sampling

PERIOD = 0.001


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing was sampled"
        time.sleep(PERIOD)


def count(samples: Samples) -> int:
    return sum(len(clocks) for clocks in samples.clocks.values())


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy and nvidia-ml-py with one device at 1980 MHz and 400 W."""
    module = bench_fakes.nvml(lambda: 1980, lambda: 400)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setitem(sys.modules, "cupy", bench_fakes.Gpu({}).module())
    return module


def test_samples_belong_to_what_runs() -> None:
    clock = {"now": 1000.0}
    module = bench_fakes.nvml(lambda: clock["now"], lambda: 500)
    sampler = Sampler(module, "device 0000:1B:00.0", PERIOD)
    sampler.start()
    try:
        sampler.mark("a")
        wait(lambda: len(sampler.samples.clocks.get("a", [])) >= 5)
        sampler.mark(None)
        clock["now"] = 2000.0
        sampler.mark("b")
        wait(lambda: len(sampler.samples.clocks.get("b", [])) >= 5)
    finally:
        sampler.stop()
    samples = sampler.samples
    assert samples.clock_mhz("a") == 1000 and samples.clock_mhz("b") == pytest.approx(2000, rel=0.2)
    assert samples.power_w() == 500


def test_nothing_is_kept_while_nothing_runs() -> None:
    asked = itertools.count()
    sampler = Sampler(
        bench_fakes.nvml(lambda: next(asked), lambda: 1), "device 0000:1B:00.0", PERIOD
    )
    sampler.start()
    time.sleep(20 * PERIOD)
    sampler.stop()
    assert next(asked) == 0 and count(sampler.samples) == 0
    assert sampler.samples.power_w() is None and sampler.samples.clock_mhz("a") is None


def test_a_label_that_was_hardly_met_gets_the_mean_of_all() -> None:
    samples = Samples()
    samples.clocks = {"a": [1000.0, 1200.0, 1100.0], "b": [1900.0]}
    assert samples.clock_mhz("a") == 1100
    assert samples.clock_mhz("b") == samples.clock_mhz("never") == 1300


def test_power_without_the_instant_field() -> None:
    sampler = Sampler(
        bench_fakes.nvml(lambda: 1, lambda: 123, instant=False), "device 0000:1B:00.0", PERIOD
    )
    assert sampler._power() == 123


def test_a_device_that_does_not_answer() -> None:
    module = bench_fakes.nvml(lambda: 1, lambda: 1)

    def refuse(*_arguments: object) -> None:
        raise module.NVMLError("not supported")

    module.nvmlDeviceGetClockInfo = module.nvmlDeviceGetFieldValues = refuse
    sampler = Sampler(module, "device", PERIOD)
    sampler.start()
    sampler.mark("a")
    time.sleep(10 * PERIOD)
    sampler.stop()
    assert count(sampler.samples) == 0 and sampler.samples.power_w() is None


def test_another_case_starts_from_nothing(installed: Any) -> None:
    with sampling() as sampler:
        assert sampler is not None
        sampler.mark("a")
        wait(lambda: count(sampler.samples) > 0)
        sampler.mark(None)
        sampler.fresh()
        assert count(sampler.samples) == 0
        assert installed.opened == [True]
    assert installed.opened == [], "shut down again"


def test_absent(monkeypatch: pytest.MonkeyPatch, installed: Any) -> None:
    def no_driver() -> None:
        raise installed.NVMLError("NVML Shared Library Not Found")

    def no_device(_bus: str) -> None:
        raise installed.NVMLError("not found")

    monkeypatch.setattr(installed, "nvmlDeviceGetHandleByPciBusId", no_device)
    with sampling() as sampler:
        assert sampler is None and installed.opened == []
    monkeypatch.setattr(installed, "nvmlInit", no_driver)
    with sampling() as sampler:
        assert sampler is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with sampling() as sampler:
        assert sampler is None


@pytest.mark.gpu
def test_a_busy_device_has_a_clock_and_draws_power() -> None:
    pytest.importorskip("pynvml")
    import cupy as cp

    x = cp.zeros(1 << 26, cp.float32)
    with sampling() as sampler:
        assert sampler is not None
        sampler.mark("busy")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            x += 1
            cp.cuda.Device().synchronize()
        clock, power = sampler.samples.clock_mhz("busy"), sampler.samples.power_w()
    print(clock, power)
    assert clock is not None and 200 < clock < 3000
    assert power is not None and 20 < power < 1500
