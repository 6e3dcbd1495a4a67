"""A whole run: rows as they are measured, with and without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bench_fakes
import pytest
from tiny_kernels import needs_nvrtc

from cpgemm.bench import contenders, run
from cpgemm.bench.cases import suite
from cpgemm.bench.contenders import NAMES, Contender
from cpgemm.bench.cutlass_build import variants_of
from cpgemm.bench.result import Case, Report, Row, report_of
from cpgemm.bench.run import run_suites

SMALL = {
    "dense": Case("dense", 64, 256, 512),
    "contiguous": Case("contiguous", 128, 256, 512, 3),
    "masked": Case("masked", 5, 256, 512, 3),
    "quantize": Case("quantize", 300, 0, 512, 0, "bfloat16 128x128 pow2"),
}


def valid(rows: list[Row]) -> list[Row]:
    """The rows, after the schema had a look at them."""
    report = Report({}, 0, {}, rows)
    return report_of(report.as_dict(), "report").rows


# ------------------------------------------------------------------------------------ without a GPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "why_no_hopper", lambda: "no driver")


@pytest.mark.usefixtures("no_gpu")
def test_numpy_path() -> None:
    done: list[str] = []
    cases = [*SMALL.values(), Case("host", 64, 256, 512, 0, "plan")]
    rows = valid(list(run_suites(cases, seed=5, windows=5, progress=done.append)))
    assert done == [case.name for case in cases] == [row.case.name for row in rows]
    for row in rows[:-1]:
        assert (row.contender, row.status, row.kernel) == ("cpgemm", "ok", "NumPy")
        assert row.bytes > 0 and row.us and len(row.windows_us) == 5
        assert row.error is not None and row.error <= 0.002
    assert (rows[-1].status, rows[-1].reason) == ("absent", "host paths launch kernels: no driver")


@pytest.mark.usefixtures("no_gpu")
def test_rows_come_one_by_one() -> None:
    done: list[str] = []
    rows = run_suites(list(SMALL.values()), seed=5, windows=1, progress=done.append)
    assert next(rows).case == SMALL["dense"] and done == []
    assert next(rows).case == SMALL["contiguous"] and done == [SMALL["dense"].name]
    rows.close()


@pytest.mark.usefixtures("no_gpu")
def test_a_case_that_fails_does_not_end_the_run() -> None:
    cases = [Case("quantize", 4, 0, 128, 0, "no such detail"), SMALL["dense"]]
    first, second = run_suites(cases, seed=5, windows=1)
    assert first.status == "failed" and "no such detail" in first.reason
    assert second.status == "ok"


@pytest.mark.usefixtures("no_gpu")
def test_contenders_that_are_not_asked_for() -> None:
    assert list(run_suites([SMALL["dense"]], seed=0, contenders=["cutlass"])) == []


@needs_nvrtc
@pytest.mark.usefixtures("no_gpu")
def test_jit_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    rows = valid(list(run_suites(suite("jit"), seed=5, windows=2)))
    assert [row.status for row in rows] == ["ok"] * 3


# -------------------------------------------------------------------------- with a stand-in for one


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> bench_fakes.Gpu:
    fake = bench_fakes.Gpu({"ours": 10.0})
    monkeypatch.setitem(sys.modules, "cupy", fake.module())
    for name in ("torch", "cupti", "pynvml"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(run, "why_no_hopper", lambda: None)
    return fake


def test_products_wait_for_compilers_and_the_host_for_products() -> None:
    cases = [
        Case("dense", 1, 8, 128), Case("host", 1, 8, 128), Case("quantize", 1, 0, 128),
        Case("masked", 1, 8, 128, 1), Case("jit"),
    ]  # fmt: skip
    assert run._ordered(cases, False) == cases
    suites = [case.suite for case in run._ordered(cases, True)]
    assert suites == ["quantize", "dense", "masked", "host", "jit"]


def test_every_contender_of_a_product_has_a_maker(
    gpu: bench_fakes.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row says what happened, and the variants that the suites need were asked for."""
    asked: list[Any] = []

    class NoBuilder:
        busy = False

        def __init__(self, variants: list[Any]) -> None:
            asked.extend(variants)

        def __enter__(self) -> NoBuilder:
            return self

        def __exit__(self, *_error: object) -> None: ...

        def library(self, variant: Any) -> Path:
            raise contenders.Absent("no nvcc")

    monkeypatch.setattr(run, "Builder", NoBuilder)
    monkeypatch.setattr(run.Product, "make", lambda *_a, **_k: FakeProduct())
    monkeypatch.setattr(run.contending, "ours", lambda name, _product: timed(name))
    monkeypatch.setattr(run.contending, "floor", lambda name, _product: timed(name, False))
    monkeypatch.setattr(run, "tolerance", lambda _product, *, by_blocks: 0.002)
    monkeypatch.setattr(run.Session, "pools", (None, None))

    class FakeProduct:
        case, sets = SMALL["masked"], ()

        def poison(self) -> None: ...

        def error(self, *, by_blocks: bool) -> float:
            return 0.001

    def timed(name: str, checked: bool = True) -> Contender:
        return Contender(name, [gpu.call("ours")], checked=checked)

    rows = valid(list(run_suites([SMALL["masked"]], seed=1, windows=5, window_ms=0.1)))
    assert asked == list(variants_of("masked"))
    assert [row.contender for row in rows] == list(NAMES)
    statuses = {row.contender: row.status for row in rows}
    assert {name for name, status in statuses.items() if status == "absent"} == {
        "batch invariant", "cublaslt block", "cublaslt tensor", "deep_gemm", "deep_gemm pdl",
        "cutlass",
    }  # fmt: skip
    assert set(statuses.values()) == {"ok", "absent"}
    assert not gpu.inside, "the caller's streams are the caller's"


def test_a_case_too_large_for_the_device(
    gpu: bench_fakes.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_arguments: object, **_named: object) -> None:
        raise MemoryError("Out of memory allocating 1 TB")

    monkeypatch.setattr(run.Product, "make", too_large)
    monkeypatch.setattr(run.Session, "pools", (None, None))
    (row,) = run_suites([SMALL["dense"]], seed=1, contenders=["cpgemm"])
    assert (row.status, row.reason) == ("failed", "Out of memory allocating 1 TB")
    assert not gpu.inside


# ------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "contiguous", "masked", "quantize"])
def test_smoke(name: str) -> None:
    """Peers may be absent; what is there must be right, and ours and the floors must be there."""
    peers = ("cublaslt block", "cublaslt tensor", "deep_gemm")  # no minutes of nvcc in a test
    rows = valid(list(run_suites([SMALL[name]], seed=3, windows=5, window_ms=0.5, peers=peers)))
    for row in rows:
        print(row)
        assert row.status in ("ok", "absent"), (row.contender, row.reason)
        assert row.role in ("peer", "variant") or row.status == "ok"
    others = ("peer", "variant")
    ours = {row.contender for row in rows if row.status == "ok" and row.role not in others}
    wanted = {"cpgemm", "memory floor"}
    if name != "quantize":
        wanted |= {"cpgemm pdl", "memory floor pdl", "compute floor"}
    assert ours == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("detail", ["gemm out", "plan", "torch", "graph replay", "masked out",
                                    "quantize", "deep_gemm"])  # fmt: skip
def test_smoke_of_host_paths(detail: str) -> None:
    rows = valid(list(run_suites([Case("host", 64, 256, 512, 0, detail)], seed=3, windows=5)))
    assert rows
    for row in rows:
        print(row)
        assert row.status in ("ok", "absent"), (row.contender, row.reason)
    if detail not in ("torch", "deep_gemm"):
        assert rows[0].contender == "cpgemm" and rows[0].us and 0.5 < rows[0].us < 500


@pytest.mark.gpu
def test_smoke_of_jit() -> None:
    rows = valid(list(run_suites(suite("jit"), seed=3, windows=3)))
    assert [row.status for row in rows] == ["ok"] * 3
    cold, warm, _import = (row.us for row in rows)
    assert cold and warm and warm < cold
