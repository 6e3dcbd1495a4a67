"""What the GPU cases of a run share: stream, sampler, data; and how one case is measured."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cpgemm.bench.contenders import NAMES, Absent, Call, Contender, role_of
from cpgemm.bench.kernel_time import KernelTimes
from cpgemm.bench.operands import Pool
from cpgemm.bench.result import Case, Row, Status
from cpgemm.bench.sampler import Sampler, sampling
from cpgemm.timing import Timing, summarize, time_interleaved

__all__ = ["Session", "brief", "judgement"]

_QUICK_WINDOWS, _QUICK_WINDOW_MS = 3, 2.0

Make = Callable[[], Contender]


class Session:
    """One run on CuPy's current device; as a context manager it ends the sampler."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        seed: int,
        windows: int,
        window_ms: float,
        kernel_time: bool = True,
    ) -> None:
        import cupy

        self.cupy = cupy
        self.names, self.windows, self.window_ms = tuple(names), windows, window_ms
        self.seed = seed
        self._order = random.Random(seed)
        self._kernel_time = kernel_time
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._exits = contextlib.ExitStack()
        self._sampler: Sampler | None = None

    def __enter__(self) -> Session:
        self._sampler = self._exits.enter_context(sampling())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exits.close()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside, the run's stream is current, for torch's peers too; device memory is freed after.

        Rows are yielded outside, so that the caller's own work goes to the caller's streams.
        """
        with self.stream, self._with_torch(self.stream):
            yield
        self._free()

    @functools.cached_property
    def _times(self) -> KernelTimes | None:
        return KernelTimes(self.synchronize) if self._kernel_time else None

    @functools.cached_property
    def pools(self) -> tuple[Pool, Pool]:
        """Where the values of A and of B come from; they differ, so that no row meets itself."""
        return Pool(2 * self.seed, self.cupy), Pool(2 * self.seed + 1, self.cupy)

    @contextlib.contextmanager
    def _with_torch(self, stream: Any) -> Iterator[None]:
        """Where torch's peers are measured, its work goes to ``stream`` too."""
        users = ("cublaslt block", "cublaslt tensor", "deep_gemm", "deep_gemm pdl")
        torch = _torch() if any(name in self.names for name in users) else None
        if torch is None:
            yield
            return
        device = self.cupy.cuda.runtime.getDevice()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=device)):
            yield

    def synchronize(self) -> None:
        """Wait for everything on the device."""
        self.cupy.cuda.runtime.deviceSynchronize()

    def _free(self) -> None:
        """Give cached device memory back, so that the next case has all of it."""
        gc.collect()  # errors of contenders hold frames, and those operands
        self.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()
        torch = _torch(only_loaded=True)
        if torch is not None:
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------- measuring

    def measure(
        self,
        case: Case,
        makers: Mapping[str, Make],
        *,
        check: Callable[[Contender], tuple[float, float]],
        nbytes: float,
    ) -> list[Row]:
        """A row for each contender of ``makers`` that the run wants, timed together.

        ``check`` calls a contender once on poisoned memory and returns its relative error and the
        largest that is right.
        """
        rows: dict[str, Row] = {}
        ready: dict[str, Contender] = {}
        errors: dict[str, float] = {}

        def row(name: str, status: Status, **fields: Any) -> Row:
            pdl = name.endswith(" pdl")
            return Row(case, name, role_of(name), status, bytes=nbytes, pdl=pdl, **fields)

        for name in (name for name in NAMES if name in makers and name in self.names):
            try:
                contender = makers[name]()
                if contender.checked:
                    error, limit = check(contender)
                    if not error <= limit:  # NaN is not
                        rows[name] = row(
                            name, "wrong", kernel=contender.kernel, reason=judgement(error, limit),
                            error=None if math.isnan(error) else error,
                        )  # fmt: skip
                        continue
                    errors[name] = error
            except Absent as error:
                rows[name] = row(name, "absent", reason=str(error))
                continue
            except Exception as error:
                rows[name] = row(name, "failed", reason=brief(error))
                continue
            ready[name] = contender

        failures: dict[str, Exception] = {}
        timings = self._time(ready, failures)
        samples = self._sampler.samples if self._sampler is not None else None
        for name, failure in failures.items():
            rows[name] = row(name, "failed", kernel=ready[name].kernel, reason=brief(failure))
        alone = {name: ready[name].calls for name in timings if not ready[name].pdl}
        kernel_us = self._times.measure(alone) if self._times is not None else {}
        for name, timing in timings.items():
            rows[name] = row(
                name, "ok", us=timing.median_us, spread_pct=timing.spread_pct,
                windows_us=timing.windows, kernel_us=kernel_us.get(name), error=errors.get(name),
                clock_mhz=samples.clock_mhz(name) if samples is not None else None,
                power_w=samples.power_w() if samples is not None else None,
                kernel=ready[name].kernel,
            )  # fmt: skip
        return [rows[name] for name in NAMES if name in rows]

    def _time(
        self, ready: Mapping[str, Contender], failures: dict[str, Exception]
    ) -> dict[str, Timing]:
        if not ready:
            return {}
        sampler = self._sampler
        if sampler is not None:
            sampler.fresh()
        return time_interleaved(
            {name: contender.calls for name, contender in ready.items()},
            windows=self.windows,
            window_ms=self.window_ms,
            seed=self._order.randrange(2**32),
            stream=self.stream,
            context=self._with_torch,
            watch=sampler.mark if sampler is not None else None,
            failed=failures.__setitem__,
        )

    def quickest(self, candidates: Mapping[str, Sequence[Call]]) -> str:
        """The name of the candidate that is quickest in short windows; those that fail are not."""
        timings = time_interleaved(
            candidates, windows=_QUICK_WINDOWS, window_ms=_QUICK_WINDOW_MS, stream=self.stream,
            seed=self._order.randrange(2**32), failed=lambda _name, _error: None,
        )  # fmt: skip
        if not timings:
            raise RuntimeError("no variant can be captured in a graph")
        return min(timings, key=lambda name: timings[name].median_us)

    def host_timing(self, calls: Sequence[Call], count: int) -> Timing:
        """Microseconds of host time of a call, ``count`` of them in each window.

        The device is idle when a window begins.  The caller has made each call once.
        """
        sequence = list(itertools.islice(itertools.cycle(calls), count))
        taken: list[float] = []
        for _ in range(self.windows):
            self.synchronize()
            start = time.perf_counter()
            for call in sequence:
                call()
            taken.append((time.perf_counter() - start) * 1e6 / count)
        self.synchronize()
        return summarize(taken)


def brief(error: BaseException) -> str:
    """The first line of an error, with its type where it has no text."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def judgement(error: float, limit: float) -> str:
    """What is wrong with a result of this relative error, which may be ``limit`` at most."""
    if math.isnan(error):
        return "the result holds NaN or infinity, or was not written everywhere"
    return f"off by {error:.5f} (at most {limit:g})"


def _torch(*, only_loaded: bool = False) -> Any:
    """torch with CUDA, or None."""
    if "torch" not in sys.modules and not only_loaded:
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")
    torch: Any = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None
