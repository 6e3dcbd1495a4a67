"""How long kernels alone take, without the gaps between them, where CUPTI is there.

Through cupti-python, else through torch's profiler; without either there are no such times.  Calls
run outside of any graph and window, once over all sets of operands.  Launches with programmatic
dependent launch overlap, so that a kernel's own time would count what it waits for the one before:
they have no such time.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["KernelTimes"]

Call = Callable[[], object]

_BUFFER_BYTES = 8 << 20
_RANGE = "cpgemm bench "


class KernelTimes:
    """Measures with whichever of the two works; after a failure not again.

    ``synchronize`` waits for the device.
    """

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self._synchronize = synchronize
        self._collect = _collector()

    @property
    def available(self) -> bool:
        """Whether there will be times."""
        return self._collect is not None

    def measure(self, contenders: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        """Microseconds of kernels for each call of each contender: the mean over its calls.

        Contenders whose kernels were not seen are left out.
        """
        if self._collect is None or not contenders:
            return {}
        try:
            durations = self._collect(
                {name: functools.partial(self._run, calls) for name, calls in contenders.items()}
            )
        except Exception:  # a profiler that does not work here must not end a run of minutes
            self._collect = None
            return {}
        return {
            name: sum(durations[name]) / len(calls)
            for name, calls in contenders.items()
            if durations.get(name)
        }

    def _run(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()
        self._synchronize()


_Collect = Callable[[Mapping[str, Call]], dict[str, list[float]]]


def _collector() -> _Collect | None:
    """Runs each of some functions, and returns the microseconds of the kernels that each ran."""
    try:
        from cupti import cupti
    except Exception:  # absent, or its library is not found
        return _with_torch if _torch_profiles() else None
    return functools.partial(_with_cupti, cupti)


def _with_cupti(cupti: Any, runs: Mapping[str, Call]) -> dict[str, list[float]]:
    kind = cupti.ActivityKind.CONCURRENT_KERNEL
    found: list[float] = []

    def completed(activities: list[Any]) -> None:
        found.extend((one.end - one.start) / 1e3 for one in activities if one.kind == kind)

    cupti.activity_register_callbacks(lambda: (_BUFFER_BYTES, 0), completed)
    durations: dict[str, list[float]] = {}
    cupti.activity_enable(kind)
    try:
        for name, run in runs.items():
            found.clear()
            run()
            cupti.activity_flush_all(1)
            durations[name] = list(found)
    finally:
        cupti.activity_disable(kind)
    return durations


def _torch_profiles() -> bool:
    try:
        import torch
        from torch.profiler import ProfilerActivity, supported_activities
    except ImportError:
        return False
    return torch.cuda.is_available() and ProfilerActivity.CUDA in supported_activities()


def _with_torch(runs: Mapping[str, Call]) -> dict[str, list[float]]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        # It speaks of runs of several cycles; this is one.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(activities=activities) as profiler:
            for name, run in runs.items():
                with record_function(_RANGE + name):
                    run()
    events = list(profiler.events())
    spans = {
        event.name.removeprefix(_RANGE): (event.time_range.start, event.time_range.end)
        for event in events
        if event.name.startswith(_RANGE) and event.device_type == DeviceType.CPU
    }
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for event in events:
        if event.device_type != DeviceType.CUDA or event.name.startswith((_RANGE, "Mem")):
            continue
        middle = statistics.fmean((event.time_range.start, event.time_range.end))
        for name, (start, end) in spans.items():
            if start <= middle <= end:
                durations[name].append(event.time_range.end - event.time_range.start)
    return durations
