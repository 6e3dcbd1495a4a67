"""A sample of a result against the product in float64: which elements, and how far they are off."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm.kernel_check import on_host
from cpgemm.scaled import BLOCK, ScaledTensor

__all__ = ["NAN_BITS", "largest_errors", "relative_error", "select_rows", "stratified"]

NAN_BITS = 0xFFFF  # uint16: a bfloat16 NaN, twice a float32 one; what is not written shows
# Largest relative errors of a right result, against the exact and against the float product (see
# docs/numerics.md).  Rounding to bfloat16 costs 0.0017 over many elements; of few each may be off
# by half a unit in the last place, 2**-8, and a little more.  Rounding to e4m3 costs 0.03 to 0.04,
# more where few sums cancel; beyond that is no rounding but a wrong scale.
_LIMITS, _LIMITS_OF_FEW, _FEW = (0.002, 0.1), (0.004, 1.0), 1024


def stratified(extent: int, count: int, rng: np.random.Generator) -> Any:
    """Sorted indices below ``extent``: one at random from each of ``count`` equal stretches."""
    edges = np.linspace(0, extent, min(count, extent) + 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:])


def largest_errors(m: int, n: int) -> tuple[float, float]:
    """Relative errors, exact and float, that a right (m, n) result may have."""
    return _LIMITS if m * n >= _FEW else _LIMITS_OF_FEW


def relative_error(got: Any, wanted: Any) -> float:
    """Frobenius norm of the difference over that of ``wanted``; 0 for two zeros."""
    difference, size = float(np.linalg.norm(got - wanted)), float(np.linalg.norm(wanted))
    if size > 0:
        return difference / size
    return 0.0 if difference == 0 else float("inf")


def select_rows(tensor: ScaledTensor, rows: Any) -> ScaledTensor:
    """Some rows, on the host; a row of 128 x 128 blocks becomes a row of 1 x 128 blocks."""
    return ScaledTensor.from_arrays(
        on_host(tensor.data.view(np.uint8)[rows]),
        on_host(tensor.scales[rows // tensor.granularity[0]]),
        (1, BLOCK),
        scale_format=tensor.scale_format,
    )
