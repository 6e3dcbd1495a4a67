"""``gemm``: block-scaled FP8 matrix products.

    D[m, n] = cast( C[m, n] + sum over kb of  sA[m, kb] * sB[n // 128, kb]
                                              * sum over k in block kb of A[m, k] * B[n, k] )

Operands on a GPU run one kernel, torch's on torch's current stream and all others on CuPy's; those
on the CPU take the reference path.  Results are of the operands' kind.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from cpgemm.calls import ReadyCalls, signature, working_framework
from cpgemm.cost_model import Machine
from cpgemm.dlpack import as_framework, as_native, empty
from cpgemm.epilogue_heuristics import choose_kernel
from cpgemm.fused import fused_gemm
from cpgemm.launch import PreparedLaunch
from cpgemm.plan import cached_plan, call_key
from cpgemm.problem import (
    OUT_DTYPES,
    Deterministic,
    GemmProblem,
    infer_out_dtype,
    wants_unsplit,
)
from cpgemm.reference import gemm_reference
from cpgemm.scaled import ScaledTensor, is_cupy
from cpgemm.streams import working_stream

__all__ = ["gemm", "ready_gemm"]


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any = None,
    *,
    c: Any = None,
    out_dtype: Any = None,
    deterministic: Deterministic = True,
    static_b: bool = False,
    epilogue: Any = None,
) -> Any:
    """D = C + A @ B.T from block-scaled e4m3 operands.

    ``a``: ScaledTensor (M, K), granularity (1, 128).  ``b``: ScaledTensor (N, K), (128, 128).
    ``out``, ``c``: (M, N) of ``out_dtype``, of any library, where ``a`` is, rows contiguous, row
    pitch and address multiples of 16 bytes; ``c`` may be ``out`` itself.  ``out_dtype``: "bfloat16"
    or "float32"; by default the dtype of ``out``, else of ``c``, else bfloat16.  K is a multiple of
    16, N of 8, M anything; empty sizes do what linear algebra says (K = 0 gives C or zeros).
    ``epilogue``: steps of ``cpgemm.epilogues`` on C + A @ B.T, within the kernel; D then has the
    shape and the kind that they leave: codes behind Quantize, whatever ``out_dtype``.

    ``deterministic``: every run gives the same bits, in any case.  With ``"batch_invariant"`` the
    bits of a row of D depend on nothing but that row of A (and of C) and on B: neither on M nor on
    the other rows.  The kernels that split K are left out then, which few rows can feel.
    ``static_b``: a promise that nothing on the stream still writes to ``b``: with programmatic
    dependent launch (``cpgemm.settings.set_pdl``) its loads then overlap the kernel before.

    On a GPU: one kernel, nothing allocated but ``out``, on torch's current stream when one of the
    arrays is torch's, otherwise on CuPy's.  On the CPU: the reference path with the same semantics.
    Returns ``out``, or an array of a's kind.

    Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before anything is launched
    or written, ``CompileError`` when a kernel does not build.
    """
    if epilogue is not None:
        options = (deterministic, static_b)
        return fused_gemm(a, b, out, c, out_dtype, epilogue, options)
    if out_dtype is None:
        if out is None:
            out = _room(a, b, c)
        key = call_key(a, b, out, c, deterministic, static_b)
        launch = _ready.get(key)
        if launch is not None:
            launch()
            return out
        return _checked(a, b, out, c, None, deterministic, static_b, key)
    return _checked(a, b, out, c, out_dtype, deterministic, static_b, None)


_ready = ReadyCalls()
_results: dict[Hashable, tuple[tuple[int, int], Any]] = {}  # shape and dtype by operands


def _room(a: Any, b: Any, c: Any) -> Any:
    """Room for the result of operands that were multiplied before; None for new ones."""
    made = _results.get((signature(a), signature(b), c is not None and signature(c)))
    if made is None:
        return None
    return empty(a.framework, *made, a.data)


def ready_gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    c: Any,
    *,
    deterministic: Deterministic = True,
    static_b: bool = False,
) -> PreparedLaunch | None:
    """The launch of an earlier ``gemm`` on these very operands, if it is still known."""
    return _ready.get(call_key(a, b, out, c, deterministic, static_b))


def _checked(
    a: Any,
    b: Any,
    out: Any,
    c: Any,
    out_dtype: Any,
    deterministic: Deterministic,
    static_b: bool,
    key: Hashable,
) -> Any:
    """A call that was not made before: every rule is checked."""
    unsplit = wants_unsplit(deterministic)
    native_out: Any = None if out is None else as_native("out", out, writable=True)
    native_c: Any = None if c is None else as_native("c", c)
    dtype = infer_out_dtype(out_dtype, native_out, native_c)
    problem = GemmProblem.of(a, b, native_out, native_c, dtype)
    if not is_cupy(a.data):
        result = gemm_reference(a, b, c=native_c, out_dtype=problem.out_dtype)
        if out is None:
            return as_framework(a.framework, result)
        native_out[...] = result
        return out
    framework = working_framework(a, b, out, c)
    with working_stream(framework, a.data.data.device_id):
        made = out is None
        if made:
            shape, kind = (problem.m, problem.n), OUT_DTYPES[dtype]
            out = empty(a.framework, shape, kind, a.data)
            native_out = as_native("out", out)
            read = c is not None and signature(c)
            if out_dtype is None and a.framework in ("cupy", "torch") and read is not None:
                if len(_results) > 4096:
                    _results.clear()
                _results[signature(a), signature(b), read] = shape, kind
        if problem.k == 0 and native_out.size:
            _fill(native_out, native_c)
        elif native_out.size:
            machine = Machine.of_device(a.data.data.device_id)
            config = choose_kernel(problem, machine, unsplit)
            plan = cached_plan(problem, config, machine, bool(static_b))
            launch = plan.prepare(a, b, native_out, native_c, framework)
            if key is not None:
                _ready.put(key, launch)
            launch()
        # torch's result is a tensor already; JAX's was CuPy's until it was complete.
        return as_framework("jax", native_out) if made and a.framework == "jax" else out


def _fill(out: Any, c: Any) -> None:
    """K = 0: D is C, or zeros. As bits, because CuPy has few kernels for bfloat16."""
    bits = np.uint16 if out.itemsize == 2 else np.uint32
    out.view(bits)[...] = 0 if c is None else c.view(bits)
