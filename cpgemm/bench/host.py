"""The suite ``host``: microseconds of the host's time that a call takes, however it is made.

Calls walk through several sets of operands, as a model's layers do.  Nothing waits for the GPU
inside a window, and a window's launches fit into its queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cpgemm.bench.contenders import NAMES, Absent, Call, pdl_setting, role_of
from cpgemm.bench.operands import Product, tolerance
from cpgemm.bench.peers import cublaslt, deep_gemm_launches, find_torch
from cpgemm.bench.result import Case, Row
from cpgemm.bench.session import Session, brief, judgement
from cpgemm.dlpack import to_torch

__all__ = ["PATHS", "gpu_rows"]

_CALLS = 480  # in a window; a queue of launches holds about a thousand
_SETS = 16
_MASKED_GROUPS = 4
_CUBLASLT = ("cublaslt block", "cublaslt tensor")

PATHS = ("gemm out", "plan", "torch", "deep_gemm", "graph replay", "masked out", "quantize")
"""``detail`` of the cases that are understood."""

Made = tuple[Sequence[Call], bool]  # calls, one by set; whether they apply block scales


def gpu_rows(session: Session, case: Case) -> list[Row]:
    """The rows of one host path: cpgemm, and other libraries called in the same way."""
    masked = case.detail == "masked out"
    groups = _MASKED_GROUPS if masked else 0
    sized = Case("masked" if masked else "dense", case.m, case.n, case.k, groups)
    product = Product.make(sized, *session.pools, session.cupy, sets=_SETS)
    makers = _makers(session, case, product)
    with pdl_setting(False):
        return [
            _row(session, case, product, name, makers[name])
            for name in NAMES
            if name in makers and name in session.names
        ]


def _row(
    session: Session, case: Case, product: Product, name: str, make: Callable[[], Made]
) -> Row:
    role, found = role_of(name), None
    try:
        calls, by_blocks = make()
        if case.detail != "quantize":
            product.poison()
            calls[0]()
            session.synchronize()
            found, limit = (
                product.error(by_blocks=by_blocks), tolerance(product, by_blocks=by_blocks)
            )  # fmt: skip
            if not found <= limit:  # NaN is not
                return Row(case, name, role, "wrong", reason=judgement(found, limit))
        for call in calls:
            call()
        timing = session.host_timing(calls, _CALLS)
    except Absent as error:
        return Row(case, name, role, "absent", reason=str(error))
    except Exception as error:
        return Row(case, name, role, "failed", reason=brief(error))
    return Row(
        case, name, role, us=timing.median_us, spread_pct=timing.spread_pct,
        windows_us=timing.windows, error=found,
    )  # fmt: skip


def _makers(session: Session, case: Case, product: Product) -> Mapping[str, Callable[[], Made]]:
    import cpgemm

    path, sets = case.detail, product.sets

    def blocks(calls: Callable[[], Sequence[Call]]) -> Callable[[], Made]:
        return lambda: (calls(), True)

    def cublaslt_calls(name: str) -> Made:
        contender = cublaslt(name, product)
        return contender.calls, contender.by_blocks

    ours: dict[str, Callable[[], Sequence[Call]]] = {
        "gemm out": lambda: [partial(cpgemm.gemm, one.a, one.b, one.out) for one in sets],
        "plan": lambda: [
            partial(cpgemm.plan_gemm(case.m, case.n, case.k), one.a, one.b, one.out)
            for one in sets
        ],
        "torch": lambda: _torch_calls(product),
        "deep_gemm": lambda: _face_calls(product),
        "graph replay": lambda: _graph_calls(session, product),
        "masked out": lambda: [
            partial(
                cpgemm.grouped_gemm_masked, one.a, one.b, one.out, masked_m=one.index,
                expected_m=case.m,
            )
            for one in sets
        ],
        "quantize": lambda: _quantize_calls(session, case),
    }  # fmt: skip
    if path not in ours:
        raise ValueError(f"host: the path must be one of {', '.join(PATHS)}; got {path!r}")
    makers = {"cpgemm": blocks(ours[path])}
    if path == "torch":
        makers |= {name: partial(cublaslt_calls, name) for name in _CUBLASLT}
    if path in ("torch", "deep_gemm", "masked out"):
        makers["deep_gemm"] = blocks(lambda: deep_gemm_launches(product, pdl=False))
    return makers


def _torch_calls(product: Product) -> list[Call]:
    """``gemm`` on torch's tensors, on torch's stream."""
    from cpgemm import ScaledTensor, gemm

    find_torch()
    calls: list[Call] = []
    for one in product.sets:
        a = ScaledTensor.from_arrays(*one.a.to_torch(), (1, 128))
        b = ScaledTensor.from_arrays(*one.b.to_torch(), (128, 128))
        calls.append(partial(gemm, a, b, to_torch(one.out)))
    return calls


def _face_calls(product: Product) -> list[Call]:
    """``cpgemm.deep_gemm.fp8_gemm_nt``, as DeepGEMM's callers make it."""
    from cpgemm.deep_gemm import fp8_gemm_nt

    find_torch()
    return [
        partial(fp8_gemm_nt, one.a.to_torch(), one.b.to_torch(), to_torch(one.out))
        for one in product.sets
    ]


def _graph_calls(session: Session, product: Product) -> list[Call]:
    """The replay of a graph that holds one ``gemm``."""
    from cpgemm import gemm

    calls: list[Call] = []
    for one in product.sets:
        call = partial(gemm, one.a, one.b, one.out)
        call()
        session.synchronize()
        session.stream.begin_capture()
        call()
        calls.append(partial(session.stream.end_capture().launch, session.stream))
    return calls


def _quantize_calls(session: Session, case: Case) -> list[Call]:
    from cpgemm import quantize

    x = session.pools[0].matrix(case.m, case.k)
    inputs = [x.copy() for _ in range(_SETS)]
    return [partial(quantize, one, out=quantize(one)) for one in inputs]
