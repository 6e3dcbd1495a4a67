"""Arrays of other libraries seen as NumPy or CuPy arrays, and the way back; nothing is copied.

``as_native`` takes what a user has and returns a view on the same memory:

==============  ================================================  ==================================
array           road                                              result
==============  ================================================  ==================================
NumPy, CuPy     none                                              the array itself
torch, CUDA     ``data_ptr``, shape and strides (a DLPack         CuPy; keeps the tensor's storage
                exchange would cost ten times as much)
torch, CPU      ``Tensor.numpy``                                  NumPy; keeps the tensor's storage
JAX             DLPack; JAX arrays are immutable                  CuPy, or NumPy and read-only
anything else   DLPack, either kind of capsule                    CuPy, or NumPy
==============  ================================================  ==================================

FP8 and bfloat16 get the dtypes of ``ml_dtypes``.  CuPy has no read-only arrays: memory that its
producer forbids to write is refused with ``writable=True``, otherwise left to the caller's care.

Streams: a DLPack producer is told CuPy's current stream of its device and lets that stream wait
for work that is still under way; the host waits for nothing.  Such memory goes back to its producer
when the last view of it is gone and that stream is past what it had been given by then; this is
looked at when the next such array comes or goes, so that memory can stay longer than its views.
Work on torch tensors belongs on torch's current stream (``current_stream``), where nothing waits.

``share``, ``to_torch`` and ``to_jax`` are the way back, ``as_framework`` chooses among them,
``empty`` makes room for a result.  torch and JAX are imported only by what makes their arrays, CuPy
only for memory of a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from cpgemm import dlpack_abi as abi
from cpgemm.dlpack_export import (
    KNOWN,
    carrier,
    share,
    to_jax,
    to_torch,
    torch_dtype,
    torch_dtypes,
)
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import Array, device_of

__all__ = [
    "Framework",
    "as_framework",
    "as_native",
    "current_stream",
    "empty",
    "framework_of",
    "framework_of_type",
    "share",
    "stream_getter",
    "to_jax",
    "to_torch",
]

Framework = Literal["numpy", "cupy", "torch", "jax", "dlpack"]
"""Whose arrays: ``"dlpack"`` stands for any other library that speaks the protocol."""
_Road = Callable[[str, Any, bool], Array]

_LEGACY_STREAM = 1  # how the protocol spells stream 0
# What producers raise when they cannot export: JAX for sharded and for deleted arrays, and whoever
# lacks one of the two methods.
_REFUSALS = (AssertionError, AttributeError, BufferError, RuntimeError, TypeError, ValueError)


# ------------------------------------------------------------------------------- telling them apart


def framework_of(value: object) -> Framework | None:
    """Whose array ``value`` is, by its type alone; None when it is no array.

    ``"dlpack"``: any other object with ``__dlpack__`` and ``__dlpack_device__``.
    """
    return _road(type(value))[0]


def framework_of_type(kind: type) -> Framework | None:
    """``framework_of`` for objects of the type ``kind``."""
    return _road(kind)[0]


_roads: dict[type, tuple[Framework | None, _Road]] = {}  # found out once per type


def _road(kind: type) -> tuple[Framework | None, _Road]:
    """Framework of a type, and how its objects become native."""
    found = _roads.get(kind)
    if found is None:
        found = _roads[kind] = _find_road(kind)
    return found


def _find_road(kind: type) -> tuple[Framework | None, _Road]:
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__}
    if ("numpy", "ndarray") in bases:
        return "numpy", _from_numpy
    if ("cupy", "ndarray") in bases:
        return "cupy", _from_cupy
    if ("torch", "Tensor") in bases:
        traced = bases & {("torch", "FakeTensor"), ("torch", "FunctionalTensor")}
        return "torch", _refuse_traced_tensor if traced else _from_torch
    if ("jax", "Tracer") in bases:
        return "jax", _refuse_tracer
    if bases & {("jaxlib", "ArrayImpl"), ("jax", "ArrayImpl"), ("jax", "Array")}:
        return "jax", _from_jax
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return "dlpack", _from_dlpack
    return None, _refuse


def _refuse(name: str, value: object, writable: bool) -> NoReturn:
    reject(
        name,
        "must be a NumPy, CuPy, torch or JAX array, or another one that speaks DLPack",
        type(value).__qualname__,
        "Convert it, for example with numpy.asarray.",
        kind=ArgumentTypeError,
    )


def _refuse_tracer(name: str, value: object, writable: bool) -> NoReturn:
    reject(
        name,
        "must be a concrete array; inside jit, vmap or grad JAX has no memory to share",
        type(value).__qualname__,
        "Call it outside of them, or use cpgemm.jax.",
        kind=ArgumentTypeError,
    )


def _refuse_traced_tensor(name: str, value: object, writable: bool) -> NoReturn:
    reject(
        name,
        "must have memory; torch.compile and torch.export trace with tensors that have none",
        type(value).__qualname__,
        "Use the operators of cpgemm.torch, which can be traced.",
        kind=ArgumentTypeError,
    )


def _refuse_writing(name: str, got: str) -> NoReturn:
    reject(
        name, "must be writable", got, "Give another array, or take the result that is returned."
    )


# --------------------------------------------------------------------------------------- the way in


def as_native(name: str, value: Any, *, writable: bool = False) -> Array:
    """A NumPy or CuPy array on the memory of ``value``: same address, shape, strides and dtype.

    ``name`` is what error messages call it; ``writable`` says that it is going to be written.  The
    result keeps the memory alive; only a torch storage on CUDA that is resized in place is beyond
    its power.

    Raises ``ArgumentTypeError`` for what is no array, has another dtype than those of the bridge
    (integers, bool, floats of 16 to 64 bits, bfloat16, FP8), or is a tracer's stand-in (JAX's,
    ``torch.compile``'s); ``ArgumentError`` for tensors that require gradients, arrays over several
    devices, memory of neither CPU nor CUDA, and for read-only arrays with ``writable=True``;
    ``MissingDependencyError`` for CUDA memory without CuPy.
    """
    return _road(type(value))[1](name, value, writable)


def _from_numpy(name: str, array: Any, writable: bool) -> Array:
    if writable and not array.flags.writeable:
        _refuse_writing(name, "a read-only NumPy array")
    return array


def _from_cupy(name: str, array: Any, writable: bool) -> Array:
    return array


def _from_torch(name: str, tensor: Any, writable: bool) -> Array:
    if tensor.requires_grad:
        reject(
            name,
            "must not require gradients",
            "a tensor with requires_grad=True",
            "Call .detach() on it, or use cpgemm.torch.Linear, which computes gradients.",
        )
    dtype = torch_dtypes().get(tensor.dtype)
    if dtype is None:
        reject(name, KNOWN, tensor.dtype, "Convert it.", kind=ArgumentTypeError)
    on_gpu = tensor.is_cuda
    if not (on_gpu or tensor.is_cpu):
        reject(
            name,
            "must be in CPU or CUDA memory",
            f"a tensor on device {tensor.device}",
            "Give a tensor of one of them.",
        )
    try:
        address = tensor.data_ptr()
        if not address and tensor.numel():
            raise RuntimeError("it wraps other tensors")
        if tensor.is_neg():
            raise RuntimeError("its signs have yet to be flipped")
        if not on_gpu:
            # Through torch itself, which then forbids to resize the storage.
            return tensor.view(torch_dtype(carrier(dtype))).numpy().view(dtype)
        # The storage is kept and not the tensor, which lets go of it in ``tensor.data = ...``.
        storage, strides = tensor.untyped_storage(), None
        if not tensor.is_contiguous():
            strides = tuple([dtype.itemsize * stride for stride in tensor.stride()])
        return abi.cupy_view(
            address, storage.nbytes(), storage, tensor.get_device(), tensor.shape, dtype, strides
        )
    except (RuntimeError, TypeError) as error:
        reject(
            name,
            "must be a tensor with strides and with memory of its own",
            f"{type(tensor).__qualname__} of layout {tensor.layout}: {error}",
            "Make an ordinary tensor of it, for example with .to_dense() or .resolve_neg().",
        )


def _from_jax(name: str, array: Any, writable: bool) -> Array:
    if writable:
        _refuse_writing(name, "a JAX array, which is immutable")
    return _from_dlpack(name, array, False, read_only=True)


def _from_dlpack(name: str, value: Any, writable: bool, *, read_only: bool = False) -> Array:
    kind, ordinal = _device(name, value)
    if kind in (abi.CUDA, abi.CUDA_MANAGED):
        cuda = abi.imported("cupy").cuda
        abi.release_retired()
        with cuda.Device(ordinal):
            stream = cuda.get_current_stream()
            managed = _exported(name, value, stream=stream.ptr or _LEGACY_STREAM)
        owner: Any = abi.OnStream(managed, cuda, stream, ordinal)
    elif kind in (abi.CPU, abi.CUDA_HOST):
        owner = managed = _exported(name, value)
    else:
        reject(
            name,
            "must be in CPU or CUDA memory",
            f"DLPack device type {kind}",
            "Give an array of one of them.",
        )
    dtype = abi.DTYPES.get(managed.dtype)
    if dtype is None:
        code, size, lanes = managed.dtype
        got = f"{lanes} x {size} bits of DLPack type code {code}"
        reject(name, KNOWN, got, "Convert it.", kind=ArgumentTypeError)
    read_only = read_only or bool(managed.flags & abi.READ_ONLY)
    if writable and read_only:
        _refuse_writing(name, f"a read-only {type(value).__qualname__}")
    if writable and managed.flags & abi.IS_COPIED:
        _refuse_writing(name, f"a copy of a {type(value).__qualname__}")
    shape, strides = managed.shape, managed.strides
    if strides is not None:
        strides = tuple([dtype.itemsize * stride for stride in strides])
    if owner is managed:
        return abi.numpy_view(managed.address, owner, shape, dtype, strides, not read_only)
    if kind == abi.CUDA_MANAGED and managed.address:
        ordinal = -1  # the protocol says 0 wherever managed memory is; the driver knows better
    size = dtype.itemsize * math.prod(shape)
    return abi.cupy_view(managed.address, size, owner, ordinal, shape, dtype, strides)


def _device(name: str, value: Any) -> tuple[int, int]:
    """DLPack device type and ordinal of ``value``."""
    try:
        kind, ordinal = value.__dlpack_device__()
        return int(kind), int(ordinal)
    except _REFUSALS as error:
        _refuse_export(name, value, error)


def _exported(name: str, value: Any, **stream: int) -> abi.Managed:
    """The tensor of ``value``, ready for what follows on ``stream`` when one is given."""
    try:
        try:
            capsule = value.__dlpack__(**stream, max_version=abi.MAX_VERSION, copy=False)
        except TypeError:  # a producer of before the array API of 2023
            capsule = value.__dlpack__(**stream)
        return abi.take(capsule)
    except _REFUSALS as error:
        _refuse_export(name, value, error)


def _refuse_export(name: str, value: Any, error: Exception) -> NoReturn:
    mend = "Give an array that DLPack can express."
    if framework_of(value) == "jax":
        mend = "Give a live array on one device, for example x.addressable_shards[0].data."
    reject(
        name,
        "must be exportable through DLPack without a copy",
        f"{type(value).__qualname__}, which raised {type(error).__name__}: {error}",
        mend,
    )


# -------------------------------------------------------------------------------------- the way out


def as_framework(framework: Framework, array: Array) -> Any:
    """A NumPy or CuPy array as an array of ``framework``, as ``to_torch`` and ``to_jax`` do it.

    For ``"dlpack"``, which names no library to make arrays with, it is the array itself.
    """
    if framework == "torch":
        return to_torch(array)
    return to_jax(array) if framework == "jax" else array


def empty(framework: Framework, shape: Sequence[int], dtype: Any, like: Any) -> Any:
    """Room for a result: an uninitialised C-contiguous array where ``like`` is.

    ``shape``: its extents.  ``dtype``: NumPy's or ml_dtypes'.  ``like`` is an array of any
    framework.  ``"torch"``: a tensor from torch's own allocator (on CUDA its caching allocator, for
    torch's current stream).  Otherwise a CuPy array, or a NumPy array on the CPU.  For JAX too: it
    gives no memory that others may write, so that the result is handed over by ``as_framework``
    after the work that writes it was enqueued.  Raises ``MissingDependencyError`` without the
    library.
    """
    kind = np.dtype(dtype)
    if framework == "torch":
        torch = abi.imported("torch")
        place = like.device if framework_of(like) == "torch" else _place("like", like)
        return torch.empty(tuple(shape), dtype=torch_dtype(kind), device=place)
    place = _place("like", like)
    if place == "cpu":
        return np.empty(tuple(shape), kind)
    cupy = abi.imported("cupy")
    with cupy.cuda.Device(int(place.partition(":")[2])):
        return cupy.empty(tuple(shape), carrier(kind)).view(kind)


def _place(name: str, value: Any) -> str:
    """``"cpu"`` or ``"cuda:<ordinal>"``, whatever the framework."""
    if framework_of(value) in ("numpy", "cupy"):
        return device_of(value)
    if framework_of(value) == "torch":
        return f"cuda:{value.get_device()}" if value.is_cuda else "cpu"
    kind, ordinal = _device(name, value)
    return f"cuda:{ordinal}" if kind in (abi.CUDA, abi.CUDA_MANAGED) else "cpu"


@functools.cache
def stream_getter(framework: Framework) -> Callable[[int], int]:
    """``current_stream`` for one framework, to be kept by who calls it often."""
    if framework == "torch":
        torch = abi.imported("torch")
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        return raw or (lambda ordinal: torch.cuda.current_stream(ordinal).cuda_stream)
    present = abi.imported("cupy").cuda.get_current_stream
    return lambda ordinal: present(ordinal).ptr


def current_stream(framework: Framework, device_index: int) -> int:
    """Handle of the CUDA stream on which work for arrays of ``framework`` belongs.

    torch's current stream of device ``device_index`` for torch, CuPy's for all others: what comes
    through DLPack was made to be ready there.
    """
    return stream_getter(framework)(device_index)
