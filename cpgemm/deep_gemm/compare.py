"""The two measures of DeepGEMM's ``testing`` that callers use."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm.deep_gemm.arrays import on_device, torch_of, widen

__all__ = ["calc_diff", "count_bytes"]


def calc_diff(x: Any, y: Any) -> Any:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in float64: 0 for equal arrays, 0.0 for two of zeros.

    x, y: of one shape and one kind (torch, CuPy or NumPy).  Returns a scalar of that kind.
    """
    if torch_of("x", x) is not None:
        return _difference(x.double(), y.double())
    torch_of("y", y)
    with on_device(x):
        return _difference(_double(x), _double(y))


def _double(x: Any) -> Any:
    return x if x.dtype == np.float64 else widen(x).astype(np.float64)


def _difference(x: Any, y: Any) -> Any:
    total = (x * x + y * y).sum()
    return 1 - 2 * (x * y).sum() / total if total != 0 else 0.0


def count_bytes(*tensors: Any) -> int:
    """Bytes of all arrays in ``tensors``, lists and tuples of any depth; None counts nothing."""
    return sum(
        count_bytes(*item) if isinstance(item, (tuple, list)) else int(item.nbytes)
        for item in tensors
        if item is not None
    )
