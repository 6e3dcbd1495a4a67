"""Peers: which libraries are found, and with what they are called."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bench_fakes import real_deep_gemm  # noqa: F401  (a fixture)

import cpgemm.deep_gemm
from cpgemm.bench import peers
from cpgemm.bench.contenders import Absent
from cpgemm.bench.operands import Pool, Product, tolerance
from cpgemm.bench.result import Case

DENSE = Case("dense", 5, 128, 256)
CONTIGUOUS = Case("contiguous", 128, 128, 256, 2)
MASKED = Case("masked", 5, 128, 256, 2)


@pytest.fixture(autouse=True)
def look_again() -> Iterator[None]:
    """What was found in one test is not found in another."""
    peers._look_for_deep_gemm.cache_clear()
    yield
    peers._look_for_deep_gemm.cache_clear()


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch with CUDA, as far as a peer looks at it before it calls anything."""
    torch: Any = types.ModuleType("torch")
    torch.__version__ = "9.9"
    torch.cuda = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", torch)
    # Operands of these tests are NumPy's: the tensors that peers get are the arrays themselves.
    monkeypatch.setattr(peers, "to_torch", lambda array: array)
    monkeypatch.setattr(
        cpgemm.ScaledTensor, "to_torch", lambda tensor: (tensor.data, tensor.scales)
    )
    return torch


def make(case: Case) -> Product:
    return Product.make(case, Pool(0, np), Pool(1, np), np, sets=2)


def test_without_torch_there_are_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for make_peer, name in ((peers.cublaslt, "cublaslt block"), (peers.deep_gemm, "deep_gemm")):
        with pytest.raises(Absent, match="torch is not installed"):
            make_peer(name, make(DENSE))


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch, fake_torch: Any) -> None:
    fake_torch.cuda.is_available = lambda: False
    with pytest.raises(Absent, match=r"torch 9\.9 finds no CUDA device"):
        peers.cublaslt("cublaslt block", make(DENSE))


# --------------------------------------------------------------------------------------- DeepGEMM


def test_our_own_interface_is_no_peer(monkeypatch: pytest.MonkeyPatch, fake_torch: Any) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", cpgemm.deep_gemm)
    with pytest.raises(Absent, match="deep_gemm is not installed"):
        peers.find_deep_gemm()
    assert sys.modules["deep_gemm"] is cpgemm.deep_gemm


@pytest.mark.usefixtures("real_deep_gemm", "fake_torch")
def test_the_real_one_is_found_behind_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", cpgemm.deep_gemm)
    monkeypatch.setitem(sys.modules, "deep_gemm.utils", cpgemm.deep_gemm.utils)
    found = peers.find_deep_gemm()
    assert found.__version__ == "2.9" and found is peers.find_deep_gemm()
    assert sys.modules["deep_gemm"] is cpgemm.deep_gemm, "users of the other name keep it"
    assert sys.modules["deep_gemm.utils"] is cpgemm.deep_gemm.utils


@pytest.mark.usefixtures("real_deep_gemm", "fake_torch")
def test_the_real_one_that_is_imported_already() -> None:
    import deep_gemm

    assert peers.find_deep_gemm() is deep_gemm


@pytest.mark.usefixtures("real_deep_gemm", "fake_torch")
def test_one_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = next(path for path in sys.path if path.endswith("site"))
    with open(f"{broken}/deep_gemm/__init__.py", "w") as file:
        file.write("raise AssertionError('no CUDA_HOME\\nat all')")
    with pytest.raises(Absent, match=r"deep_gemm cannot be imported: no CUDA_HOME$"):
        peers.find_deep_gemm()
    assert "deep_gemm" not in sys.modules


@pytest.mark.usefixtures("real_deep_gemm", "fake_torch")
def test_calls_of_deep_gemm() -> None:
    """Each suite's function under the name that there is, with scales relaid and PDL set."""
    library = peers.find_deep_gemm()
    for name, pdl in (("deep_gemm", False), ("deep_gemm pdl", True)):
        library.calls.clear()
        dense, contiguous, masked = map(make, (DENSE, CONTIGUOUS, MASKED))
        contenders = [peers.deep_gemm(name, product) for product in (dense, contiguous, masked)]
        library.set_pdl(not pdl)  # another contender in between
        for contender in contenders:
            assert len(contender.calls) == 2 and contender.checked
            contender.calls[1]()
        first, second, third = library.calls
        one = dense.sets[1]
        assert first[:2] == (pdl, "dense") and first[2][0] is one.a.data
        assert first[2][1][0] == "aligned" and first[2][1][1] is one.a.scales
        assert first[3] == (one.b.data, one.b.scales) and first[4] is one.out
        assert second[:2] == (pdl, "contiguous") and second[2] is contiguous.sets[1].index
        assert third[:2] == (pdl, "masked") and third[2] is masked.sets[1].index
        assert third[3] == MASKED.m


@pytest.mark.usefixtures("real_deep_gemm", "fake_torch")
def test_an_old_deep_gemm() -> None:
    library = peers.find_deep_gemm()
    del library.set_pdl, library.fp8_gemm_nt
    with pytest.raises(Absent, match="has no set_pdl"):
        peers.deep_gemm("deep_gemm pdl", make(CONTIGUOUS))
    with pytest.raises(Absent, match="has no fp8_gemm_nt"):
        peers.deep_gemm("deep_gemm", make(DENSE))


# --------------------------------------------------------------------------------------- cuBLASLt


def test_cublaslt_says_what_it_does_not_take(fake_torch: Any) -> None:
    with pytest.raises(Absent, match=r"torch 9\.9 has no _scaled_mm"):
        peers.cublaslt("cublaslt block", make(DENSE))
    fake_torch._scaled_mm = None
    with pytest.raises(Absent, match="no grouped product"):
        peers.cublaslt("cublaslt tensor", make(MASKED))
    with pytest.raises(Absent, match="N % 128 == 0"):
        peers.cublaslt("cublaslt block", make(Case("dense", 5, 136, 256)))


def test_what_cublaslt_refuses_is_absent(monkeypatch: pytest.MonkeyPatch, fake_torch: Any) -> None:
    fake_torch._scaled_mm = None

    def refused() -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nbacktrace")

    monkeypatch.setattr(peers, "torch_call", lambda one, *, by_blocks: refused)
    with pytest.raises(Absent, match=r"_scaled_mm refuses: CUBLAS_STATUS_NOT_SUPPORTED .*Matmul$"):
        peers.cublaslt("cublaslt block", make(DENSE))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cublaslt block", "cublaslt tensor", "deep_gemm"])
def test_peers_compute_the_product(name: str) -> None:
    """Where they are installed: the memory that they share with cpgemm means the same to them."""
    import cupy as cp

    product = Product.make(Case("dense", 64, 512, 1024), Pool(0, cp), Pool(1, cp), cp, sets=1)
    build = peers.deep_gemm if name == "deep_gemm" else peers.cublaslt
    try:
        contender = build(name, product)
    except Absent as error:
        pytest.skip(str(error))
    product.poison()
    cp.cuda.Device().synchronize()
    contender.calls[0]()
    cp.cuda.runtime.deviceSynchronize()
    blocks = contender.by_blocks
    assert product.error(by_blocks=blocks) <= tolerance(product, by_blocks=blocks)
