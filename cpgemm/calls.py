"""Calls that were made before are not checked again: their launches are kept, ready to go.

Every rule of a product is about types, addresses, shapes and strides.  A call whose operands agree
in all of these with those of an earlier call needs no more than that call's launch.  Nothing here
keeps an array alive: a key holds numbers, or what stands for them, and memory that comes back at
the same address with the same shape is as good as before.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable
from typing import Any

from cpgemm import settings
from cpgemm.dlpack import Framework, framework_of, framework_of_type
from cpgemm.launch import PreparedLaunch
from cpgemm.scaled import ScaledTensor

__all__ = ["ReadyCalls", "signature", "signers", "working_framework"]

_LIMIT = 8192  # launches, of about 2 KiB each

_Signer = Callable[[Any], Hashable]


class _Signers(dict[type, _Signer]):
    """What signs the objects of a type, found out once for each."""

    def __missing__(self, kind: type) -> _Signer:
        signer = self[kind] = _find_signer(kind)
        return signer


signers = _Signers()
"""``signers[type(array)](array)`` is ``signature(array)``, for the hottest path."""


def signature(array: Any) -> Hashable:
    """All that the rules look at in a CuPy array, a torch tensor on a GPU or a ``ScaledTensor``.

    None for None and for whatever else: such calls are checked each time.
    """
    return signers[type(array)](array)


def _find_signer(kind: type) -> _Signer:
    if issubclass(kind, ScaledTensor):
        return _of_scaled
    framework = framework_of_type(kind)
    if framework == "cupy":
        return _of_cupy
    # No other subclasses of torch's: those that trace have no memory.
    if framework == "torch" and kind.__name__ in ("Tensor", "Parameter"):
        return _of_torch
    return _no_signature


def _no_signature(array: Any) -> None:
    return None


_of_scaled = operator.attrgetter("signature")


def _of_cupy(array: Any) -> Hashable:
    memory = array.data
    return (memory.ptr, array.shape, array.strides, array.dtype.num, memory.device_id)


def _of_torch(tensor: Any) -> Hashable:
    if not tensor.is_cuda:
        return None
    return (
        tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(),
        tensor.requires_grad,
    )  # fmt: skip


def working_framework(*arrays: Any) -> Framework:
    """Whose current stream a call works on: torch's when one of its arrays is torch's, else CuPy's.

    Arrays that came through DLPack were made to be ready on CuPy's current stream.
    """
    for array in arrays:
        found = array.framework if isinstance(array, ScaledTensor) else framework_of(array)
        if found == "torch":
            return "torch"
    return "cupy"


class ReadyCalls:
    """Launches by the signatures of their operands; forgets the oldest beyond a limit.

    ``get(key)`` is the launch of an earlier call with this key, or None; a change of ``settings``
    forgets all of them.
    """

    def __init__(self) -> None:
        self._launches: dict[Hashable, PreparedLaunch] = {}
        self._lock = threading.Lock()
        self.get = self._launches.get
        settings.on_change(self.forget)

    def put(self, key: Hashable, launch: PreparedLaunch) -> None:
        """Keep a launch for later calls."""
        with self._lock:
            while len(self._launches) >= _LIMIT:
                del self._launches[next(iter(self._launches))]
            self._launches[key] = launch

    def forget(self) -> None:
        """Forget all launches."""
        with self._lock:
            self._launches.clear()

    def __len__(self) -> int:
        return len(self._launches)
