"""The exact semantics of a block-scaled FP8 GEMM, in NumPy.

    D[m, n] = cast( C[m, n] + sum over kb of (sA[m, kb] * sB[n, kb]) * P_kb[m, n] )
    P_kb[m, n] = sum over k in k-block kb of A[m, k] * B[n, k]

with kb = k // 128.  ``gemm_reference`` does what the kernels do, in float32: each partial sum P_kb
comes from one BLAS ``sgemm`` (its order within the 128 products is BLAS's own, as that of the
tensor core is the hardware's), the two scales are multiplied first, their product with the partial
sum is rounded, and partial sums are added in the order kb = 0, 1, 2, ... to an accumulator that
starts at zero.  C, widened to float32, is added last; one cast to the output dtype (round to
nearest even) follows.  ``exact_product`` is the same sum in float64, to measure both against.

Both work tile by tile, so that the memory beyond the result stays at some tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.scaled import BLOCK, FP8, Array, ScaledTensor, require_scaled

__all__ = ["exact_product", "gemm_reference"]

_TILE = 1024  # rows and columns of D worked on at a time
_OUT_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_DECODED = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def gemm_reference(
    a: ScaledTensor, b: ScaledTensor, *, c: Array | None = None, out_dtype: Any = "bfloat16"
) -> Array:
    """D = C + A @ B.T with the semantics of ``cpgemm.gemm``, in NumPy.

    ``a``: (M, K), ``b``: (N, K), NumPy, each of granularity (1, 128) or (128, 128).  ``c``: None or
    a bfloat16 or float32 array (M, N).  ``out_dtype``: "bfloat16" or "float32" (or those dtypes).
    Returns a new C-contiguous (M, N) array.  K = 0 gives C, or zeros.  Raises ``ArgumentError`` and
    ``ArgumentTypeError``.
    """
    _check_operands(a, b)
    target = _out_dtype(out_dtype)
    m, n = a.shape[0], b.shape[0]
    _check_c(c, (m, n))
    out = np.empty((m, n), dtype=target)
    partial = np.empty((min(m, _TILE), min(n, _TILE)), np.float32)
    for columns in _tiles(n):
        b_codes, b_scales = b.data[columns].view(np.uint8), _row_scales(b, columns)
        for rows in _tiles(m):
            a_codes, a_scales = a.data[rows].view(np.uint8), _row_scales(a, rows)
            shape = (a_codes.shape[0], b_codes.shape[0])
            total = np.zeros(shape, np.float32)
            product = partial[: shape[0], : shape[1]]
            # NaN operands give NaN and huge ones infinity, as in the kernel: no case for a warning.
            with np.errstate(over="ignore", invalid="ignore"):
                for kb in range(a_scales.shape[1]):
                    ks = slice(kb * BLOCK, (kb + 1) * BLOCK)
                    np.matmul(_DECODED[a_codes[:, ks]], _DECODED[b_codes[:, ks]].T, out=product)
                    product *= np.multiply.outer(a_scales[:, kb], b_scales[:, kb])
                    total += product
                if c is not None:
                    total += np.asarray(c[rows, columns], np.float32)
                out[rows, columns] = total
    return out


def exact_product(a: ScaledTensor, b: ScaledTensor) -> Array:
    """A @ B.T of the dequantised operands ``a`` and ``b`` in float64, shape (M, N).

    Each dequantised value is exact in float64 (4 by 24 significant bits); products and sums are
    rounded to float64.  Takes and raises what ``gemm_reference`` does.
    """
    _check_operands(a, b)
    m, n = a.shape[0], b.shape[0]
    out = np.empty((m, n), np.float64)
    for columns in _tiles(n):
        right = _dequantized_rows(b, columns)
        for rows in _tiles(m):
            with np.errstate(over="ignore", invalid="ignore"):
                np.matmul(_dequantized_rows(a, rows), right.T, out=out[rows, columns])
    return out


def _tiles(extent: int) -> Iterator[slice]:
    for start in range(0, extent, _TILE):
        yield slice(start, min(start + _TILE, extent))


def _row_scales(tensor: ScaledTensor, rows: slice) -> Array:
    """Scales of some rows, one for each row and k-block: float32 (rows, ceil(K/128))."""
    if tensor.granularity == (1, BLOCK):
        return tensor.scales[rows]
    return tensor.scales[np.arange(rows.start, rows.stop) // BLOCK]


def _dequantized_rows(tensor: ScaledTensor, rows: slice) -> Array:
    values = _DECODED[tensor.data[rows].view(np.uint8)].astype(np.float64)
    scales = _row_scales(tensor, rows)
    for kb in range(scales.shape[1]):
        values[:, kb * BLOCK : (kb + 1) * BLOCK] *= scales[:, kb, None]
    return values


def _check_operands(a: ScaledTensor, b: ScaledTensor) -> None:
    for name, operand in (("a", a), ("b", b)):
        require_scaled(name, operand, "Make one with cpgemm.quantize or ScaledTensor.from_arrays.")
        if operand.device != "cpu":
            reject(
                name,
                "must hold NumPy arrays",
                operand.device,
                "Bring data and scales over with .get(), or call cpgemm.gemm.",
            )
        if operand.ndim != 2:
            reject(name, "must have 2 axes", f"shape {operand.shape}", "Give one group at a time.")
        if operand.granularity == (BLOCK, 1):
            reject(
                name,
                "must have granularity (1, 128) or (128, 128)",
                operand.granularity,
                "Scales must be constant along 128 of K; quantise along the other axis.",
            )
    if a.shape[1] != b.shape[1]:
        reject(
            "b",
            f"must have the K of a ({a.shape[1]})",
            f"shape {b.shape}",
            "Both operands are K-last: a is (M, K), b is (N, K).",
        )


def _check_c(c: Array | None, shape: tuple[int, int]) -> None:
    if c is None:
        return
    if not isinstance(c, np.ndarray) or c.dtype not in _OUT_DTYPES.values():
        reject(
            "c",
            "must be a bfloat16 or float32 NumPy array",
            getattr(c, "dtype", type(c).__qualname__),
            "Convert it with astype.",
            kind=ArgumentTypeError,
        )
    if c.shape != shape:
        reject("c", f"must have shape {shape}", f"shape {c.shape}", "Give one value for each of D.")


def _out_dtype(out_dtype: Any) -> np.dtype[Any]:
    found = _OUT_DTYPES.get(out_dtype) if isinstance(out_dtype, str) else None
    if found is None and not isinstance(out_dtype, str):
        for candidate in _OUT_DTYPES.values():
            if out_dtype == candidate:
                found = candidate
    if found is None:
        reject(
            "out_dtype",
            "must be 'bfloat16' or 'float32'",
            repr(out_dtype),
            "Convert the result afterwards.",
            kind=ArgumentTypeError,
        )
    return found
