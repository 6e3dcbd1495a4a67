"""What a benchmark run yields: rows of timings and a report that holds them.

A ``Row`` is one contender of one case.  Ratios are made between rows of one case only: they were
interleaved in one process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SCHEMA_VERSION", "Case", "Report", "Row", "Status"]

SCHEMA_VERSION = 1

# ok: timed and checked; wrong: output off by more than rounding allows, hence no time;
# absent: the contender is not installed or does not take this case; failed: it raised.
Status = Literal["ok", "wrong", "absent", "failed"]


@dataclass(frozen=True)
class Case:
    """What is measured: one product (or one quantisation, host path, compilation) of one size.

    ``suite``: dense, contiguous, masked, quantize, host or jit.  ``groups`` is 0 for products
    without groups; ``m`` is the rows of A, of each group where there are groups.  ``detail`` names
    what sizes do not say (a granularity, a host path, a kernel).
    """

    suite: str
    m: int = 0
    n: int = 0
    k: int = 0
    groups: int = 0
    detail: str = ""

    @property
    def name(self) -> str:
        """Readable and unique within a report, e.g. ``dense 64x2112x7168``."""
        sizes = f"{self.groups}x" if self.groups else ""
        sizes += "x".join(str(size) for size in (self.m, self.n, self.k) if size)
        return " ".join(part for part in (self.suite, sizes, self.detail) if part)

    @property
    def flops(self) -> float:
        """Multiplications and additions; 0 where the case is no product."""
        return 2.0 * max(self.groups, 1) * self.m * self.n * self.k


@dataclass(frozen=True)
class Row:
    """One contender of one case.

    ``us``: median of the windows, microseconds per call, launch gaps included; None unless the
    status is ok.  ``spread_pct``: (max - min) / median of the windows.  ``kernel_us``: the kernel
    alone, where CUPTI is there.  ``bytes``: what must move at least (operands, scales, result).
    ``clock_mhz`` and ``power_w``: means while the row was timed.  ``error``: relative 2-norm error
    of the checked output.  ``role``: ours, peer, memory floor or compute floor.
    """

    case: Case
    contender: str
    role: Literal["ours", "peer", "memory floor", "compute floor"]
    status: Status = "ok"
    us: float | None = None
    spread_pct: float | None = None
    windows_us: tuple[float, ...] = ()
    kernel_us: float | None = None
    bytes: float = 0.0
    clock_mhz: float | None = None
    power_w: float | None = None
    error: float | None = None
    pdl: bool = False
    kernel: str = ""
    reason: str = ""

    @property
    def tflops(self) -> float | None:
        """Rate of the case's arithmetic; None where nothing was timed or multiplied."""
        if not self.us or not self.case.flops or self.role == "memory floor":
            return None
        return self.case.flops / self.us / 1e6

    @property
    def gbs(self) -> float | None:
        """Rate of ``bytes``."""
        return self.bytes / self.us / 1e3 if self.us and self.bytes else None


@dataclass
class Report:
    """A whole run: rows in the order in which they were measured, and under what conditions."""

    machine: dict[str, Any]  # machine.describe().as_dict()
    seed: int
    method: dict[str, Any]  # windows, window_ms, rotation, PDL, suites asked for ...
    rows: list[Row] = field(default_factory=list)
    complete: bool = False  # False: the run was interrupted
    schema_version: int = SCHEMA_VERSION

    def cases(self) -> list[Case]:
        """Every case, in the order of its first row."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def of(self, case: Case) -> list[Row]:
        """The rows of one case."""
        return [row for row in self.rows if row.case == case]

    def as_dict(self) -> dict[str, Any]:
        """What is written as JSON."""
        return dataclasses.asdict(self)
