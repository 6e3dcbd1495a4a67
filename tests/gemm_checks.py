"""Shared by the GEMM tests: operands, the exact product and a bound that rounding allows.

Where the bound comes from, for D = cast(C + sum_kb s * P_kb) with s = sA * sB:

- The tensor core aligns the addends of one wgmma (32 products and the accumulator) to the largest
  exponent and cuts off what lies below some 13 fraction bits.  On positive operands, where cuts
  cannot cancel, an H200 is off by up to 2^-10 * S with S = sum |s * a * b|; twice that is allowed.
  On random data the result is 10 to 100 times closer, which ``NORM_*`` checks as well.
- Promotion and C in float32: (k_blocks + 2) * 2^-24 * (S + |C|).
- bfloat16 output: 2^-8 * |D|, half a unit in the last of 8 bits.

``NORM_BFLOAT16``: rounding to 8 bits alone gives a relative error of 2^-8 / sqrt(3) * 0.72 = 0.0016
in the 2-norm (0.72: a significand's reciprocal square, averaged over a binade, square-rooted).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import cpgemm
from cpgemm.scaled import ScaledTensor, array_module

CUT = 2.0**-9
NORM_BFLOAT16 = 0.002
FEW_ELEMENTS = 20000
NORM_FLOAT32 = 0.0005
DENSE_SHAPES = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
_POOL = 4194301  # prime, so that no two rows of a matrix repeat


def normal(rng, rows, columns, xp=np):
    """float32 (rows, columns), normally distributed; quick for large sizes, on either device."""
    size = rows * columns
    pool = xp.asarray(rng.standard_normal(min(max(size, 1), _POOL), dtype=np.float32))
    if size > pool.size:
        pool = xp.tile(pool, -(-size // pool.size))
    return pool[:size].reshape(rows, columns)


def operands(rng, m, n, k, xp=np, scale_format="float32"):
    """Quantised normal A (m, k) and B (n, k); scales differ by block and row, some by a lot."""
    a = normal(rng, m, k, xp)
    b = normal(rng, n, k, xp)
    if m:
        a *= xp.asarray(2.0 ** rng.integers(-6, 7, (m, 1)), dtype=np.float32)
    if n:
        b *= xp.asarray(2.0 ** rng.integers(-3, 4, (n, 1)), dtype=np.float32)
    return (
        cpgemm.quantize(a, (1, 128), scale_format=scale_format),
        cpgemm.quantize(b, (128, 128), scale_format=scale_format),
    )


def to_numpy(x):
    if isinstance(x, ScaledTensor):
        return ScaledTensor.from_arrays(
            to_numpy(x.data), to_numpy(x.scales), x.granularity, scale_format=x.scale_format
        )
    if array_module(x) is np:
        return x
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize]
    return np.asarray(x.view(bits).get()).view(x.dtype)


def widen(x):
    """float32 of a bfloat16 or float32 array, on its device."""
    if x.dtype == np.float32:
        return x
    xp = array_module(x)
    return (x.view(np.uint16).astype(np.uint32) << xp.uint32(16)).view(np.float32)


def exact_and_bound(a, b, c, out_dtype):
    """float64 exact product of the quantised operands (+ c) and the element-wise bound, in chunks.

    float32 dequantised values are products of a 4-bit code and a 24-bit scale: 2^-24 off, which is
    nothing beside the bound; products and sums are float64.
    """
    xp = array_module(a.data)
    right = b.dequantize().astype(np.float64)
    left = a.dequantize().astype(np.float64)
    k_blocks = -(-a.shape[1] // 128)
    exact = left @ right.T
    magnitude = abs(left) @ abs(right).T
    if c is not None:
        wide = widen(c).astype(np.float64)
        exact += wide
    bound = CUT * magnitude + (k_blocks + 2) * 2.0**-24 * (magnitude + abs(exact))
    if out_dtype == "bfloat16":
        bound += 2.0**-8 * (abs(exact) + bound)
    else:
        bound += 2.0**-24 * abs(exact)
    return exact, bound + xp.float64(1e-38)


def assert_close(out, a, b, c=None, norm=True):
    """Element-wise within the bound, and close in the 2-norm as random data must be."""
    name = "bfloat16" if out.dtype == np.dtype(ml_dtypes.bfloat16) else "float32"
    xp = array_module(out)
    step = max(1, 2**27 // max(b.shape[0], b.shape[1], 1))  # rows at a time: float64 is wide
    error = total = 0.0
    for start in range(0, a.shape[0], step):
        stop = min(start + step, a.shape[0])
        part = ScaledTensor.from_arrays(a.data[start:stop], a.scales[start:stop], a.granularity)
        exact, bound = exact_and_bound(part, b, None if c is None else c[start:stop], name)
        got = widen(out[start:stop]).astype(np.float64)
        difference = abs(got - exact)
        worst = (difference / bound).max() if difference.size else 0.0
        assert bool(xp.isfinite(got).all()), "the result holds NaN or infinity"
        assert float(worst) <= 1.0, f"off by {float(worst):.3g} times the bound that rounding gives"
        error += float((difference**2).sum())
        total += float((exact**2).sum())
    # Rows differ in scale: of fewer elements, too few rule the norm for a limit this close.
    if norm and total and out.size >= FEW_ELEMENTS:
        limit = NORM_BFLOAT16 if name == "bfloat16" else NORM_FLOAT32
        relative = (error / total) ** 0.5
        assert relative <= limit, f"relative error {relative:.2e} in the 2-norm, {limit} allowed"


def guarded(m, n, dtype, xp):
    """A poisoned buffer and the (m, n) view in its middle; rows lie apart by a 16-byte gap."""
    bits = np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint32
    gap = 16 // np.dtype(dtype).itemsize
    pitch = -(-n // gap) * gap + gap
    poison = xp.full((m + 2, pitch), np.iinfo(bits).max, dtype=bits)  # a NaN in either type
    return poison, poison.view(dtype)[1 : m + 1, :n]


def assert_guards_intact(poison, m, n):
    limit = np.iinfo(poison.dtype).max
    assert bool((poison[0] == limit).all()) and bool((poison[m + 1] == limit).all())
    assert bool((poison[:, n:] == limit).all()), "written beyond the end of a row"
