"""What every epilogue has: steps joined by ``|``, where a step stands, and its arguments.

``cpgemm.epilogues`` has the steps.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from cpgemm.calls import signature
from cpgemm.dlpack import framework_of
from cpgemm.epilogue_spec import EpilogueSpec, Output, Stage
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.problem import OUT_DTYPES, OutDtype, check_alignment
from cpgemm.scaled import Array, device_of, is_cupy

__all__ = [
    "Chain",
    "Epilogue",
    "Field",
    "Step",
    "check_contiguous",
    "check_like",
    "check_same_device",
    "float_dtype",
    "operand",
    "output_of",
    "require_epilogue",
    "signed",
]


@dataclass(frozen=True)
class Field:
    """The values that a step works on: the shape of D so far, where it is, and what D will hold.

    ``shape``: (M, N), or (groups, M_max, N) of a masked product.  ``groups``: of a grouped product,
    None of a dense one.  ``device``: that of the operands.
    """

    shape: tuple[int, ...]
    output: Output
    device: str
    groups: int | None = None

    @property
    def columns(self) -> int:
        """Columns of D so far."""
        return self.shape[-1]


class Epilogue:
    """One step or several; ``epilogue | epilogue`` is the left one followed by the right one.

    Immutable, reusable, and best kept: it remembers what its rules look at.
    """

    steps: tuple[Step, ...]

    def __or__(self, other: object) -> Chain:
        if not isinstance(other, Epilogue):
            return NotImplemented
        return Chain((*self.steps, *other.steps))

    def __repr__(self) -> str:
        return " | ".join(repr(step) for step in self.steps)

    @functools.cached_property
    def signature(self) -> Hashable:
        """What a launch depends on; None when an array lies on the CPU."""
        parts = tuple(step.signature for step in self.steps)
        return None if None in parts else parts

    @functools.cached_property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays that steps read, as they were given."""
        return tuple(array for step in self.steps for array in step.given)

    def spec(self, output: Output) -> EpilogueSpec:
        """What of it is compiled in, for a D of ``output``."""
        return EpilogueSpec(tuple(step.stage() for step in self.steps), output)

    def fields(self, field: Field) -> list[Field]:
        """The field of each step, from ``field`` on, and last D's; raises for a broken rule."""
        found = [field]
        for step in self.steps:
            found.append(step.check_field(found[-1]))
        return found

    def check_sizes(self, shape: tuple[int, ...], output: Output) -> None:
        """The rules that need no operands, for a product of ``shape``; ``output``: what D holds.

        Raises ``ArgumentError`` for a broken one.
        """
        field = Field(shape, output, device="")
        for step in self.steps:
            if not step.given:
                field = step.check_field(field)

    def operands(self) -> tuple[bytes, ...]:
        """The kernel's arguments for the arrays that are read, without those of a quantised D."""
        return tuple(one for step in self.steps for one in step.operands())

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        """The steps but ``Quantize`` on float32 (R, N), rows ``rows`` of the flattened D; NumPy."""
        for step in self.steps:
            values = step.apply_to(values, rows, group)
        return values


class Chain(Epilogue):
    """``steps`` one after another; made by ``|``.  Raises ``ArgumentError`` for an order that
    cannot be.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        if not steps:
            reject("steps", "must be one at least", "none", "Leave the epilogue out.")
        self.steps = steps
        _check_order([step.kind for step in steps])


def _check_order(kinds: list[str]) -> None:
    if "quantize" in kinds[:-1]:
        after = kinds[kinds.index("quantize") + 1]
        reject(
            "epilogue",
            "nothing can follow Quantize, which stores codes",
            f"{after} after it",
            "Put Quantize last.",
        )
    if kinds.count("swiglu") > 1:
        reject(
            "epilogue",
            "must have SwiGLU once at most",
            f"{kinds.count('swiglu')} of them",
            "Columns are pairs of gate and up once only.",
        )


class Step(Epilogue):
    """One step: its kind, the arrays that it reads, its rule, its NumPy form."""

    kind: str
    given: tuple[Any, ...] = ()  # arrays as the user gave them
    natives: tuple[Array, ...] = ()  # as NumPy's or CuPy's
    signature: Hashable

    def __init__(self) -> None:
        self.steps = (self,)
        self.signature = self.kind

    def stage(self) -> Stage:
        """What of it is compiled in."""
        return Stage(self.kind)

    def check_field(self, field: Field) -> Field:
        """The field behind this step, after checking every rule; raises ``ArgumentError``."""
        return field

    def operands(self) -> tuple[bytes, ...]:
        """Arguments of the kernel, of 16 bytes each."""
        return ()

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        """float32 (R, N) to float32; ``rows`` of the flattened D belong to ``group``."""
        raise NotImplementedError


def require_epilogue(epilogue: object) -> Epilogue:
    """``epilogue`` itself, when it is one."""
    if not isinstance(epilogue, Epilogue):
        reject(
            "epilogue",
            "must be made of cpgemm.epilogues",
            type(epilogue).__qualname__,
            "Give for example epilogues.Bias(bias) | epilogues.SiLU().",
            kind=ArgumentTypeError,
        )
    return epilogue


def output_of(epilogue: Epilogue, out_dtype: OutDtype) -> Output:
    """What D holds: codes behind ``Quantize``, else ``out_dtype``."""
    return "codes" if epilogue.steps[-1].kind == "quantize" else out_dtype


def operand(address: int, number: int = 0) -> bytes:
    """``fused::Operand``: an address and a number, 16 bytes."""
    return struct.pack("<Qq", address, number)


def float_dtype(name: str, array: Array) -> str:
    """``"float32"`` or ``"bfloat16"``."""
    for dtype, kind in OUT_DTYPES.items():
        if array.dtype == kind:
            return dtype
    reject(
        name,
        "must have dtype float32 or bfloat16",
        array.dtype,
        "Convert it with astype.",
        kind=ArgumentTypeError,
    )


def check_same_device(name: str, array: Array, field: Field) -> None:
    """An array that a kernel reads lies where the operands do."""
    if device_of(array) != field.device:
        reject(
            name,
            f"must be where the operands are ({field.device})",
            device_of(array),
            "Move it, for example with cupy.asarray.",
        )


def signed(kind: str, given: Any, array: Array) -> Hashable:
    """What a launch depends on, of a step that reads ``given`` as ``array``; None on the CPU.

    Its library too: the stream of a launch is torch's when one array is.
    """
    read = signature(array)
    return None if read is None else (kind, framework_of(given), read)


def check_contiguous(name: str, array: Array) -> None:
    """An array that a kernel reads from end to end."""
    if array.size and not array.flags.c_contiguous:
        reject(
            name,
            "must be contiguous",
            f"shape {tuple(array.shape)} with strides {tuple(array.strides)}",
            "Copy it with ascontiguousarray.",
        )


def check_like(name: str, array: Array, field: Field, *, aligned: bool = True) -> None:
    """An array that a kernel reads lies where the operands do, ``aligned`` to 16 bytes."""
    check_same_device(name, array, field)
    if aligned and is_cupy(array):
        check_alignment(name, array)
