"""Around grouped products in a mixture-of-experts layer: gather, SwiGLU, weighted scatter.

    routing = moe.route(expert_ids, groups)
    a = moe.gather_quantized(x, routing)                         # rows sorted by expert, e4m3
    h = cpgemm.grouped_gemm_contiguous(a, up, offsets=routing.offsets)
    s = moe.swiglu_quantize(h, offsets=routing.offsets)
    y = cpgemm.grouped_gemm_contiguous(s, down, offsets=routing.offsets)
    out = moe.scatter_combine(y, routing, weights)

Every function takes NumPy arrays (a reference path) or CuPy arrays (one launch on CuPy's current
stream, nothing read on the host, capturable in a graph once the kernel is loaded; give ``out`` in a
capture, so that nothing is allocated).  Both give the same bits, NaNs of ``scatter_combine`` aside.
``cpgemm.moe_routing`` says what a ``Routing`` holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm.bridged import bridged
from cpgemm.dlpack import Framework
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.moe_kernels import (
    FLOAT_DTYPES,
    launch_combine,
    launch_gather,
    launch_gather_quantize,
    launch_swiglu,
    moe_sources,
)
from cpgemm.moe_routing import Routing, offsets_from_counts, route, routed_rows
from cpgemm.moe_rules import (
    check_like,
    check_numbers,
    check_rows,
    readable_contents,
)
from cpgemm.problem import check_free, check_operand, check_scaled_out
from cpgemm.quantize import quantize
from cpgemm.quantize_kernels import INPUT_DTYPES
from cpgemm.scaled import (
    BLOCK,
    Array,
    ScaledTensor,
    ScaleFormat,
    array_module,
    check_scale_format,
    empty_scaled,
    is_cupy,
)

__all__ = [
    "Routing",
    "gather",
    "gather_quantized",
    "moe_sources",
    "offsets_from_counts",
    "route",
    "routed_rows",
    "scatter_combine",
    "swiglu_quantize",
]

# exp(-x) = 2**t with t = x * _MINUS_LOG2E; 2**f for f in [-1/2, 1/2] is a polynomial, its highest
# coefficient first.  The same numbers stand in cuda_src/moe.cuh.
_MINUS_LOG2E = np.float32(float.fromhex("-0x1.715476p+0"))
_ROUNDER = np.float32(float.fromhex("0x1.8p+23"))
_POWER = tuple(
    np.float32(float.fromhex(digits))
    for digits in (
        "0x1.5bba14p-10",
        "0x1.3cea88p-7",
        "0x1.c6b752p-5",
        "0x1.ebf9bcp-3",
        "0x1.62e42ap-1",
        "0x1p+0",
    )
)


# ------------------------------------------------------------------------------------ public face


@bridged
def gather(x: ScaledTensor, routing: Routing, *, out: ScaledTensor | None = None) -> ScaledTensor:
    """Rows of quantised tokens in sorted order: codes and scales.

    ``x``: ``ScaledTensor`` (tokens, K), granularity (1, 128), K-major.  Returns a ``ScaledTensor``
    (routing.rows, K) of the same granularity and format: row r is row ``order[r] // top_k`` of
    ``x``, or zeros with scales 1 where ``order[r]`` is -1.  ``out``: such a tensor, to be filled
    and returned.

    Raises ``ArgumentError`` and ``ArgumentTypeError`` before anything is written, and
    ``DeviceError`` for a GPU other than Hopper.
    """
    check_operand("x", x, (1, BLOCK))
    _check_routing("x", x.data, routing)
    shape = (routing.rows, x.shape[1])
    if out is not None:
        check_scaled_out(
            out, shape, (1, BLOCK), x.scale_format, {"x": x.data, "x.scales": x.scales}
        )
    if is_cupy(x.data):
        with x.data.device:
            result = out if out is not None else _room(shape, x.scale_format, x.data)
            if result.data.size:
                launch_gather(x, routing.order, routing.top_k, result)
        return result
    result = out if out is not None else _room(shape, x.scale_format, x.data)
    source, kept = _sources(routing)
    codes = result.data.view(np.uint8)
    codes[...] = 0
    codes[kept] = x.data.view(np.uint8)[source]
    result.scales[...] = 1.0
    result.scales[kept] = x.scales[source]
    return result


@bridged
def gather_quantized(
    x: Array,
    routing: Routing,
    *,
    scale_format: ScaleFormat = "float32",
    out: ScaledTensor | None = None,
) -> ScaledTensor:
    """Rows of float tokens in sorted order, quantised on the way.

    ``x``: float32, float16 or bfloat16 (tokens, K), rows contiguous, K a multiple of 16.  Returns
    what ``gather(quantize(x), routing)`` returns, the same bits, in one pass.  Less work than that
    when ``top_k`` is 1; with more experts for each token quantising first reads less.
    ``scale_format`` as in ``quantize``.  ``out``: a ``ScaledTensor`` to be filled and returned.

    Raises ``ArgumentError`` and ``ArgumentTypeError`` before anything is written, and
    ``DeviceError`` for a GPU other than Hopper.
    """
    check_scale_format(scale_format)
    check_rows("x", x, tuple(INPUT_DTYPES), 16)
    _check_routing("x", x, routing)
    shape = (routing.rows, x.shape[1])
    if out is not None:
        check_scaled_out(out, shape, (1, BLOCK), scale_format, {"x": x})
    if is_cupy(x):
        with x.device:
            result = out if out is not None else _room(shape, scale_format, x)
            if result.data.size:
                launch_gather_quantize(x, routing.order, routing.top_k, result)
        return result
    source, kept = _sources(routing)
    values = np.zeros(shape, x.dtype)
    values[kept] = x[source]
    return quantize(values, scale_format=scale_format, out=out)


@bridged
def swiglu_quantize(
    h: Array,
    *,
    scale_format: ScaleFormat = "float32",
    offsets: Array | None = None,
    out: ScaledTensor | None = None,
) -> ScaledTensor:
    """silu(gate) * up, quantised with one scale for 1 x 128 values.

    ``h``: bfloat16 or float32 (R, 2 * I), rows contiguous, I a multiple of 16; gate in columns
    [0, I), up in [I, 2 * I).  ``offsets``: int32 (groups + 1,) beside ``h``; only rows from
    ``offsets[0]`` to ``offsets[-1]`` are read and written then, the others stay (uninitialised in a
    fresh result).  Returns a ``ScaledTensor`` (R, I), granularity (1, 128), which is ``out`` when
    that is given.

    silu(x) = x / (1 + exp(-x)) in float32.  exp is made of single IEEE additions and products, so
    that a CPU and a GPU give the same bits; it is off by 2**-17 relatively at most, and infinite
    for x below -88.4, where silu is zero then.  Infinite and NaN products get the code NaN, as do
    those of an infinite gate.  Then the rule of ``cpgemm.quantize`` applies, with its
    ``scale_format``.

    Offsets out of range are rejected for NumPy (and with ``CPGEMM_CHECK``) and clamped on a GPU.

    Raises ``ArgumentError`` and ``ArgumentTypeError`` before anything is written, and
    ``DeviceError`` for a GPU other than Hopper.
    """
    check_scale_format(scale_format)
    check_rows("h", h, tuple(FLOAT_DTYPES), 32)
    shape = (h.shape[0], h.shape[1] // 2)
    if offsets is not None:
        _check_offsets(offsets, h)
    if out is not None:
        check_scaled_out(out, shape, (1, BLOCK), scale_format, {"h": h, "offsets": offsets})
    if is_cupy(h):
        with h.device:
            result = out if out is not None else _room(shape, scale_format, h)
            if result.data.size:
                launch_swiglu(h, offsets, result)
        return result
    result = out if out is not None else _room(shape, scale_format, h)
    rows = slice(None) if offsets is None else slice(int(offsets[0]), int(offsets[-1]))
    quantized = quantize(_swiglu(h[rows].astype(np.float32)), scale_format=scale_format)
    result.data.view(np.uint8)[rows] = quantized.data.view(np.uint8)
    result.scales[rows] = quantized.scales
    return result


@bridged
def scatter_combine(
    y: Array, routing: Routing, weights: Array, *, out: Array | None = None
) -> Array:
    """Each token's weighted sum of its rows: the inverse of ``gather``.

    ``y``: bfloat16 or float32 (routing.rows, N), rows contiguous, N a multiple of 8.  ``weights``:
    float32 (tokens, top_k), contiguous.  Returns (tokens, N) of the dtype of ``y``, which is
    ``out`` when that is given:

        out[t] = sum over j of weights[t, j] * y[position[t, j]]

    in float32 from 0 on, in the order of j, products and sums rounded singly, then one rounding to
    the dtype.  What was dropped (position -1) is left out, a token without experts gives zeros.
    Rows of ``y`` that no position names are never read.  Of a NaN only that it is one is defined.

    Raises ``ArgumentError`` and ``ArgumentTypeError`` before anything is written, and
    ``DeviceError`` for a GPU other than Hopper.
    """
    check_rows("y", y, tuple(FLOAT_DTYPES), 8)
    _check_routing("y", y, routing, sorted_rows=True)
    check_numbers("weights", weights, 2, np.float32)
    check_like("weights", weights, "y", y)
    if weights.shape != routing.position.shape:
        reject(
            "weights",
            f"must have shape {tuple(routing.position.shape)} (tokens, top_k)",
            f"shape {tuple(weights.shape)}",
            "Give one weight for each expert of each token.",
        )
    shape = (routing.tokens, y.shape[1])
    if out is not None:
        _check_out(out, shape, y, {"y": y, "weights": weights, "routing": routing.position})
    if is_cupy(y):
        with y.device:
            if out is None:
                # As integers, because CuPy cannot allocate every dtype.
                bits = np.uint16 if y.itemsize == 2 else np.uint32
                out = array_module(y).empty(shape, bits).view(y.dtype)
            if out.size:
                launch_combine(y, routing.position, weights, out)
        return out
    total = np.zeros(shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # as on a GPU
        for j in range(routing.top_k):
            row = routing.position[:, j]
            kept = (row >= 0) & (row < routing.rows)
            total[kept] += weights[kept, j, None] * y[row[kept]].astype(np.float32)
        if out is None:
            return total.astype(y.dtype)
        out[...] = total.astype(y.dtype)
    return out


# ------------------------------------------------------------------------------------- NumPy path


def _sources(routing: Routing) -> tuple[Array, Array]:
    """Tokens of the rows that have one, and which rows those are."""
    token = routing.order // routing.top_k
    kept = (routing.order >= 0) & (token < routing.tokens)
    return token[kept], kept


def _swiglu(h: Array) -> Array:
    """silu(gate) * up of float32 (R, 2 * I), each operation rounded, as the kernel does it."""
    gate, up = np.split(h, 2, axis=1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return _silu(gate) * up


def _silu(x: Array) -> Array:
    # fmax and fmin take the number beside a NaN, as a GPU does; x itself brings the NaN back.
    t = np.fmin(np.fmax(x * _MINUS_LOG2E, np.float32(-126)), np.float32(128))
    shifted = t + _ROUNDER
    f = t - (shifted - _ROUNDER)
    power = np.full_like(f, _POWER[0])
    for coefficient in _POWER[1:]:
        power = power * f + coefficient
    exponent = (shifted.view(np.uint32) + np.uint32(127)) << np.uint32(23)
    return x / (np.float32(1) + power * exponent.view(np.float32))


# ------------------------------------------------------------------------------------- both paths


def _room(shape: tuple[int, int], scale_format: ScaleFormat, like: Array) -> ScaledTensor:
    library: Framework = "cupy" if is_cupy(like) else "numpy"
    return empty_scaled(shape, (1, BLOCK), scale_format, library, like)


def _check_routing(name: str, array: Array, routing: Routing, *, sorted_rows: bool = False) -> None:
    if not isinstance(routing, Routing):
        reject(
            "routing",
            "must be a Routing",
            type(routing).__qualname__,
            "Make one with cpgemm.moe.route.",
            kind=ArgumentTypeError,
        )
    check_like("routing", routing.position, name, array)
    wanted = routing.rows if sorted_rows else routing.tokens
    if array.shape[0] != wanted:
        what = "sorted row" if sorted_rows else "token"
        reject(
            name,
            f"must have a row for each {what} of the routing, {wanted}",
            f"shape {tuple(array.shape)}",
            "Route the same tokens.",
        )


def _check_offsets(offsets: Array, h: Array) -> None:
    check_numbers("offsets", offsets, 1)
    check_like("offsets", offsets, "h", h)
    if offsets.size < 2:
        reject("offsets", "must have groups + 1 elements", offsets.size, "Give Routing.offsets.")
    values = readable_contents(offsets)
    if values is not None and not 0 <= values[0] <= values[-1] <= h.shape[0]:
        reject(
            "offsets",
            f"must begin and end within the rows of h, {h.shape[0]}",
            f"{values[0]} to {values[-1]}",
            "Give the offsets of the product that made h.",
        )


def _check_out(out: Array, shape: tuple[int, int], y: Array, inputs: dict[str, Any]) -> None:
    check_rows("out", out, tuple(FLOAT_DTYPES), 8)
    check_like("out", out, "y", y)
    if out.dtype != y.dtype or tuple(out.shape) != shape:
        reject(
            "out",
            f"must have the dtype of y, {y.dtype}, and shape {shape}",
            f"{out.dtype}, shape {tuple(out.shape)}",
            "Leave it out to have one made.",
        )
    check_free(out, inputs)
