"""Where work on arrays of a library goes: their device, its current stream, its memory."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from cpgemm.dlpack import Framework, as_native, current_stream, empty
from cpgemm.layout import Array, array_module

__all__ = ["allocator", "external_stream", "working_stream"]


@contextlib.contextmanager
def working_stream(framework: Framework, device: int) -> Iterator[None]:
    """Make ``device`` current, and for torch its current stream CuPy's as well.

    Whatever CuPy and cpgemm enqueue inside is in order with the library's own work.
    """
    cuda = sys.modules["cupy"].cuda
    with cuda.Device(device):
        if framework != "torch":
            yield
            return
        with external_stream(current_stream("torch", device)):
            yield


class _Handle:
    """A stream of another library, as the CUDA stream protocol has it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._handle)


def external_stream(handle: int) -> Any:
    """CuPy's object for another library's stream of the current device; 0 is the default stream."""
    from cupy import cuda

    return cuda.Stream.null if handle == 0 else _external(handle, cuda.runtime.getDevice())


@functools.lru_cache(maxsize=64)
def _external(handle: int, _device: int) -> Any:
    from cupy import cuda

    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_Handle(handle))
    return cuda.ExternalStream(handle)  # CuPy before 14.1


class _TorchMemory:
    """``empty`` as NumPy and CuPy have it, with memory from torch's caching allocator."""

    def __init__(self, like: Array) -> None:
        self._like = like

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return as_native("memory", empty("torch", shape, dtype, self._like))


def allocator(framework: Framework, like: Array) -> Any:
    """What makes memory for results: an object with ``empty(shape, dtype)``, on like's device.

    ``like``: an array of NumPy or CuPy; for torch's memory a tensor on a GPU will do.
    """
    if framework == "torch" and not isinstance(like, np.ndarray):
        return _TorchMemory(like)
    return array_module(like)
