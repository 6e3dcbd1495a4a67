"""Kernels alone: through cupti-python or torch's profiler, or not at all."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from cpgemm.bench import kernel_time
from cpgemm.bench.kernel_time import KernelTimes


class FakeCupti:
    """``cupti.cupti``: whatever runs while a kind is enabled is handed over at the next flush."""

    def __init__(self) -> None:
        self.ActivityKind = types.SimpleNamespace(CONCURRENT_KERNEL=10)
        self.enabled = False
        self.pending: list[Any] = []
        self.clock = 0

    def activity_register_callbacks(
        self, requested: Callable[[], Any], completed: Callable[[list[Any]], None]
    ) -> None:
        assert requested()[0] > 0
        self.completed = completed

    def activity_enable(self, kind: int) -> None:
        self.enabled = True

    def activity_disable(self, kind: int) -> None:
        self.enabled = False

    def activity_flush_all(self, _flag: int) -> None:
        self.completed(self.pending)
        self.pending = []

    def run(self, ns: int, kind: int = 10) -> None:
        if self.enabled:
            self.pending.append(
                types.SimpleNamespace(kind=kind, start=self.clock, end=self.clock + ns)
            )
        self.clock += ns + 500


@pytest.fixture
def cupti(monkeypatch: pytest.MonkeyPatch) -> FakeCupti:
    fake, package = FakeCupti(), types.ModuleType("cupti")
    package.cupti = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupti", package)
    return fake


def test_with_cupti(cupti: FakeCupti) -> None:
    waits: list[int] = []
    times = KernelTimes(lambda: waits.append(cupti.clock))
    assert times.available

    def two_kernels_and_a_copy() -> None:
        cupti.run(2000)
        cupti.run(1000)
        cupti.run(9000, kind=1)

    found = times.measure(
        {
            "one": [lambda: cupti.run(4000), lambda: cupti.run(6000)],
            "two": [two_kernels_and_a_copy],
            "none": [lambda: None],
        }
    )
    assert found == {"one": 5.0, "two": 3.0}
    assert not cupti.enabled and len(waits) == 3, "each contender's kernels are complete"


def test_a_profiler_that_fails_is_not_asked_again(cupti: FakeCupti) -> None:
    def fail(_flag: int) -> None:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    cupti.activity_flush_all = fail  # type: ignore[method-assign]
    times = KernelTimes(lambda: None)
    assert times.measure({"one": [lambda: cupti.run(1)]}) == {}
    assert not times.available and not cupti.enabled


def test_without_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupti", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    times = KernelTimes(lambda: None)
    assert not times.available and times.measure({"one": [lambda: None]}) == {}


def test_torch_without_cuda_profiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    import torch

    monkeypatch.setitem(sys.modules, "cupti", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not KernelTimes(lambda: None).available


def test_torch_ranges_split_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of a profiler, sorted to the ranges in which they ran."""
    pytest.importorskip("torch")
    import torch
    from torch.autograd import DeviceType

    def event(name: str, kind: Any, start: float, end: float) -> Any:
        span = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(name=name, device_type=kind, time_range=span)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("cpgemm bench a", cpu, 0, 100), event("cpgemm bench b", cpu, 100, 200),
        event("cpgemm bench a", cuda, 5, 90), event("gemm", cuda, 10, 30),
        event("gemm", cuda, 40, 50), event("Memset (Device)", cuda, 60, 70),
        event("other", cuda, 110, 150), event("aten::ones", cpu, 120, 130),
    ]  # fmt: skip

    class Profiler:
        def __init__(self, **_options: Any) -> None: ...

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *_error: object) -> None: ...

        def events(self) -> list[Any]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    found = kernel_time._with_torch({"a": lambda: None, "b": lambda: None})
    assert found == {"a": [20, 10], "b": [40]}


@pytest.mark.gpu
def test_a_copy_kernel_takes_as_long_as_memory_needs() -> None:
    import cupy as cp

    x, y = cp.zeros(1 << 28, cp.float32), cp.empty(1 << 28, cp.float32)
    times = KernelTimes(cp.cuda.runtime.deviceSynchronize)
    if not times.available:
        pytest.skip("neither cupti-python nor torch")
    found = times.measure({"add": [lambda: cp.add(x, 1, out=y)]})
    assert 300 < found["add"] < 2000, "2 GiB at 1 to 5 TB/s"
