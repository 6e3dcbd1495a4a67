"""The rules that arguments of ``cpgemm.jax`` must obey, checked when it is called or traced.

Arguments are arrays or JAX's stand-ins for them: types, dtypes and shapes are known, values and
memory are not.  What depends on memory XLA sees to; what depends on values shows when it runs.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import BLOCK, FP8, scale_shape
from cpgemm.problem import OUT_DTYPES, OutDtype, normalize_out_dtype
from cpgemm.scaled_rules import check_operand_shapes

__all__ = [
    "check_array",
    "check_operand_types",
    "check_shape",
    "check_shapes",
    "host_bool",
    "host_integer",
    "out_dtype_of",
]

_FLOAT32 = np.dtype(np.float32)


def check_array(name: str, value: Any, *dtypes: np.dtype[Any]) -> None:
    """A JAX array, traced or not, or a NumPy array, of one of the dtypes."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        kind = type(value)
        reject(
            name,
            "must be a JAX array",
            f"{kind.__module__}.{kind.__qualname__}",
            "Convert it, for example with jax.numpy.asarray or jax.dlpack.from_dlpack.",
            kind=ArgumentTypeError,
        )
    if value.dtype not in dtypes:
        mend = "Convert it with astype."
        if dtypes == (FP8,):
            mend = (
                "Quantise values with cpgemm.jax.quantize; see uint8 codes as FP8 with "
                "jax.lax.bitcast_convert_type."
            )
        reject(
            name,
            f"must have dtype {' or '.join(str(dtype) for dtype in dtypes)}",
            value.dtype,
            mend,
            kind=ArgumentTypeError,
        )


def check_operand_types(a_data: Any, a_scales: Any, b_data: Any, b_scales: Any) -> None:
    """Types and dtypes of two operands."""
    check_array("a_data", a_data, FP8)
    check_array("a_scales", a_scales, _FLOAT32)
    check_array("b_data", b_data, FP8)
    check_array("b_scales", b_scales, _FLOAT32)


def check_shapes(
    a_data: jax.Array,
    a_scales: jax.Array,
    b_data: jax.Array,
    b_scales: jax.Array,
    a_form: str,
    b_form: str,
) -> None:
    """Shapes of two operands; the forms are what their data must look like, like "(M, K)"."""
    check_operand_shapes(("a_data", "b_data"), a_data.shape, b_data.shape, a_form, b_form)
    for name, data, scales, granularity in (
        ("a_scales", a_data, a_scales, (1, BLOCK)),
        ("b_scales", b_data, b_scales, (BLOCK, BLOCK)),
    ):
        check_shape(
            name,
            scales,
            scale_shape(data.shape, granularity),
            f"data of shape {data.shape} and granularity {granularity}",
            "Give one scale for each block, short last blocks included.",
        )


def check_shape(
    name: str, array: jax.Array, wanted: tuple[int, ...], reason: str, mend: str
) -> None:
    """An array of just this shape."""
    if array.shape != wanted:
        reject(name, f"must have shape {wanted} for {reason}", f"shape {array.shape}", mend)


def out_dtype_of(out_dtype: Any, c: Any) -> OutDtype:
    """``out_dtype`` when given, else that of ``c`` when it has one of the two, else bfloat16."""
    if out_dtype is not None:
        return normalize_out_dtype(out_dtype)
    found = getattr(c, "dtype", None)
    return normalize_out_dtype(found) if found in OUT_DTYPES.values() else "bfloat16"


def host_integer(name: str, value: object) -> int | None:
    """None or an integer that is known when the call is traced, 0 at least."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        reject(
            name,
            "must be an integer of the host, or None",
            type(value).__qualname__,
            "It is compiled in: under jax.jit make it a static argument.",
            kind=ArgumentTypeError,
        )
    if value < 0:
        reject(name, "must not be negative", value, "Leave it out if in doubt.")
    return int(value)


def host_bool(name: str, value: object) -> bool:
    """A bool that is known when the call is traced."""
    if not isinstance(value, (bool, np.bool_)):
        reject(
            name,
            "must be True or False",
            type(value).__qualname__,
            "It is compiled in: under jax.jit make it a static argument.",
            kind=ArgumentTypeError,
        )
    return bool(value)
