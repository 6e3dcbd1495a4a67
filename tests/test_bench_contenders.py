"""Which contenders a run measures, and our own launches."""

from __future__ import annotations

import numpy as np
import pytest

from cpgemm import settings
from cpgemm.bench.contenders import NAMES, Contender, ours, pdl_setting, role_of, selected
from cpgemm.bench.operands import Pool, Product, tolerance
from cpgemm.bench.result import Case


def test_names_in_the_order_of_the_rows() -> None:
    assert selected((False, True)) == NAMES
    assert selected((False,)) == (
        "cpgemm", "batch invariant", "cublaslt block", "cublaslt tensor", "deep_gemm", "cutlass",
        "memory floor", "compute floor",
    )  # fmt: skip


def test_with_dependent_launch_only_what_has_no_such_variant_stays() -> None:
    assert selected((True,)) == (
        "cpgemm pdl", "batch invariant", "cublaslt block", "cublaslt tensor", "deep_gemm pdl",
        "cutlass", "memory floor pdl", "compute floor",
    )  # fmt: skip


def test_peers_are_chosen_by_names_without_pdl() -> None:
    assert selected((False, True), peers=("deep_gemm",)) == (
        "cpgemm", "cpgemm pdl", "batch invariant", "deep_gemm", "deep_gemm pdl", "memory floor",
        "memory floor pdl", "compute floor",
    )  # fmt: skip
    assert not any(role_of(name) == "peer" for name in selected((False, True), peers=()))
    assert selected((False, True), contenders=["cutlass", "cpgemm"]) == ("cpgemm", "cutlass")


def test_roles() -> None:
    roles = {name: role_of(name) for name in NAMES}
    assert roles["cpgemm pdl"] == "ours" and roles["deep_gemm pdl"] == roles["cutlass"] == "peer"
    assert roles["memory floor pdl"] == "memory floor" and roles["batch invariant"] == "variant"
    assert roles["compute floor"] == "compute floor"
    assert Contender("cpgemm pdl", []).pdl and not Contender("cpgemm", []).pdl


def test_the_setting_is_put_back() -> None:
    before = settings.pdl()
    with pytest.raises(ZeroDivisionError), pdl_setting(not before):
        assert settings.pdl() is not before
        raise ZeroDivisionError
    assert settings.pdl() is before
    settings.set_pdl(None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cpgemm", "cpgemm pdl"])
@pytest.mark.parametrize(
    "case",
    [
        Case("dense", 70, 256, 512),
        Case("contiguous", 128, 256, 512, 3),
        Case("masked", 20, 256, 512, 3),
    ],
    ids=lambda case: case.suite,
)
def test_launches_compute_the_product(case: Case, name: str) -> None:
    import cupy as cp

    product = Product.make(case, Pool(0, cp), Pool(1, cp), cp, sets=2)
    contender = ours(name, product)
    assert len(contender.calls) == 2 and contender.kernel
    for one in product.sets:
        one.out.view(np.uint16)[...] = 0xFFFF
    contender.calls[0]()
    cp.cuda.Device().synchronize()
    assert product.error() <= tolerance(product)
    assert bool((product.sets[1].out.view(np.uint16) == 0xFFFF).all()), "the other set's call"
