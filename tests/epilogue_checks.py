"""Shared by the epilogue tests: float64 formulas of the steps, with bounds that rounding allows.

A value is a pair (exact, bound): float64 arrays, NumPy.  A step maps the exact values and carries
the bound on: through its steepest slope, plus what its own float32 arithmetic rounds.  The
hardware's exp2 and reciprocal are off by 2^-22 each and exp's argument by |x| * 2^-24, which for
results that are not flushed to zero (|x| < 88) is 2^-17 relatively.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from gemm_checks import exact_and_bound, to_numpy, widen

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOAT = 2.0**-23  # of one float32 operation, doubled
APPROXIMATE = 2.0**-17
TINY = 1e-37  # what flushing to zero loses

_erf = np.vectorize(math.erf, otypes=[np.float64])


def product(a, b, c=None):
    """(exact, bound) of C + A @ B.T in float32."""
    a, b = to_numpy(a), to_numpy(b)
    return exact_and_bound(a, b, None if c is None else to_numpy(c), "float32")


def add(pair, term):
    value, bound = pair
    value = value + widen(to_numpy(term)).astype(np.float64)
    return value, bound + FLOAT * abs(value)


def scale(pair, factor):
    value, bound = pair
    return value * factor, bound * abs(factor) + FLOAT * abs(value * factor)


def silu(pair):
    value, bound = pair
    with np.errstate(over="ignore"):
        result = value / (1 + np.exp(-value))
    return result, 1.1 * bound + APPROXIMATE * abs(result) + TINY


def gelu(pair):
    value, bound = pair
    result = value / 2 * (1 + _erf(value / math.sqrt(2)))
    # 1 + erf is rounded to 2^-23: behind it lies |x|.
    return result, 1.13 * bound + 4 * FLOAT * abs(value)


def gelu_tanh(pair):
    value, bound = pair
    u = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    result = value / 2 * (1 + np.tanh(u))
    # tanh in float64 cancels for large negative u; the bound's second term covers it.
    return result, 1.14 * bound + APPROXIMATE * abs(result) + FLOAT * abs(value)


def swiglu(pair):
    value, bound = pair
    gate, up = value[:, 0::2], value[:, 1::2]
    activated, error = silu((gate, bound[:, 0::2]))
    result = activated * up
    other = bound[:, 1::2]
    return result, abs(activated) * other + abs(up) * error + error * other + FLOAT * abs(result)


def assert_within(out, pair):
    """``out`` (bfloat16 or float32, NumPy or CuPy) is the pair's value, rounded once."""
    value, bound = pair
    out = to_numpy(out)
    if out.dtype == BF16:
        bound = bound + 2.0**-8 * (abs(value) + bound)
    got = widen(out).astype(np.float64)
    assert got.shape == value.shape
    assert np.isfinite(got).all(), "the result holds NaN or infinity"
    worst = (abs(got - value) / (bound + TINY)).max() if got.size else 0.0
    assert worst <= 1.0, f"off by {worst:.3g} times the bound that rounding gives"


def assert_quantized(out, pair):
    """Codes and scales of the pair's value: scales by the largest of 128, codes to half a step."""
    value, bound = pair
    out = to_numpy(out)
    assert out.shape == value.shape and out.granularity == (1, 128)
    scales = out.scales.astype(np.float64)
    for block in range(scales.shape[1]):
        columns = slice(128 * block, 128 * block + 128)
        part, error, scale_of = value[:, columns], bound[:, columns], scales[:, block]
        largest, off = abs(part).max(axis=1), error.max(axis=1)
        if out.scale_format == "float32":
            allowed = off / 448 + FLOAT * largest / 448
            assert (abs(scale_of - largest / 448) <= allowed)[largest > off].all()
        else:
            assert (np.frexp(scale_of)[0] == 0.5).all(), "no power of two"
            above = largest > off
            assert (scale_of * 448 >= largest - off)[above].all()
            assert (scale_of * 224 <= largest + off)[above].all()
        got = out.data[:, columns].astype(np.float64) * scale_of[:, None]
        # Half a unit of 4 significant bits; below 2^-6 codes lie 2^-9 apart.  Where values are off,
        # the scale is too.
        step = np.maximum(abs(part) * 2.0**-4, scale_of[:, None] * 2.0**-10)
        assert (abs(got - part) <= step * (1 + 2.0**-10) + 2 * error + TINY).all()


def put(xp, array):
    """A NumPy array where ``xp`` has its arrays; bfloat16 travels as bits."""
    if array.dtype == BF16:
        return xp.asarray(array.view(np.uint16)).view(BF16)
    return xp.asarray(array)
