"""Products and quantisation on a machine without a Hopper GPU: the NumPy path, timed on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpgemm.bench import quantizers
from cpgemm.bench.operands import Operands, Pool, Product, bytes_of, tolerance
from cpgemm.bench.result import Case, Row
from cpgemm.bench.session import brief, judgement
from cpgemm.timing import time_host

__all__ = ["rows"]

_KERNEL = "NumPy"


def rows(case: Case, pools: tuple[Pool, Pool], windows: int) -> list[Row]:
    """cpgemm's row of one case; its result is checked first."""
    try:
        row = _quantized if case.suite == "quantize" else _multiplied
        return [row(case, pools, windows)]
    except Exception as error:
        return [Row(case, "cpgemm", "ours", "failed", kernel=_KERNEL, reason=brief(error))]


def _multiplied(case: Case, pools: tuple[Pool, Pool], windows: int) -> Row:
    product = Product.make(case, *pools, np, sets=1)
    call = _call(case, product.sets[0])
    product.poison()
    call()
    return _row(case, call, windows, product.error(), tolerance(product), bytes_of(case))


def _call(case: Case, one: Operands) -> Callable[[], object]:
    import cpgemm

    if case.suite == "dense":
        return lambda: cpgemm.gemm(one.a, one.b, one.out)
    if case.suite == "contiguous":
        return lambda: cpgemm.grouped_gemm_contiguous(one.a, one.b, one.out, m_indices=one.index)
    return lambda: cpgemm.grouped_gemm_masked(one.a, one.b, one.out, masked_m=one.index)


def _quantized(case: Case, pools: tuple[Pool, Pool], windows: int) -> Row:
    how = quantizers.how_of(case)
    x = quantizers.values(case, pools[0], how[0])
    call = quantizers.quantizer(how)
    out = call(x)
    nbytes = float(x.nbytes + out.nbytes)
    error = quantizers.sampled_error(x, out, how)
    return _row(case, lambda: call(x, out=out), windows, error, 0.0, nbytes)


def _row(
    case: Case,
    call: Callable[[], object],
    windows: int,
    error: float,
    limit: float,
    nbytes: float,
) -> Row:
    if not error <= limit:
        return Row(
            case, "cpgemm", "ours", "wrong", kernel=_KERNEL, bytes=nbytes,
            reason=judgement(error, limit),
        )  # fmt: skip
    timing = time_host(call, windows=windows)
    return Row(
        case, "cpgemm", "ours", us=timing.median_us, spread_pct=timing.spread_pct,
        windows_us=timing.windows, error=error, kernel=_KERNEL, bytes=nbytes,
    )  # fmt: skip
