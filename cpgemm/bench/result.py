"""What a benchmark run yields: rows of timings and a report that holds them.

A ``Row`` is one contender of one case.  Ratios are made between rows of one case only: they were
interleaved in one process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from cpgemm.errors import ArgumentError, reject

__all__ = [
    "SCHEMA_VERSION",
    "Case",
    "Report",
    "Role",
    "Row",
    "Status",
    "read_report",
    "report_of",
    "write_report",
    "write_text",
]

SCHEMA_VERSION = 1

# ok: timed and checked; wrong: output off by more than rounding allows, hence no time;
# absent: the contender is not installed or does not take this case; failed: it raised.
Status = Literal["ok", "wrong", "absent", "failed"]
Role = Literal["ours", "variant", "peer", "memory floor", "compute floor"]


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
        """Multiplications and additions; 0 where none are timed: quantize, host, jit."""
        if self.suite in ("quantize", "host", "jit"):
            return 0.0
        return 2.0 * max(self.groups, 1) * self.m * self.n * self.k


@dataclass(frozen=True)
class Row:
    """One contender of one case.

    ``us``: median of the windows, microseconds per call, launch gaps included; None unless the
    status is ok.  ``spread_pct``: (max - min) / median of the windows.  ``kernel_us``: the kernel
    alone, where CUPTI is there.  ``bytes``: what must move at least (operands, scales, result).
    ``clock_mhz`` and ``power_w``: means while the row was timed.  ``error``: relative 2-norm error
    of the checked output.  ``role``: ours, variant (ours under another promise), peer, memory floor
    or compute floor.
    """

    case: Case
    contender: str
    role: Role
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

    def add(self, row: Row) -> None:
        """Append a row; ``ArgumentError`` for one that could not be written and read back."""
        where = f"row {row.case.name}, {row.contender}"
        _row(_without_nan(dataclasses.asdict(row)), where)
        if any((one.case, one.contender) == (row.case, row.contender) for one in self.rows):
            _refuse(where, "must be the only one of its case and contender", "a second one")
        self.rows.append(row)

    def _repr_html_(self) -> str:
        from cpgemm.displays.report import report_html

        return report_html(self)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        from cpgemm.bench.report import report_text

        printer.text(report_text(self))

    def as_dict(self) -> dict[str, Any]:
        """What is written as JSON: the version first, rows last, None for NaN and infinity."""
        fields = dataclasses.asdict(self)
        order = ("schema_version", "complete", "seed", "method", "machine", "rows")
        return {name: _without_nan(fields[name]) for name in order}


# ------------------------------------------------------------------------------------------ files


def write_report(report: Report, path: Path) -> None:
    """Write JSON (docs/benchmarks/schema.md); an interrupted write leaves the old file.

    Raises ``ArgumentError`` for a report that ``read_report`` would refuse.
    """
    record = report.as_dict()
    report_of(record, "report")
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in record.pop("rows"))
    head = json.dumps(record, indent=1, allow_nan=False).removesuffix("\n}")
    write_text(path, f'{head},\n "rows": [\n{rows}\n ]\n}}\n')  # a line for each row


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: whoever reads ``path`` sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_report(path: Path) -> Report:
    """The report in a JSON file, checked.

    Raises ``ArgumentError`` that names the file and the field, such as ``rows[3].us``.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reject("report", "must be a readable file", f"{path} ({error})", "Check the path.")
    except json.JSONDecodeError as error:
        reject("report", "must be JSON", f"{path} ({error})", "Write it with --json.")
    return report_of(record, str(path))


def report_of(record: object, where: str) -> Report:
    """The report of a dictionary as ``Report.as_dict`` makes it; ``where`` begins each error.

    Fields that have a default may be missing.  Raises ``ArgumentError``.
    """
    if not isinstance(record, dict):
        _refuse(where, "must be an object", type(record).__name__)
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        reject(
            f"{where}: schema_version",
            f"must be {SCHEMA_VERSION}",
            repr(version),
            "Read it with the release that wrote it, or measure again.",
        )
    values = _fields(Report, record, where, _REPORT)
    values["rows"] = [
        _row(row, f"{where}: rows[{at}]") for at, row in enumerate(values.get("rows", ()))
    ]
    seen: set[tuple[Case, str]] = set()
    for at, row in enumerate(values["rows"]):
        if (row.case, row.contender) in seen:
            _refuse(f"{where}: rows[{at}]", "must be the only one of its case and contender",
                    f"{row.case.name}, {row.contender} again")  # fmt: skip
        seen.add((row.case, row.contender))
    return Report(**values)


def _row(record: object, where: str) -> Row:
    values = _fields(Row, record, where, _ROW)
    values["case"] = Case(**_fields(Case, values["case"], f"{where}.case", _CASE))
    values["windows_us"] = tuple(values.get("windows_us", ()))
    for at, us in enumerate(values["windows_us"]):
        _take(_POSITIVE, us, f"{where}.windows_us[{at}]")
    row = Row(**values)
    if (row.status == "ok") != (row.us is not None):
        rule = "must be a time" if row.status == "ok" else "must be null"
        _refuse(f"{where}.us", f"{rule} where status is {row.status!r}", row.us)
    if row.status != "ok" and (row.windows_us or row.kernel_us is not None):
        _refuse(where, f"must hold no time where status is {row.status!r}", "one")
    if row.us is not None and row.windows_us:
        median = statistics.median(row.windows_us)
        if not math.isclose(row.us, median, rel_tol=1e-3):
            _refuse(f"{where}.us", f"must be the median of windows_us, {median:g}", row.us)
    return row


_Check = tuple[str, Callable[[Any], bool]]


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _or_null(check: _Check) -> _Check:
    return f"{check[0]} or null", lambda value: value is None or check[1](value)


def _one_of(*names: str) -> _Check:
    return f"one of {', '.join(names)}", lambda value: value in names


_TEXT: _Check = ("a text", lambda value: isinstance(value, str))
_FLAG: _Check = ("true or false", lambda value: isinstance(value, bool))
_OBJECT: _Check = ("an object", lambda value: isinstance(value, dict))
_LIST: _Check = ("a list", lambda value: isinstance(value, (list, tuple)))
_COUNT: _Check = (
    "a whole number from 0 on",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
)
_AMOUNT: _Check = ("a number from 0 on", lambda value: _is_number(value) and value >= 0)
_POSITIVE: _Check = ("a number above 0", lambda value: _is_number(value) and value > 0)

_REPORT = {
    "schema_version": _COUNT, "complete": _FLAG, "seed": _COUNT, "method": _OBJECT,
    "machine": _OBJECT, "rows": _LIST,
}  # fmt: skip
_CASE = {"suite": _TEXT, "detail": _TEXT, **dict.fromkeys(("m", "n", "k", "groups"), _COUNT)}
_ROW = {
    "case": _OBJECT, "contender": _TEXT, "role": _one_of(*get_args(Role)),
    "status": _one_of(*get_args(Status)), "us": _or_null(_POSITIVE),
    "spread_pct": _or_null(_AMOUNT), "windows_us": _LIST, "kernel_us": _or_null(_POSITIVE),
    "bytes": _AMOUNT, "clock_mhz": _or_null(_AMOUNT), "power_w": _or_null(_AMOUNT),
    "error": _or_null(_AMOUNT), "pdl": _FLAG, "kernel": _TEXT, "reason": _TEXT,
}  # fmt: skip


def _fields(kind: type, record: object, where: str, checks: Mapping[str, _Check]) -> dict[str, Any]:
    """The fields of a dataclass in ``record``: none unknown, none lacking, each of its type."""
    if not isinstance(record, dict):
        _refuse(where, "must be an object", repr(record))
    for name, value in record.items():
        if name not in checks:
            _refuse(f"{where}.{name}", "is no field of this schema", "one of that name")
        _take(checks[name], value, f"{where}.{name}")
    for one in dataclasses.fields(kind):
        optional = (one.default, one.default_factory) != (dataclasses.MISSING,) * 2
        if one.name not in record and not optional:
            _refuse(f"{where}.{one.name}", "is needed", "none")
    return dict(record)


def _take(check: _Check, value: object, where: str) -> None:
    if not check[1](value):
        _refuse(where, f"must be {check[0]}", repr(value))


def _refuse(where: str, rule: str, got: object) -> NoReturn:
    reject(where, rule, got, "Fields: docs/benchmarks/schema.md.", kind=ArgumentError)


def _without_nan(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
