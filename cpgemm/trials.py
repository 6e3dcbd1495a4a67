"""Configurations of the finite set against each other on one problem: right, and how fast.

Operands of any shape are views of memory that is allocated once, for the largest: codes of
quantised normal values (zeros and constants draw less power), scales, results.  There are as many
sets of them as keep L2 cold (``timing.rotations``).

``contest`` times in two rounds: a quick one, and a longer one among those that came within half of
the best's time.  What measures is an argument, so that everything but ``GpuTrials`` runs anywhere.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cpgemm.config import KernelConfig
from cpgemm.demo import largest_errors, relative_error, stratified
from cpgemm.errors import CompileError, DeviceError, reject
from cpgemm.gemm import GemmPlan
from cpgemm.heuristics import Machine, configurations, explain, predict
from cpgemm.layout import BLOCK, Array, fp8_view, scale_pitch
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.quantize import quantize
from cpgemm.reference import exact_product
from cpgemm.scaled import ScaledTensor
from cpgemm.timing import Timing, rotations, time_interleaved

__all__ = [
    "Contest",
    "GpuTrials",
    "OperandMemory",
    "OperandSet",
    "Trials",
    "candidates",
    "contest",
    "short_name",
]

_POOL = 4194301  # prime, so that no two rows of a matrix repeat
_ALIGNMENT = 256  # bytes, of every operand
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 32, 128  # of a result, the last ones besides
_NAN_BITS = 0xFFFF  # a NaN of either dtype, so that what is not written shows

_HOPELESS = 3.0  # times the prediction for the model's choice: not even tried
_QUICK_WINDOWS, _QUICK_WINDOW_MS = 2, 0.5
_SLOW = 1.5  # times the best of the quick round: not timed again


# -------------------------------------------------------------------------------------- operands


@dataclass(frozen=True)
class OperandSet:
    """What one call works on; ``c`` is None unless the problem accumulates."""

    a: ScaledTensor
    b: ScaledTensor
    out: Array
    c: Array | None


class OperandMemory:
    """Memory for the operand sets of any of ``problems``, all of one output dtype.

    ``xp``: numpy or cupy.  ``seed``: of the values.
    """

    def __init__(self, problems: Sequence[GemmProblem], *, seed: int, xp: Any) -> None:
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((-(-_POOL // BLOCK), BLOCK), dtype=np.float32)
        codes = quantize(values).data.view(np.uint8).reshape(-1)[:_POOL]
        uniform = rng.uniform(0.5, 1.5, _POOL).astype(np.float32)
        needed = np.max([_bytes_of_sets(problem) for problem in problems], axis=0).tolist()
        code_bytes, scale_bytes, result_bytes, addend_bytes = needed
        self._codes = _repeated(codes, code_bytes, xp)
        # Scales of about what quantising gives, so that results are of the order of 1 to 100.
        self._scales = _repeated(uniform / 448, scale_bytes // 4, xp).view(np.uint8)
        self._results = xp.empty(result_bytes, dtype=np.uint8)
        addends = uniform.astype(OUT_DTYPES[problems[0].out_dtype])
        self._addends = _repeated(addends.view(np.uint8), addend_bytes, xp)

    def sets(self, problem: GemmProblem) -> list[OperandSet]:
        """Operands of ``problem``, the same ones whenever they are asked for."""
        p, dtype = problem, OUT_DTYPES[problem.out_dtype]
        codes, scales = _Carver(self._codes), _Carver(self._scales)
        results, addends = _Carver(self._results), _Carver(self._addends)
        made = []
        for _ in range(rotations(p.bytes)):
            rows = scales.take(p.k_blocks * scale_pitch(p.m) * 4).view(np.float32)
            blocks = scales.take(-(-p.n // BLOCK) * p.k_blocks * 4).view(np.float32)
            a_scales = rows.reshape(p.k_blocks, scale_pitch(p.m))[:, : p.m].T
            b_scales = blocks.reshape(-(-p.n // BLOCK), p.k_blocks)
            a_codes = fp8_view(codes.take(p.m * p.k).reshape(p.m, p.k))
            b_codes = fp8_view(codes.take(p.n * p.k).reshape(p.n, p.k))
            size = p.m * p.n * dtype.itemsize
            made.append(
                OperandSet(
                    ScaledTensor(a_codes, a_scales, (1, BLOCK)),
                    ScaledTensor(b_codes, b_scales, (BLOCK, BLOCK)),
                    results.take(size).view(_bits(dtype)).view(dtype).reshape(p.m, p.n),
                    addends.take(size).view(_bits(dtype)).view(dtype).reshape(p.m, p.n)
                    if p.accumulate
                    else None,
                )
            )
        return made


class _Carver:
    """Hands out aligned pieces of a buffer of bytes, one after another."""

    def __init__(self, buffer: Array) -> None:
        self._buffer, self._at = buffer, 0

    def take(self, size: int) -> Array:
        piece = self._buffer[self._at : self._at + size]
        self._at += _aligned(size)
        return piece


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes_of_sets(p: GemmProblem) -> tuple[int, int, int, int]:
    """Of all sets together: codes, scales, results, addends (C)."""
    count = rotations(p.bytes)
    result = _aligned(p.m * p.n * OUT_DTYPES[p.out_dtype].itemsize)
    blocks = -(-p.n // BLOCK) * p.k_blocks
    return (
        count * (_aligned(p.m * p.k) + _aligned(p.n * p.k)),
        count * (_aligned(4 * p.k_blocks * scale_pitch(p.m)) + _aligned(4 * blocks)),
        count * result,
        count * result if p.accumulate else 0,
    )


def _repeated(values: Any, size: int, xp: Any) -> Array:
    """``values`` of the host over and over until ``size`` elements are full."""
    pool = xp.asarray(values)
    whole = xp.empty(size, dtype=pool.dtype)
    for start in range(0, size, len(pool)):
        part = whole[start : start + len(pool)]
        part[...] = pool[: len(part)]
    return whole


# ------------------------------------------------------------------------------------- the trials


class Trials(Protocol):
    """What tries configurations on one problem after another."""

    def pose(self, problem: GemmProblem) -> None:
        """Make ``problem`` the one that the other methods are about."""

    def why_wrong(self, config: KernelConfig) -> str | None:
        """What is wrong with the configuration's result; None when it is right."""

    def time(
        self, configs: Sequence[KernelConfig], *, windows: int, window_ms: float, seed: int
    ) -> dict[str, Timing]:
        """The ``Timing`` of each by its name, interleaved."""


class GpuTrials:
    """``Trials`` on CuPy's current device, a Hopper GPU, for any of ``problems``."""

    def __init__(self, problems: Sequence[GemmProblem], machine: Machine, *, seed: int) -> None:
        import cupy

        self._cupy, self._machine = cupy, machine
        self._stream = cupy.cuda.Stream(non_blocking=True)
        try:
            with self._stream:
                self._memory = OperandMemory(problems, seed=seed, xp=cupy)
        except cupy.cuda.memory.OutOfMemoryError as error:
            needed = max(sum(_bytes_of_sets(problem)) for problem in problems) / 1e9
            raise DeviceError(
                f"device: the largest shape needs {needed:.1f} GB of its memory; got {error}. "
                "Leave that shape out."
            ) from error
        self._problem = problems[0]
        self._sets: list[OperandSet] = []
        self._launches: dict[str, list[Any]] = {}

    def pose(self, problem: GemmProblem) -> None:
        """Make ``problem`` the one that the other methods are about."""
        self._problem = problem
        with self._stream:
            self._sets = self._memory.sets(problem)
        self._launches = {}
        self.__dict__.pop("_wanted", None)

    def why_wrong(self, config: KernelConfig) -> str | None:
        """What is wrong with the configuration's result; None when it is right."""
        one = self._sets[0]
        try:
            launches = self._prepared(config)
        except CompileError as error:
            return str(error).partition("\n")[0]
        with self._stream:
            bits = one.out.view(np.uint16)
            bits[...] = _NAN_BITS
            launches[0]()
            self._stream.synchronize()
            return why_wrong(one.out, self._sample, self._wanted)

    def time(
        self, configs: Sequence[KernelConfig], *, windows: int, window_ms: float, seed: int
    ) -> dict[str, Timing]:
        """The ``Timing`` of each by its name, interleaved."""
        return time_interleaved(
            {config.name: self._prepared(config) for config in configs},
            windows=windows, window_ms=window_ms, seed=seed, stream=self._stream,
        )  # fmt: skip

    def _prepared(self, config: KernelConfig) -> list[Any]:
        """The launch on each set of operands."""
        if config.name not in self._launches:
            plan = GemmPlan(self._problem, config, self._machine)
            with self._stream:
                self._launches[config.name] = [
                    plan.prepare(one.a, one.b, one.out, one.c, "cupy") for one in self._sets
                ]
        return self._launches[config.name]

    @property
    def _sample(self) -> tuple[Any, Any]:
        return sample_of(self._problem)

    @functools.cached_property
    def _wanted(self) -> Any:
        return wanted(self._sets[0], self._sample)


def sample_of(problem: GemmProblem) -> tuple[Any, Any]:
    """Rows and columns of D that are compared: some from everywhere, and the last of each."""
    rng = np.random.default_rng(0)
    rows = stratified(problem.m, _SAMPLED_ROWS, rng)
    columns = stratified(problem.n, _SAMPLED_COLUMNS, rng)
    return np.unique([*rows, problem.m - 1]), np.unique([*columns, problem.n - 1])


def wanted(one: OperandSet, sample: tuple[Any, Any]) -> Any:
    """The sampled elements of C + A @ B.T in float64."""
    rows, columns = sample
    product = exact_product(_host_rows(one.a, rows), _host_rows(one.b, columns))
    if one.c is not None:
        product += _host_sample(one.c, sample)
    return product


def why_wrong(out: Array, sample: tuple[Any, Any], exact: Any) -> str | None:
    """What is wrong with a result ``out``, given the exact values of a sample of it."""
    bits = out.view(_bits(out.dtype))
    exponent = 0x7F80 if out.itemsize == 2 else 0x7F800000
    if bool(((bits & exponent) == exponent).any()):
        return "the result holds NaN or infinity, or was not written everywhere"
    error = relative_error(_host_sample(out, sample), exact)
    limit = largest_errors(*exact.shape)[0]  # bfloat16's, which float32 keeps easily
    return None if error <= limit else f"off by {error:.5f} (at most {limit:g})"


def _host_sample(array: Array, sample: tuple[Any, Any]) -> Any:
    rows, columns = sample
    values = _host(array.view(_bits(array.dtype))[rows]).view(array.dtype)
    return values[:, columns].astype(np.float64)


def _host_rows(tensor: ScaledTensor, rows: Any) -> ScaledTensor:
    """Some rows on the host; those of 128 x 128 blocks get scales of their own."""
    codes = _host(tensor.data.view(np.uint8)[rows])
    scales = _host(tensor.scales[rows // tensor.granularity[0]])
    return ScaledTensor.from_arrays(codes, scales, (1, BLOCK))


def _bits(dtype: Any) -> Any:
    """Unsigned integers as wide as ``dtype``: CuPy has few kernels for bfloat16."""
    return np.uint16 if dtype.itemsize == 2 else np.uint32


def _host(array: Array) -> Any:
    return array if isinstance(array, np.ndarray) else array.get()


# ------------------------------------------------------------------------------------ the contest


@dataclass(frozen=True)
class Contest:
    """The outcome for one problem; dictionaries by the names of configurations.

    ``choice``: the model's.  ``predicted_us``: of all candidates.  ``timings``:
    of all that were timed.  ``finalists``: those timed in the long round; only their times are good
    to a per cent.  ``wrong``: what is wrong with the results of others.
    """

    problem: GemmProblem
    choice: str
    predicted_us: Mapping[str, float]
    timings: Mapping[str, Timing]
    finalists: tuple[str, ...]
    wrong: Mapping[str, str]

    @property
    def best(self) -> str:
        """The fastest right configuration."""
        return min(self.finalists, key=lambda name: self.timings[name].median_us)

    @property
    def ratio(self) -> float:
        """Time of the model's choice over the best time; infinite where the choice is wrong."""
        if self.choice not in self.finalists:
            return math.inf
        return self.timings[self.choice].median_us / self.timings[self.best].median_us


def short_name(name: str) -> str:
    """A configuration's name without its output dtype, for tables of one dtype."""
    return re.sub(f"_({'|'.join(OUT_DTYPES)})$", "", name)


def candidates(problem: GemmProblem, machine: Machine, best: int | None = None) -> list[Any]:
    """(configuration, predicted microseconds) of what runs ``problem``, the model's choice first.

    Those that the model considers come in its order, then all others: it may be wrong about them.
    Left out are those predicted to take three times as long as its choice.  ``best``: only the
    first ones.
    """
    if best is not None and best < 1:
        reject("best", "must be at least 1", best, "Leave it out for all candidates.")
    p = problem
    considered = explain(
        p.m, p.n, p.k, out_dtype=p.out_dtype, accumulate=p.accumulate, machine=machine
    ).candidates
    names = {candidate.config.name for candidate in considered}
    others = [
        predict(problem, config, machine)
        for config in configurations(problem.out_dtype)
        if config.name not in names
        and config.why_not(problem) is None
        and config.cluster <= machine.sms
    ]
    others.sort(key=lambda candidate: candidate.predicted_us)
    limit = _HOPELESS * considered[0].predicted_us
    return [
        (candidate.config, candidate.predicted_us)
        for candidate in (*considered, *others)[:best]
        if candidate.predicted_us < limit
    ]


def contest(
    trials: Trials,
    problem: GemmProblem,
    machine: Machine,
    *,
    rounds: int,
    window_ms: float,
    order: random.Random,
    best: int | None = None,
    done: Callable[[str], None] = lambda _name: None,
) -> Contest:
    """Try the candidates for ``problem``.

    ``rounds`` windows of ``window_ms`` milliseconds in the long round, in an order that ``order``
    decides.  ``best``: only the first ones by the model.  ``done`` is called with the name of each
    candidate when its result has been checked.  Raises ``DeviceError`` when no candidate
    gives a right result.
    """
    offered = candidates(problem, machine, best)
    choice = offered[0][0].name
    trials.pose(problem)
    right: list[KernelConfig] = []
    wrong: dict[str, str] = {}
    for config, _ in offered:
        why = trials.why_wrong(config)
        if why is None:
            right.append(config)
        else:
            wrong[config.name] = why
        done(config.name)
    if not right:
        raise DeviceError(
            f"device: one kernel at least must give a right result for {problem}; got "
            f"{'; '.join(f'{name}: {why}' for name, why in wrong.items())}. "
            "Run: python -m cpgemm doctor"
        )
    timings = trials.time(
        right, windows=_QUICK_WINDOWS, window_ms=_QUICK_WINDOW_MS, seed=order.randrange(2**32)
    )
    limit = _SLOW * min(timing.median_us for timing in timings.values())
    finalists = [
        config for config in right
        if timings[config.name].median_us <= limit or config.name == choice
    ]  # fmt: skip
    timings |= trials.time(
        finalists, windows=rounds, window_ms=window_ms, seed=order.randrange(2**32)
    )
    names = tuple(config.name for config in finalists)
    predicted = {config.name: us for config, us in offered}
    return Contest(problem, choice, predicted, timings, names, wrong)
