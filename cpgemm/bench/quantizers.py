"""The suite ``quantize``: cpgemm's quantisers beside the memory floor of their traffic."""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from cpgemm.bench import floors
from cpgemm.bench.contenders import Contender
from cpgemm.bench.operands import Pool
from cpgemm.bench.result import Case, Row
from cpgemm.bench.session import Session
from cpgemm.errors import reject
from cpgemm.kernel_check import on_host
from cpgemm.quantize import quantize
from cpgemm.quantize_kernels import QuantizeConfig
from cpgemm.sampled_check import relative_error
from cpgemm.scaled import BLOCK, Array, ScaledTensor, ScaleFormat
from cpgemm.timing import rotations

__all__ = ["How", "gpu_rows", "how_of", "sampled_error", "values"]

_SAMPLED_BLOCKS = 4  # of 128 rows
_GRANULARITIES = {"1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK)}
_DTYPES = {
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}  # fmt: skip

How = tuple[str, tuple[int, int], ScaleFormat]  # dtype of the input, granularity, scale format


def how_of(case: Case) -> How:
    """What ``case.detail`` says: ``<dtype of the input> <granularity> <scale format>``."""
    words = case.detail.split()
    formats: dict[str, ScaleFormat] = {"float32": "float32", "pow2": "pow2"}
    fits = len(words) == 3 and words[0] in _DTYPES and words[1] in _GRANULARITIES
    if not fits or words[2] not in formats:
        reject(
            "detail", "must be a dtype, a granularity and a scale format", repr(case.detail),
            "For example: bfloat16 1x128 float32.",
        )  # fmt: skip
    return words[0], _GRANULARITIES[words[1]], formats[words[2]]


def values(case: Case, pool: Pool, dtype: str) -> Array:
    """Normally distributed (m, k) of this type."""
    x = pool.matrix(case.m, case.k)
    if dtype == "float16":
        return x.astype(np.float16)
    if dtype == "bfloat16":  # by bits: CuPy converts to no bfloat16 of ml_dtypes
        bits = x.view(np.uint32) + np.uint32(0x8000)
        return (bits >> np.uint32(16)).astype(np.uint16).view(_DTYPES["bfloat16"])
    return x


def quantizer(how: How) -> Callable[..., ScaledTensor]:
    """``quantize`` with everything but its arrays."""
    _dtype, granularity, scale_format = how
    return functools.partial(quantize, granularity=granularity, scale_format=scale_format)


def sampled_error(x: Array, got: ScaledTensor, how: How) -> float:
    """Relative error of some blocks of rows against the NumPy path, whose bits are the same.

    NaN for a code of NaN anywhere: the input has none.
    """
    codes = got.data.view(np.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        return float("nan")
    ours, theirs = [], []
    for start in np.linspace(0, max(x.shape[0] - BLOCK, 0), _SAMPLED_BLOCKS).astype(int):
        # Whole blocks, so that a block of 128 x 128 is that of the sample.
        first = start // BLOCK * BLOCK
        rows = slice(first, first + BLOCK)
        part = quantizer(how)(on_host(x[rows]))
        scales = got.scales[first // how[1][0] :][: part.scales.shape[0]]
        sample = ScaledTensor.from_arrays(on_host(codes[rows]), on_host(scales), how[1])
        ours.append(sample.dequantize(np.float32))
        theirs.append(part.dequantize(np.float32))
    return relative_error(np.concatenate(ours), np.concatenate(theirs))


def gpu_rows(session: Session, case: Case) -> list[Row]:
    """The rows of one case on the GPU."""
    how = how_of(case)
    call = quantizer(how)
    kernel = QuantizeConfig(how[1], how[0], how[2]).name
    x = values(case, session.pools[0], how[0])
    first = call(x)
    nbytes = float(x.nbytes + first.nbytes)
    inputs = [x, *(_copy(x) for _ in range(rotations(nbytes) - 1))]
    outs = [first, *(call(one) for one in inputs[1:])]

    def ours() -> Contender:
        calls = [functools.partial(call, a, out=b) for a, b in zip(inputs, outs, strict=True)]
        return Contender("cpgemm", calls, kernel=kernel)

    def memory_floor() -> Contender:
        calls = [
            floors.memory_floor(
                [floors.whole(a)], [floors.whole(b.data), floors.whole(_packed(b))], pdl=False
            )
            for a, b in zip(inputs, outs, strict=True)
        ]
        return Contender("memory floor", calls, checked=False)

    def check(contender: Contender) -> tuple[float, float]:
        first.data.view(np.uint8)[...] = 0xFF  # NaN
        contender.calls[0]()
        session.synchronize()
        return sampled_error(x, first, how), 0.0

    makers = {"cpgemm": ours, "memory floor": memory_floor}
    return session.measure(case, makers, check=check, nbytes=nbytes)


def _packed(tensor: ScaledTensor) -> Array:
    """The scales with their contiguous axis last."""
    rows_fastest = tensor.granularity == (1, BLOCK)
    return tensor.scales.swapaxes(-1, -2) if rows_fastest else tensor.scales


def _copy(x: Array) -> Array:
    return x.view(np.uint8).copy().view(x.dtype)
