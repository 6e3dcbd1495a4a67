"""What the pictures of a benchmark show, as plain numbers and labels; nothing is drawn here.

Only products are taken (suites dense, contiguous and masked): the other suites time no kernel that
peers or floors stand beside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cpgemm.bench.ratios import base_name, counterpart, floor_of, speedup
from cpgemm.bench.result import Case, Report, Row
from cpgemm.cost_model import H200
from cpgemm.plot_style import bar_place

__all__ = [
    "LARGE",
    "Bar",
    "Group",
    "Panel",
    "Point",
    "Roofs",
    "Sweep",
    "bandwidths",
    "floor_panels",
    "machine_line",
    "roofline_points",
    "roofs",
    "spaced",
    "speedup_panels",
]

LARGE = 512  # rows of A, of each group, from which a product is not called decode
_PRODUCTS = ("dense", "contiguous", "masked")
_ABSENT = "n/a"
_GROUPS = 12  # of bars in a panel


@dataclass(frozen=True)
class Bar:
    """One bar, or the reason in words where ``value`` is None; ``label`` is for the legend."""

    label: str
    contender: str
    value: float | None
    low: float = 0.0
    high: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Group:
    """The bars of one case."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Panel:
    """Some cases of one suite."""

    title: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Roofs:
    """The best rates of a machine, GB/s and TFLOPS, and where they are from; None: not known."""

    gbs: float | None
    tflops: float | None
    gbs_source: str = "measured"
    tflops_source: str = "measured"


@dataclass(frozen=True)
class Point:
    """A row on the roofline: FLOP per byte and TFLOPS.  ``limit``: TFLOPS at the case's floor."""

    row: Row
    intensity: float
    tflops: float
    limit: float | None


@dataclass
class Sweep:
    """GB/s of the weights against M, for each contender of one (N, K)."""

    title: str
    lines: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    floors: set[str] = field(default_factory=set)


def machine_line(report: Report) -> str:
    """Machine, driver, commit and date of the run."""
    machine = report.machine
    parts = [str(machine.get("gpu") or machine.get("cpu") or "unknown machine")]
    for key, text in (("sms", "{} SMs"), ("driver", "driver {}"), ("commit", "commit {}")):
        if machine.get(key):
            parts.append(text.format(machine[key]))
    parts.append(str(machine.get("date") or "date unknown"))
    if not report.complete:
        parts.append("interrupted run")
    return ", ".join(parts)


def by_case(report: Report) -> dict[Case, list[Row]]:
    """The rows of each product, in the order of the report."""
    cases: dict[Case, list[Row]] = {}
    for row in report.rows:
        if row.case.suite in _PRODUCTS and row.case.flops:
            cases.setdefault(row.case, []).append(row)
    return cases


def _role(rows: Iterable[Row], role: str) -> list[Row]:
    return [row for row in rows if row.role == role]


# -------------------------------------------------------------------------------------- speedups


def speedup_panels(report: Report, *, large: bool) -> list[Panel]:
    """Time of each peer over that of cpgemm, for cases of ``LARGE`` rows and more, or of fewer."""
    bars = []
    for case, rows in by_case(report).items():
        ours = _role(rows, "ours")
        if ours and (case.m >= LARGE) is large:
            peers = sorted(_role(rows, "peer"), key=lambda row: bar_place(row.contender))
            bars.append((case, [_speedup(ours, peer) for peer in peers]))
    return _panels(bars)


def _speedup(ours: Sequence[Row], peer: Row) -> Bar:
    mine = counterpart(ours, base_name(ours[0]), peer.pdl) or ours[0]
    label = f"over {peer.contender}"
    if peer.contender == "cublaslt tensor":
        label += " (less work)"
    if mine.pdl and not peer.pdl:
        label += " (cpgemm with PDL)"
    elif peer.pdl and not mine.pdl:
        label += " (cpgemm without PDL)"
    ratio = speedup(mine, peer)
    if ratio is None:
        return Bar(label, peer.contender, None, note=_why(peer if mine.us else mine))
    low = high = ratio
    if len(mine.windows_us) == len(peer.windows_us) and all(mine.windows_us):
        # Window i of both was taken in the same round, so that their ratio is clean of the clock.
        ratios = [b / a for a, b in zip(mine.windows_us, peer.windows_us, strict=True)]
        low, high = min([*ratios, ratio]), max([*ratios, ratio])
    return Bar(label, peer.contender, ratio, low, high)


def _why(row: Row) -> str:
    return f"{row.contender} {row.status if row.status in ('wrong', 'failed') else _ABSENT}"


# ---------------------------------------------------------------------------------------- floors


def roofs(report: Report) -> Roofs:
    """The best floor rows of the report; where there is none, the model of an H200, on an H200."""
    timed = [row for rows in by_case(report).values() for row in rows if row.us]
    gbs = max((row.gbs for row in _role(timed, "memory floor") if row.gbs), default=None)
    tflops = max((row.tflops for row in _role(timed, "compute floor") if row.tflops), default=None)
    found = Roofs(gbs, tflops)
    if H200.name in str(report.machine.get("gpu")):
        sms = report.machine.get("sms") or H200.sms
        model = replace(H200, sms=int(sms))
        if gbs is None:
            found = replace(found, gbs=model.dram_tbs * 1e3, gbs_source="model")
        if tflops is None:
            found = replace(found, tflops=model.peak_tflops, tflops_source="model")
    return found


def floor_panels(report: Report) -> list[Panel]:
    """The time of the larger floor over that of each contender, in per cent; grouped products."""
    bars: list[tuple[Case, list[Bar]]] = []
    for case, rows in by_case(report).items():
        if case.groups and any(row.us for row in _role(rows, "ours")):
            order = (
                *_role(rows, "ours"),
                *sorted(_role(rows, "peer"), key=lambda row: bar_place(row.contender)),
            )
            bars.append((case, [_share(rows, row) for row in order]))
    large = [(case, of_case) for case, of_case in bars if case.m >= LARGE]
    small = [(case, of_case) for case, of_case in bars if case.m < LARGE]
    return _panels(large, notes=True) + _panels(small, notes=True)


def _share(rows: Sequence[Row], row: Row) -> Bar:
    floor = floor_of(rows, row)
    if floor is None or not row.us:
        return Bar(row.contender, row.contender, None, note=_why(row))
    floor_us = floor.fraction * row.us
    shares = [100 * floor_us / us for us in (*row.windows_us, row.us)]
    kind = {"mem": "memory", "mma": "compute"}[floor.kind]
    return Bar(row.contender, row.contender, shares[-1], min(shares), max(shares), kind)


# ---------------------------------------------------------------------------------------- panels


def _panels(cases: Sequence[tuple[Case, list[Bar]]], *, notes: bool = False) -> list[Panel]:
    """Cases by suite, and dense ones by (N, K) where each has several M.

    Nothing is kept that would be empty: a contender absent from a whole panel, a case without bars,
    a panel without values.
    """
    panels: list[Panel] = []
    for suite in _PRODUCTS:
        members = [(case, bars) for case, bars in cases if case.suite == suite]
        pairs = list(dict.fromkeys((case.n, case.k) for case, _ in members))
        swept = suite == "dense" and len(members) > 8 and len(members) >= 3 * len(pairs)
        runs = (
            [[(case, bars) for case, bars in members if (case.n, case.k) == pair] for pair in pairs]
            if swept
            else [members]
        )
        for run in runs:
            count = math.ceil(len(run) / _GROUPS)
            for at in range(count):
                part = run[len(run) * at // count : len(run) * (at + 1) // count]
                panels += _panel(part, swept, notes)
    return panels


def _panel(cases: Sequence[tuple[Case, list[Bar]]], swept: bool, notes: bool) -> list[Panel]:
    shown = {
        bar.label
        for _, bars in cases
        for bar in bars
        if bar.value or not bar.note.endswith(_ABSENT)
    }
    kept = [(case, [bar for bar in bars if bar.label in shown]) for case, bars in cases]
    kept = [(case, bars) for case, bars in kept if bars]
    if not any(bar.value for _, bars in kept for bar in bars):
        return []
    first = kept[0][0]
    one_m = len({case.m for case, _ in kept}) == 1
    if swept:
        title = f"dense, N x K = {first.n} x {first.k}"
    elif first.groups:
        title = f"{first.suite}: groups x rows, N x K"
    else:
        title = f"dense, M = {first.m}: N x K" if one_m else "dense: M x N x K"
    groups = []
    for case, bars in kept:
        if swept:
            lines = [f"M = {case.m}"]
        elif case.groups:
            lines = [f"{case.groups} x {case.m}", f"{case.n} x {case.k}"]
        else:
            lines = [f"{case.n} x {case.k}" if one_m else f"{case.m} x {case.n} x {case.k}"]
        lines += [case.detail] if case.detail else []
        if notes:
            lines.append(next(f"({bar.note} floor)" for bar in bars if bar.value))
        groups.append(Group("\n".join(lines), tuple(bars)))
    return [Panel(title, tuple(groups))]


# -------------------------------------------------------------------------- roofline, bandwidths


def roofline_points(report: Report) -> list[Point]:
    """Every timed row of ours and of the peers, of products whose bytes are known."""
    best = roofs(report)
    points = []
    for case, rows in by_case(report).items():
        ours = max((row.bytes for row in _role(rows, "ours")), default=0.0)
        for row in rows:
            size, rate = row.bytes or ours, row.tflops
            if row.role not in ("ours", "peer") or not size or not rate:
                continue
            floor = floor_of(rows, row)
            # A memory floor alone says nothing of arithmetic.
            limit = min(rate / floor.fraction, best.tflops or math.inf) if floor else None
            points.append(Point(row, case.flops / size, rate, limit))
    return points if any(point.row.role == "ours" for point in points) else []


def bandwidths(report: Report) -> list[Sweep]:
    """For each (N, K) of several dense decode rows: bytes of the weights over the time of each.

    The floors stream more than the weights, but are counted by the same bytes: a contender at its
    floor lies on the floor's line.
    """
    sweeps: dict[tuple[Any, ...], Sweep] = {}
    for case, rows in by_case(report).items():
        if case.suite != "dense" or case.m >= LARGE or not any(r.us for r in _role(rows, "ours")):
            continue
        title = f"N x K = {case.n} x {case.k}" + (f", {case.detail}" if case.detail else "")
        sweep = sweeps.setdefault((case.n, case.k, case.detail), Sweep(title))
        for row in rows:
            if row.us and row.role != "compute floor":
                rate = case.n * case.k / row.us / 1e3
                sweep.lines.setdefault(row.contender, []).append((case.m, rate))
                if row.role == "memory floor":
                    sweep.floors.add(row.contender)
    for sweep in sweeps.values():
        for line in sweep.lines.values():
            line.sort()
    several = (len({m for line in s.lines.values() for m, _ in line}) > 1 for s in sweeps.values())
    return [sweep for sweep, kept in zip(sweeps.values(), several, strict=True) if kept]


def spaced(positions: Sequence[float], gap: float) -> list[int]:
    """Indices of those of increasing ``positions`` that lie ``gap`` apart, the last among them."""
    kept: list[int] = []
    for at in range(len(positions) - 1, -1, -1):
        if not kept or positions[kept[-1]] - positions[at] >= gap:
            kept.append(at)
    return kept[::-1]
