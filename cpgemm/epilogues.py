"""Epilogues: what ``gemm`` and the grouped products do with their sums before D is stored.

    d = cpgemm.gemm(a, b, epilogue=epilogues.Bias(bias) | epilogues.SiLU())

Steps follow one another in the order in which ``|`` joins them, on float32 values; D is rounded
once, at the end.  ``c`` is added before the first step.  What a step reads (bias, residual, scale)
is taken when the step is made: NumPy, CuPy, torch and JAX arrays and those of any DLPack producer,
without a copy, where the operands are.  On a GPU the steps are part of the product's kernel, which
is compiled when it is first needed (``GemmPlan.compile`` and ``compile_ahead`` do it before); on
the CPU NumPy does the same.

==================  ===========================================================================
``Bias(bias)``      + bias[column]; for grouped products also (groups, N)
``SiLU()``          x / (1 + exp(-x))
``GELU()``          x / 2 * (1 + erf(x / sqrt(2))), or its tanh form
``Residual(r)``     + r[row, column]
``Scale(s)``        * s
``SwiGLU()``        silu(x[2j]) * x[2j + 1]: D has half of the columns
``Quantize()``      D is a ``ScaledTensor``: what ``cpgemm.quantize`` makes of the values; last
``Custom(...)``     a CUDA function of the user's
==================  ===========================================================================

On a GPU exp and the division of SiLU, SwiGLU and the tanh form are the hardware's approximations:
relatively off by 2**-17 at most (2**-20 for |x| < 8).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np

from cpgemm.custom_epilogue import Custom
from cpgemm.dlpack import as_native, framework_of
from cpgemm.epilogue_spec import Stage
from cpgemm.epilogue_step import (
    Chain,
    Epilogue,
    Field,
    Step,
    check_contiguous,
    check_like,
    float_dtype,
    operand,
    signed,
)
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.fused import compile_ahead
from cpgemm.scaled import Array, ScaleFormat, check_scale_format, pointer
from cpgemm.tma import row_pitch

__all__ = [
    "GELU",
    "Bias",
    "Chain",
    "Custom",
    "Epilogue",
    "Quantize",
    "Residual",
    "Scale",
    "SiLU",
    "SwiGLU",
    "compile_ahead",
    "interleave_gate_up",
]


class Bias(Step):
    """Adds ``bias``: float32 or bfloat16 (N,), one number for each column of the product.

    For grouped products also (groups, N), a row for each group.  N is that of D where the step
    stands: behind ``SwiGLU`` half of B's rows.  Contiguous, at a multiple of 16 bytes on a GPU.
    Raises ``ArgumentError`` and ``ArgumentTypeError``, here for what the array is, in a product for
    what does not fit it; so do the other steps.
    """

    kind = "bias"

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self.given = (bias,)
        self.bias = as_native("bias", bias)
        self.natives = (self.bias,)
        self.dtype = float_dtype("bias", self.bias)
        if self.bias.ndim not in (1, 2):
            reject(
                "bias",
                "must have 1 axis (N) or, for grouped products, 2 axes (groups, N)",
                f"shape {tuple(self.bias.shape)}",
                "Reshape it.",
            )
        check_contiguous("bias", self.bias)
        self.signature = signed(self.kind, bias, self.bias)

    def __repr__(self) -> str:
        return f"Bias({self.dtype} {tuple(self.bias.shape)})"

    def stage(self) -> Stage:
        return Stage(self.kind, self.dtype, per_group=self.bias.ndim == 2)

    def check_field(self, field: Field) -> Field:
        check_like("bias", self.bias, field)
        wanted: tuple[int, ...] = (field.columns,)
        if self.bias.ndim == 2 and field.groups is not None:
            wanted = (field.groups, field.columns)
        if tuple(self.bias.shape) != wanted:
            reject(
                "bias",
                f"must have shape {wanted}, a number for each column",
                f"shape {tuple(self.bias.shape)}",
                "Give as many as D has columns where the step stands.",
            )
        return field

    def operands(self) -> tuple[bytes, ...]:
        return (operand(pointer(self.bias), self.bias.shape[-1]),)

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        line = self.bias[group] if self.bias.ndim == 2 else self.bias
        return values + line.astype(np.float32)


class SiLU(Step):
    """x / (1 + exp(-x)), value by value."""

    kind = "silu"

    def __repr__(self) -> str:
        return "SiLU()"

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        return _silu(values)


class GELU(Step):
    """``approximate="none"``: x / 2 * (1 + erf(x / sqrt(2))); ``"tanh"``: its usual approximation
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), cheaper and off by 0.0005 at most.
    Raises ``ArgumentError`` for another name.
    """

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            reject(
                "approximate",
                "must be 'none' or 'tanh'",
                repr(approximate),
                "Leave it out for erf.",
            )
        self.kind = "gelu_erf" if approximate == "none" else "gelu_tanh"
        super().__init__()

    def __repr__(self) -> str:
        return "GELU()" if self.kind == "gelu_erf" else "GELU('tanh')"

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        if self.kind == "gelu_erf":
            erf = _erf(values * np.float32(math.sqrt(0.5)))
            return np.float32(0.5) * values * (np.float32(1) + erf)
        with np.errstate(over="ignore", invalid="ignore"):
            u = values * (np.float32(0.044715) * values * values + np.float32(1))
            power = np.exp(u * np.float32(-2 * math.sqrt(2 / math.pi)))
            return values / (np.float32(1) + power)


class Residual(Step):
    """Adds ``residual``: (M, N), or (groups, M_max, N) for masked products, of D's dtype.

    bfloat16 or float32 before ``Quantize``.  N is that of D where the step stands.  Rows
    contiguous, address and row pitch multiples of 16 bytes on a GPU, groups one behind the other.
    May be ``out`` itself where both have one shape.  Raises as ``Bias`` does.
    """

    kind = "residual"

    def __init__(self, residual: Any) -> None:
        super().__init__()
        self.given = (residual,)
        self.residual = as_native("residual", residual)
        self.natives = (self.residual,)
        self.dtype = float_dtype("residual", self.residual)
        if self.residual.ndim not in (2, 3):
            reject(
                "residual",
                "must have 2 axes (M, N), or 3 axes (groups, M_max, N) for masked products",
                f"shape {tuple(self.residual.shape)}",
                "Reshape it.",
            )
        self.signature = signed(self.kind, residual, self.residual)

    def __repr__(self) -> str:
        return f"Residual({self.dtype} {tuple(self.residual.shape)})"

    def stage(self) -> Stage:
        return Stage(self.kind, self.dtype)

    def check_field(self, field: Field) -> Field:
        array = self.residual
        check_like("residual", array, field)
        if field.output != "codes" and self.dtype != field.output:
            reject(
                "residual",
                f"must have D's dtype, {field.output}",
                self.dtype,
                "Convert it with astype, or choose another out_dtype.",
                kind=ArgumentTypeError,
            )
        if tuple(array.shape) != field.shape:
            reject(
                "residual",
                f"must have shape {field.shape}, that of D where the step stands",
                f"shape {tuple(array.shape)}",
                "Give one value for each of D.",
            )
        item, (height, width) = array.itemsize, array.shape[-2:]
        pitch = array.strides[-2]
        if array.size and (
            (width > 1 and array.strides[-1] != item)
            or (height > 1 and pitch < width * item)
            or (array.ndim == 3 and array.shape[0] > 1 and array.strides[0] != height * pitch)
        ):
            reject(
                "residual",
                "must have contiguous rows, and its groups one behind the other",
                f"strides {tuple(array.strides)}",
                "Copy it with ascontiguousarray.",
            )
        return field

    def operands(self) -> tuple[bytes, ...]:
        array = self.residual
        return (operand(pointer(array), row_pitch(array) // array.itemsize),)

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        flat = self.residual.reshape(-1, self.residual.shape[-1])
        return values + flat[rows].astype(np.float32)


class Scale(Step):
    """Multiplies by ``scale``: a number, or a float32 array of one element beside the operands.

    An array is read when the kernel runs, so that a captured graph sees its later contents.
    Raises ``ArgumentTypeError`` for anything else.
    """

    kind = "scale"

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.value = None
        if isinstance(scale, (int, float, np.floating, np.integer)) and not isinstance(scale, bool):
            self.value = np.float32(scale)
            self.signature = (self.kind, self.value.tobytes())
            return
        if framework_of(scale) is None:
            reject(
                "scale",
                "must be a number or an array of one float32",
                type(scale).__qualname__,
                "Give one of them.",
                kind=ArgumentTypeError,
            )
        self.given = (scale,)
        self.array = as_native("scale", scale)
        self.natives = (self.array,)
        if self.array.dtype != np.float32 or self.array.size != 1:
            reject(
                "scale",
                "an array must hold one float32",
                f"{self.array.dtype}, shape {tuple(self.array.shape)}",
                "Convert it, or give a number.",
                kind=ArgumentTypeError,
            )
        self.signature = signed(self.kind, scale, self.array)

    def __repr__(self) -> str:
        return "Scale(array)" if self.value is None else f"Scale({self.value:g})"

    def check_field(self, field: Field) -> Field:
        if self.value is None:
            check_like("scale", self.array, field, aligned=False)
        return field

    def operands(self) -> tuple[bytes, ...]:
        if self.value is None:
            return (operand(pointer(self.array)),)
        return (operand(0, int(self.value.view(np.uint32))),)

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        by = self.value if self.value is not None else np.float32(self.array.reshape(())[()])
        with np.errstate(over="ignore", invalid="ignore"):
            return values * by


class SwiGLU(Step):
    """silu(gate) * up: column 2j of the product is gate j, column 2j + 1 is up j.

    D has N / 2 columns, N a multiple of 16.  ``interleave_gate_up`` puts weights into that order.
    """

    kind = "swiglu"

    def __repr__(self) -> str:
        return "SwiGLU()"

    def check_field(self, field: Field) -> Field:
        if field.columns % 16:
            reject(
                "b",
                "N must be a multiple of 16 for SwiGLU, whose D has N / 2 columns",
                field.columns,
                "Pad gate and up with zero rows.",
            )
        return replace(field, shape=(*field.shape[:-1], field.columns // 2))

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return _silu(values[:, 0::2]) * values[:, 1::2]


class Quantize(Step):
    """D is a ``ScaledTensor`` (M, N), granularity (1, 128), in the layout that ``gemm`` reads.

    Codes and scales are what ``cpgemm.quantize(values, scale_format=...)`` makes of the float32
    values before it, not rounded to bfloat16 in between.  N, after ``SwiGLU`` N / 2, is a multiple
    of 16.  Must be the last step.  ``scale_format``: "float32" or "pow2"; raises ``ArgumentError``
    for another.
    """

    kind = "quantize"

    def __init__(self, scale_format: ScaleFormat = "float32") -> None:
        super().__init__()
        check_scale_format(scale_format)
        self.scale_format = scale_format
        self.signature = (self.kind, scale_format)

    def __repr__(self) -> str:
        return f"Quantize({self.scale_format!r})"

    def stage(self) -> Stage:
        return Stage(self.kind, scale_format=self.scale_format)

    def check_field(self, field: Field) -> Field:
        if field.columns % 16:
            reject(
                "b",
                "D must have a multiple of 16 columns to be quantised",
                field.columns,
                "Pad B with zero rows.",
            )
        return field

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        return values


def interleave_gate_up(w: Any) -> Any:
    """Weights (..., 2 * I, K), gate in the first half of the rows, up in the second, for SwiGLU.

    Row 2j of the result is gate j, row 2j + 1 is up j.  A copy, of w's kind (NumPy, CuPy, torch or
    JAX), to be quantised: scales of 128 x 128 serve 64 rows of gate and 64 of up then.
    Raises ``ArgumentError`` for what is no such array.
    """
    if framework_of(w) is None or w.ndim < 2 or w.shape[-2] % 2:
        reject(
            "w",
            "must be an array (..., 2 * I, K), gate above up",
            f"{type(w).__qualname__}, shape {tuple(getattr(w, 'shape', ()))}",
            "Give float weights before quantising.",
        )
    *outer, rows, columns = w.shape
    halves = w.reshape(*outer, 2, rows // 2, columns).swapaxes(-3, -2)
    return halves.reshape(*outer, rows, columns)


# -------------------------------------------------------------------------------------- formulas


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return x / (np.float32(1) + np.exp(-x))


@functools.cache
def _erf_of_one() -> Any:
    return np.frompyfunc(math.erf, 1, 1)


def _erf(x: Array) -> Array:
    return _erf_of_one()(x.astype(np.float64)).astype(np.float32)
