"""``tune``: time the candidates for shapes on this GPU, keep the winners in its model's file.

What wins must be faster than the model's choice by more than the windows of the two lie apart;
otherwise the model's choice is written down, so that the shape is known to be measured.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpgemm import settings
from cpgemm.console import counted, print_table, progress, table_text
from cpgemm.cost_model import Machine
from cpgemm.errors import DeviceError, reject
from cpgemm.locking import locked, write_atomically
from cpgemm.machine import why_no_hopper
from cpgemm.plan import current_machine
from cpgemm.problem import GemmProblem, OutDtype
from cpgemm.random_data import seed_or_fresh
from cpgemm.trials import Contest, GpuTrials, Trials, candidates, contest, short_name
from cpgemm.tuned import TunedChoice, UnusableFile, path_for, read_file, text_of

__all__ = [
    "TuneResult",
    "require_hopper",
    "save",
    "tune",
    "tune_problems",
    "winner",
]

ROUNDS, WINDOW_MS = 7, 10.0

_LOCK_SECONDS = 60.0
_COLUMNS = ("M x N x K", "the model's choice", "us", "fastest", "us", "gain", "spread")
_NUMBERS = ("us", "gain", "spread")


@dataclass(frozen=True)
class TuneResult:
    """What was measured and kept; prints as a table, in notebooks too.

    ``choices`` belong to ``contests``, one for each shape, on ``machine``.  ``path``: the file,
    None where nothing was to be kept.  ``notes``: what happened to that file besides.
    """

    machine: Machine
    contests: tuple[Contest, ...]
    choices: tuple[TunedChoice, ...]
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[str, ...]:
        """Shape, kernel, and what is wrong with its result."""
        return tuple(
            f"{_shape(one.problem)}: {name}: {why}"
            for one in self.contests
            for name, why in one.wrong.items()
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table."""
        return [_row(*pair) for pair in zip(self.contests, self.choices, strict=True)]

    def print(self) -> None:
        """The table on stdout, and what there is to say besides."""
        if self.contests:
            print_table(_COLUMNS, self.rows(), numbers=_NUMBERS, whole=_COLUMNS)
            print()
        print("\n".join(self._remarks()))

    def __str__(self) -> str:
        table = table_text(_COLUMNS, self.rows(), numbers=_NUMBERS)
        return "\n".join((table, "", *self._remarks()))

    def _repr_html_(self) -> str:
        from cpgemm.displays.html import card, note, table

        shown = table(_COLUMNS, self.rows(), numbers=_NUMBERS)
        return card("Tuning", self.machine.name, shown, *map(note, self._remarks()))

    def _remarks(self) -> Iterator[str]:
        better = sum(choice.kernel != choice.model for choice in self.choices)
        yield (
            f"{counted(len(self.choices), 'shape')} on {self.machine.name}: another kernel than "
            f"the model's choice is faster on {better}"
        )
        if any(row[5].startswith("(") for row in self.rows()):
            yield "in brackets: not more than the spread, so that the model's choice is kept"
        yield from (f"WRONG {line}" for line in self.wrong)
        yield from self.notes
        if self.path is not None:
            yield f"kept in {self.path}"


def _shape(p: GemmProblem) -> str:
    extra = ("" if p.out_dtype == "bfloat16" else " float32") + (" + C" if p.accumulate else "")
    return f"{p.m}x{p.n}x{p.k}{extra}"


def _row(one: Contest, choice: TunedChoice) -> tuple[str, ...]:
    """Brackets around a gain that is not more than the spread."""
    model_us = "wrong" if choice.model_us is None else f"{choice.model_us:.2f}"
    best_us, same = one.timings[one.best].median_us, one.best == one.choice
    gain = (
        "" if same or choice.model_us is None else f"{100 * (choice.model_us / best_us - 1):.1f} %"
    )
    return (
        _shape(one.problem), short_name(choice.model), model_us,
        "the same" if same else short_name(one.best), f"{best_us:.2f}",
        f"({gain})" if gain and choice.kernel == choice.model else gain,
        f"{choice.spread_pct:.1f} %",
    )  # fmt: skip


def winner(one: Contest) -> TunedChoice:
    """The choice that a contest leads to, by the rule of this module."""
    import cpgemm

    p, best = one.problem, one.timings[one.best]
    spread, kernel, model_us = best.spread_pct, one.best, None
    if one.choice in one.finalists:
        model = one.timings[one.choice]
        spread, model_us = max(spread, model.spread_pct), model.median_us
        if 100 * (model_us / best.median_us - 1) <= spread:
            kernel = one.choice
    now = datetime.datetime.now(datetime.timezone.utc)
    return TunedChoice(
        p.m, p.n, p.k, p.out_dtype, p.accumulate, kernel,
        round(one.timings[kernel].median_us, 3), one.choice,
        None if model_us is None else round(model_us, 3), round(spread, 2), settings.pdl(),
        cpgemm.__version__, now.strftime("%Y-%m-%d %H:%M"),
    )  # fmt: skip


# --------------------------------------------------------------------------------------- the file


def save(choices: Iterable[TunedChoice], machine: Machine, path: Path) -> list[str]:
    """Merge ``choices`` into the file ``path``, which other processes may read and write meanwhile.

    New choices replace those of the same shapes; all others stay.  What this process has prepared
    is forgotten, so that its next calls use them.  A file that is damaged, or of another schema or
    set of kernels, is moved to ``<name>.old``; the notes that are returned say so.  Raises
    ``ArgumentError`` for a file of another GPU, ``DeviceError`` where it cannot be written.
    """
    notes: list[str] = []
    try:
        with locked(path.with_name(f".{path.name}.lock"), _LOCK_SECONDS):
            merged: dict[GemmProblem, TunedChoice] = {}
            try:
                kept, faults = read_file(path, machine)
                merged = {choice.problem: choice for choice in kept}
                if faults:
                    notes.append(f"{path}: choices dropped: {len(faults)} ({faults[0]})")
            except FileNotFoundError:
                pass
            except UnusableFile as error:
                if error.foreign:
                    reject("file", "must be this GPU's", f"{path}, which {error}", "Name another.")
                old = path.with_name(path.name + ".old")
                os.replace(path, old)
                notes.append(f"the file that was there {error}; it is {old} now")
            merged |= {choice.problem: choice for choice in choices}
            write_atomically(path, text_of(merged.values(), machine))
    except OSError as error:
        raise DeviceError(
            f"file: must be one that can be written; got {path} ({error}). "
            "Name another: --file, or CPGEMM_TUNED."
        ) from error
    settings.changed()
    return notes


# ----------------------------------------------------------------------------------------- tuning


def require_hopper() -> None:
    """Raise ``DeviceError`` that says what cannot be done without a Hopper GPU."""
    why = why_no_hopper()
    if why is not None:
        raise DeviceError(
            f"tune: timing kernels needs a Hopper GPU; got {why}. Without one nothing can be timed "
            "and nothing is written; python -m cpgemm tune --dry-run lists the candidates."
        )


def tune(
    m: int | Iterable[int],
    n: int,
    k: int,
    *,
    out_dtype: OutDtype = "bfloat16",
    accumulate: bool = False,
    best: int | None = None,
    rounds: int = ROUNDS,
    window_ms: float = WINDOW_MS,
    seed: int | None = None,
    file: str | Path | None = None,
    keep: bool = True,
) -> TuneResult:
    """Time the candidate kernels for (m, k) x (n, k) on the current GPU and keep the winner.

    From then on ``gemm`` and ``plan_gemm`` use it for this shape (``cpgemm.tuned`` says for which
    others), unless ``CPGEMM_TUNED`` is 0 or names another file.  ``m``: one number of rows, or
    several.  ``best``: only as many candidates as this, the first ones by the model (None: all).
    ``out_dtype`` and ``accumulate`` as in ``explain``.  ``rounds`` windows of ``window_ms``
    milliseconds for each, in turn, over operands that are not in L2.  ``seed``: of data and order.
    ``file``: instead of the GPU model's own in the cache folder; read where ``CPGEMM_TUNED`` names
    it.  ``keep=False`` writes none.

    Takes up to some seconds for each shape and waits for the device.  Raises ``DeviceError``
    without a Hopper GPU, and ``ArgumentError`` for sizes that no kernel takes.
    """
    rows = list(m) if isinstance(m, Iterable) else [m]
    problems = [GemmProblem(each, n, k, out_dtype, accumulate) for each in rows]
    if not problems:
        reject("m", "must be at least one number of rows", "none", "Give one.")
    for problem in problems:
        if 0 in (problem.m, problem.n, problem.k):
            sizes = (problem.m, problem.n, problem.k)
            reject("m, n, k", "must not be 0 to be tuned", sizes, "An empty product is no work.")
    require_hopper()
    seed, machine = seed_or_fresh(seed), current_machine()
    path = path_for(machine, file)
    *_, result = tune_problems(
        GpuTrials(problems, machine, seed=seed), problems, machine, seed=seed, best=best,
        rounds=rounds, window_ms=window_ms, path=path if keep else None,
    )  # fmt: skip
    return result


def tune_problems(
    trials: Trials,
    problems: Sequence[GemmProblem],
    machine: Machine,
    *,
    seed: int,
    best: int | None = None,
    rounds: int = ROUNDS,
    window_ms: float = WINDOW_MS,
    path: Path | None = None,
) -> Iterator[TuneResult]:
    """Yield what is known after each shape; choices are in the file ``path`` (None: none) then."""
    contests: list[Contest] = []
    choices: list[TunedChoice] = []
    notes: list[str] = []
    order = random.Random(seed)
    if path is not None:
        notes += save((), machine, path)  # what cannot be written is said before time is spent
    steps = sum(len(candidates(problem, machine, best)) for problem in problems)
    with progress("tuning", steps) as done:
        for problem in problems:
            outcome = contest(
                trials, problem, machine, rounds=rounds, window_ms=window_ms, order=order,
                best=best, done=_named(done, problem),
            )  # fmt: skip
            contests.append(outcome)
            choices.append(winner(outcome))
            if path is not None:
                notes += save(choices[-1:], machine, path)
            yield TuneResult(machine, tuple(contests), tuple(choices), path, tuple(notes))


def _named(done: Callable[[str], None], problem: GemmProblem) -> Callable[[str], None]:
    return lambda name: done(f"{_shape(problem)} {name}")
