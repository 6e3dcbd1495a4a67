"""``Linear``: a layer whose products run in FP8, and the operators that it is made of.

    forward   y  = quantise(x, 1 x 128)  @ quantise(weight, 128 x 128).T          FP8
    backward  dx = quantise(dy, 1 x 128) @ (the same codes and scales of weight)  FP8
              dw = dy.T @ x                                                       bfloat16

A weight in blocks of 128 x 128 has the same scales when it is transposed, so that both products use
the same numbers.  The gradients are those of the product with the quantised weight, taken at the
unrounded activations: rounding counts as if it were not there (straight through).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpgemm import torch_weights
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import BLOCK
from cpgemm.quantize import quantize
from cpgemm.scaled import ScaledTensor, require_scaled
from cpgemm.torch_ops import LIBRARY, Operand, define, multiply
from cpgemm.torch_rules import OUTPUTS, check_dtype, check_linear

__all__ = ["Linear"]


# --------------------------------------------------------------------------------------- operators


def _forward(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None = None, constant: bool = False
) -> Tensor:
    out = _forward_fake(x, weight, weight_scales, constant)
    b: Operand
    if weight_scales is None:
        b = torch_weights.quantized(weight, constant)
    else:
        b = (weight.detach(), weight_scales.detach())
    multiply(quantize(torch_weights.rows_of(x)), b, out.view(-1, out.shape[-1]))
    return out


def _forward_fake(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None = None, constant: bool = False
) -> Tensor:
    check_linear("x", x, weight, weight_scales, 1)
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _dgrad(
    grad: Tensor, weight: Tensor, weight_scales: Tensor | None = None, constant: bool = False
) -> Tensor:
    out = _dgrad_fake(grad, weight, weight_scales, constant)
    b = torch_weights.transposed(weight, weight_scales, constant)
    multiply(quantize(torch_weights.rows_of(grad)), b, out.view(-1, out.shape[-1]))
    return out


def _dgrad_fake(
    grad: Tensor, weight: Tensor, weight_scales: Tensor | None = None, constant: bool = False
) -> Tensor:
    check_linear("grad", grad, weight, weight_scales, 0)
    return torch.empty((*grad.shape[:-1], weight.shape[1]), dtype=grad.dtype, device=grad.device)


def _wgrad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Operands rounded to bfloat16, sums in float32, one rounding to ``dtype``."""
    left = grad.detach().reshape(-1, grad.shape[-1]).to(torch.bfloat16).t()
    right = x.detach().reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if dtype == torch.bfloat16:
        return torch.mm(left, right)
    if left.is_cuda and left.numel():
        return torch.mm(left, right, out_dtype=torch.float32)
    # torch has no such product for the CPU.  ``out``, because autocast leaves those calls alone.
    return torch.mm(left.float(), right.float(), out=_wgrad_fake(grad, x, dtype))


def _wgrad_fake(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((grad.shape[-1], x.shape[-1]), dtype=dtype, device=x.device)


_WEIGHT = "Tensor weight, Tensor? weight_scales=None, bool constant=False"
_forward_op = define(f"linear_forward(Tensor x, {_WEIGHT}) -> Tensor", _forward, _forward_fake)
_dgrad_op = define(f"linear_dgrad(Tensor grad, {_WEIGHT}) -> Tensor", _dgrad, _dgrad_fake)
_wgrad_op = define(
    "linear_wgrad(Tensor grad, Tensor x, ScalarType dtype) -> Tensor", _wgrad, _wgrad_fake
)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_scales: Tensor | None, constant: bool
    ) -> Tensor:
        wants_dx, wants_dw, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if wants_dw else None,
            weight if wants_dx else None,
            weight_scales if wants_dx else None,
        )
        ctx.constant, ctx.weight_dtype = constant, weight.dtype
        return _forward_op(x, weight, weight_scales, constant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            reject(
                "create_graph",
                "must be False for what contains cpgemm.torch.Linear",
                True,
                "It has no second derivative: use torch.nn.Linear where one is needed.",
            )
        x, weight, weight_scales = ctx.saved_tensors
        wants_dx, wants_dw, *_ = ctx.needs_input_grad
        dx = _dgrad_op(grad, weight, weight_scales, ctx.constant) if wants_dx else None
        dw = _wgrad_op(grad, x, ctx.weight_dtype) if wants_dw else None
        return dx, dw, None, None


def _linear(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None = None, constant: bool = False
) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Differentiable.apply(x, weight, weight_scales, constant)
    return _forward_op(x, weight, weight_scales, constant)


# A composite: torch.compile and torch.export see one operator, autograd what it consists of.
# ``torch.library.register_autograd`` would do the same at three times the cost of a call.
LIBRARY.define(f"linear(Tensor x, {_WEIGHT}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.impl("linear", _linear, "CompositeImplicitAutograd")
_linear_op = torch.ops.cpgemm.linear.default


# -------------------------------------------------------------------------------------- the layer


class Linear(torch.nn.Module):
    """``x @ weight.T + bias`` as ``torch.nn.Linear`` has it, with the product in FP8.

    ``weight`` (out_features, in_features) and ``bias`` (out_features,) are parameters of ``dtype``,
    bfloat16 or float32, and are trained as usual.  Both sizes must be multiples of 16.  The weight
    is quantised at its first use and when it has changed, in blocks of 128 x 128; ``x`` at each
    call, in rows of 1 x 128.

    ``layer(x)``: x (..., in_features), bfloat16 or float32, of the weight's device; under
    ``torch.autocast`` it is converted first.  Returns (..., out_features) of the dtype of x.

    Backward: the gradient of ``x`` is an FP8 product too, that of ``weight`` one of bfloat16
    values summed in float32.  There is no second derivative.

    ``from_linear`` takes the parameters of a ``torch.nn.Linear``, ``from_scaled`` a weight that is
    FP8 already.  Raises ``ArgumentError`` and ``ArgumentTypeError``.
    """

    weight: Tensor
    weight_scale_inv: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_features(in_features, out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        _check_parameter_dtype("dtype", dtype)
        self.in_features, self.out_features = in_features, out_features
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty((out_features, in_features), **place))
        self.register_buffer("weight_scale_inv", None)
        made = torch.nn.Parameter(torch.empty(out_features, **place)) if bias else None
        self.register_parameter("bias", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as ``torch.nn.Linear`` does."""
        if self.weight_scale_inv is not None:
            reject(
                "weight",
                "must be a float weight to be drawn anew",
                "a quantised one",
                "Make a new layer.",
            )
        bound = 1 / math.sqrt(self.in_features)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                torch.nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> Linear:
        """A layer with the very parameters of ``linear``: nothing is copied, both see changes."""
        if not isinstance(linear, torch.nn.Linear):
            got = type(linear).__qualname__
            reject("linear", "must be a torch.nn.Linear", got, "Give one.", kind=ArgumentTypeError)
        _check_parameter_dtype("linear.weight", linear.weight.dtype)
        return cls._of(linear.weight, None, linear.bias).train(linear.training)

    @classmethod
    def from_scaled(cls, weight: ScaledTensor, bias: Tensor | None = None) -> Linear:
        """A layer on an FP8 weight (out_features, in_features), which is shared and not trained.

        ``weight``: granularity (128, 128), stored along in_features.  ``bias``: None or a float
        tensor (out_features,), trained if it is a parameter that requires gradients.
        ``state_dict`` holds ``weight`` and ``weight_scale_inv``, as DeepSeek-V3's checkpoints do.
        """
        tensor = require_scaled("weight", weight, "Quantise it with cpgemm.quantize.")
        if tensor.granularity != (BLOCK, BLOCK) or tensor.ndim != 2 or not tensor.is_k_major:
            reject(
                "weight",
                "must have granularity (128, 128) and 2 axes, and be stored along the second",
                repr(tensor),
                "Quantise it with cpgemm.quantize(w, (128, 128)), or call .k_major().",
            )
        return cls._of(*tensor.to_torch(), bias)

    @classmethod
    def _of(cls, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> Linear:
        out_features, in_features = weight.shape
        _check_features(in_features, out_features)
        layer = cls(16, 16, bias=False, device="meta")
        layer.in_features, layer.out_features = in_features, out_features
        if scales is None:
            layer.weight = weight
        else:
            del layer.weight
            layer.register_buffer("weight", weight)
            layer.weight_scale_inv = scales
        if bias is not None:
            _check_bias(bias, out_features)
            trained = isinstance(bias, torch.nn.Parameter)
            layer.bias = bias if trained else torch.nn.Parameter(bias.detach(), False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        kind = x.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        weight = self.weight
        # A CUDA graph that is captured for training must quantise the weight at each replay.
        constant = not (torch.is_grad_enabled() and weight.requires_grad)
        y = _linear_op(x, weight, self.weight_scale_inv, constant)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def refresh(self) -> None:
        """Quantise the weight anew after a change that torch does not count.

        Those are writes through ``weight.data``, through other libraries, and by CUDA graphs.
        Copies stay at their addresses, so that CUDA graphs that read them see the new values.
        """
        torch_weights.refresh(self.weight, self.weight_scale_inv)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        kind = str(self.weight.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={kind}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Codes and scales follow ``.to(device)``, but keep their dtypes in ``.to(dtype)``."""
        if self.weight_scale_inv is None:
            return super()._apply(fn, recurse)
        weight, scales = self.weight, self.weight_scale_inv

        def apply(tensor: Tensor) -> Tensor:
            if tensor is not weight and tensor is not scales:
                return fn(tensor)
            carrier = torch.uint8 if tensor is weight else torch.int32
            return fn(tensor.view(carrier)).view(tensor.dtype)

        return super()._apply(apply, recurse)


def _check_features(in_features: Any, out_features: Any) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(size, bool) or not isinstance(size, int):
            got = type(size).__qualname__
            reject(name, "must be an integer", got, "Give a size.", kind=ArgumentTypeError)
        if size < 16 or size % 16:
            mend = "Pad with zeros, or keep this layer a torch.nn.Linear."
            reject(name, "must be a positive multiple of 16 for the products in FP8", size, mend)


def _check_parameter_dtype(name: str, dtype: Any) -> None:
    if dtype not in OUTPUTS:
        reject(
            name,
            "must be torch.bfloat16 or torch.float32",
            dtype,
            "Convert it, for example with .to(torch.bfloat16).",
            kind=ArgumentTypeError,
        )


def _check_bias(bias: Tensor, out_features: int) -> None:
    check_dtype("bias", bias, torch.float16, *OUTPUTS)
    if tuple(bias.shape) != (out_features,):
        got = f"shape {tuple(bias.shape)}"
        reject("bias", f"must have shape ({out_features},)", got, "One number for each row.")
