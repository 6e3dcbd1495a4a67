"""Two reports against each other: what got faster or slower by more than the noise of both.

Noise: the spreads of both rows, added as independent errors are, ``sqrt(a**2 + b**2)`` per cent.
A spread is (largest - smallest) / median of a row's windows, several times the standard error of a
median, so that a change beyond it is hardly chance.  What it does not cover is another clock in the
other run, which moves everything by up to 15 %: the change of peers and floors of the same case is
shown beside each change.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TextIO

from cpgemm.bench.report import Column, Table, format_time, print_table
from cpgemm.bench.result import Case, Report, Row

__all__ = ["Change", "Comparison", "compare", "print_comparison"]

# What another machine is; versions of cpgemm, commits and dates may differ, that is the point.
_MACHINE = (
    "gpu", "sms", "memory_bytes", "driver", "cuda_driver", "nvrtc", "cupy", "torch", "numpy",
    "python", "cpu",
)  # fmt: skip
_METHOD = ("windows", "window_ms")


@dataclass(frozen=True)
class Change:
    """One contender of one case in both reports.

    ``change_pct``: time of the second over that of the first, minus one, in per cent; ``noise_pct``
    see above; ``others_pct``: the median change of the case's peers and floors, None without any.
    """

    case: Case
    contender: str
    ours: bool
    before_us: float
    after_us: float
    noise_pct: float
    others_pct: float | None = None

    @property
    def name(self) -> str:
        """Case and contender."""
        return f"{self.case.name}, {self.contender}"

    @property
    def change_pct(self) -> float:
        """Above 0: slower."""
        return 100.0 * (self.after_us / self.before_us - 1.0)

    @property
    def verdict(self) -> Literal["faster", "slower", "same"]:
        """``same``: within the noise."""
        if abs(self.change_pct) <= self.noise_pct:
            return "same"
        return "slower" if self.change_pct > 0 else "faster"


@dataclass
class Comparison:
    """What ``compare`` finds; names are ``<case>, <contender>``."""

    limit_pct: float
    changes: list[Change] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # right before, now wrong, failed or absent
    mended: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # only in the first
    added: list[str] = field(default_factory=list)  # only in the second
    warnings: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> list[Change]:
        """Rows of ours that are slower beyond the noise, and by more than the limit."""
        return [
            change
            for change in self.changes
            if change.ours and change.verdict == "slower" and change.change_pct > self.limit_pct
        ]

    @property
    def exit_code(self) -> int:
        """1 for a regression or a row of ours that broke, else 0."""
        return 1 if self.regressions or self.broken else 0


def compare(a: Report, b: Report, *, limit_pct: float) -> Comparison:
    """How ``b`` differs from the earlier ``a``.

    ``limit_pct``: a row of ours that is slower by more, and beyond its noise, is a regression.
    Peers and floors are compared too, but never are one.
    """
    found = Comparison(limit_pct, warnings=_warnings(a, b))
    before, after = ({(row.case, row.contender): row for row in one.rows} for one in (a, b))
    found.missing = [_name(row) for key, row in before.items() if key not in after]
    found.added = [_name(row) for key, row in after.items() if key not in before]
    pairs = [(row, after[key]) for key, row in before.items() if key in after]
    others: dict[Case, list[float]] = {}
    for one, two in pairs:
        if one.role != "ours" and one.us and two.us:
            others.setdefault(one.case, []).append(100.0 * (two.us / one.us - 1.0))
    for one, two in pairs:
        if one.us and two.us:
            control = others.get(one.case)
            found.changes.append(
                Change(
                    one.case, one.contender, one.role == "ours", one.us, two.us,
                    math.hypot(_spread(one, limit_pct), _spread(two, limit_pct)),
                    statistics.median(control) if control and one.role == "ours" else None,
                )
            )  # fmt: skip
        elif one.us and one.role == "ours":
            found.broken.append(f"{_name(one)}: {two.status} ({two.reason or 'no reason given'})")
        elif one.us:
            found.warnings.append(f"{_name(one)}: {two.status} in the second report")
        elif two.us:
            found.mended.append(f"{_name(one)}: was {one.status}")
    return found


def _spread(row: Row, unknown: float) -> float:
    """The row's spread; ``unknown`` where it has none, so that only more than the limit counts."""
    return unknown if row.spread_pct is None else row.spread_pct


def _name(row: Row) -> str:
    return f"{row.case.name}, {row.contender}"


def _warnings(a: Report, b: Report) -> list[str]:
    said = []
    for what, one, two, keys in (
        ("machines", a.machine, b.machine, _MACHINE), ("methods", a.method, b.method, _METHOD)
    ):  # fmt: skip
        differing = [key for key in keys if one.get(key) != two.get(key)]
        if differing:
            texts = [f"{key} {one.get(key)} and {two.get(key)}" for key in differing]
            said.append(f"The {what} differ: {'; '.join(texts)}.")
    for which, report in (("first", a), ("second", b)):
        if not report.complete:
            said.append(f"The {which} run was interrupted.")
    return said


def print_comparison(found: Comparison, width: int, file: TextIO | None = None) -> None:
    """Print what ``compare`` found: tables of what changed, ours first, then the lists."""
    file = file or sys.stdout
    for warning in found.warnings:
        print(f"warning: {warning}", file=file)
    for verdict in ("slower", "faster"):
        changes = [change for change in found.changes if change.verdict == verdict]
        if changes:
            print_table(_table(verdict, changes, found), width, file)
    lists = (
        ("broken", found.broken), ("mended", found.mended),
        ("missing in the second report", found.missing), ("new in the second report", found.added),
    )  # fmt: skip
    for title, names in lists:
        for name in names:
            print(f"{title}: {name}", file=file)
    same = sum(change.verdict == "same" for change in found.changes)
    print(
        f"{len(found.changes)} rows compared, {same} within their noise (root of the sum of the "
        f"squares of both spreads); regressions beyond {found.limit_pct:g} %: "
        f"{len(found.regressions)}, broken: {len(found.broken)}.",
        file=file,
    )


def _table(verdict: str, changes: Sequence[Change], found: Comparison) -> Table:
    ordered = sorted(changes, key=lambda change: (not change.ours, -abs(change.change_pct)))
    regressions = {id(change) for change in found.regressions}
    marks = tuple("REGRESSION" if id(change) in regressions else "" for change in ordered)
    controls = tuple(
        "" if change.others_pct is None else f"{change.others_pct:+.1f}%" for change in ordered
    )
    columns = [
        Column(("case",), tuple(change.name for change in ordered), right=False),
        Column(("before",), tuple(format_time(change.before_us) for change in ordered)),
        Column(("after",), tuple(format_time(change.after_us) for change in ordered)),
        Column(("change",), tuple(f"{change.change_pct:+.1f}%" for change in ordered)),
        Column(("noise",), tuple(f"{change.noise_pct:.1f}%" for change in ordered)),
        Column(("peers,", "floors"), controls),
        Column(("",), marks, right=False),
    ]
    return Table(verdict, tuple(column for column in columns if any(column.cells)))
