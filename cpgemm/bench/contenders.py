"""Who is timed: cpgemm and the floors here, other libraries in ``peers`` and ``cutlass_peer``.

A contender's calls are prepared outside of any window: one for each set of operands, with nothing
left for the host to do but to launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpgemm import settings
from cpgemm.bench import floors
from cpgemm.bench.operands import Operands, Product
from cpgemm.bench.result import Role
from cpgemm.problem import Deterministic

__all__ = [
    "NAMES",
    "Absent",
    "Contender",
    "floor",
    "invariant",
    "ours",
    "pdl_setting",
    "role_of",
    "selected",
]

Call = Callable[[], object]

NAMES = (
    "cpgemm", "cpgemm pdl", "batch invariant", "cublaslt block", "cublaslt tensor", "deep_gemm",
    "deep_gemm pdl", "cutlass", "memory floor", "memory floor pdl", "compute floor",
)  # fmt: skip
"""Every contender, in the order of the rows of a case."""


class Absent(Exception):
    """A contender is not installed, or does not take this case; the text says which."""


@dataclass(frozen=True)
class Contender:
    """``calls``: one for each set of operands, each enqueues on the current stream and returns.

    ``checked``: whether its output is the case's result, which is checked before it is timed;
    ``by_blocks``: whether it applies the block scales (otherwise it multiplies the bare codes).
    """

    name: str
    calls: Sequence[Call]
    kernel: str = ""
    checked: bool = True
    by_blocks: bool = True

    @property
    def pdl(self) -> bool:
        """Whether it is launched with programmatic dependent launch."""
        return self.name.endswith(" pdl")


def role_of(name: str) -> Role:
    """``Row.role`` of a contender."""
    base = name.removesuffix(" pdl")
    if base == "memory floor":
        return "memory floor"
    if base == "compute floor":
        return "compute floor"
    if base == "batch invariant":
        return "variant"
    return "ours" if base == "cpgemm" else "peer"


def selected(
    pdl: Sequence[bool],
    peers: Sequence[str] | None = None,
    contenders: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The names to measure, in the order of ``NAMES``.

    ``pdl``: which variants, where there are two.  ``peers``: which peers, by their names without
    ``pdl`` (None: all).  ``contenders``: whole names, instead of everything else.
    """

    def wanted(name: str) -> bool:
        if contenders is not None:
            return name in contenders
        base = name.removesuffix(" pdl")
        if peers is not None and role_of(name) == "peer" and base not in peers:
            return False
        return f"{base} pdl" not in NAMES or name.endswith(" pdl") in pdl

    return tuple(name for name in NAMES if wanted(name))


@contextlib.contextmanager
def pdl_setting(enabled: bool) -> Iterator[None]:
    """Products are prepared with or without programmatic dependent launch inside the block."""
    before = settings.pdl()
    settings.set_pdl(enabled)
    try:
        yield
    finally:
        settings.set_pdl(before)


# ------------------------------------------------------------------------------- cpgemm, floors


def ours(name: str, product: Product) -> Contender:
    """cpgemm: each call is made once as users make it; its launch is what is timed.

    With PDL, dense calls say that their weights are static, as they are.
    """
    pdl = name.endswith(" pdl")
    with pdl_setting(pdl):
        launches = [_launch(product, one, pdl) for one in product.sets]
    return Contender(name, launches, kernel=launches[0].kernel.compiled.source.name)


def invariant(name: str, product: Product) -> Contender:
    """cpgemm's batch-invariant product, where it takes another kernel than ``cpgemm``."""
    import cpgemm

    case = product.case
    if case.suite != "dense":
        raise Absent("grouped products are batch-invariant as they are")
    option: Deterministic = "batch_invariant"
    plans = [
        cpgemm.plan_gemm(case.m, case.n, case.k, deterministic=deterministic)
        for deterministic in (True, option)
    ]
    if plans[0].config == plans[1].config:
        raise Absent("the kernel of this case is batch-invariant as it is")
    launches = [_dense_launch(one, deterministic=option) for one in product.sets]
    return Contender(name, launches, kernel=plans[1].config.name)


def _dense_launch(one: Operands, **options: Any) -> Any:
    """The launch that ``gemm`` with these options makes."""
    import cpgemm
    from cpgemm.gemm import ready_gemm

    cpgemm.gemm(one.a, one.b, one.out, **options)
    launch = ready_gemm(one.a, one.b, one.out, None, **options)
    assert launch is not None, "a call that was just made is remembered"
    return launch


def _launch(product: Product, one: Operands, static_b: bool) -> Any:
    import cpgemm
    from cpgemm.grouped import ready_grouped

    if product.case.suite == "dense":
        return _dense_launch(one, static_b=static_b)
    if product.case.suite == "contiguous":
        cpgemm.grouped_gemm_contiguous(one.a, one.b, one.out, m_indices=one.index)
        launch = ready_grouped(one.a, one.b, one.out, one.index, "m_indices")
    else:
        cpgemm.grouped_gemm_masked(
            one.a, one.b, one.out, masked_m=one.index, expected_m=product.case.m
        )
        launch = ready_grouped(one.a, one.b, one.out, one.index, "masked")
    assert launch is not None, "a call that was just made is remembered"
    return launch


def floor(name: str, product: Product) -> Contender:
    """One of the floors."""
    case = product.case
    if name == "compute floor":
        codes = product.sets[0].a.data
        call = floors.compute_floor(codes, product.rows, case.n, case.k)
        return Contender(name, [call], checked=False)
    pdl = name.endswith(" pdl")
    calls = [floors.memory_floor(*regions(product, one), pdl=pdl) for one in product.sets]
    return Contender(name, calls, checked=False)


def regions(product: Product, one: Operands) -> tuple[list[floors.Region], list[floors.Region]]:
    """What a call reads and what it writes."""
    scales_a = one.a.scales.swapaxes(-1, -2)  # rows-fastest: (..., k-blocks, rows), with a pitch
    if product.case.suite != "masked":
        reads = [one.a.data, scales_a, one.b.data, one.b.scales]
        return [floors.whole(array) for array in reads], [floors.whole(one.out)]
    rows = product.case.m
    reads = [
        floors.whole(one.a.data, rows), floors.columns(scales_a, rows),
        floors.whole(one.b.data), floors.whole(one.b.scales),
    ]  # fmt: skip
    return reads, [floors.whole(one.out, rows)]
