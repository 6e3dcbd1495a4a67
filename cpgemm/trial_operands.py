"""Operands for trials of kernels, of any shape in the same memory, and the check of results.

Operands are views of memory that is allocated once, for the largest problem: codes of quantised
normal values (zeros and constants draw less power), scales, results.  There are as many sets of
them as keep L2 cold (``timing.rotations``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpgemm.kernel_check import on_host
from cpgemm.layout import BLOCK, Array, fp8_view, scale_pitch
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.quantize import quantize
from cpgemm.random_data import POOL, repeated
from cpgemm.reference import exact_product
from cpgemm.sampled_check import (
    NAN_BITS,
    largest_errors,
    relative_error,
    select_rows,
    stratified,
)
from cpgemm.scaled import ScaledTensor
from cpgemm.timing import rotations

__all__ = [
    "OperandMemory",
    "OperandSet",
    "bytes_of_sets",
    "poison",
    "sample_of",
    "wanted",
    "why_wrong",
]

_ALIGNMENT = 256  # bytes, of every operand
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 32, 128  # of a result, the last ones besides


@dataclass(frozen=True)
class OperandSet:
    """What one call works on; ``c`` is None unless the problem accumulates."""

    a: ScaledTensor
    b: ScaledTensor
    out: Array
    c: Array | None


class OperandMemory:
    """Memory for the operand sets of any of ``problems``, all of one output dtype.

    ``xp``: numpy or cupy.  ``seed``: of the values.
    """

    def __init__(self, problems: Sequence[GemmProblem], *, seed: int, xp: Any) -> None:
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((-(-POOL // BLOCK), BLOCK), dtype=np.float32)
        codes = quantize(values).data.view(np.uint8).reshape(-1)[:POOL]
        uniform = rng.uniform(0.5, 1.5, POOL).astype(np.float32)
        needed = np.max([bytes_of_sets(problem) for problem in problems], axis=0).tolist()
        code_bytes, scale_bytes, result_bytes, addend_bytes = needed
        self._codes = repeated(xp.asarray(codes), code_bytes)
        # Scales of about what quantising gives, so that results are of the order of 1 to 100.
        self._scales = repeated(xp.asarray(uniform / 448), scale_bytes // 4).view(np.uint8)
        self._results = xp.empty(result_bytes, dtype=np.uint8)
        addends = uniform.astype(OUT_DTYPES[problems[0].out_dtype])
        self._addends = repeated(xp.asarray(addends.view(np.uint8)), addend_bytes)

    def sets(self, problem: GemmProblem) -> list[OperandSet]:
        """Operands of ``problem``, the same ones whenever they are asked for."""
        p, dtype = problem, OUT_DTYPES[problem.out_dtype]
        codes, scales = _Carver(self._codes), _Carver(self._scales)
        results, addends = _Carver(self._results), _Carver(self._addends)
        made = []
        for _ in range(rotations(p.bytes)):
            rows = scales.take(p.k_blocks * scale_pitch(p.m) * 4).view(np.float32)
            blocks = scales.take(-(-p.n // BLOCK) * p.k_blocks * 4).view(np.float32)
            a_scales = rows.reshape(p.k_blocks, scale_pitch(p.m))[:, : p.m].T
            b_scales = blocks.reshape(-(-p.n // BLOCK), p.k_blocks)
            a_codes = fp8_view(codes.take(p.m * p.k).reshape(p.m, p.k))
            b_codes = fp8_view(codes.take(p.n * p.k).reshape(p.n, p.k))
            size = p.m * p.n * dtype.itemsize
            made.append(
                OperandSet(
                    ScaledTensor(a_codes, a_scales, (1, BLOCK)),
                    ScaledTensor(b_codes, b_scales, (BLOCK, BLOCK)),
                    results.take(size).view(_bits(dtype)).view(dtype).reshape(p.m, p.n),
                    addends.take(size).view(_bits(dtype)).view(dtype).reshape(p.m, p.n)
                    if p.accumulate
                    else None,
                )
            )
        return made


class _Carver:
    """Hands out aligned pieces of a buffer of bytes, one after another."""

    def __init__(self, buffer: Array) -> None:
        self._buffer, self._at = buffer, 0

    def take(self, size: int) -> Array:
        piece = self._buffer[self._at : self._at + size]
        self._at += _aligned(size)
        return piece


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def bytes_of_sets(p: GemmProblem) -> tuple[int, int, int, int]:
    """Of all sets together: codes, scales, results, addends (C)."""
    count = rotations(p.bytes)
    result = _aligned(p.m * p.n * OUT_DTYPES[p.out_dtype].itemsize)
    blocks = -(-p.n // BLOCK) * p.k_blocks
    return (
        count * (_aligned(p.m * p.k) + _aligned(p.n * p.k)),
        count * (_aligned(4 * p.k_blocks * scale_pitch(p.m)) + _aligned(4 * blocks)),
        count * result,
        count * result if p.accumulate else 0,
    )


# -------------------------------------------------------------------------------------- the check


def poison(out: Array) -> None:
    """Fill a result with NaN."""
    out.view(np.uint16)[...] = NAN_BITS


def sample_of(problem: GemmProblem) -> tuple[Any, Any]:
    """Rows and columns of D that are compared: some from everywhere, and the last of each."""
    rng = np.random.default_rng(0)
    rows = stratified(problem.m, _SAMPLED_ROWS, rng)
    columns = stratified(problem.n, _SAMPLED_COLUMNS, rng)
    return np.unique([*rows, problem.m - 1]), np.unique([*columns, problem.n - 1])


def wanted(one: OperandSet, sample: tuple[Any, Any]) -> Any:
    """The sampled elements of C + A @ B.T in float64."""
    rows, columns = sample
    product = exact_product(select_rows(one.a, rows), select_rows(one.b, columns))
    if one.c is not None:
        product += _host_sample(one.c, sample)
    return product


def why_wrong(out: Array, sample: tuple[Any, Any], exact: Any) -> str | None:
    """What is wrong with a result ``out``, given the exact values of a sample of it."""
    bits = out.view(_bits(out.dtype))
    exponent = 0x7F80 if out.itemsize == 2 else 0x7F800000
    if bool(((bits & exponent) == exponent).any()):
        return "the result holds NaN or infinity, or was not written everywhere"
    error = relative_error(_host_sample(out, sample), exact)
    limit = largest_errors(*exact.shape)[0]  # bfloat16's, which float32 keeps easily
    return None if error <= limit else f"off by {error:.5f} (at most {limit:g})"


def _host_sample(array: Array, sample: tuple[Any, Any]) -> Any:
    rows, columns = sample
    values = on_host(array.view(_bits(array.dtype))[rows]).view(array.dtype)
    return values[:, columns].astype(np.float64)


def _bits(dtype: Any) -> Any:
    """Unsigned integers as wide as ``dtype``: CuPy has few kernels for bfloat16."""
    return np.uint16 if dtype.itemsize == 2 else np.uint32
