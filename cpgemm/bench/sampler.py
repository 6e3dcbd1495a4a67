"""Clock and power of the GPU while something is timed, by nvidia-ml-py where it is installed.

The clock is asked for all along, and filed under what is being timed at that moment.  Power is
reported by the GPU as a mean over some 25 ms or more, longer than a window: it belongs to all
contenders of a case, which were interleaved, and so does a clock that was never met.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Sampler", "Samples", "sampling"]

_PERIOD_S = 0.005
_FEWEST = 3  # samples of a label that make a mean


class Samples:
    """What was sampled: SM clocks in MHz by label, power in W."""

    def __init__(self) -> None:
        self.clocks: dict[str, list[float]] = {}
        self.powers: list[float] = []

    def clock_mhz(self, label: str) -> float | None:
        """Mean clock under ``label``, or under all where that was sampled too rarely."""
        own = self.clocks.get(label, [])
        if len(own) < _FEWEST:
            own = [clock for clocks in self.clocks.values() for clock in clocks]
        return statistics.fmean(own) if own else None

    def power_w(self) -> float | None:
        """Mean power under all labels."""
        return statistics.fmean(self.powers) if self.powers else None


class Sampler:
    """Asks one GPU from a thread of its own.  ``nvml`` is the module pynvml, or a stand-in."""

    def __init__(self, nvml: Any, device: Any, period_s: float = _PERIOD_S) -> None:
        self.samples = Samples()
        self._nvml, self._device, self._period_s = nvml, device, period_s
        self._label: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpgemm-bench-sampler", daemon=True)

    def mark(self, label: str | None) -> None:
        """From now on samples belong to ``label``; None: they are not kept."""
        self._label = label

    def fresh(self) -> None:
        """Forget what was sampled: another case begins."""
        self.samples = Samples()

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End sampling and wait for the thread."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._period_s):
            label = self._label
            if label is None:
                continue
            clock, power = self._clock(), self._power()
            if label != self._label:  # asking took longer than the window
                continue
            if clock is not None:
                self.samples.clocks.setdefault(label, []).append(clock)
            if power is not None:
                self.samples.powers.append(power)

    def _clock(self) -> float | None:
        try:
            kind = self._nvml.NVML_CLOCK_SM
            return float(self._nvml.nvmlDeviceGetClockInfo(self._device, kind))
        except self._nvml.NVMLError:
            return None

    def _power(self) -> float | None:
        """The instant field where there is one: the older call is a mean over a second."""
        nvml = self._nvml
        try:
            field = getattr(nvml, "NVML_FI_DEV_POWER_INSTANT", None)
            if field is not None:
                value = nvml.nvmlDeviceGetFieldValues(self._device, [field])[0]
                if value.nvmlReturn == nvml.NVML_SUCCESS:
                    return float(value.value.uiVal) / 1e3
            return float(nvml.nvmlDeviceGetPowerUsage(self._device)) / 1e3
        except nvml.NVMLError:
            return None


@contextlib.contextmanager
def sampling() -> Iterator[Sampler | None]:
    """Sample CuPy's current device inside the ``with`` block; None where that is not possible."""
    opened = _open()
    if opened is None:
        yield None
        return
    nvml, device = opened
    sampler = Sampler(nvml, device)
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.stop()
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _open() -> tuple[Any, Any] | None:
    """The module and NVML's handle of CuPy's current device; None without either."""
    cupy = sys.modules.get("cupy")
    try:
        import pynvml
    except ImportError:
        return None
    if cupy is None:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        # NVML counts devices in its own order; the bus address is the same for both.
        return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(cupy.cuda.Device().pci_bus_id)
    except Exception:  # CuPy and NVML raise what they like; nothing to sample in any case
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return None
