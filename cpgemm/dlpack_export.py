"""NumPy and CuPy arrays handed to other libraries: ``share``, ``to_torch``, ``to_jax``.

``cpgemm.dlpack`` is the face of this module and says how memory and streams are treated.  NumPy
exports neither FP8 nor bfloat16, CuPy no FP8, so that the bits travel as integers of the same size
and get the true dtype on the way or on arrival.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from cpgemm import dlpack_abi as abi
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import ALIGNMENT, Array, device_of, is_array, is_cupy, pointer

__all__ = ["KNOWN", "carrier", "share", "to_jax", "to_torch", "torch_dtype", "torch_dtypes"]

KNOWN = (
    "must be of integers, bool, float16, float32, float64, bfloat16, float8_e4m3fn, float8_e5m2 or "
    "float8_e8m0fnu"
)
# What travels as bits, and the integers that carry it: those that every version of torch has.
_CARRIERS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.int16),
    np.dtype(ml_dtypes.float8_e4m3fn): np.dtype(np.uint8),
    np.dtype(ml_dtypes.float8_e5m2): np.dtype(np.uint8),
    np.dtype(ml_dtypes.float8_e8m0fnu): np.dtype(np.uint8),
}
# What libraries raise for arrays that they cannot hold: no such device, negative strides.
_REFUSALS = (AssertionError, BufferError, RuntimeError, TypeError, ValueError)


def carrier(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """``dtype`` itself, or for FP8 and bfloat16 the integers that carry it."""
    return _CARRIERS.get(dtype, dtype)


def _bits(array: Array) -> Array:
    return array.view(_CARRIERS[array.dtype]) if array.dtype in _CARRIERS else array


def _check_array(array: Any) -> None:
    if not is_array(array):
        reject(
            "array",
            "must be a NumPy or a CuPy array",
            type(array).__qualname__,
            "Arrays of other libraries speak DLPack by themselves.",
            kind=ArgumentTypeError,
        )
    if array.dtype not in abi.CODES:
        reject("array", KNOWN, array.dtype, "Convert it.", kind=ArgumentTypeError)


def _refuse(array: Array, library: str, error: Exception) -> NoReturn:
    reject(
        "array",
        f"must be one that {library} can hold",
        f"shape {tuple(array.shape)}, strides {array.strides}, {array.dtype} on "
        f"{device_of(array)} ({type(error).__name__}: {error})",
        f"Copy it, or see that {library} was installed for this device.",
    )


# ------------------------------------------------------------------------------ any DLPack consumer


class _Shared:
    """An array that DLPack consumers see with its true dtype."""

    __slots__ = ("_array",)

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = _bits(self._array).__dlpack_device__()
        return int(kind), int(index)

    def __dlpack__(self, **options: Any) -> Any:
        array = self._array
        if is_cupy(array):
            with array.device:  # whose current stream the consumer's has to wait for
                capsule = _bits(array).__dlpack__(**options)
        else:
            capsule = _bits(array).__dlpack__(**options)
        if array.dtype in _CARRIERS:
            abi.relabel(capsule, abi.CODES[array.dtype], 8 * array.itemsize)
        return capsule


def share(array: Array) -> Any:
    """An object with ``__dlpack__`` and ``__dlpack_device__`` for any DLPack consumer.

    ``array`` is NumPy's or CuPy's; FP8 and bfloat16 carry the type codes of DLPack 1.1.  The
    arguments ``stream``, ``max_version``, ``dl_device`` and ``copy`` are answered by the array's
    own library: CuPy makes the consumer's stream wait for its current one, and NumPy refuses a
    read-only array (``BufferError``) to consumers of before DLPack 1.0, whom it could not tell.
    """
    _check_array(array)
    return _Shared(array)


# -------------------------------------------------------------------------------------------- torch


@functools.cache
def torch_dtypes() -> dict[Any, np.dtype[Any]]:
    """torch's dtypes and what they are to NumPy."""
    torch = abi.imported("torch")
    found = ((getattr(torch, dtype.name, None), dtype) for dtype in abi.CODES)
    return {theirs: ours for theirs, ours in found if theirs is not None}


@functools.cache
def torch_dtype(dtype: np.dtype[Any]) -> Any:
    """torch's dtype for one of NumPy's; ``ArgumentTypeError`` when it has none."""
    for theirs, ours in torch_dtypes().items():
        if ours == dtype:
            return theirs
    reject("dtype", "must be one that torch has", dtype, "Convert it.", kind=ArgumentTypeError)


def to_torch(array: Array) -> Any:
    """A torch tensor on the memory of a NumPy or CuPy array: same address, strides and dtype.

    The tensor keeps the array alive; torch's current stream waits for CuPy's, not the host.  CuPy's
    memory pool may use the memory again as soon as neither is referenced, so keep one of them until
    work on another stream than CuPy's is done, as within CuPy.

    torch has no read-only tensors.  For a read-only NumPy array (a memory-mapped file) it says so
    in a warning, once per process, and shares the memory all the same; writing to the tensor is
    then undefined and may end the process.  Raises ``ArgumentTypeError`` for dtypes that torch
    lacks, ``ArgumentError`` for what it cannot hold (negative strides, no CUDA in that torch),
    ``MissingDependencyError`` without torch.
    """
    _check_array(array)
    torch = abi.imported("torch")
    dtype = torch_dtype(array.dtype)
    try:
        if array.size == 0:  # its address may be NULL
            return torch.empty(tuple(array.shape), dtype=dtype, device=device_of(array))
        if is_cupy(array):
            with array.device:
                tensor = torch.from_dlpack(_bits(array))
        else:
            tensor = torch.from_numpy(_bits(array))
    except _REFUSALS as error:
        _refuse(array, "torch", error)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


# ---------------------------------------------------------------------------------------------- JAX


def to_jax(array: Array) -> Any:
    """A JAX array of a NumPy or CuPy array, on the same memory where JAX allows it.

    JAX's stream waits for CuPy's current one, not the host.  JAX takes an array as it is when its
    elements fill their memory without gaps, in any order of axes, and the address is a multiple of
    16 bytes (on the CPU of what its version asks for there, so far up to 64); others are copied.
    64-bit types become 32-bit ones unless JAX is told otherwise.

    To JAX an array never changes: do not write to the memory any more.  Raises as ``to_torch``.
    """
    _check_array(array)
    jax_dlpack = abi.imported("jax.dlpack")
    original = array
    try:
        if array.size == 0:
            return _empty_jax(array)
        if not _is_dense(array) or (is_cupy(array) and pointer(array) % ALIGNMENT):
            array = _copied(array)
        if not is_cupy(array) and not array.flags.writeable:
            array = _writable_alias(array)
        return jax_dlpack.from_dlpack(_Shared(array))
    except _REFUSALS as error:
        _refuse(original, "JAX", error)


def _is_dense(array: Array) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of axes."""
    expected = array.itemsize
    for stride, extent in sorted(zip(array.strides, array.shape, strict=True)):
        if extent > 1:
            if stride != expected:
                return False
            expected *= extent
    return True


def _copied(array: Array) -> Array:
    if not is_cupy(array):
        return np.array(_bits(array), order="C").view(array.dtype)
    with array.device:
        return _bits(array).copy(order="C").view(array.dtype)


def _writable_alias(array: np.ndarray) -> np.ndarray:
    """For JAX, which never writes, but asks for the kind of capsule that cannot say read-only."""
    raw = _bits(array)
    interface = dict(raw.__array_interface__, data=(pointer(raw), False))
    return np.asarray(SimpleNamespace(__array_interface__=interface, owner=raw)).view(array.dtype)


def _empty_jax(array: Array) -> Any:
    jax = abi.imported("jax")
    backend, ordinal = ("cuda", array.device.id) if is_cupy(array) else ("cpu", 0)
    devices = {device.local_hardware_id: device for device in jax.local_devices(backend=backend)}
    return jax.device_put(np.empty(array.shape, array.dtype), devices.get(ordinal))
