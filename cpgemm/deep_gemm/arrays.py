"""Which kind of array an argument is.  torch is only reached through a tensor of the user's."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from cpgemm.dlpack import framework_of
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import array_module, is_cupy

__all__ = ["on_device", "torch_of", "widen"]

_BFLOAT16 = "bfloat16"  # NumPy's name of ml_dtypes' type


def torch_of(name: str, x: object) -> Any:
    """The torch module when ``x`` is a tensor, None when it is a NumPy or CuPy array.

    ``ArgumentTypeError`` for ``name`` when it is neither.
    """
    framework = framework_of(x)
    if framework == "torch":
        return sys.modules["torch"]
    if framework not in ("numpy", "cupy"):
        reject(
            name,
            "must be a torch tensor, a CuPy array or a NumPy array",
            f"{type(x).__module__}.{type(x).__qualname__}",
            "Convert it, for example with torch.from_dlpack or cupy.from_dlpack.",
            kind=ArgumentTypeError,
        )
    return None


def on_device(x: Any) -> AbstractContextManager[Any]:
    """A scope in which CuPy works on the device of ``x``; nothing for NumPy."""
    return x.device if is_cupy(x) else contextlib.nullcontext()


def widen(x: Any) -> Any:
    """A NumPy or CuPy array of float32, float16 or bfloat16 as float32, exactly; may be ``x``."""
    if x.dtype == np.float32:
        return x
    if x.dtype.name == _BFLOAT16 and array_module(x) is not np:
        # As bits, because CuPy converts no bfloat16.
        return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)
