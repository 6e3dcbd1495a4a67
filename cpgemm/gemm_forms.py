"""``gemm`` with operands in other orientations, by its BLAS names."""

from __future__ import annotations

from typing import Any

from cpgemm.gemm import gemm
from cpgemm.scaled import ScaledTensor, require_scaled

__all__ = ["gemm_nn", "gemm_nt", "gemm_tn", "gemm_tt"]


def gemm_nt(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """``gemm`` by its BLAS name: a (M, K) as it is, b (N, K) transposed.

    ``out`` and the options (``c``, ``out_dtype``), the result and the errors as in ``gemm``.
    """
    return gemm(a, b, out, **options)


def gemm_nn(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """D = C + A @ B with b (K, N), granularity (128, 128).

    Hopper's FP8 tensor cores read both operands along K, so this makes a transposed copy of ``b``
    first (``b.T.k_major()``); keep that copy yourself when ``b`` is used again.  The rest as in
    ``gemm``.
    """
    return gemm(a, _transposed("b", b), out, **options)


def gemm_tn(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """D = C + A.T @ B with a (K, M), granularity (128, 1), and b (K, N), granularity (128, 128).

    Makes transposed copies of what is not stored along K (``gemm_nn`` says why).
    ``quantize(x, (128, 1))`` stores along K already, so that its result is not copied again.  The
    rest as in ``gemm``.
    """
    return gemm(_transposed("a", a), _transposed("b", b), out, **options)


def gemm_tt(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """D = C + A.T @ B.T with a (K, M), granularity (128, 1), and b (N, K), granularity (128, 128).

    Makes a transposed copy of ``a`` unless it is stored along K (``gemm_nn`` says why).  The rest
    as in ``gemm``.
    """
    return gemm(_transposed("a", a), b, out, **options)


def _transposed(name: str, operand: object) -> ScaledTensor:
    return require_scaled(name, operand, "Quantise it with cpgemm.quantize.").T.k_major()
