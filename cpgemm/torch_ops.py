"""The products and the quantiser as operators of torch, ``torch.ops.cpgemm.*``.

They are registered with ``Library.define`` and ``Library.impl``, one kernel each for CPU and CUDA.
A call through torch's dispatcher then costs some 3 us; ``torch.library.custom_op``, which adds
layers of Python for autograd and for counting changes, costs some 16.

A call whose tensors agree in address, shape and layout with those of an earlier one goes straight
to that call's launch, as in ``cpgemm.calls``.  Results are allocated by torch, so that addresses
repeat from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from cpgemm import env, gemm, grouped_gemm_contiguous, grouped_gemm_masked
from cpgemm.calls import ReadyCalls, signature
from cpgemm.cost_model import Machine
from cpgemm.dlpack import as_native
from cpgemm.errors import CpgemmError
from cpgemm.group_index import GroupLayout, index_name, select_layout
from cpgemm.grouped import prepare_grouped
from cpgemm.grouped_heuristics import choose_grouped
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.launch import PreparedLaunch
from cpgemm.layout import BLOCK, Granularity, pointer
from cpgemm.plan import plan_gemm
from cpgemm.problem import GemmProblem
from cpgemm.quantize import quantize
from cpgemm.scaled import ScaledTensor, check_granularity, check_scale_format
from cpgemm.streams import working_stream
from cpgemm.torch_rules import (
    check_index,
    check_like_out,
    check_operands,
    check_quantizable,
    empty_quantized,
    out_dtype_of,
    refuse_gradients,
)

__all__ = ["LIBRARY", "Operand", "define", "multiply"]

Operand = ScaledTensor | tuple[Tensor, Tensor]
_Operands = Sequence[Tensor]  # in the order of the names
_NAMES = ("a", "a_scales", "b", "b_scales")

LIBRARY = torch.library.Library("cpgemm", "FRAGMENT")
# Inductor must give the kernels the strides that it was told of: pitches of scales are rules.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator with a kernel for tensors and one for their stand-ins; returns it."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"cpgemm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cpgemm, name).default


# ---------------------------------------------------------------------------------- dense products


def multiply(a: Operand, b: Operand, out: Tensor, c: Tensor | None = None) -> None:
    """``out = c + a @ b.T``; operands are ``ScaledTensor`` or pairs of codes and scales."""
    key: Any = (_signed(a), _signed(b), signature(out), () if c is None else signature(c))
    launch = None if None in key else _ready.get(key)
    if launch is None:
        if isinstance(a, tuple) and isinstance(b, tuple):
            _check_gemm((*a, *b), out.dtype, c=c, out=out)
        left, right = _scaled("a", a, (1, BLOCK)), _scaled("b", b, (BLOCK, BLOCK))
        if not out.is_cuda or out.numel() == 0 or left.shape[-1] == 0:
            gemm(left, right, out, c=c)
            return
        launch = _prepared(left, right, out, c)
        _keep(key, launch, (a, left), (b, right))
    launch()


_ready = ReadyCalls()


def _signed(operand: Operand) -> Hashable:
    """What a launch depends on; None when it is not to be remembered."""
    if isinstance(operand, ScaledTensor):
        return operand.signature
    data, scales = signature(operand[0]), signature(operand[1])
    return None if data is None or scales is None else (data, scales)


def _keep(key: Any, launch: PreparedLaunch, *operands: tuple[Operand, ScaledTensor]) -> None:
    """Remember a launch, unless it reads scales that were copied into their layout for it."""
    for given, scaled in operands:
        if not isinstance(given, ScaledTensor) and pointer(scaled.scales) != given[1].data_ptr():
            return
    if None not in key:
        _ready.put(key, launch)


def _prepared(
    left: ScaledTensor, right: ScaledTensor, out: Tensor, c: Tensor | None
) -> PreparedLaunch:
    native_out = as_native("out", out, writable=True)
    native_c = None if c is None else as_native("c", c)
    problem = GemmProblem.of(left, right, native_out, native_c, native_out.dtype)
    options: dict[str, Any] = dict(out_dtype=problem.out_dtype, accumulate=problem.accumulate)
    with working_stream("torch", out.get_device()):
        plan = plan_gemm(problem.m, problem.n, problem.k, **options)
        return plan.prepare(left, right, native_out, native_c, "torch")


def _scaled(name: str, operand: Operand, granularity: Granularity) -> ScaledTensor:
    if isinstance(operand, ScaledTensor):
        return operand
    try:
        return ScaledTensor.from_arrays(*operand, granularity)
    except CpgemmError as error:  # which speaks of data and scales, of either operand
        raise type(error)(f"{name}: {error}") from None


def _check_gemm(operands: _Operands, dtype: torch.dtype, **like_out: Tensor | None) -> None:
    check_operands(*operands)
    for name, tensor in like_out.items():
        if tensor is not None:
            check_like_out(name, tensor, operands[0], operands[2], dtype)


def _plain(operands: _Operands, **others: Tensor | None) -> list[Any]:
    """All tensors without a wish for gradients, which is refused while torch records."""
    tensors = [*operands, *others.values()]
    if not any([tensor is not None and tensor.requires_grad for tensor in tensors]):
        return tensors
    if torch.is_grad_enabled():
        refuse_gradients((*_NAMES, *others), tensors)
    return [tensor if tensor is None else tensor.detach() for tensor in tensors]


def _empty_result(operands: _Operands, dtype: torch.dtype, zeros: bool = False) -> Tensor:
    """Room for the result of operands of whatever axes: they are checked in a moment."""
    a, _, b, _ = operands
    make = torch.zeros if zeros else torch.empty
    return make((*a.shape[:-1], *b.shape[-2:-1]), dtype=dtype, device=a.device)


def _gemm(
    *tensors: Tensor, c: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    *operands, c = _plain(tensors, c=c)
    out = _empty_result(operands, out_dtype_of(out_dtype, c))
    multiply((operands[0], operands[1]), (operands[2], operands[3]), out, c)
    return out


def _gemm_fake(
    *operands: Tensor, c: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    _plain(operands, c=c)
    dtype = out_dtype_of(out_dtype, c)
    _check_gemm(operands, dtype, c=c)
    return _empty_result(operands, dtype)


def _gemm_out(*tensors: Tensor, out: Tensor, c: Tensor | None = None) -> None:
    *operands, target, c = _plain(tensors, out=out, c=c)
    multiply((operands[0], operands[1]), (operands[2], operands[3]), target, c)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as torch's own operators count


def _gemm_out_fake(*operands: Tensor, out: Tensor, c: Tensor | None = None) -> None:
    _plain(operands, out=out, c=c)
    _check_gemm(operands, out.dtype, out=out, c=c)


_SCHEMA = "Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, *"
define(f"gemm({_SCHEMA}, Tensor? c=None, ScalarType? out_dtype=None) -> Tensor", _gemm, _gemm_fake)
define(f"gemm_out({_SCHEMA}, Tensor(a!) out, Tensor? c=None) -> ()", _gemm_out, _gemm_out_fake)


# -------------------------------------------------------------------------------- grouped products


def _multiply_groups(
    layout: GroupLayout, operands: _Operands, index: Tensor, out: Tensor, fill_padding: bool
) -> None:
    a, b = (operands[0], operands[1]), (operands[2], operands[3])
    key: Any = (_signed(a), _signed(b), signature(index), signature(out), layout, fill_padding)
    launch = None if None in key or env.check() else _ready.get(key)
    if launch is None:
        _check_grouped(layout, operands, index)
        left, right = _scaled("a", a, (1, BLOCK)), _scaled("b", b, (BLOCK, BLOCK))
        options: dict[str, Any] = {index_name(layout): index}
        if layout != "masked":
            options["fill_padding"] = fill_padding
        if not out.is_cuda or out.numel() == 0 or env.check():
            call = grouped_gemm_masked if layout == "masked" else grouped_gemm_contiguous
            call(left, right, out, **options)
            return
        launch = _prepared_groups(layout, left, right, out, options)
        _keep(key, launch, (a, left), (b, right))
    launch()


def _prepared_groups(
    layout: GroupLayout,
    left: ScaledTensor,
    right: ScaledTensor,
    out: Tensor,
    options: dict[str, Any],
) -> PreparedLaunch:
    native_out, name = as_native("out", out, writable=True), index_name(layout)
    index = as_native(name, options[name])
    options = {**options, name: index, "out_dtype": native_out.dtype}
    pose = GroupedProblem.of_masked if layout == "masked" else GroupedProblem.of_contiguous
    problem = pose(left, right, native_out, **options)
    with working_stream("torch", out.get_device()):
        config = choose_grouped(problem, Machine.of_device(out.get_device()))
        operands = (left, right, native_out, index)
        return prepare_grouped(problem, config, *operands, framework="torch")


def _check_grouped(layout: GroupLayout, operands: _Operands, index: Tensor) -> None:
    form = "(groups, M_max, K)" if layout == "masked" else "(M_total, K)"
    a, a_scales, b, b_scales = operands
    check_operands(a, a_scales, b, b_scales, form, "(groups, N, K)")
    check_index(layout, index, a, b)


def _contiguous(
    *tensors: Tensor,
    offsets: Tensor | None = None,
    m_indices: Tensor | None = None,
    ends: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    fill_padding: bool = False,
) -> Tensor:
    layout, index = select_layout(m_indices=m_indices, offsets=offsets, ends=ends)
    operands = _plain(tensors)
    out = _empty_result(operands, out_dtype_of(out_dtype, None))
    _multiply_groups(layout, operands, index, out, fill_padding)
    return out


def _contiguous_fake(
    *operands: Tensor,
    offsets: Tensor | None = None,
    m_indices: Tensor | None = None,
    ends: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    fill_padding: bool = False,
) -> Tensor:
    layout, index = select_layout(m_indices=m_indices, offsets=offsets, ends=ends)
    _plain(operands)
    _check_grouped(layout, operands, index)
    return _empty_result(operands, out_dtype_of(out_dtype, None))


def _masked(
    *tensors: Tensor,
    masked_m: Tensor,
    out_dtype: torch.dtype | None = None,
    fill_padding: bool = False,
) -> Tensor:
    operands = _plain(tensors)
    out = _empty_result(operands, out_dtype_of(out_dtype, None), zeros=fill_padding)
    _multiply_groups("masked", operands, masked_m, out, False)
    return out


def _masked_fake(
    *operands: Tensor,
    masked_m: Tensor,
    out_dtype: torch.dtype | None = None,
    fill_padding: bool = False,
) -> Tensor:
    _plain(operands)
    _check_grouped("masked", operands, masked_m)
    return _empty_result(operands, out_dtype_of(out_dtype, None))


_OPTIONS = "ScalarType? out_dtype=None, bool fill_padding=False"
define(
    f"grouped_gemm_contiguous({_SCHEMA}, Tensor? offsets=None, Tensor? m_indices=None, "
    f"Tensor? ends=None, {_OPTIONS}) -> Tensor",
    _contiguous,
    _contiguous_fake,
)
define(
    f"grouped_gemm_masked({_SCHEMA}, Tensor masked_m, {_OPTIONS}) -> Tensor",
    _masked,
    _masked_fake,
)


# -------------------------------------------------------------------------------------- quantising


def _quantize(
    x: Tensor, block_rows: int = 1, block_columns: int = BLOCK, scale_format: Any = "float32"
) -> tuple[Tensor, Tensor]:
    data, scales = _quantize_fake(x, block_rows, block_columns, scale_format)
    pair, into = (block_rows, block_columns), (data, scales)
    x = x.detach()
    if pair == (BLOCK, 1):  # turned here, so that it is torch that allocates
        x, pair = x.transpose(-1, -2).contiguous(), (1, BLOCK)
        into = (data.transpose(-1, -2), scales.transpose(-1, -2))
    out = ScaledTensor.from_arrays(*into, pair, scale_format=scale_format)
    quantize(x, pair, scale_format=scale_format, out=out)
    return data, scales


def _quantize_fake(
    x: Tensor, block_rows: int = 1, block_columns: int = BLOCK, scale_format: Any = "float32"
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        refuse_gradients(("x",), (x,))
    pair = check_granularity((block_rows, block_columns))
    check_scale_format(scale_format)
    check_quantizable(x, pair)
    return empty_quantized(x, pair)


define(
    "quantize(Tensor x, int block_rows=1, int block_columns=128, str scale_format='float32') "
    "-> (Tensor data, Tensor scales)",
    _quantize,
    _quantize_fake,
)
