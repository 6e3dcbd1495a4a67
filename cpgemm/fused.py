"""Products with an epilogue: ``gemm`` and the grouped calls come here when they are given one.

Every rule is checked first; then one kernel is launched, or the NumPy path taken.  Repeated calls
are found by the signatures of operands, result and epilogue, as in ``gemm``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from cpgemm.calls import ReadyCalls, signature, working_framework
from cpgemm.compiler import CompiledKernel, compile_kernel
from cpgemm.cost_model import Machine
from cpgemm.dlpack import Framework, as_framework, as_native, empty, framework_of
from cpgemm.epilogue_heuristics import choose_fused_grouped, fused_configurations
from cpgemm.epilogue_step import Epilogue, Field, output_of, require_epilogue
from cpgemm.errors import reject
from cpgemm.fused_result import FusedResult
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.grouped_reference import group_products, zero_padding
from cpgemm.kernels import gemm_source
from cpgemm.launch import PreparedLaunch
from cpgemm.plan import fused_plan
from cpgemm.problem import (
    OUT_DTYPES,
    GemmProblem,
    OutDtype,
    check_no_overlap,
    infer_out_dtype,
    wants_unsplit,
)
from cpgemm.reference import gemm_reference
from cpgemm.scaled import (
    BLOCK,
    Array,
    ScaledTensor,
    empty_scaled,
    is_cupy,
    pointer,
)
from cpgemm.streams import working_stream

__all__ = [
    "compile_ahead",
    "fused_gemm",
    "fused_grouped",
    "ready_launch",
]

Prepare = Callable[..., PreparedLaunch]


def compile_ahead(
    epilogue: Epilogue, *, out_dtype: OutDtype = "bfloat16", grouped: bool = False
) -> list[CompiledKernel]:
    """Compile every kernel that products with ``epilogue`` may choose, whatever their sizes.

    ``out_dtype``: of D, unless it is quantised.  ``grouped``: for grouped products, not for dense
    ones.  Choices that ``cpgemm.tune`` has kept may be others.  Raises ``CompileError`` and what
    compiling raises otherwise.

    Needs no GPU.  For servers that run inside ``cpgemm.freeze()``: kernels with an epilogue are no
    part of ``python -m cpgemm compile --all``.
    """
    dtype = infer_out_dtype(out_dtype, None, None)
    spec = require_epilogue(epilogue).spec(output_of(epilogue, dtype))
    return [
        compile_kernel(gemm_source(config, spec))
        for config in fused_configurations(spec, grouped=grouped)
    ]


class FusedRoom(tuple[Any, ...]):
    """(shape, scale_format or None, dtype) of a result that was made before."""

    def make(self, framework: Framework, like: Array) -> Any:
        """The same again."""
        shape, scale_format, dtype = self
        if scale_format is None:
            return empty(framework, shape, dtype, like)
        return empty_scaled(shape, (1, BLOCK), scale_format, framework, like)


_ready = ReadyCalls()
_results: dict[Hashable, FusedRoom] = {}


def _result_signature(out: Any) -> Hashable:
    """Of ``out``; a ScaledTensor's own says nothing of its scale format, which goes with it."""
    signed = signature(out)
    return (signed, out.scale_format) if isinstance(out, ScaledTensor) and signed else signed


def _native_result(out: Any) -> Any:
    if out is None or isinstance(out, ScaledTensor):
        return out
    return as_native("out", out, writable=True)


def _written(out: Any) -> Array:
    """The matrix that a kernel's D is: codes of a quantised one."""
    return out.data if isinstance(out, ScaledTensor) else out


# ------------------------------------------------------------------------------------------ dense


def fused_gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    c: Any,
    out_dtype: Any,
    epilogue: Any,
    options: tuple[Any, ...],
) -> Any:
    """``gemm`` with an epilogue; ``options``: its ``deterministic`` and ``static_b``."""
    known = signature(a), signature(b), signature(c), getattr(epilogue, "signature", None)
    whole = None not in (known[0], known[1], known[3]) and (c is None or known[2] is not None)
    recipe = (*known, str(out_dtype), options) if whole else None
    made = out is None
    if made and recipe is not None and (room := _results.get(recipe)) is not None:
        out = room.make(a.framework, a.data)
    key = _key(recipe, out)
    launch = _ready.get(key)
    if launch is not None:
        launch()
        return out
    epilogue = require_epilogue(epilogue)
    wants_unsplit(options[0])
    native_out, native_c = _native_result(out), None if c is None else as_native("c", c)
    dtype = infer_out_dtype(
        out_dtype, None if isinstance(out, ScaledTensor) else native_out, native_c
    )
    spec = epilogue.spec(output_of(epilogue, dtype))
    if c is not None and spec.own_store:
        reject(
            "c",
            "cannot be added before SwiGLU or Quantize",
            f"c beside {epilogue!r}",
            "Put epilogues.Residual(c) before them.",
        )
    problem = GemmProblem.of(a, b, None, native_c, dtype)
    if problem.k == 0:
        reject(
            "a",
            "K must not be 0 in a product with an epilogue",
            f"shape {a.shape}",
            "Apply the epilogue to C, or to zeros, yourself.",
        )
    result = FusedResult(epilogue, spec, Field((problem.m, problem.n), spec.output, a.device))
    if native_out is not None:
        result.check(native_out, a, _read(a, b))
        if native_c is not None and not _same_memory(native_out, native_c):
            check_no_overlap(native_out, "c", native_c)
    if not is_cupy(a.data):
        if made:
            out = native_out = result.make("numpy", a.data)
        if problem.m and result.shape[-1]:
            values = gemm_reference(a, b, c=native_c, out_dtype="float32")
            result.write(values, native_out, slice(0, problem.m), 0)
        return _returned(a, out, made)
    framework = working_framework(a, b, out, c, *epilogue.arrays)
    with working_stream(framework, a.data.data.device_id):
        if out is None:
            out = result.make(a.framework, a.data)
            native_out = _native_result(out)
            if recipe is not None and a.framework in ("cupy", "torch"):
                _remember(recipe, result)
            key = _key(recipe, out)
        if _written(native_out).size:
            plan = fused_plan(problem, spec, a.data.data.device_id, *options)
            launch = plan.prepare(
                a, b, _written(native_out), native_c, framework, result.operands(native_out)
            )
            if key is not None:
                _ready.put(key, launch)
            launch()
        return _returned(a, out, made)


def _key(recipe: Hashable, out: Any) -> Hashable:
    signed = None if out is None else _result_signature(out)
    return None if recipe is None or signed is None else (recipe, signed)


def _remember(recipe: Hashable, result: FusedResult) -> None:
    if len(_results) > 4096:
        _results.clear()
    quantized = result.spec.quantize is not None
    dtype = None if quantized else OUT_DTYPES[result.spec.out_dtype]
    _results[recipe] = FusedRoom((result.shape, result.scale_format if quantized else None, dtype))


def _read(a: ScaledTensor, b: ScaledTensor) -> dict[str, Any]:
    return {"a": a.data, "a.scales": a.scales, "b": b.data, "b.scales": b.scales}


def _same_memory(out: Any, c: Any) -> bool:
    return pointer(out) == pointer(c) and out.strides == c.strides


def _returned(a: ScaledTensor, out: Any, made: bool) -> Any:
    """A result that was made here, as an array of a's library."""
    if made and not isinstance(out, ScaledTensor) and framework_of(out) != a.framework:
        return as_framework(a.framework, out)
    if made and isinstance(out, ScaledTensor) and out.framework != a.framework:
        return replace(out, framework=a.framework)
    return out


# ---------------------------------------------------------------------------------------- grouped


def ready_launch(
    a: Any, b: Any, out: Any, index: Any, options: Hashable, epilogue: Any
) -> tuple[Hashable, PreparedLaunch | None]:
    """Key and launch of an earlier grouped call on these very operands, None for new ones."""
    known = (
        signature(a), signature(b), signature(index), getattr(epilogue, "signature", None),
        None if out is None else _result_signature(out),
    )  # fmt: skip
    key = None if None in known else (*known, str(options))
    return key, _ready.get(key)


def fused_grouped(
    problem: GroupedProblem,
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    given_index: Any,
    index: Array,
    epilogue: Any,
    prepare: Prepare,
    key: Hashable,
) -> Any:
    """A grouped product with an epilogue; ``problem`` has been checked but for ``out``.

    ``index`` is ``given_index`` as a native array; ``prepare`` is ``grouped.prepare_grouped``.
    """
    epilogue = require_epilogue(epilogue)
    spec = epilogue.spec(output_of(epilogue, problem.out_dtype))
    if problem.fill_padding and spec.own_store:
        reject(
            "fill_padding",
            "cannot be had with SwiGLU or Quantize",
            True,
            "Zero the rows of no group yourself, or leave it out.",
        )
    result = FusedResult(
        epilogue, spec, Field(problem.shape, spec.output, a.device, problem.groups)
    )
    native_out = _native_result(out)
    if native_out is not None:
        result.check(native_out, a, {**_read(a, b), "index": index})
    made = out is None
    if not is_cupy(a.data):
        if made:
            out = native_out = result.make("numpy", a.data)
        for group, rows, values in group_products(problem, a, b, index, "float32"):
            result.write(values, native_out, rows, group)
        zero_padding(problem, native_out, index)
        return _returned(a, out, made)
    framework = working_framework(a, b, out, given_index, *epilogue.arrays)
    device = a.data.data.device_id
    with working_stream(framework, device):
        if made:
            out = result.make(a.framework, a.data)
            native_out = _native_result(out)
        if _written(native_out).size:
            config = choose_fused_grouped(problem, spec, Machine.of_device(device))
            launch = prepare(
                problem, config, a, b, _written(native_out), index, framework=framework,
                epilogue=spec, operands=result.operands(native_out),
            )  # fmt: skip
            if key is not None:
                _ready.put(key, launch)
            launch()
        return _returned(a, out, made)
