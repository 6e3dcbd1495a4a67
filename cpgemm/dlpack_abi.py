"""The structures of DLPack's C header, the capsules that carry them, and memory that came in them.

A producer hands out a capsule named ``dltensor`` (a ``DLManagedTensor``) or, since DLPack 1.0,
``dltensor_versioned`` (a ``DLManagedTensorVersioned``).  A consumer renames the capsule to
``used_...``, which tells the capsule's own destructor to keep its hands off, and from then on owes
one call of the structure's deleter.  ``take`` does the former, ``Managed`` the latter; ``relabel``
changes the dtype that an unused capsule announces.

Nothing here knows an array library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from cpgemm.errors import MissingDependencyError

__all__ = [
    "CODES",
    "CPU",
    "CUDA",
    "CUDA_HOST",
    "CUDA_MANAGED",
    "DTYPES",
    "IS_COPIED",
    "MAX_VERSION",
    "READ_ONLY",
    "DLDataType",
    "DLDevice",
    "DLManagedTensor",
    "DLManagedTensorVersioned",
    "DLTensor",
    "Managed",
    "OnStream",
    "cupy_view",
    "imported",
    "numpy_view",
    "relabel",
    "release_retired",
    "take",
]

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # device types
READ_ONLY, IS_COPIED = 1, 2  # bits of ``flags``
MAX_VERSION = (1, 1)  # the newest version that is understood: 1.1 added the FP8 codes

CODES: dict[np.dtype[Any], int] = {
    np.dtype(kind): code
    for code, kinds in {
        0: (np.int8, np.int16, np.int32, np.int64),
        1: (np.uint8, np.uint16, np.uint32, np.uint64),
        2: (np.float16, np.float32, np.float64),
        4: (ml_dtypes.bfloat16,),
        6: (np.bool_,),
        10: (ml_dtypes.float8_e4m3fn,),
        12: (ml_dtypes.float8_e5m2,),
        14: (ml_dtypes.float8_e8m0fnu,),
    }.items()
    for kind in kinds
}
DTYPES = {(code, 8 * dtype.itemsize, 1): dtype for dtype, code in CODES.items()}


class DLDevice(ctypes.Structure):
    """Where a tensor is."""

    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class DLDataType(ctypes.Structure):
    """What an element is."""

    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    """A tensor; ``strides`` count elements and may be NULL, which means C-contiguous."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    """What a capsule named ``dltensor`` points to."""

    _fields_ = (
        ("dl_tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DLManagedTensorVersioned(ctypes.Structure):
    """What a capsule named ``dltensor_versioned`` points to."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    )


# PyCapsule keeps the pointer to its name, so that the new names must live as long as any capsule.
_KINDS: tuple[tuple[bytes, bytes, Any], ...] = (
    (b"dltensor_versioned", b"used_dltensor_versioned", DLManagedTensorVersioned),
    (b"dltensor", b"used_dltensor", DLManagedTensor),
)


def _python_api(name: str, result: Any, *arguments: Any) -> Any:
    """A function of CPython's C API.

    A prototype of its own, because attributes of ``ctypes.pythonapi`` are shared with everybody
    else in the process, who may have set other argument types.
    """
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_object, _text, _address = ctypes.py_object, ctypes.c_char_p, ctypes.c_void_p
_is_valid = _python_api("PyCapsule_IsValid", ctypes.c_int, _object, _text)
_get_pointer = _python_api("PyCapsule_GetPointer", _address, _object, _text)
_set_name = _python_api("PyCapsule_SetName", ctypes.c_int, _object, _text)
# Called with the GIL held, as a capsule's destructor would: not every deleter takes it by itself.
_Deleter = ctypes.PYFUNCTYPE(None, _address)


class Managed:
    """A tensor that was taken out of its capsule; calls the producer's deleter when it dies.

    ``address``: of the first element, byte offset included.  ``device``: (type, id).  ``dtype``:
    (code, bits, lanes).  ``shape`` in elements; ``strides`` likewise, None for C-contiguous.
    ``flags``: ``READ_ONLY`` and ``IS_COPIED``, 0 for capsules that have none.
    """

    __slots__ = ("_deleter", "_pointer", "address", "device", "dtype", "flags", "shape", "strides")

    def __init__(self, managed: DLManagedTensor | DLManagedTensorVersioned) -> None:
        self._pointer = ctypes.addressof(managed)
        self._deleter = _Deleter(managed.deleter) if managed.deleter else None
        self.flags = 0
        if isinstance(managed, DLManagedTensorVersioned):
            if managed.major != MAX_VERSION[0]:  # only the deleter may be used then
                raise BufferError(
                    f"the tensor is of DLPack {managed.major}.{managed.minor}, not of version 1"
                )
            self.flags = int(managed.flags)
        tensor = managed.dl_tensor
        self.address = (tensor.data or 0) + tensor.byte_offset
        self.device = (tensor.device.device_type, tensor.device.device_id)
        self.dtype = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
        axes = tensor.ndim
        self.shape: tuple[int, ...] = tuple(tensor.shape[:axes]) if axes else ()
        self.strides: tuple[int, ...] | None = None
        if tensor.strides:
            self.strides = tuple(tensor.strides[:axes])

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._deleter is not None and not ending():  # a dying process needs no memory back
            self._deleter(self._pointer)


def _opened(capsule: object) -> tuple[Any, bytes, bytes]:
    """The structure in an unused capsule, the capsule's name and the name that marks it as used."""
    for name, used, kind in _KINDS:
        if _is_valid(capsule, name):
            return kind.from_address(_get_pointer(capsule, name)), name, used
    raise BufferError(f"not an unused DLPack capsule: {capsule!r}")


def take(capsule: object) -> Managed:
    """Consume a capsule.  ``BufferError`` when it is none, was used, or is of another version."""
    structure, _, used = _opened(capsule)
    _set_name(capsule, used)
    return Managed(structure)


def relabel(capsule: object, code: int, bits: int) -> None:
    """Let an unused capsule announce another dtype of the same size."""
    structure, name, _ = _opened(capsule)
    old = structure.dl_tensor.dtype
    if (old.bits, old.lanes) != (bits, 1):
        raise BufferError(f"{name.decode()} holds {old.lanes} x {old.bits} bits, not {bits}")
    structure.dl_tensor.dtype = DLDataType(code, bits, 1)


# ------------------------------------------------------------------------- arrays of foreign memory


def imported(library: str) -> Any:
    """A module of an optional library; ``MissingDependencyError`` when it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        package = library.partition(".")[0]
        mend = 'pip install "cpgemm[cuda12]" (or cuda13)'
        raise MissingDependencyError(
            f"{package}: arrays of this kind need it; got {type(error).__name__}: {error}. "
            f"Run: {mend if package == 'cupy' else f'pip install {package}'}"
        ) from error


class _OnHost:
    """What NumPy makes an array of, and keeps."""

    def __init__(self, owner: object, **interface: Any) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, **interface}


def numpy_view(
    address: int,
    owner: object,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    strides: tuple[int, ...] | None,
    writable: bool,
) -> np.ndarray:
    """A NumPy array on memory that ``owner`` keeps; ``strides`` in bytes, None for C-contiguous."""
    if 0 in shape:  # the address may be NULL, which NumPy would not take
        nothing = np.empty(shape, dtype)
        nothing.flags.writeable = writable
        return nothing
    memory = _OnHost(
        owner,
        typestr=f"<u{dtype.itemsize}",
        shape=shape,
        strides=strides,
        data=(address, not writable),
    )
    return np.asarray(memory).view(dtype)


def cupy_view(
    address: int,
    size: int,
    owner: object,
    device: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    strides: tuple[int, ...] | None,
) -> Any:
    """A CuPy array on ``size`` bytes that ``owner`` keeps; ``strides`` as above.

    ``device`` is the ordinal, or -1 to ask the driver.
    """
    ndarray, memory, start = _cupy_classes()
    return ndarray(shape, dtype, start(memory(address, size, owner, device), 0), strides)


@functools.cache
def _cupy_classes() -> tuple[Any, Any, Any]:
    cupy = imported("cupy")
    return cupy.ndarray, cupy.cuda.UnownedMemory, cupy.cuda.MemoryPointer


# ------------------------------------------------------------------- giving GPU memory back in time

# Tensors that no view uses any more, while work on their stream may: [tensor, cupy.cuda, stream,
# ordinal, event or None].  A deque, because ``__del__`` can add to it at any moment, in any thread.
_retired: deque[list[Any]] = deque()


class OnStream:
    """Owner of a tensor that is used on ``stream``, a CuPy stream of device ``ordinal``.

    When it dies the tensor lives on until the stream has done what it had been given by then.
    Nobody waits for that: it is looked at whenever this module deals with another such tensor.
    """

    __slots__ = ("_entry",)

    def __init__(self, managed: Managed, cuda: Any, stream: Any, ordinal: int) -> None:
        self._entry = [managed, cuda, stream, ordinal, None]

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            _retired.append(self._entry)
            release_retired()


def release_retired() -> None:
    """Let go of every retired tensor whose stream is done with it."""
    for _ in range(len(_retired)):
        try:
            entry = _retired.popleft()
        except IndexError:  # another thread was quicker
            return
        if not _is_done(entry):
            _retired.append(entry)


def _is_done(entry: list[Any]) -> bool:
    """Whether the stream is past the point at which the tensor was retired."""
    _, cuda, stream, ordinal, event = entry
    try:
        with cuda.Device(ordinal):
            if stream.is_capturing():  # a query would spoil the capture
                return False
            if event is not None:
                return bool(event.done)
            if stream.done:
                return True
            event = cuda.Event(disable_timing=True)
            event.record(stream)
            entry[4] = event
    except RuntimeError:  # CUDA's; better to keep the memory than to give it away too early
        pass
    return False
