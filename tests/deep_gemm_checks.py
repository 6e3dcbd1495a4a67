"""Shared by the tests of ``cpgemm.deep_gemm``: arrays of each kind, casts and products in float64.

Nothing here uses the package's own arithmetic: codes are found in a table of e4m3 numbers, factors
by float64 divisions rounded once (which is what float32 division gives), products in float64.
"""

from __future__ import annotations

import math
import sys

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import CUT

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
KINDS = (
    "numpy",
    "torch",
    pytest.param("cupy", marks=pytest.mark.gpu),
    pytest.param("torch-cuda", marks=pytest.mark.gpu),
)
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_TABLE = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float64)


class Kind:
    """Arrays of one framework on one device: from NumPy and back."""

    def __init__(self, name):
        self.name = name
        self.is_torch = name.startswith("torch")
        if self.is_torch:
            self.torch = pytest.importorskip("torch")
            self.device = "cuda" if name == "torch-cuda" else "cpu"
            self.dtypes = {
                FP8: self.torch.float8_e4m3fn,
                BF16: self.torch.bfloat16,
                np.dtype(np.float32): self.torch.float32,
                np.dtype(np.float16): self.torch.float16,
                np.dtype(np.float64): self.torch.float64,
                np.dtype(np.int32): self.torch.int32,
            }
        elif name == "cupy":
            self.cupy = pytest.importorskip("cupy")

    def give(self, array):
        """A C-contiguous copy of a NumPy array."""
        bits = np.array(array, order="C").view(_BITS[array.itemsize])
        if self.is_torch:
            signed = bits.view(f"int{8 * array.itemsize}")
            tensor = self.torch.from_numpy(signed).to(self.device)
            return tensor.view(self.dtypes[np.dtype(array.dtype)])
        return (self.cupy.asarray(bits) if self.name == "cupy" else bits).view(array.dtype)

    def take(self, x):
        """The values as a NumPy array."""
        if self.is_torch:
            dtype = next(key for key, value in self.dtypes.items() if value == x.dtype)
            signed = {1: self.torch.int8, 2: self.torch.int16, 4: self.torch.int32}
            bits = x.detach().contiguous()
            bits = bits.view(signed.get(dtype.itemsize, self.torch.int64)).cpu().numpy()
            return bits.view(dtype)
        if self.name == "cupy":
            return x.view(_BITS[x.itemsize]).get().view(x.dtype)
        return x

    def of(self, x):
        """Whether ``x`` is of this kind."""
        if self.is_torch:
            return isinstance(x, self.torch.Tensor) and x.device.type == self.device
        module = sys.modules["cupy"] if self.name == "cupy" else np
        return isinstance(x, module.ndarray)

    def turned(self, x):
        """The last two axes swapped, a view."""
        return x.transpose(-1, -2) if self.is_torch else x.swapaxes(-1, -2)

    def strides(self, x):
        """In elements."""
        return tuple(x.stride()) if self.is_torch else tuple(s // x.itemsize for s in x.strides)

    def pointer(self, x):
        if self.is_torch:
            return x.data_ptr()
        return x.data.ptr if self.name == "cupy" else x.__array_interface__["data"][0]

    def poisoned(self, shape, dtype):
        """NaN everywhere."""
        bits = _BITS[np.dtype(dtype).itemsize]
        return self.give(np.full(shape, np.iinfo(bits).max, bits).view(dtype))


# ----------------------------------------------------------------------------------------- casts


def e4m3(values):
    """float64 magnitudes up to 464 to the code of the nearest e4m3 number, ties to even codes."""
    magnitude = np.abs(values)
    lower = np.searchsorted(_TABLE, magnitude, side="right") - 1
    upper = np.minimum(lower + 1, 126)
    below, above = magnitude - _TABLE[lower], _TABLE[upper] - magnitude
    up = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(up, upper, lower).astype(np.uint8) | (np.signbit(values) * np.uint8(0x80))


def power_of_two(value):
    """The smallest power of two that is not below a positive number."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - (fraction == 0.5))


def factors_of(x, rows, columns, use_ue8m0):
    """float32 factors of blocks of rows x columns, one block after another."""
    m, n = x.shape
    out = np.empty((-(-m // rows), -(-n // columns)), np.float32)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            block = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            amax = max(float(np.abs(block.astype(np.float64)).max()), float(np.float32(1e-4)))
            factor = float(np.float32(amax / 448.0))
            out[i, j] = power_of_two(factor) if use_ue8m0 else factor
    return out


def codes_of(x, factors, rows, columns):
    """uint8 codes: the float32 inverse of the factor, the float32 product, the nearest code."""
    inverse = (1.0 / factors.astype(np.float64)).astype(np.float32)
    by_element = np.repeat(np.repeat(inverse, rows, 0), columns, 1)[: x.shape[0], : x.shape[1]]
    scaled = (x.astype(np.float64) * by_element.astype(np.float64)).astype(np.float32)
    return e4m3(scaled.astype(np.float64))


# -------------------------------------------------------------------------------------- products


def operand(rng, shape, rows):
    """Random codes and factors for blocks of ``rows`` x 128: NumPy e4m3 and float32."""
    codes = rng.standard_normal(shape, dtype=np.float32).astype(FP8)
    *outer, m, k = shape
    grid = (*outer, -(-m // rows), -(-k // 128))
    factors = rng.uniform(0.5, 2.0, grid) * 2.0 ** rng.integers(-4, 5, grid)
    return codes, factors.astype(np.float32)


def dequantised(pair, rows):
    codes, factors = pair
    wide = np.repeat(np.repeat(factors.astype(np.float64), rows, -2), 128, -1)
    return codes.astype(np.float64) * wide[..., : codes.shape[-2], : codes.shape[-1]]


def assert_product(got, a, b, c=None):
    """``got``, bfloat16 or float32 NumPy, is c + a @ b.T within what rounding allows."""
    left, right = dequantised(a, 1), dequantised(b, 128)
    exact = left @ right.T
    magnitude = np.abs(left) @ np.abs(right).T
    if c is not None:
        exact = exact + c.astype(np.float64)
    k_blocks = -(-left.shape[1] // 128)
    bound = CUT * magnitude + (k_blocks + 2) * 2.0**-24 * (magnitude + np.abs(exact))
    bound += (2.0**-8 if got.dtype == BF16 else 2.0**-24) * (np.abs(exact) + bound) + 1e-38
    difference = np.abs(got.astype(np.float64) - exact)
    assert got.shape == exact.shape
    assert np.isfinite(difference).all(), "the result holds NaN or infinity"
    assert (difference <= bound).all(), f"{(difference / bound).max():.3g} times the bound"
