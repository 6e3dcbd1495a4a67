"""The steps of the suite ``jit``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_kernels import needs_nvrtc

from cpgemm.bench import jit
from cpgemm.bench.result import Case
from cpgemm.compiler import compile_count
from cpgemm.plan import plan_gemm

pytestmark = needs_nvrtc
SIZES = (64, 256, 512)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CPGEMM_COMPILER", raising=False)
    return tmp_path


def test_cold_means_compiled_each_time(cache: Path) -> None:
    before = compile_count()
    (row,) = jit.rows(Case("jit", *SIZES, 0, "cold compile"), 7, on_gpu=False)
    assert row.status == "ok" and len(row.windows_us) == 3
    assert compile_count() - before == 1 + 3, "once to warm the compiler up"
    assert row.kernel == plan_gemm(*SIZES).config.name
    assert os.environ["CPGEMM_CACHE_DIR"] == str(cache)


def test_warm_means_not_compiled() -> None:
    jit.rows(Case("jit", *SIZES, 0, "warm load"), 2, on_gpu=False)
    before = compile_count()
    (row,) = jit.rows(Case("jit", *SIZES, 0, "warm load"), 5, on_gpu=False)
    assert row.status == "ok" and len(row.windows_us) == 5 and compile_count() == before
    assert row.us is not None and row.us < 1e5, "a look into the cache"


def test_import_runs_in_a_fresh_interpreter() -> None:
    (row,) = jit.rows(Case("jit", detail="import"), 2, on_gpu=False)
    assert row.status == "ok" and row.us is not None
    assert 1e3 < row.us < 3e7, "numpy alone takes longer than a millisecond"


def test_another_step() -> None:
    (row,) = jit.rows(Case("jit", *SIZES, 0, "tepid"), 2, on_gpu=False)
    assert row.status == "failed" and "tepid" in row.reason
