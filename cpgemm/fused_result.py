"""``FusedResult``: the D of a product with an epilogue; its rules, its memory, its NumPy path."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm.dlpack import Framework, empty
from cpgemm.epilogue_spec import EpilogueSpec
from cpgemm.epilogue_step import Epilogue, Field, operand
from cpgemm.grouped_problem import check_grouped_out, check_groups_adjacent
from cpgemm.problem import OUT_DTYPES, check_matrix, check_no_overlap, check_scaled_out
from cpgemm.quantize import quantize
from cpgemm.scaled import (
    BLOCK,
    Array,
    ScaledTensor,
    empty_scaled,
    pointer,
)

__all__ = ["FusedResult"]


class FusedResult:
    """D of one call: what it must be, and room for it."""

    def __init__(self, epilogue: Epilogue, spec: EpilogueSpec, field: Field) -> None:
        self.epilogue, self.spec = epilogue, spec
        self.shape = epilogue.fields(field)[-1].shape

    @property
    def scale_format(self) -> Any:
        """That of a quantised D."""
        assert self.spec.quantize is not None
        return self.spec.quantize.scale_format

    def check(self, out: Any, a: ScaledTensor, read: dict[str, Any]) -> None:
        """The rules for ``out``, as ``as_native`` gives it; ``read``: what it must not overlap."""
        if self.spec.quantize:
            check_scaled_out(out, self.shape, (1, BLOCK), self.scale_format, read)
            if len(self.shape) == 3:
                check_groups_adjacent("out", out.data)
        elif len(self.shape) == 3:
            check_grouped_out(out, self.shape, self.spec.out_dtype, a)
        else:
            check_matrix("out", out, (self.shape[0], self.shape[1]), self.spec.out_dtype, a)
        written = (out.data, out.scales) if self.spec.quantize else (out,)
        for array in written:
            for name, other in read.items():
                check_no_overlap(array, name, other)
            for number, step in enumerate(self.epilogue.steps):
                for other in step.natives:
                    same = pointer(array) == pointer(other) and array.strides == other.strides
                    if not (step.kind == "residual" and same and array.shape == other.shape):
                        check_no_overlap(array, f"{step.kind} (step {number})", other)

    def make(self, framework: Framework, like: Array) -> Any:
        """Room for D where ``like`` is."""
        if not self.spec.quantize:
            return empty(framework, self.shape, OUT_DTYPES[self.spec.out_dtype], like)
        return empty_scaled(self.shape, (1, BLOCK), self.scale_format, framework, like)

    def operands(self, out: Any) -> tuple[bytes, ...]:
        """The kernel's arguments for epilogue and result."""
        operands = self.epilogue.operands()
        if not self.spec.quantize:
            return operands
        rows = self.shape[-2]
        group_step = out.scales.strides[0] // 4 if len(self.shape) == 3 else 0
        return (
            *operands,
            operand(pointer(out.scales), out.scales_pitch),
            operand(rows, group_step),
        )

    def write(self, values: Array, out: Any, rows: slice, group: int) -> None:
        """NumPy: the epilogue of float32 ``values``, rows ``rows`` of the flattened D."""
        values = np.ascontiguousarray(self.epilogue.apply_to(values, rows, group))
        if self.spec.quantize:
            made = quantize(values, (1, BLOCK), scale_format=self.scale_format)
            height = self.shape[-2]
            if len(self.shape) == 3:
                at = slice(rows.start - group * height, rows.stop - group * height)
                codes, scales = out.data[group, at], out.scales[group, at]
            else:
                codes, scales = out.data[rows], out.scales[rows]
            codes.view(np.uint8)[...] = made.data.view(np.uint8)
            scales[...] = made.scales
            return
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(out.dtype)
        if len(self.shape) == 3:
            first = group * self.shape[-2]
            out[group, rows.start - first : rows.stop - first] = cast
        else:
            out[rows] = cast
