"""XLA's foreign function interface in ctypes: a Python function as the target of a custom call.

XLA calls ``XLA_FFI_Error* handler(XLA_FFI_CallFrame*)`` when a compiled program reaches a custom
call.  ``target`` makes such a handler from a Python function; ctypes takes the GIL on whichever
thread XLA calls from and gives it back on return.  The function gets a ``Call``: addresses, shapes
and dtypes of the buffers, attributes, and on a GPU the stream.

The structures are those of ``xla/ffi/api/c_api.h``, which every jaxlib carries; those of API
versions 0.3 and 0.4 agree in everything that is read here.  XLA puts the size of each structure
into it and promises to serve handlers of an older version.  Whatever is not as described here
becomes an XLA error, as does every exception: nothing is guessed, and no exception is lost.

Only ctypes and NumPy are needed; JAX is not imported.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cpgemm.errors import ArgumentError, ArgumentTypeError, CpgemmError, DeviceError

__all__ = ["API_VERSION", "Buffer", "Call", "Handler", "target"]

API_VERSION = (0, 4)  # the newest one whose header these structures were compared with

_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_METADATA = 1  # XLA_FFI_Extension_Metadata
_BUFFER = 1  # XLA_FFI_ArgType_BUFFER and XLA_FFI_RetType_BUFFER
_SCALAR, _STRING = 3, 4  # XLA_FFI_AttrType
_INVALID_ARGUMENT, _FAILED_PRECONDITION, _INTERNAL = 3, 9, 13  # XLA_FFI_Error_Code

# XLA_FFI_DataType, as far as buffers and attributes of ours can have it.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.bool_),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    16: np.dtype(ml_dtypes.bfloat16),
    20: np.dtype(ml_dtypes.float8_e4m3fn),
}


# ---------------------------------------------------------------------------- c_api.h in ctypes

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_POINTERS, _INTS = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
# Most structures begin with these.
_HEAD: list[tuple[str, Any]] = [("struct_size", _SIZE), ("extension_start", _POINTER)]


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", _SIZE), ("type", _INT), ("next", _POINTER)]


class _ApiVersion(ctypes.Structure):
    _fields_ = [*_HEAD, ("major_version", _INT), ("minor_version", _INT)]


class _Metadata(ctypes.Structure):
    """Up to ``traits``: what follows is for handlers with state, and XLA zeroes it."""

    _fields_ = [
        ("struct_size", _SIZE),
        ("api_version", _ApiVersion),
        ("traits", ctypes.c_uint32),
    ]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("extension_base", _Extension), ("metadata", _POINTER)]


# Of the many functions, those up to the last that is called here.
_FUNCTIONS = (
    "Error_Create",
    "Error_GetMessage",  # Error_GetDetails since 0.4
    "Error_Destroy",
    "Handler_Register",
    "Stream_Get",
)


class _Api(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("api_version", _ApiVersion),
        ("internal_api", _POINTER),
        *((name, _POINTER) for name in _FUNCTIONS),
    ]


class _ErrorCreateArgs(ctypes.Structure):
    _fields_ = [*_HEAD, ("message", ctypes.c_char_p), ("errc", _INT)]


class _ErrorDestroyArgs(ctypes.Structure):
    _fields_ = [*_HEAD, ("error", _POINTER)]


class _StreamGetArgs(ctypes.Structure):
    _fields_ = [*_HEAD, ("ctx", _POINTER), ("stream", _POINTER)]


class _Buffer(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("dtype", _INT),
        ("data", _POINTER),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    ]


class _ByteSpan(ctypes.Structure):
    _fields_ = [("ptr", _POINTER), ("len", _SIZE)]


class _Scalar(ctypes.Structure):
    _fields_ = [("dtype", _INT), ("value", _POINTER)]


class _Args(ctypes.Structure):
    """XLA_FFI_Args, and XLA_FFI_Rets, whose last field is ``rets``."""

    _fields_ = [*_HEAD, ("size", ctypes.c_int64), ("types", _INTS), ("args", _POINTERS)]


class _Attrs(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("size", ctypes.c_int64),
        ("types", _INTS),
        ("names", _POINTERS),
        ("attrs", _POINTERS),
    ]


class _CallFrame(ctypes.Structure):
    """Up to ``attrs``, as XLA counts its size; a future for asynchronous handlers follows."""

    _fields_ = [
        *_HEAD,
        ("api", _POINTER),
        ("ctx", _POINTER),
        ("stage", _INT),
        ("args", _Args),
        ("rets", _Args),
        ("attrs", _Attrs),
    ]


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_API_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def _size_through(structure: type[ctypes.Structure], field: str) -> int:
    """Bytes from the start of a structure to the end of a field, XLA's measure of its size."""
    member = getattr(structure, field)
    return int(member.offset + member.size)


# ---------------------------------------------------------------------- what a function is given


class Buffer(NamedTuple):
    """A row-major array of XLA's.  ``pointer`` may be 0 when there are no elements."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Call:
    """One execution of a custom call; valid until the function returns.

    ``arguments`` and ``results`` are ``Buffer``s, ``attributes`` maps names to int, bool or str.
    """

    def __init__(self, frame: _CallFrame, api: _Api) -> None:
        self._context = frame.ctx
        self._api = api
        self.arguments = _buffers("arguments", frame.args)
        self.results = _buffers("results", frame.rets)
        self.attributes = _attributes(frame.attrs)

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream that this call's work belongs on; ``DeviceError`` on a CPU."""
        args = _StreamGetArgs(struct_size=ctypes.sizeof(_StreamGetArgs), ctx=self._context)
        error = _API_FUNCTION(self._api.Stream_Get)(ctypes.addressof(args))
        if error:
            size = ctypes.sizeof(_ErrorDestroyArgs)
            destroy = _ErrorDestroyArgs(struct_size=size, error=error)
            _API_FUNCTION(self._api.Error_Destroy)(ctypes.addressof(destroy))
            raise DeviceError("XLA: gives this call no CUDA stream; is its platform CUDA?")
        return int(args.stream or 0)


def _buffers(name: str, items: _Args) -> tuple[Buffer, ...]:
    return tuple(_buffer(f"{name}[{i}]", items, i) for i in range(items.size))


def _buffer(name: str, items: _Args, index: int) -> Buffer:
    if items.types[index] != _BUFFER:
        raise DeviceError(f"XLA: {name} must be a buffer; got type {items.types[index]}")
    buffer = _Buffer.from_address(items.args[index])
    _check_size(f"XLA_FFI_Buffer of {name}", buffer.struct_size, ctypes.sizeof(_Buffer))
    if buffer.dtype not in _DTYPES:
        raise DeviceError(f"XLA: {name} has a dtype that is not known here, {buffer.dtype}")
    return Buffer(buffer.data or 0, tuple(buffer.dims[: buffer.rank]), _DTYPES[buffer.dtype])


def _attributes(attrs: _Attrs) -> dict[str, Any]:
    return {
        _string(attrs.names[i]): _attribute(attrs.types[i], attrs.attrs[i])
        for i in range(attrs.size)
    }


def _attribute(kind: int, address: int) -> Any:
    if kind == _STRING:
        return _string(address)
    if kind == _SCALAR:
        scalar = _Scalar.from_address(address)
        dtype = _DTYPES.get(scalar.dtype)
        if dtype is not None and dtype.kind in "bi":
            return np.frombuffer(ctypes.string_at(scalar.value, dtype.itemsize), dtype)[0].item()
    raise DeviceError(f"XLA: attributes must be integers, bools or strings; got type {kind}")


def _string(address: int) -> str:
    span = _ByteSpan.from_address(address)
    return ctypes.string_at(span.ptr, span.len).decode() if span.len else ""


# ------------------------------------------------------------------------------------- handlers


class Handler:
    """A Python function that XLA can call.

    ``function`` is called with a ``Call`` and may be replaced.  ``pointer`` is the C function.  A
    handler must live as long as the process: XLA keeps its address.
    """

    def __init__(self, function: Callable[[Call], None]) -> None:
        self.function = function
        self.pointer = _HANDLER(self._enter)

    def _enter(self, address: int) -> int | None:
        """What XLA calls.  ctypes would print an exception and return success: none may leave."""
        api: _Api | None = None
        try:
            frame = _CallFrame.from_address(address)
            api = _Api.from_address(frame.api)
            if frame.extension_start and _describe(frame.extension_start, api):
                return None
            _check_frame(frame, api)
            self.function(Call(frame, api))
        except BaseException as error:
            if api is None:
                raise
            return _error(api, error)
        return None


def _describe(extension_start: int, api: _Api) -> bool:
    """Answer the question for a handler's metadata, if this is it: API version, no traits.

    Of the traits there is one, that calls may be captured into a CUDA graph and replayed without
    the handler.  It is not claimed: graphs are then made without these calls.

    Sizes that do not fit are not an error here but at the first call, because registering may
    happen while JAX sets up its platform, which it would drop altogether.
    """
    extension = _MetadataExtension.from_address(extension_start)
    if extension.extension_base.type != _METADATA:
        return False
    metadata = _Metadata.from_address(extension.metadata)
    if metadata.struct_size >= _size_through(_Metadata, "traits"):
        major, minor = API_VERSION
        version = metadata.api_version
        version.struct_size = ctypes.sizeof(_ApiVersion)
        version.extension_start = None
        version.major_version = major
        version.minor_version = min(minor, api.api_version.minor_version)
        metadata.traits = 0
    return True


def _check_frame(frame: _CallFrame, api: _Api) -> None:
    """``DeviceError`` unless the structures are laid out as this module reads them."""
    version = api.api_version
    if version.major_version != API_VERSION[0]:
        raise DeviceError(
            f"XLA: the FFI API must be of major version {API_VERSION[0]}; got "
            f"{version.major_version}.{version.minor_version}. Use a JAX that cpgemm knows."
        )
    _check_size("XLA_FFI_Api", api.struct_size, ctypes.sizeof(_Api))
    _check_size("XLA_FFI_CallFrame", frame.struct_size, _size_through(_CallFrame, "attrs"))
    # These are fields of the frame: a larger one would move those behind it.
    for name, part in (("Args", frame.args), ("Rets", frame.rets), ("Attrs", frame.attrs)):
        _check_size(f"XLA_FFI_{name}", part.struct_size, ctypes.sizeof(part), exact=True)
    if frame.stage != _EXECUTE:
        raise DeviceError(f"XLA: the handler is for execution only; got stage {frame.stage}")


def _check_size(name: str, got: int, known: int, *, exact: bool = False) -> None:
    if got < known or (exact and got != known):
        raise DeviceError(
            f"XLA: {name} must have {'' if exact else 'at least '}{known} bytes; got {got}. "
            "Use a JAX that cpgemm knows."
        )


def _error(api: _Api, error: BaseException) -> int | None:
    """An XLA_FFI_Error with the text of an exception; XLA owns it."""
    code = _INTERNAL
    if isinstance(error, (ArgumentError, ArgumentTypeError)):
        code = _INVALID_ARGUMENT
    elif isinstance(error, CpgemmError):
        code = _FAILED_PRECONDITION
    text = f"{type(error).__name__}: {error}".replace("\0", "?")
    args = _ErrorCreateArgs(
        struct_size=_size_through(_ErrorCreateArgs, "errc"),
        message=text.encode("utf-8", "replace"),
        errc=code,
    )
    created: int | None = _API_FUNCTION(api.Error_Create)(ctypes.addressof(args))
    return created


_targets: dict[tuple[str, str], Handler] = {}
_lock = threading.Lock()


def target(name: str, platform: str, function: Callable[[Call], None]) -> Handler:
    """The handler of a custom call on a platform ("cpu", "CUDA"), kept for the process's life.

    XLA refuses a second address for a name: asked again, the same handler gets the new function.
    """
    with _lock:
        handler = _targets.setdefault((name, platform), Handler(function))
        handler.function = function
        return handler
