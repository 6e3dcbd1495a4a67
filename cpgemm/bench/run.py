"""Measure cases, one after another; rows come as they are measured, so that Ctrl-C loses little."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cpgemm.bench import contenders as contending
from cpgemm.bench import cpu, host, jit, quantizers
from cpgemm.bench.contenders import Contender, selected
from cpgemm.bench.cutlass_build import Builder, variants_of
from cpgemm.bench.cutlass_peer import cutlass
from cpgemm.bench.operands import PRODUCTS, Pool, Product, bytes_of, tolerance
from cpgemm.bench.peers import cublaslt, deep_gemm
from cpgemm.bench.result import Case, Row
from cpgemm.bench.session import Make, Session, brief
from cpgemm.machine import why_no_hopper

__all__ = ["QUICK", "run_suites"]

QUICK = {"windows": 5, "window_ms": 2.0}
"""Short windows, for a first look."""


def run_suites(
    cases: Sequence[Case],
    *,
    seed: int,
    windows: int = 7,
    window_ms: float = 10.0,
    pdl: Sequence[bool] = (False, True),
    progress: Callable[[str], None] | None = None,
    peers: Sequence[str] | None = None,
    contenders: Sequence[str] | None = None,
    kernel_time: bool = True,
) -> Iterator[Row]:
    """Yield a row for each contender of each case.

    ``seed``: of values and of the order in which contenders take turns.  ``windows`` of at least
    ``window_ms`` milliseconds each.  ``pdl``: without, with programmatic dependent launch, or both.
    ``progress`` is called once a case, with its name, when its rows are there.  ``peers``: which of
    them, by names without ``pdl`` (None: all that are installed).  ``contenders``: names of
    ``contenders.NAMES`` that are measured instead of all others.  ``kernel_time``: kernels alone as
    well, where CUPTI is there.

    Cases run in the given order, but for one thing: while CUTLASS is being compiled, what does not
    need it goes first.  Without a Hopper GPU cases run on the NumPy path and ``jit`` compiles; a
    case of ``host`` gives a row that says why it cannot run.  The device is CuPy's current one.
    """
    names = selected(pdl, peers, contenders)
    done = progress or (lambda _name: None)
    lacking = why_no_hopper()
    if lacking is not None:
        yield from _without_gpu(cases, names, seed, windows, done, lacking)
        return
    suites = {case.suite for case in cases if case.suite in PRODUCTS}
    wanted = {v: None for suite in suites for v in variants_of(suite)} if "cutlass" in names else {}
    session = Session(
        names, seed=seed, windows=windows, window_ms=window_ms, kernel_time=kernel_time
    )
    with Builder(list(wanted)) as builder, session:
        for case in _ordered(cases, builder.busy):
            try:
                with session.working():
                    rows = _rows(session, builder, case)
            except Exception as error:  # too large for the device's memory, for one
                rows = [Row(case, "cpgemm", "ours", "failed", reason=brief(error))]
            yield from rows
            done(case.name)


def _ordered(cases: Sequence[Case], building: bool) -> list[Case]:
    """Products wait for the compilers, and what measures the host's time for the CPU."""
    if not building:
        return list(cases)
    return sorted(cases, key=lambda c: 1 if c.suite in PRODUCTS else 2 * (c.suite != "quantize"))


def _rows(session: Session, builder: Builder, case: Case) -> list[Row]:
    if case.suite == "quantize":
        return quantizers.gpu_rows(session, case)
    if case.suite == "host":
        return host.gpu_rows(session, case)
    if case.suite == "jit":
        ours = "cpgemm" in session.names
        return jit.rows(case, session.windows, on_gpu=True) if ours else []
    return _product_rows(session, builder, case)


def _product_rows(session: Session, builder: Builder, case: Case) -> list[Row]:
    product = Product.make(case, *session.pools, session.cupy)

    def check(contender: Contender) -> tuple[float, float]:
        product.poison()
        contender.calls[0]()
        session.synchronize()
        blocks = contender.by_blocks
        return product.error(by_blocks=blocks), tolerance(product, by_blocks=blocks)

    makers: dict[str, Make] = {
        name: functools.partial(make, name, product)
        for make, named in (
            (contending.ours, ("cpgemm", "cpgemm pdl")),
            (contending.invariant, ("batch invariant",)),
            (cublaslt, ("cublaslt block", "cublaslt tensor")),
            (deep_gemm, ("deep_gemm", "deep_gemm pdl")),
            (contending.floor, ("memory floor", "memory floor pdl", "compute floor")),
        )
        for name in named
    }
    makers["cutlass"] = functools.partial(cutlass, product, builder, session.quickest)
    return session.measure(case, makers, check=check, nbytes=bytes_of(case))


def _without_gpu(
    cases: Sequence[Case],
    names: Sequence[str],
    seed: int,
    windows: int,
    done: Callable[[str], None],
    lacking: str,
) -> Iterator[Row]:
    pools = Pool(2 * seed, np), Pool(2 * seed + 1, np)
    for case in cases:
        if "cpgemm" in names:
            if case.suite == "jit":
                yield from jit.rows(case, windows, on_gpu=False)
            elif case.suite == "host":
                reason = f"host paths launch kernels: {lacking}"
                yield Row(case, "cpgemm", "ours", "absent", reason=reason)
            else:
                yield from cpu.rows(case, pools, windows)
        done(case.name)
