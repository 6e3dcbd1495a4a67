"""Timing on the GPU that can be trusted: cold L2, CUDA graphs, contenders interleaved, medians.

A GPU's clock follows its temperature and power.  Whoever is timed first on a cool GPU looks 10 to
15 % faster than the same kernel later on, so that contenders must take turns within one run, and
only ratios inside that run mean something.  A matrix that still lies in L2 from the last call is
read faster than any real layer's weights: each contender therefore walks through several sets of
operands, together larger than L2 (``rotations`` says how many sets that takes).

Everything but ``time_interleaved`` and its helpers is arithmetic that runs anywhere.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpgemm.errors import DeviceError, MissingDependencyError, reject

__all__ = ["Timing", "interleave", "rotations", "summarize", "time_host", "time_interleaved"]

Call = Callable[[], object]

_L2_FACTOR = 3  # times L2 that rotating operands fill together
_MAX_SETS = 32
_MAX_GRAPH_CALLS = 4096  # calls captured in one graph; longer windows launch the graph again
_LEAD_IN_US = 300.0  # work queued ahead of a window, so that no launch latency falls into it
_MAX_LEAD_IN = 64


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median of all windows, and how far the windows lie apart.

    ``spread_pct`` is (largest - smallest) / median in per cent; ``windows`` are the microseconds
    per call of each window, in the order in which they were taken.
    """

    median_us: float
    spread_pct: float
    windows: tuple[float, ...]


def summarize(windows: Sequence[float]) -> Timing:
    """``Timing`` of the microseconds per call of one or more windows."""
    if not windows:
        reject("windows", "must not be empty", "0 windows", "Time at least one window.")
    median = statistics.median(windows)
    spread = 100.0 * (max(windows) - min(windows)) / median if median > 0 else 0.0
    return Timing(median, spread, tuple(windows))


def rotations(bytes_per_set: float, l2_bytes: float = 60e6) -> int:
    """How many sets of operands keep L2 cold: at least three times ``l2_bytes`` in all.

    ``bytes_per_set`` is what one call reads and writes.  At least 2, at most 32: below
    ``3 * l2_bytes / 32`` a set (5.6 MB for the default, which rounds an H200's 50 MB up), L2 stays
    partly warm.
    """
    if bytes_per_set <= 0:
        return _MAX_SETS
    return max(2, min(_MAX_SETS, math.ceil(_L2_FACTOR * l2_bytes / bytes_per_set)))


def window_plan(pass_us: float, calls: int, window_us: float) -> tuple[int, int]:
    """How to fill a window: (passes through all calls in one graph, launches of that graph).

    ``pass_us`` is the time of one pass through the ``calls`` calls of a contender.
    """
    passes = max(1, math.ceil(window_us / max(pass_us, 1e-3)))
    per_graph = min(passes, max(1, _MAX_GRAPH_CALLS // calls))
    return per_graph, math.ceil(passes / per_graph)


def interleave(
    replays: Mapping[str, Callable[[], float]],
    windows: int,
    rng: random.Random,
    watch: Callable[[str | None], None] | None = None,
) -> dict[str, Timing]:
    """Call each of ``replays`` ``windows`` times, round by round, each round in random order.

    A replay runs one window and returns its microseconds per call.  ``watch`` is told whose window
    begins, and None at the end.
    """
    taken: dict[str, list[float]] = {name: [] for name in replays}
    tell = watch or (lambda _name: None)
    try:
        for _ in range(windows):
            order = list(replays)
            rng.shuffle(order)
            for name in order:
                tell(name)
                taken[name].append(replays[name]())
    finally:
        tell(None)
    return {name: summarize(values) for name, values in taken.items()}


def time_host(call: Call, *, windows: int = 3, enough_s: float = 2.0) -> Timing:
    """Time a call on the CPU, one call a window; stops early once ``enough_s`` seconds are spent.

    The caller has made the call once before: caches, threads and imports are warm.
    """
    taken: list[float] = []
    while len(taken) < windows and sum(taken) < enough_s * 1e6:
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e6)
    return summarize(taken)


def time_interleaved(
    contenders: Mapping[str, Sequence[Call]],
    *,
    windows: int = 7,
    window_ms: float = 10.0,
    seed: int | None = None,
    stream: Any = None,
    context: Callable[[Any], contextlib.AbstractContextManager[object]] | None = None,
    watch: Callable[[str | None], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time contenders on the current device, all in one run, and return the ``Timing`` of each.

    ``contenders`` maps a name to calls without arguments, one for each set of operands (see
    ``rotations``).  A call enqueues work on CuPy's current stream and returns; it must not
    synchronise or read back.  Each is called once before anything is captured, so that it may
    compile or allocate then.  The calls of a contender are captured in a CUDA graph, repeated until
    ``window_ms`` milliseconds are full; graphs are replayed ``windows`` times round by round, in an
    order that ``seed`` (None: a fresh one) decides, and timed with CUDA events.  Some work is
    queued before each window, so that windows hold no launch latency; the gaps between the calls
    of a graph are part of the result.

    ``stream`` is a non-blocking ``cupy.cuda.Stream`` to work on (None: a new one).  Contenders of
    another library must enqueue on that same stream: ``context(stream)`` returns a context manager
    that sees to it, for torch ``torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))``.

    ``watch`` is called with a contender's name when a window of it begins, and with None after the
    last one.  ``failed`` is called with the name and the error of a contender that raises before
    the first window; it is left out then (None: the error is raised).

    Raises ``ArgumentError`` for an empty contender or a window count below 1, ``DeviceError``
    without a GPU.
    """
    if windows < 1:
        reject("windows", "must be at least 1", windows, "Leave it out for 7.")
    if not window_ms > 0:
        reject("window_ms", "must be positive", window_ms, "Leave it out for 10 ms.")
    for name, calls in contenders.items():
        if not calls:
            reject(
                "contenders", "each must have a call", f"none for {name!r}", "Give at least one."
            )
    cupy = _cupy()
    stream = cupy.cuda.Stream(non_blocking=True) if stream is None else stream
    cupy.cuda.runtime.deviceSynchronize()  # operands may still be in the making on other streams
    with stream, context(stream) if context is not None else contextlib.nullcontext():
        replays = {}
        for name, calls in contenders.items():
            try:
                replays[name] = _prepare(cupy, stream, list(calls), window_ms * 1e3)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
        timings = interleave(replays, windows, random.Random(seed), watch)
        stream.synchronize()
    return timings


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            'cupy: timing kernels needs it; it is not installed. Run: pip install "cpgemm[cuda12]"'
        ) from error
    try:
        cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"device: timing kernels needs a GPU; got {error}. time_host times NumPy calls."
        ) from error
    return cupy


def _prepare(cupy: Any, stream: Any, calls: list[Call], window_us: float) -> Callable[[], float]:
    """Warm the calls up, capture them, and return what replays and times one window."""
    for call in calls:
        call()
    stream.synchronize()
    one_pass = _capture(stream, calls)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def elapsed_us(graph: Any, launches: int) -> float:
        start.record(stream)
        for _ in range(launches):
            graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e3

    elapsed_us(one_pass, 1)  # the first launch of a graph uploads it
    pass_us = elapsed_us(one_pass, 4) / 4
    passes, launches = window_plan(pass_us, len(calls), window_us)
    graph = _capture(stream, calls * passes) if passes > 1 else one_pass
    elapsed_us(graph, 1)
    lead_in = min(_MAX_LEAD_IN, math.ceil(_LEAD_IN_US / max(pass_us, 1e-3)))

    def replay() -> float:
        for _ in range(lead_in):
            one_pass.launch(stream)
        return elapsed_us(graph, launches) / (launches * passes * len(calls))

    return replay


def _capture(stream: Any, calls: Sequence[Call]) -> Any:
    """The work that ``calls`` enqueue on ``stream``, as a CUDA graph."""
    stream.begin_capture()
    try:
        for call in calls:
            call()
    except BaseException:
        # Leave no stream in capture behind: what broke inside is the error to show.
        with contextlib.suppress(Exception):
            stream.end_capture()
        raise
    return stream.end_capture()
