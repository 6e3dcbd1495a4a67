"""``GemmProblem``: what is to be computed, and every rule that operands must obey.

All rules of ``gemm`` are in this module, so that a message exists in one place.  Nothing here needs
a GPU, reads a value on a device or changes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from cpgemm.errors import ArgumentTypeError, DeviceError, reject
from cpgemm.scaled import (
    BLOCK,
    Granularity,
    ScaledTensor,
    byte_range,
    device_of,
    is_array,
    is_cupy,
    pointer,
    require_scaled,
)

__all__ = [
    "HOPPER",
    "OUT_DTYPES",
    "Deterministic",
    "GemmProblem",
    "OutDtype",
    "check_alignment",
    "check_device",
    "check_free",
    "check_matrix",
    "check_no_overlap",
    "check_operand",
    "check_scaled_out",
    "infer_out_dtype",
    "normalize_out_dtype",
    "wants_unsplit",
]

OutDtype = Literal["bfloat16", "float32"]
Deterministic: TypeAlias = "bool | Literal['batch_invariant']"
OUT_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
# CuPy's spelling of compute capability 9.0, the only one with wgmma, setmaxnreg and sm_90a code.
HOPPER = "90"

_LIMIT = 2**31 - 1  # TMA coordinates and the kernels' sizes are int32
_TMA_ALIGNMENT = 16  # bytes, of addresses and pitches that TMA reads and writes


def normalize_out_dtype(out_dtype: object) -> OutDtype:
    """``"bfloat16"`` or ``"float32"`` from a name, a dtype or a scalar type."""
    if isinstance(out_dtype, str) and out_dtype in OUT_DTYPES:
        return out_dtype  # type: ignore[return-value]
    if not isinstance(out_dtype, str) and out_dtype is not None:
        try:
            found = np.dtype(out_dtype)  # type: ignore[call-overload]
        except TypeError:
            found = None
        for name, dtype in OUT_DTYPES.items():
            if found == dtype:
                return name  # type: ignore[return-value]
    reject(
        "out_dtype",
        "must be 'bfloat16' or 'float32'",
        repr(out_dtype),
        "Cast the result yourself for other types.",
        kind=ArgumentTypeError,
    )


def infer_out_dtype(out_dtype: object, *arrays: Any) -> OutDtype:
    """``out_dtype`` when given, else that of the first array that has one, else bfloat16."""
    if out_dtype is not None:
        return normalize_out_dtype(out_dtype)
    for array in arrays:
        if is_array(array) and array.dtype in OUT_DTYPES.values():
            return normalize_out_dtype(array.dtype)
    return "bfloat16"


def wants_unsplit(deterministic: object) -> bool:
    """Whether K is to be added up in one order for all M."""
    if isinstance(deterministic, bool):
        return False  # run to run, every kernel is deterministic
    if deterministic == "batch_invariant":
        return True
    reject(
        "deterministic",
        'must be True or "batch_invariant"',
        repr(deterministic),
        "Leave it out: every run gives the same bits.",
    )


@dataclass(frozen=True)
class GemmProblem:
    """D = C + A @ B.T with A (m, k), B (n, k), D (m, n); the sizes may be 0.

    ``k`` is a multiple of 16 (TMA reads rows of whole 16-byte units), ``n`` a multiple of 8 (rows
    of bfloat16 D then are too).  ``out_dtype``: "bfloat16" or "float32".  ``accumulate`` says
    whether there is a C.  Raises ``ArgumentError`` and ``ArgumentTypeError``.
    """

    m: int
    n: int
    k: int
    out_dtype: OutDtype = "bfloat16"
    accumulate: bool = False

    def __post_init__(self) -> None:
        for name in ("m", "n", "k"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
                reject(
                    name, "must be an integer", repr(size), "Give a size.", kind=ArgumentTypeError
                )
            if not 0 <= size <= _LIMIT:
                reject(name, f"must be between 0 and {_LIMIT}", size, "Split the product.")
            object.__setattr__(self, name, int(size))
        if self.k % 16:
            reject(
                "k", "K must be a multiple of 16", self.k, "Pad both operands with zeros along K."
            )
        if self.n % 8:
            reject("n", "N must be a multiple of 8", self.n, "Pad B with zero rows.")
        object.__setattr__(self, "out_dtype", normalize_out_dtype(self.out_dtype))

    @property
    def k_blocks(self) -> int:
        """Blocks of 128 along K, the last one possibly short."""
        return -(-self.k // BLOCK)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Each operand, each scale and C read once, D written once."""
        item = OUT_DTYPES[self.out_dtype].itemsize
        scales = 4 * self.k_blocks * (self.m + -(-self.n // BLOCK))
        return (self.m + self.n) * self.k + scales + self.m * self.n * item * (1 + self.accumulate)

    @classmethod
    def of(
        cls,
        a: ScaledTensor,
        b: ScaledTensor,
        out: Any = None,
        c: Any = None,
        out_dtype: object = "bfloat16",
    ) -> GemmProblem:
        """The problem that ``a``, ``b``, ``out`` and ``c`` pose, after checking every rule.

        Raises what ``gemm`` raises.
        """
        check_operand("a", a, (1, BLOCK))
        check_operand("b", b, (BLOCK, BLOCK))
        if a.shape[1] != b.shape[1]:
            reject(
                "b",
                f"must have as many columns (K) as a, {a.shape[1]}",
                f"shape {b.shape}",
                "gemm computes a @ b.T: give b as (N, K), or call gemm_nn for a (K, N) operand.",
            )
        if b.device != a.device:
            reject("b", f"must be on a's device, {a.device}", b.device, "Move one of them.")
        dtype = normalize_out_dtype(out_dtype)
        problem = cls(a.shape[0], b.shape[0], a.shape[1], dtype, c is not None)
        shape = (problem.m, problem.n)
        for name, array in (("out", out), ("c", c)):
            if array is not None:
                check_matrix(name, array, shape, dtype, a)
        if out is not None:
            for name, array in (
                ("a", a.data), ("a.scales", a.scales), ("b", b.data), ("b.scales", b.scales)
            ):  # fmt: skip
                check_no_overlap(out, name, array)
            if c is not None and not _same_memory(out, c):
                check_no_overlap(out, "c", c)
        check_device(a)
        return problem


# --------------------------------------------------------------------------------- single rules


def check_operand(name: str, operand: object, granularity: tuple[int, int], ndim: int = 2) -> None:
    """A scaled operand in the form that the kernels read: granularity, axes, K-major, sizes."""
    operand = require_scaled(
        name,
        operand,
        "Quantise it with cpgemm.quantize, or wrap FP8 data and scales with "
        "ScaledTensor.from_arrays.",
    )
    if operand.granularity != granularity:
        reject(
            name,
            f"must have granularity {granularity}",
            operand.granularity,
            f"Quantise it with cpgemm.quantize(x, {granularity}).",
        )
    if operand.ndim != ndim:
        reject(
            name, f"must have {ndim} axes", f"shape {operand.shape}", "Select one group or reshape."
        )
    if operand.shape[-1] % 16:
        reject(
            name,
            "K must be a multiple of 16",
            operand.shape[-1],
            "Pad the values with zeros along K before quantising.",
        )
    data, scales = operand.data, operand.scales
    if data.size and (
        (data.shape[-1] > 1 and data.strides[-1] != 1)
        or (granularity == (BLOCK, BLOCK) and not scales.flags.c_contiguous)
    ):
        reject(
            name,
            "must be contiguous along K (its last axis), scales too",
            f"strides {data.strides}, scales' strides {scales.strides}",
            f"Call {name}.k_major() for an explicit copy; Hopper's FP8 tensor cores read "
            "K-major operands only.",
        )
    if is_cupy(data):
        check_alignment(name, data)


def check_alignment(name: str, array: Any) -> None:
    """TMA's rule: address and pitches are multiples of 16 bytes."""
    if array.size == 0:
        return
    if pointer(array) % _TMA_ALIGNMENT:
        reject(
            name,
            "must start at a 16-byte aligned address",
            f"address {pointer(array):#x}",
            "Copy it, or slice it at a multiple of 16 bytes.",
        )
    for axis in range(array.ndim - 1):
        stride = array.strides[axis]
        if array.shape[axis] > 1 and stride % _TMA_ALIGNMENT:
            reject(
                name,
                "must have a row pitch that is a multiple of 16 bytes",
                f"{stride} bytes",
                "Copy it into a padded array.",
            )


def check_matrix(
    name: str, array: Any, shape: tuple[int, int], dtype: OutDtype, a: ScaledTensor
) -> None:
    """``out`` or ``c``: a matrix of the result's kind, shape, dtype and device."""
    if not is_array(array) or is_cupy(array) != is_cupy(a.data):
        kind = "CuPy" if is_cupy(a.data) else "NumPy"
        reject(
            name,
            f"must be a {kind} array, as a is",
            f"{type(array).__module__}.{type(array).__qualname__}",
            "Give an array of the operands' kind, or leave it out.",
            kind=ArgumentTypeError,
        )
    if array.dtype != OUT_DTYPES[dtype]:
        reject(
            name,
            f"must have dtype {dtype}, as out_dtype says",
            array.dtype,
            f"Change out_dtype, or allocate {name} with dtype ml_dtypes.bfloat16 or float32.",
            kind=ArgumentTypeError,
        )
    if tuple(array.shape) != shape:
        reject(
            name,
            f"must have shape {shape} (rows of a, rows of b)",
            f"shape {tuple(array.shape)}",
            "Allocate it with that shape.",
        )
    if device_of(array) != a.device:
        reject(name, f"must be on a's device, {a.device}", device_of(array), "Move it.")
    item = array.itemsize
    if array.size and (
        (shape[1] > 1 and array.strides[1] != item)
        or (shape[0] > 1 and array.strides[0] < shape[1] * item)
    ):
        reject(
            name,
            "must be contiguous along its rows, without overlap",
            f"strides {array.strides}",
            "Give a C-contiguous array.",
        )
    if is_cupy(array):
        check_alignment(name, array)


def check_scaled_out(
    out: Any,
    shape: tuple[int, ...],
    granularity: Granularity,
    scale_format: str,
    inputs: Mapping[str, Any],
) -> None:
    """A quantised ``out``, where the first of ``inputs`` is; None stands for an input left out."""
    require_scaled("out", out, "Leave it out to have one made.")
    device = device_of(next(iter(inputs.values())))
    wanted = (tuple(shape), granularity, scale_format, device)
    if (out.shape, out.granularity, out.scale_format, out.device) != wanted:
        reject(
            "out",
            "must have the shape {}, granularity {}, format {!r} and device {!r}".format(*wanted),
            repr(out),
            "Leave it out to have one made.",
        )
    if not (out if granularity != (BLOCK, 1) else out.T).is_k_major:
        reject(
            "out",
            "must have 16-byte aligned rows along the blocks and scales in their standard layout",
            f"{out!r} with strides {out.data.strides} and {out.scales.strides}",
            "Leave it out to have one made.",
        )
    check_free(out.data, inputs, "data")
    check_free(out.scales, inputs, "scales")


def check_free(array: Any, inputs: Mapping[str, Any], part: str = "array") -> None:
    """``out``, or ``part`` of it, may be written: not read-only, not the memory of an input."""
    if not is_cupy(array) and not array.flags.writeable:
        reject("out", "must be writable", f"read-only {part}", "Give a copy.")
    for name, other in inputs.items():
        if other is not None:
            check_no_overlap(array, name, other, part)


def check_no_overlap(out: Any, name: str, array: Any, part: str = "array") -> None:
    """``out``, or ``part`` of it, may not share memory with what the kernel reads."""
    low, high = byte_range(out)
    other_low, other_high = byte_range(array)
    if low < other_high and other_low < high:
        reject(
            "out",
            f"must not overlap {name}",
            f"{part} at {low:#x} to {high:#x} against {other_low:#x} to {other_high:#x}",
            "Give it memory of its own.",
        )


def _same_memory(out: Any, c: Any) -> bool:
    """C may be ``out`` itself: each element is read before it is written, by the same thread."""
    return pointer(out) == pointer(c) and out.strides == c.strides


def check_device(a: ScaledTensor) -> None:
    """The kernels run on compute capability 9.0 only; NumPy operands run anywhere."""
    if not is_cupy(a.data):
        return
    capability = str(a.data.device.compute_capability)
    if capability != HOPPER:
        found = f"{capability[:-1]}.{capability[-1]}"
        reject(
            "a",
            "must be on a Hopper GPU (compute capability 9.0)",
            f"compute capability {found} of device {a.data.device.id}",
            "Use NumPy operands for the reference path, or a machine with an H100, H200 or GH200.",
            kind=DeviceError,
        )
