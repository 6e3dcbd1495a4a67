"""Calls of CUTLASS: Python and C++ agree on the arguments, and the quickest variant is the peer."""

from __future__ import annotations

import ctypes
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpgemm.bench import cutlass_build, cutlass_peer
from cpgemm.bench.contenders import Absent
from cpgemm.bench.cutlass_build import VARIANTS, Builder, Variant, variants_of
from cpgemm.bench.cutlass_peer import cutlass
from cpgemm.bench.operands import Pool, Product, tolerance
from cpgemm.bench.result import Case

KINDS = {
    "const void*": ctypes.c_void_p, "const float*": ctypes.c_void_p, "void*": ctypes.c_void_p,
    "int": ctypes.c_int, "int*": ctypes.POINTER(ctypes.c_int),
    "const int*": ctypes.POINTER(ctypes.c_int), "const char*": ctypes.c_char_p, "void": None,
}  # fmt: skip


def declared(source: str) -> dict[str, tuple[Any, list[Any]]]:
    """Result and arguments of each C function of a source."""
    text = (Path(cutlass_peer.__file__).with_name("cutlass") / source).read_text()
    text = text[text.index('extern "C"') :]
    found = {}
    for result, name, arguments in re.findall(
        r"^([a-z][\w* ]*?) ?(cpgemm_\w+)\(([^)]*)\) \{", text, re.MULTILINE
    ):
        kinds = [re.sub(r"\s*\w+$", "", one.strip()) for one in arguments.split(",")]
        found[name] = (KINDS[result], [KINDS[kind] for kind in kinds])
    return found


@pytest.mark.parametrize("source", ["dense.cu", "grouped.cu"])
def test_python_calls_what_is_declared(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = declared(source)
    assert len(functions) == 4

    class Library:
        def __init__(self, _path: str) -> None:
            for name in functions:
                setattr(self, name, types.SimpleNamespace())

    monkeypatch.setattr(ctypes, "CDLL", Library)
    library = cutlass_peer._load.__wrapped__(source)
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        assert (function.restype, function.argtypes) == (result, arguments), name


class FakeCalls:
    """Calls that are made without a library; variants in ``refused`` take no case."""

    refused: tuple[str, ...] = ()

    def __init__(self, variant: Variant, library: Path, product: Product) -> None:
        if variant.name in self.refused:
            raise Absent("CUTLASS refuses: Error Misaligned Operand")
        self.calls = [variant.name] * len(product.sets)


@pytest.fixture
def product() -> Product:
    return Product.make(Case("dense", 5, 128, 256), Pool(0, np), Pool(1, np), np, sets=2)


def test_the_quickest_variant_is_the_peer(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutlass_peer, "Calls", FakeCalls)
    monkeypatch.setattr(FakeCalls, "refused", (VARIANTS[1].name,))
    builder: Any = types.SimpleNamespace(library=lambda variant: Path(variant.name))
    seen: list[str] = []

    def last(candidates: Mapping[str, Sequence[Any]]) -> str:
        seen.extend(candidates)
        return seen[-1]

    found = cutlass(product, builder, last)
    names = [variant.name for variant in variants_of("dense")]
    assert seen == [name for name in names if name != VARIANTS[1].name]
    assert (found.name, found.kernel) == ("cutlass", names[-1])
    assert list(found.calls) == [names[-1]] * 2


def test_without_any_variant_the_reasons_are_told_once(product: Product) -> None:
    def library(variant: Variant) -> Path:
        raise Absent("no nvcc")

    builder: Any = types.SimpleNamespace(library=library)
    with pytest.raises(Absent, match=r"^no nvcc$"):
        cutlass(product, builder, lambda candidates: "")


def test_a_library_of_another_machine(product: Product, tmp_path: Path) -> None:
    path = tmp_path / "peer.so"
    path.write_bytes(b"no ELF")
    builder: Any = types.SimpleNamespace(library=lambda variant: path)
    with pytest.raises(Absent, match="cannot be loaded"):
        cutlass(product, builder, lambda candidates: "")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_cutlass_computes_the_product(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its library was built before: a minute of nvcc is no part of a test."""
    import cupy as cp

    monkeypatch.setattr(cutlass_build, "header_folder", lambda: None)

    if variant.source == "dense":
        cases = [Case("dense", m, n, k) for m, n, k in ((1, 256, 512), (70, 2112, 1040))]
    else:
        cases = [Case("contiguous", 128, 256, 512, 3), Case("masked", 20, 256, 512, 3)]
    with Builder([variant]) as builder:
        try:
            library = builder.library(variant)
        except Absent as error:
            pytest.skip(str(error))
    for case in cases:
        product = Product.make(case, Pool(0, cp), Pool(1, cp), cp, sets=2)
        calls = cutlass_peer.Calls(variant, library, product).calls
        for _ in range(2):  # stream-K's counters are as they were
            product.poison()
            cp.cuda.runtime.deviceSynchronize()
            calls[0]()
            cp.cuda.runtime.deviceSynchronize()
            assert product.error() <= tolerance(product), case.name


def test_scales_of_groups_are_packed(rng: np.random.Generator) -> None:
    """Whatever the layout, group g has a (k-blocks, m) matrix of its own."""
    groups, m, blocks = 3, 5, 4
    values = rng.random((groups, m, blocks), np.float32)
    room = np.zeros((groups, 8, blocks), np.float32)
    room[:, :m] = values
    for scales in (room, values.reshape(groups * m, blocks), np.asfortranarray(room)):
        packed = cutlass_peer.packed_scales(scales, groups, m)
        assert packed.flags.c_contiguous and packed.shape == (groups, blocks, m)
        np.testing.assert_array_equal(packed.swapaxes(-1, -2), values)
