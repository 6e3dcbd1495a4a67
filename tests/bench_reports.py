"""Made-up benchmark reports: every number follows from the case, so that tests can foresee it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from cpgemm.bench.result import Case, Report, Role, Row

DENSE = Case("dense", 64, 4096, 7168)
LARGE = Case("dense", 4096, 7168, 2048)
MASKED = Case("masked", 20, 4096, 4096, 32)
IMPORT = Case("jit", detail="import")

MACHINE: dict[str, Any] = {
    "gpu": "NVIDIA H200", "compute_capability": "9.0", "sms": 132, "memory_bytes": 150109880320,
    "driver": "580.1", "cuda_driver": "13.0", "nvrtc": "13.0.88", "cupy": "14.2.0",
    "torch": "2.11.0", "numpy": "2.5.2", "ml_dtypes": "0.6.0", "python": "3.12.3",
    "cpgemm": "0.1.0", "commit": "0123456789ab", "system": "Linux", "cpu": "a CPU", "cores": 16,
    "host_memory_bytes": 2**37, "date": "2026-11-22 16:38 UTC",
}  # fmt: skip
METHOD: dict[str, Any] = {"windows": 5, "window_ms": 10.0, "cases": 3, "pdl": [False, True]}


def row(case: Case, contender: str, us: float = 10.0, **fields: Any) -> Row:
    """A row that was timed; the role follows from the contender."""
    base = contender.removesuffix(" pdl")
    role: Role = "ours" if base == "cpgemm" else "peer"
    role = base if base.endswith("floor") else role  # type: ignore[assignment]
    windows = tuple(us * factor for factor in (0.995, 1.0, 1.005, 0.999, 1.001))
    made = Row(
        case, contender, role, "ok", us, 1.0, windows, us * 0.9, 3e7, 1700.0, 600.0,
        0.00166 if role == "ours" else None, contender.endswith(" pdl"),
        "dense_64x32_s16_w1_bfloat16" if role == "ours" else "",
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


def bad(case: Case, contender: str, status: str, reason: str = "", **fields: Any) -> Row:
    """A row that was not timed."""
    none: dict[str, Any] = dict.fromkeys(("us", "spread_pct", "kernel_us", "clock_mhz", "power_w"))
    none |= {"windows_us": (), "status": status, "reason": reason, "error": None}
    return dataclasses.replace(row(case, contender), **{**none, **fields})


def rows(case: Case, us: float = 10.0) -> list[Row]:
    """Ours, three peers and two floors with ratios that tests know."""
    return [
        row(case, "cpgemm", us),
        row(case, "cpgemm pdl", us * 0.8),
        row(case, "cublaslt block", us * 1.5),
        row(case, "deep_gemm", us * 1.2),
        row(case, "deep_gemm pdl", us * 0.72),
        bad(case, "cutlass", "absent", "nvcc is not on PATH"),
        row(case, "memory floor", us * 0.5),
        row(case, "memory floor pdl", us * 0.6),
        row(case, "compute floor", us * 0.7),
    ]


def report(made: Iterable[Row] | None = None, **fields: Any) -> Report:
    """A complete report, by default of three cases."""
    if made is None:
        made = [*rows(DENSE), *rows(LARGE, 100.0), *rows(MASKED, 150.0)]
    whole = Report(dict(MACHINE), 5, dict(METHOD), list(made), True)
    return dataclasses.replace(whole, **fields)
