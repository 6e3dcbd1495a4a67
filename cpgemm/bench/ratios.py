"""What the rows of one case say together: ratios to peers, the fraction of the floor.

Like is compared with like: one of our rows with PDL (programmatic dependent launch) stands against
the peer's and the floor's variant with PDL where there is one, otherwise against the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cpgemm.bench.result import Report, Row

__all__ = ["Floor", "base_name", "counterpart", "floor_of", "peers_of", "speedup"]


class Floor(NamedTuple):
    """Which floor rules a case, and which part of our time it is (1: at the floor)."""

    kind: str  # "mem" or "mma"
    fraction: float
    row: Row


def base_name(row: Row) -> str:
    """The contender without its PDL suffix."""
    return row.contender.removesuffix(" pdl")


def peers_of(report: Report) -> list[str]:
    """Base names of all peers and variants, in the order of their first rows."""
    rows = (row for row in report.rows if row.role in ("variant", "peer"))
    return list(dict.fromkeys(map(base_name, rows)))


def counterpart(rows: Sequence[Row], base: str, pdl: bool) -> Row | None:
    """The row of contender ``base`` to compare with: the same PDL if that was timed, else any."""
    found = [row for row in rows if base_name(row) == base]
    found.sort(key=lambda row: (row.status != "ok", row.pdl != pdl))
    return found[0] if found else None


def speedup(ours: Row | None, other: Row | None) -> float | None:
    """The other's time over ours: above 1 ours is faster; None unless both were timed."""
    if ours is None or other is None or not ours.us or not other.us:
        return None
    return other.us / ours.us


def floor_of(rows: Sequence[Row], ours: Row | None) -> Floor | None:
    """The larger of the floors that were timed, over our time."""
    if ours is None or not ours.us:
        return None
    floors = [
        Floor(kind, found.us / ours.us, found)
        for kind, base in (("mem", "memory floor"), ("mma", "compute floor"))
        if (found := counterpart(rows, base, ours.pdl)) and found.us
    ]
    return max(floors, key=lambda floor: floor.fraction, default=None)
