"""Rows, reports, and the JSON they are kept in."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_reports import DENSE, IMPORT, MASKED, bad, report, row

from cpgemm.bench import result
from cpgemm.bench.result import Case, Report, Row, read_report, report_of, write_report, write_text
from cpgemm.errors import ArgumentError

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "schema.md"


def test_names_of_cases() -> None:
    assert DENSE.name == "dense 64x4096x7168" and MASKED.name == "masked 32x20x4096x4096"
    assert Case("quantize", 8, 0, 16, detail="float32 1x128 pow2").name.endswith(
        " 8x16 float32 1x128 pow2"
    )
    assert IMPORT.name == "jit import"


def test_operations_and_rates() -> None:
    assert DENSE.flops == 2.0 * 64 * 4096 * 7168 and MASKED.flops == 2.0 * 32 * 20 * 4096 * 4096
    for name in ("quantize", "host", "jit"):
        assert Case(name, 64, 4096, 7168).flops == 0
    one = row(DENSE, "cpgemm", 10.0)
    assert one.tflops == pytest.approx(DENSE.flops / 10e-6 / 1e12)
    assert one.gbs == pytest.approx(3e7 / 10e-6 / 1e9)
    assert row(DENSE, "memory floor").tflops is None
    assert row(DENSE, "compute floor").tflops is not None
    assert row(IMPORT, "cpgemm").tflops is None
    wrong = bad(DENSE, "cpgemm", "wrong")
    assert wrong.tflops is None and wrong.gbs is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    before = report([row(DENSE, "cpgemm"), bad(DENSE, "deep_gemm", "absent", "é")], complete=False)
    write_report(before, path)
    after = read_report(path)
    assert after == before and isinstance(after.rows[0].windows_us, tuple)
    assert [one.name for one in path.parent.iterdir()] == ["bench.json"], "no temporary file stays"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"contender"' in line for line in lines) == 2, "a line for each row"
    assert os.stat(path).st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_report_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_report(report([], complete=False), path)
    assert json.loads(path.read_text())["rows"] == [] and read_report(path).rows == []


def test_nan_and_numpy_numbers_are_written_as_json_knows_them(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    us = np.float32(12.5)
    odd = row(
        DENSE, "cpgemm", error=float("nan"), clock_mhz=np.float64("inf"), us=us, windows_us=(us,),
        bytes=np.int64(7),
    )  # fmt: skip
    write_report(report([odd]), path)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    got = read_report(path).rows[0]
    assert (got.error, got.clock_mhz, got.us, got.bytes) == (None, None, 12.5, 7)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.md"
    write_text(path, "old")

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(result.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_report_that_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    timed_though_wrong = row(DENSE, "cpgemm", status="wrong")
    with pytest.raises(ArgumentError, match=r"report: rows\[0\]\.us: must be null where status"):
        write_report(report([timed_though_wrong]), path)
    assert not path.exists()


def test_only_rows_that_can_be_kept_are_added() -> None:
    made = report([])
    made.add(row(DENSE, "cpgemm", windows_us=(np.float32(10.0),)))
    made.add(bad(DENSE, "deep_gemm", "wrong", error=float("nan")))
    with pytest.raises(ArgumentError, match=r"row dense .*, cutlass\.us: must be null where"):
        made.add(row(DENSE, "cutlass", status="wrong"))
    with pytest.raises(ArgumentError, match=r"row dense 64x4096x7168, cpgemm: must be the only"):
        made.add(row(DENSE, "cpgemm"))
    assert [one.contender for one in made.rows] == ["cpgemm", "deep_gemm"]


def _record(**changes: Any) -> dict[str, Any]:
    """What ``report`` writes, with fields of its first row changed; None as a name drops one."""
    record = json.loads(json.dumps(report().as_dict()))
    record["rows"][0].update(changes)
    return record


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"us": None}, r"rows\[0\]\.us: must be a time where status is 'ok'; got None"),
        ({"us": "10"}, r"rows\[0\]\.us: must be a number above 0 or null; got '10'"),
        ({"us": 0.0}, r"rows\[0\]\.us: must be a number above 0 or null; got 0.0"),
        ({"us": True}, r"rows\[0\]\.us: must be a number above 0"),
        ({"us": 11.0}, r"rows\[0\]\.us: must be the median of windows_us, 10; got 11"),
        ({"status": "fine"}, r"rows\[0\]\.status: must be one of ok, wrong, absent, failed"),
        ({"role": "mine"}, r"rows\[0\]\.role: must be one of ours, variant, peer"),
        ({"status": "failed"}, r"rows\[0\]\.us: must be null where status is 'failed'"),
        ({"status": "failed", "us": None}, r"rows\[0\]: must hold no time where status"),
        ({"windows_us": [10.0, -1.0]}, r"rows\[0\]\.windows_us\[1\]: must be a number above 0"),
        ({"spread_pct": float("nan")}, r"rows\[0\]\.spread_pct: must be a number from 0 on or"),
        ({"pdl": 1}, r"rows\[0\]\.pdl: must be true or false; got 1"),
        ({"speed": 1}, r"rows\[0\]\.speed: is no field of this schema"),
        ({"case": {"suite": "dense", "m": 1.5}}, r"rows\[0\]\.case\.m: must be a whole number"),
        ({"case": {"m": 1}}, r"rows\[0\]\.case\.suite: is needed"),
        ({"case": 7}, r"rows\[0\]\.case: must be an object; got 7"),
        ({"contender": "cpgemm pdl"}, r"rows\[1\]: must be the only one of its case and contender"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        report_of(_record(**changes), "b.json")


def test_a_wrong_report_is_named(tmp_path: Path) -> None:
    for text, says in (
        ("{", "must be JSON"), ("[]", "b.json: must be an object; got list"),
        ('{"schema_version": 2}', "schema_version: must be 1; got 2. Read it with the release"),
        ("{}", "schema_version: must be 1; got None"),
        ('{"schema_version": 1, "seed": 1, "method": {}}', "machine: is needed; got none"),
        ('{"schema_version": 1, "rows": 3}', "rows: must be a list; got 3"),
    ):  # fmt: skip
        path = tmp_path / "b.json"
        path.write_text(text)
        with pytest.raises(ArgumentError, match=re.escape(says)):
            read_report(path)
    with pytest.raises(ArgumentError, match="must be a readable file"):
        read_report(tmp_path / "nowhere.json")


def test_fields_with_a_default_may_be_missing() -> None:
    record: dict[str, Any] = {"schema_version": 1, "seed": 0, "method": {}, "machine": {}}
    record["rows"] = [{"case": {"suite": "jit"}, "contender": "cpgemm", "role": "ours", "us": 2}]
    got = report_of(record, "b.json")
    assert got == Report({}, 0, {}, [Row(Case("jit"), "cpgemm", "ours", us=2)])


def test_the_schema_page_names_every_field() -> None:
    text = SCHEMA.read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)`", text))
    for kind in (Report, Row, Case):
        for one in dataclasses.fields(kind):
            assert one.name in listed, f"{kind.__name__}.{one.name}"
    assert f"`schema_version` is {result.SCHEMA_VERSION}." in text
