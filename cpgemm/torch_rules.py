"""The rules that tensors given to the operators of ``cpgemm.torch`` must obey.

They hold for tensors and for the stand-ins that ``torch.compile`` traces with: types, dtypes,
shapes and devices are known, values and memory are not.  What depends on memory the bridge checks
when a call runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.group_index import GroupLayout, index_length, index_name
from cpgemm.layout import BLOCK, Granularity, scale_pitch, scale_shape
from cpgemm.scaled_rules import check_axes, check_block_axis, check_operand_shapes

__all__ = [
    "OUTPUTS",
    "check_dtype",
    "check_index",
    "check_like_out",
    "check_linear",
    "check_operands",
    "check_quantizable",
    "empty_quantized",
    "out_dtype_of",
    "refuse_gradients",
]

OUTPUTS = (torch.bfloat16, torch.float32)

_FP8 = torch.float8_e4m3fn


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype, mend: str = "") -> None:
    """A tensor of one of the dtypes."""
    if tensor.dtype not in dtypes:
        if not mend:
            mend = "Convert it with .to()."
            if dtypes == (_FP8,):
                mend = "Quantise values with cpgemm.torch.quantize; .view() shows codes as FP8."
        wanted = " or ".join(map(str, dtypes))
        reject(name, f"must have dtype {wanted}", tensor.dtype, mend, kind=ArgumentTypeError)


def refuse_gradients(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """No tensor may ask for a gradient that the operators would not give."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            reject(
                name,
                "must not require gradients, of which this operator has none",
                "a tensor with requires_grad=True",
                "Call .detach() on it, work under torch.no_grad(), or use cpgemm.torch.Linear.",
            )


def _check_device(name: str, tensor: Tensor, device: torch.device, other: str) -> None:
    if tensor.device != device:
        reject(name, f"must be on the device of {other}, {device}", tensor.device, "Move it.")


def _check_shape(
    name: str, tensor: Tensor, wanted: tuple[int, ...], reason: str, mend: str
) -> None:
    if tuple(tensor.shape) != wanted:
        got = f"shape {tuple(tensor.shape)}"
        reject(name, f"must have shape {wanted} for {reason}", got, mend)


def _check_scales(name: str, data: Tensor, scales: Tensor, granularity: Granularity) -> None:
    check_dtype(f"{name}_scales", scales, torch.float32)
    _check_shape(
        f"{name}_scales",
        scales,
        scale_shape(data.shape, granularity),
        f"data of shape {tuple(data.shape)} and granularity {granularity}",
        "Give one scale for each block, short last blocks included.",
    )
    _check_device(f"{name}_scales", scales, data.device, name)


def check_operands(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    a_form: str = "(M, K)",
    b_form: str = "(N, K)",
) -> None:
    """Two operands; the forms are what they must look like, like "(groups, N, K)"."""
    check_dtype("a", a, _FP8)
    check_dtype("b", b, _FP8)
    check_operand_shapes(("a", "b"), a.shape, b.shape, a_form, b_form)
    if a.dim() == 3 and a.shape[0] != b.shape[0]:
        got = f"shape {tuple(a.shape)}"
        reject("a", f"must have as many groups as b, {b.shape[0]}", got, f"Give it as {a_form}.")
    _check_device("b", b, a.device, "a")
    _check_scales("a", a, a_scales, (1, BLOCK))
    _check_scales("b", b, b_scales, (BLOCK, BLOCK))


def out_dtype_of(out_dtype: torch.dtype | None, c: Tensor | None) -> torch.dtype:
    """``out_dtype`` when given, else that of ``c``, else bfloat16."""
    if out_dtype is None:
        return torch.bfloat16 if c is None else c.dtype
    if out_dtype not in OUTPUTS:
        reject(
            "out_dtype",
            "must be torch.bfloat16 or torch.float32",
            out_dtype,
            "Cast the result yourself for other types.",
            kind=ArgumentTypeError,
        )
    return out_dtype


def check_like_out(
    name: str, tensor: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None
) -> None:
    """``out`` or ``c`` of a dense product, of ``dtype`` or of any that a result can have."""
    check_dtype(name, tensor, *([dtype] if dtype in OUTPUTS else OUTPUTS))
    wanted = (a.shape[0], b.shape[0])
    _check_shape(name, tensor, wanted, "these operands", "Give (rows of a, rows of b).")
    _check_device(name, tensor, a.device, "a")


def check_index(layout: GroupLayout, index: Tensor, a: Tensor, b: Tensor) -> None:
    """The index array of a grouped product."""
    name = index_name(layout)
    check_dtype(name, index, torch.int32)
    groups, rows = b.shape[0], a.shape[-2]
    wanted = (index_length(layout, groups, rows),)
    _check_shape(name, index, wanted, f"{groups} groups and {rows} rows", "One number for each.")
    _check_device(name, index, a.device, "a")


def check_quantizable(x: Tensor, granularity: Granularity) -> None:
    """What the quantiser takes."""
    check_dtype("x", x, torch.float32, torch.float16, torch.bfloat16)
    check_axes("x", x.shape)
    check_block_axis(x.shape[-2 if granularity == (BLOCK, 1) else -1])


def check_linear(name: str, x: Tensor, weight: Tensor, scales: Tensor | None, axis: int) -> None:
    """What ``Linear`` multiplies: ``x``, called ``name``, and the weight along ``axis`` of it."""
    check_dtype(
        name,
        x,
        *OUTPUTS,
        mend="Convert it, for example with x.to(torch.bfloat16); results are of its dtype, and FP8 "
        "products have no other.",
    )
    if weight.dim() != 2 or weight.shape[0] % 16 or weight.shape[1] % 16 or 0 in weight.shape:
        reject(
            "weight",
            "must have 2 axes (out_features, in_features), both multiples of 16",
            f"shape {tuple(weight.shape)}",
            "Pad it with zeros.",
        )
    if x.dim() < 1 or x.shape[-1] != weight.shape[axis]:
        reject(
            name,
            f"its last axis must have {weight.shape[axis]} values for a weight of shape "
            f"{tuple(weight.shape)}",
            f"shape {tuple(x.shape)}",
            "Reshape it.",
        )
    _check_device("weight", weight, x.device, name)
    if scales is None:
        check_dtype("weight", weight, *OUTPUTS)
    else:
        check_dtype("weight", weight, _FP8)
        _check_scales("weight", weight, scales, (BLOCK, BLOCK))


def empty_quantized(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and scales for ``x``, in the layouts that ``cpgemm.scaled`` describes.

    Also for traced tensors: the strides given here are those that operators return.
    """
    *groups, rows, columns = x.shape
    turned = granularity == (BLOCK, 1)  # the transpose of (1, 128)
    if turned:
        rows, columns = columns, rows
    scale_rows, kblocks = scale_shape((rows, columns), (1, BLOCK) if turned else granularity)
    strides = (scale_rows * kblocks, kblocks, 1)
    if granularity != (BLOCK, BLOCK):
        pitch = scale_pitch(scale_rows)
        strides = (kblocks * pitch, 1, pitch)
    data_strides = (rows * columns, columns, 1)
    return (
        _empty((*groups, rows, columns), data_strides, _FP8, x.device, turned),
        _empty((*groups, scale_rows, kblocks), strides, torch.float32, x.device, turned),
    )


def _empty(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    turned: bool,
) -> Tensor:
    axes = list(zip(shape, strides[-len(shape) :], strict=True))
    if turned:
        axes[-2:] = reversed(axes[-2:])
    extents, steps = zip(*axes, strict=True)
    return torch.empty_strided(extents, steps, dtype=dtype, device=device)
