"""Whether a result is a product as far as rounding allows, against the sum in float64.

For D = cast(C + sum_kb s * P_kb) with s = sA * sB, S = sum |s * a * b| and ``exact`` in float64, an
element may be off by

- 2^-9 * S: the tensor core aligns the addends of one wgmma to the largest exponent and cuts off
  what lies below some 13 fraction bits.  Up to 2^-10 * S was seen on an H200, where all terms are
  positive; on random data results are 10 to 100 times closer.
- (k_blocks + 2) * 2^-24 * (S + |exact|): promotion and C in float32.
- 2^-8 * |exact| for bfloat16, 2^-24 * |exact| for float32: the last rounding.

Sums in another order, or in float32 throughout, are within the same bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpgemm.errors import WrongResultError
from cpgemm.layout import Array, is_cupy
from cpgemm.random_data import POOL, repeated
from cpgemm.reference import exact_product
from cpgemm.scaled import FP8, ScaledTensor

__all__ = ["CheckResult", "compare", "on_host", "seeded_operands"]

_CUT = 2.0**-9
_ROUNDING = {2: 2.0**-8, 4: 2.0**-24}  # by bytes of an element


@dataclass(frozen=True)
class CheckResult:
    """How close a result is.

    - ``error``: the largest error of an element, absolute
    - ``tolerance``: what rounding allows that element
    - ``fraction``: the largest error over tolerance of any element; at most 1
    """

    error: float
    tolerance: float
    fraction: float

    def __str__(self) -> str:
        return (
            f"right: largest error {self.error:.3g}, tolerance {self.tolerance:.3g} there; at most "
            f"{self.fraction:.3g} of what rounding allows"
        )


def compare(name: str, got: Array, a: ScaledTensor, b: ScaledTensor, c: Any = None) -> CheckResult:
    """Compare ``got`` (M, N), bfloat16 or float32, with c + a @ b.T; all of them NumPy's.

    Raises ``WrongResultError``, which calls the kernel ``name`` and says where it is wrong, by how
    much, and whether elements were not written (NaN).
    """
    exact = exact_product(a, b)
    magnitude = exact_product(_absolute(a), _absolute(b))
    if c is not None:
        exact += np.asarray(c, np.float64)
    k_blocks = a.scales.shape[1]
    tolerance = _CUT * magnitude + (k_blocks + 2) * 2.0**-24 * (magnitude + abs(exact))
    tolerance += _ROUNDING[got.itemsize] * (abs(exact) + tolerance) + 1e-38
    wide = np.asarray(got, np.float64)
    error = abs(wide - exact)
    share = np.where(np.isfinite(error), error / tolerance, np.inf)
    wrong = share > 1.0
    if wrong.any():
        raise WrongResultError(_message(name, wide, exact, error, tolerance, share, wrong))
    if not error.size:
        return CheckResult(0.0, 0.0, 0.0)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    return CheckResult(float(error[worst]), float(tolerance[worst]), float(share.max()))


def _message(
    name: str, got: Array, exact: Array, error: Array, tolerance: Array, share: Array, wrong: Array
) -> str:
    row, column = (int(at) for at in np.unravel_index(int(np.argmax(share)), share.shape))
    rows, columns = np.nonzero(wrong.any(axis=1))[0], np.nonzero(wrong.any(axis=0))[0]
    missing = int(np.isnan(got).sum())
    text = (
        f"{name}: the result must agree with the float64 sum to within rounding; "
        f"{int(wrong.sum())} of {wrong.size} elements do not, in rows {rows[0]} to {rows[-1]} and "
        f"columns {columns[0]} to {columns[-1]}. The worst, at row {row} and column {column}: got "
        f"{got[row, column]:.6g}, wanted {exact[row, column]:.6g}, off by "
        f"{error[row, column]:.3g}, allowed {tolerance[row, column]:.3g}."
    )
    if missing:
        text += f" {missing} elements are NaN: not written, or computed from what was not loaded."
    return text


def _absolute(tensor: ScaledTensor) -> ScaledTensor:
    """The magnitudes of the values: codes without their sign bit, scales likewise."""
    codes = (tensor.data.view(np.uint8) & np.uint8(0x7F)).view(FP8)
    return ScaledTensor.from_arrays(codes, abs(tensor.scales), tensor.granularity)


def on_host(x: Any) -> Any:
    """NumPy's of a CuPy array or of a ``ScaledTensor`` of them; NumPy's own as they are."""
    if isinstance(x, ScaledTensor):
        return ScaledTensor.from_arrays(
            on_host(x.data), on_host(x.scales), x.granularity, scale_format=x.scale_format
        )
    if not is_cupy(x):
        return x
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize]
    return np.asarray(x.view(bits).get()).view(x.dtype)


def seeded_operands(m: int, n: int, k: int, seed: int, xp: Any) -> tuple[Array, Array]:
    """float32 (m, k) and (n, k) on ``xp``'s device; normal, rows and blocks differing in size.

    A scale that is taken from the wrong row or block then shows.
    """
    rng = np.random.default_rng(seed)
    made = []
    for rows, spread in ((m, 6), (n, 3)):
        size = rows * k
        pool = xp.asarray(rng.standard_normal(min(size, POOL), dtype=np.float32))
        values = repeated(pool, size).reshape(rows, k)
        exponents = rng.integers(-spread, spread + 1, (rows, 1))
        made.append(values * xp.asarray(np.ldexp(np.float32(1), exponents), dtype=np.float32))
    return made[0], made[1]
