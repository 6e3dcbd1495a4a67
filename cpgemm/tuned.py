"""Choices of kernels that were measured on a GPU model go before the cost model's.

``cpgemm.tune`` writes a file for each GPU model, a line for each shape::

    {
     "schema": 1,
     "gpu": "NVIDIA H200",
     "sms": 132,
     "kernels": "0123456789abcdef",
     "shapes": [
      {"m": 64, "n": 2112, "k": 7168, "out_dtype": "bfloat16", "accumulate": false,
       "kernel": ..., "us": 7.9, "model": ..., "model_us": 8.4, "spread_pct": 1.2, ...}
     ]
    }

A choice holds for its N, K, output dtype and ``accumulate``, and for its own M.  Any other M takes
the choice of the nearest measured one that needs as many tiles of 64 rows, ceil(M / 64): between
those, every kernel has the same tiles.  Beyond, the model chooses.

The file is read once, when the first kernel is chosen.  One that does not belong to this GPU or to
this set of kernels, or is damaged, is left aside, and a line of the logger ``cpgemm`` says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cpgemm import env, heuristics, settings
from cpgemm.config import KernelConfig, SplitKernelConfig
from cpgemm.cost_model import H200, Candidate, Machine, predict
from cpgemm.errors import ArgumentError
from cpgemm.heuristics import Explanation, configurations
from cpgemm.problem import OUT_DTYPES, GemmProblem, OutDtype

__all__ = [
    "SCHEMA",
    "TunedChoice",
    "TunedExplanation",
    "UnusableFile",
    "choose",
    "digest",
    "explain",
    "lookup",
    "path_for",
    "read_file",
    "text_of",
]

SCHEMA = 1

_ROWS = 64  # every tile's rows are a multiple
_logger = logging.getLogger("cpgemm")


@dataclass(frozen=True)
class TunedChoice:
    """The outcome for one shape, and how it was found.

    ``m``, ``n``, ``k``, ``out_dtype``, ``accumulate``: the shape.  ``kernel``: the configuration to
    use, by name, and ``us``, its microseconds per call with cold operands.  ``model``: what the
    model chose, and ``model_us``, None where its result was wrong. ``spread_pct``: how far the
    windows of these two lay apart, at most.  ``pdl``: whether launches were programmatic dependent
    ones.  ``cpgemm``: the version.  ``date``: UTC.
    """

    m: int
    n: int
    k: int
    out_dtype: OutDtype
    accumulate: bool
    kernel: str
    us: float
    model: str
    model_us: float | None
    spread_pct: float
    pdl: bool
    cpgemm: str
    date: str

    @property
    def problem(self) -> GemmProblem:
        """The shape."""
        return GemmProblem(self.m, self.n, self.k, self.out_dtype, self.accumulate)

    @property
    def config(self) -> KernelConfig:
        """The configuration of ``kernel``."""
        return _by_name(self.out_dtype)[self.kernel]


@functools.lru_cache(maxsize=2)
def _by_name(out_dtype: OutDtype) -> dict[str, KernelConfig]:
    return {config.name: config for config in configurations(out_dtype)}


@functools.lru_cache(maxsize=1)
def digest() -> str:
    """Of the names of all dense kernels: a choice among others says nothing about these."""
    names = sorted(name for dtype in OUT_DTYPES for name in _by_name(dtype))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------- the file


class UnusableFile(Exception):
    """Why a file is left aside.  ``foreign``: it is good, but for another GPU."""

    def __init__(self, why: str, *, foreign: bool = False) -> None:
        super().__init__(why)
        self.foreign = foreign


def path_for(machine: Machine, file: str | Path | None = None) -> Path:
    """``file`` (``~`` is home) or ``CPGEMM_TUNED`` where one of them names a file.

    Otherwise the GPU model's file in the cache.
    """
    chosen = env.tuned_file() if file is None else Path(file).expanduser()
    if chosen is not None:
        return chosen
    model = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    return env.cache_dir() / "tuned" / f"{model}-{machine.sms}-sms.json"


def read_file(path: Path, machine: Machine) -> tuple[list[TunedChoice], list[str]]:
    """The choices of a file, and what is wrong with those that are left out.

    Raises ``FileNotFoundError``, and ``UnusableFile`` for a file that is not for ``machine`` (name
    and multiprocessors), of another schema or set of kernels, or damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableFile(f"cannot be read ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        raise UnusableFile("is not a list of measured choices")
    if record.get("schema") != SCHEMA:
        raise UnusableFile(f"has schema {record.get('schema')!r}, not {SCHEMA}")
    gpu, sms = record.get("gpu"), record.get("sms")
    if (gpu, sms) != (machine.name, machine.sms):
        here = f"{machine.name} with {machine.sms} multiprocessors"
        raise UnusableFile(f"is for {gpu} with {sms} multiprocessors, not {here}", foreign=True)
    if record.get("kernels") != digest():
        raise UnusableFile("was measured with another set of kernels")
    choices: list[TunedChoice] = []
    faults: list[str] = []
    for number, item in enumerate(record["shapes"], 1):
        try:
            choices.append(_checked(item))
        except (ValueError, TypeError) as error:
            faults.append(f"shape {number}: {error}")
    return choices, faults


def text_of(choices: Iterable[TunedChoice], machine: Machine) -> str:
    """The file that holds ``choices``, sorted by layer and rows."""
    head = {"schema": SCHEMA, "gpu": machine.name, "sms": machine.sms, "kernels": digest()}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    ordered = sorted(choices, key=lambda c: (c.n, c.k, c.out_dtype, c.accumulate, c.m))
    shapes = ",\n".join("  " + json.dumps(asdict(choice), allow_nan=False) for choice in ordered)
    return "{\n" + ",\n".join([*lines, f' "shapes": [\n{shapes}\n ]']) + "\n}\n"


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "str": (str,), "bool": (bool,), "float": (int, float), "OutDtype": (str,),
    "float | None": (int, float, type(None)),
}  # fmt: skip


def _checked(item: Any) -> TunedChoice:
    """The choice that an entry of a file states; ``ValueError`` or ``TypeError`` says what ails."""
    if not isinstance(item, dict):
        raise TypeError("is no object")
    for field in fields(TunedChoice):
        if field.name not in item:
            raise ValueError(f"lacks {field.name}")
        value, kinds = item[field.name], _KINDS[str(field.type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{field.name} is {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} is {value!r}")
    choice = TunedChoice(**{field.name: item[field.name] for field in fields(TunedChoice)})
    if choice.out_dtype not in OUT_DTYPES or choice.kernel not in _by_name(choice.out_dtype):
        raise ValueError(f"{choice.kernel!r} is no kernel for {choice.out_dtype!r}")
    try:
        why = choice.config.why_not(choice.problem)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    if why is not None or choice.us <= 0:
        raise ValueError(why or f"us is {choice.us}")
    return choice


# ------------------------------------------------------------------------------------- the lookup


class _Table:
    """The choices of one file by what is asked for."""

    def __init__(self, choices: Iterable[TunedChoice]) -> None:
        self._exact = {choice.problem: choice for choice in choices}
        self._near: dict[tuple[object, ...], list[TunedChoice]] = {}
        for choice in self._exact.values():
            self._near.setdefault(_bucket(choice.problem), []).append(choice)

    def find(self, problem: GemmProblem) -> TunedChoice | None:
        if not self._exact:
            return None
        near = self._near.get(_bucket(problem), [])
        return self._exact.get(problem) or min(
            near, key=lambda choice: (abs(choice.m - problem.m), -choice.m), default=None
        )


def _bucket(p: GemmProblem) -> tuple[object, ...]:
    return (p.n, p.k, p.out_dtype, p.accumulate, -(-p.m // _ROWS))


class _Tables:
    """Each file is read once; a change of ``settings`` forgets what was read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[Machine, _Table] = {}
        self._said: set[str] = set()
        settings.on_change(self.forget)

    def forget(self) -> None:
        with self._lock:
            self._tables.clear()
        lookup.cache_clear()

    def of(self, machine: Machine) -> _Table:
        with self._lock:
            if machine not in self._tables:
                self._tables[machine] = _Table(self._read(machine) if settings.tuned() else ())
            return self._tables[machine]

    def _read(self, machine: Machine) -> list[TunedChoice]:
        path = path_for(machine)
        try:
            choices, faults = read_file(path, machine)
        except FileNotFoundError:
            if env.tuned_file() is not None:
                self._say(f"CPGEMM_TUNED: {path} does not exist; the cost model chooses kernels.")
            return []
        except UnusableFile as error:
            self._say(f"{path} {error}; the cost model chooses kernels. Run: python -m cpgemm tune")
            return []
        if faults:
            self._say(f"{path}: measured choices left out: {len(faults)} ({faults[0]}).")
        return choices

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            _logger.warning("cpgemm: %s", line)


@functools.lru_cache(maxsize=4096)
def lookup(problem: GemmProblem, machine: Machine = H200) -> TunedChoice | None:
    """The measured choice that holds for ``problem`` on ``machine``; None when there is none."""
    choice = _tables.of(machine).find(problem)
    return None if choice is None or choice.config.cluster > machine.sms else choice


_tables = _Tables()


def choose(problem: GemmProblem, machine: Machine = H200, *, unsplit: bool = False) -> KernelConfig:
    """The measured choice where there is one, otherwise the cost model's.

    ``unsplit``: among the kernels that do not split K, all of which give the same bits.
    """
    found = lookup(problem, machine)
    if found is None or (unsplit and isinstance(found.config, SplitKernelConfig)):
        return heuristics.choose(problem, machine, unsplit=unsplit)
    return found.config


@dataclass(frozen=True)
class TunedExplanation(Explanation):
    """An explanation whose choice was measured: ``tuned`` says where and how."""

    tuned: TunedChoice

    @property
    def choice(self) -> Candidate:
        """The measured choice, with the model's prediction for it."""
        return predict(self.problem, self.tuned.config, self.machine)

    def __str__(self) -> str:
        first, *others = super().__str__().splitlines()
        return "\n".join((first, self.measured, *others))

    @property
    def measured(self) -> str:
        """How the choice was measured, in words."""
        one = self.tuned
        what = f"measured at M = {one.m}: {one.us:.1f} us"
        if one.kernel == one.model:
            return f"{what}, the model's choice; none was faster ({one.date})"
        if one.model_us is None:
            return f"{what}; {one.model} was wrong ({one.date})"
        return f"{what}, {one.model} {one.model_us:.1f} us ({one.date})"


def explain(
    m: int,
    n: int,
    k: int,
    *,
    out_dtype: OutDtype = "bfloat16",
    accumulate: bool = False,
    machine: Machine = H200,
) -> Explanation:
    """Which kernel ``gemm`` uses for (m, k) x (n, k), why, the predicted time and its floor.

    A ``TunedExplanation`` where the choice was measured (``cpgemm.tune``).  ``out_dtype``:
    "bfloat16" or "float32".  ``accumulate``: whether there is a C.  ``machine``: an H200, or
    ``Machine.of_device`` for another.  Needs no GPU.  Times are microseconds, from the model that
    docs/performance.md describes.  Raises ``ArgumentError`` as ``plan_gemm`` does.
    """
    found = heuristics.explain(
        m, n, k, out_dtype=out_dtype, accumulate=accumulate, machine=machine
    )  # fmt: skip
    choice = lookup(found.problem, machine)
    if choice is None:
        return found
    return TunedExplanation(
        found.problem, found.machine, found.candidates, found.floor_us, tuned=choice
    )
