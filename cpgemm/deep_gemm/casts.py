"""DeepGEMM's casts of float matrices to e4m3, for torch tensors, CuPy and NumPy arrays.

For each block, in float32: amax = the largest magnitude, at least 1e-4; sf = amax / 448; with
``use_ue8m0``, sf is rounded up to a power of two; code = e4m3(x * (1 / sf)), rounded to nearest
even.  A NaN makes its whole block NaN; an infinity becomes NaN and the rest of its block zero.
(``cpgemm.quantize`` differs: it has no such lower bound, multiplies by 448 / amax and leaves what
is not finite out of amax.)

Tensors go through torch's own operations, as in DeepGEMM.  On a GPU torch divides by 448 as a
product with the reciprocal, so that its factors may differ in the last bit from those of the CPU,
of NumPy and of CuPy, which divide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm.deep_gemm.arrays import on_device, torch_of, widen
from cpgemm.deep_gemm.layouts import ceil_div
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import BLOCK, FP8, array_module
from cpgemm.quantize_kernels import INPUT_DTYPES

__all__ = [
    "ceil_to_ue8m0",
    "encode_e4m3",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp8",
]

_LARGEST_CODE = 448.0
_SMALLEST_AMAX = 1e-4


def per_token_cast_to_fp8(
    x: Any, use_ue8m0: bool = False, gran_k: int = BLOCK, use_packed_ue8m0: bool = False
) -> tuple[Any, Any]:
    """e4m3 codes (M, K) of ``x`` (M, K) and float32 factors (M, ceil(K / gran_k)), row-major.

    ``x``: float32, float16 or bfloat16.  Codes and factors are of the kind of ``x``, where ``x``
    is.  ``use_ue8m0``: factors rounded up to powers of two.  Raises ``ArgumentError`` and
    ``ArgumentTypeError``, and ``NotImplementedError`` for ``use_packed_ue8m0``.
    """
    if use_packed_ue8m0:
        raise NotImplementedError(
            "cpgemm.deep_gemm.per_token_cast_to_fp8: packed UE8M0 factors belong to Blackwell; "
            "leave use_packed_ue8m0 out, Hopper reads float32 factors"
        )
    return _cast_blocks(x, 1, gran_k, use_ue8m0)


def per_channel_cast_to_fp8(
    x: Any, use_ue8m0: bool = False, gran_k: int = BLOCK
) -> tuple[Any, Any]:
    """e4m3 codes (K, N) of ``x`` (K, N) and float32 factors (K / gran_k, N); K % gran_k == 0.

    The rest as in ``per_token_cast_to_fp8``.
    """
    torch_of("x", x)
    if len(x.shape) == 2 and x.shape[0] % gran_k:
        reject("x", f"its rows must be a multiple of {gran_k}", x.shape[0], "Pad it with zeros.")
    return _cast_blocks(x, gran_k, 1, use_ue8m0)


def per_block_cast_to_fp8(x: Any, use_ue8m0: bool = False, gran_k: int = BLOCK) -> tuple[Any, Any]:
    """e4m3 codes (N, K) of ``x`` and float32 factors (ceil(N / gran_k), ceil(K / gran_k)).

    The rest as in ``per_token_cast_to_fp8``.
    """
    return _cast_blocks(x, gran_k, gran_k, use_ue8m0)


def per_custom_dims_cast_to_fp8(x: Any, dims: Any, use_ue8m0: bool) -> tuple[Any, Any]:
    """e4m3 codes of ``x`` and one float32 factor for each index along the axes ``dims``.

    The factors have the extents of ``x`` along ``dims``; axes of extent 1 are left out.  The rest
    as in ``per_token_cast_to_fp8``.
    """
    torch = _check(x)
    axes = tuple(axis for axis in range(len(x.shape)) if axis not in set(dims))
    if torch is not None:
        codes, factors = _cast_torch(torch, x.detach(), axes, use_ue8m0)
        return codes, factors.squeeze()
    with on_device(x), np.errstate(over="ignore", invalid="ignore"):
        codes, factors = _cast_native(widen(x), axes, use_ue8m0)
    return codes, factors.squeeze()


def ceil_to_ue8m0(x: Any) -> Any:
    """Magnitudes of the float32 numbers ``x`` rounded up to powers of two, 2**-126 to 2**127.

    Raises ``ArgumentTypeError`` for another dtype.
    """
    torch = torch_of("x", x)
    integer, real = (np.int32, np.float32) if torch is None else (torch.int32, torch.float32)
    if x.dtype != real:
        reject("x", "must be float32", x.dtype, "Convert it.", kind=ArgumentTypeError)
    bits = x.view(integer)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0)
    return (exponent.clip(1, 254) << 23).view(real)


# ---------------------------------------------------------------------------------- the one rule


def _check(x: Any) -> Any:
    """The torch module for a tensor, None for an array; rejects what cannot be cast."""
    torch = torch_of("x", x)
    known = (
        tuple(INPUT_DTYPES.values())
        if torch is None
        else (torch.float32, torch.float16, torch.bfloat16)
    )
    if x.dtype not in known:
        reject(
            "x",
            "must have dtype float32, float16 or bfloat16",
            x.dtype,
            "Convert it.",
            kind=ArgumentTypeError,
        )
    return torch


def _cast_blocks(x: Any, rows: int, columns: int, use_ue8m0: bool) -> tuple[Any, Any]:
    """Cast (M, N) with one factor for rows x columns values; short last blocks are padded."""
    torch = _check(x)
    if len(x.shape) != 2:
        reject("x", "must have 2 axes", f"shape {tuple(x.shape)}", "Cast one group at a time.")
    m, n = x.shape
    shape = (ceil_div(m, rows), rows, ceil_div(n, columns), columns)
    below, right = shape[0] * rows - m, shape[2] * columns - n
    if torch is not None:
        x = x.detach()
        if below or right:
            x = torch.nn.functional.pad(x, (0, right, 0, below))
        codes, factors = _cast_torch(torch, x.reshape(shape), (1, 3), use_ue8m0)
        codes = codes.reshape(m + below, n + right)[:m, :n].contiguous()
        return codes, factors.reshape(shape[0], shape[2])
    xp = array_module(x)
    with on_device(x), np.errstate(over="ignore", invalid="ignore"):
        values = widen(x)
        if below or right:
            values = xp.pad(values, ((0, below), (0, right)))
        codes, factors = _cast_native(values.reshape(shape), (1, 3), use_ue8m0)
        # As bytes, because CuPy has no copy kernels for FP8.
        codes = codes.view(np.uint8).reshape(m + below, n + right)[:m, :n]
        return xp.ascontiguousarray(codes).view(FP8), factors.reshape(shape[0], shape[2])


def _cast_torch(torch: Any, x: Any, axes: Any, use_ue8m0: bool) -> tuple[Any, Any]:
    """Codes like ``x`` and factors with the reduced axes kept."""
    amax = x.abs().float().amax(dim=axes, keepdim=True).clamp(_SMALLEST_AMAX)
    factors = amax / _LARGEST_CODE
    if use_ue8m0:
        factors = ceil_to_ue8m0(factors)
    return (x * (1.0 / factors)).to(torch.float8_e4m3fn), factors


def _cast_native(x: Any, axes: Any, use_ue8m0: bool) -> tuple[Any, Any]:
    """``_cast_torch`` for float32 NumPy and CuPy arrays."""
    xp = array_module(x)
    amax = xp.maximum(abs(x).max(axis=axes, keepdims=True), np.float32(_SMALLEST_AMAX))
    factors = amax / np.float32(_LARGEST_CODE)
    if use_ue8m0:
        factors = ceil_to_ue8m0(factors)
    scaled = x * (np.float32(1.0) / factors)
    return (scaled.astype(FP8) if xp is np else encode_e4m3(scaled)), factors


def encode_e4m3(values: Any) -> Any:
    """float32 to e4m3, to nearest even, beyond 464 to NaN: for CuPy, which has no such cast."""
    xp = array_module(values)
    bits = values.view(np.uint32)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Round away 20 of 23 fraction bits; a carry goes into the exponent, as it must.
    odd = (magnitude >> np.uint32(20)) & np.uint32(1)
    rounded = (magnitude + (odd + np.uint32(0x7FFFF))) >> np.uint32(20)
    normal = rounded - np.uint32((127 - 7) << 3)
    # Below 2**-6 codes count units of 2**-9.  Larger values are not to be converted: they overflow.
    small = magnitude < np.uint32(0x3C800000)
    units = xp.rint(xp.where(small, magnitude.view(np.float32), np.float32(0)) * np.float32(512))
    code = xp.where(small, units.astype(np.uint32), normal)
    return (xp.minimum(code, np.uint32(0x7F)) | sign).astype(np.uint8).view(FP8)
