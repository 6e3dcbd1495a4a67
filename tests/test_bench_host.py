"""The suite ``host``: every path of the cases is understood."""

from __future__ import annotations

import sys
from typing import Any

import bench_fakes
import numpy as np
import pytest

from cpgemm.bench import host
from cpgemm.bench.cases import HOST_PATHS
from cpgemm.bench.contenders import NAMES
from cpgemm.bench.operands import Pool
from cpgemm.bench.result import Case
from cpgemm.bench.session import Session


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session whose operands are NumPy's: ``gemm`` computes them on the CPU."""
    module: Any = bench_fakes.Gpu({}).module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "torch", None)
    made = Session(NAMES, seed=0, windows=5, window_ms=1)
    made.cupy = np
    monkeypatch.setattr(made, "pools", (Pool(0, np), Pool(1, np)))
    monkeypatch.setattr(made, "synchronize", lambda: None)
    monkeypatch.setattr(host, "_CALLS", 4)
    return made


def test_the_cases_have_known_paths() -> None:
    assert set(HOST_PATHS) <= set(host.PATHS)


@pytest.mark.parametrize("path", ["gemm out", "masked out", "quantize"])
def test_paths_that_numpy_takes_too(session: Session, path: str) -> None:
    rows = host.gpu_rows(session, Case("host", 5, 128, 256, 0, path))
    row = rows[0]
    assert (row.contender, row.status) == ("cpgemm", "ok") and len(row.windows_us) == 5
    assert (row.error is None) == (path == "quantize")
    others = {row.contender: row.status for row in rows[1:]}
    assert others == ({"deep_gemm": "absent"} if path == "masked out" else {})


def test_without_torch_its_path_is_absent(session: Session) -> None:
    rows = host.gpu_rows(session, Case("host", 5, 128, 256, 0, "torch"))
    assert {row.contender: row.status for row in rows} == dict.fromkeys(
        ("cpgemm", "cublaslt block", "cublaslt tensor", "deep_gemm"), "absent"
    )
    assert all(row.reason == "torch is not installed" for row in rows)


def test_a_wrong_result_has_no_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpgemm.gemm", lambda a, b, out: None)
    (row,) = host.gpu_rows(session, Case("host", 5, 128, 256, 0, "gemm out"))
    assert row.status == "wrong" and row.us is None and "not written" in row.reason


def test_an_unknown_path(session: Session) -> None:
    with pytest.raises(ValueError, match=r"the path must be one of gemm out, .* got 'fax'"):
        host.gpu_rows(session, Case("host", 5, 128, 256, 0, "fax"))
