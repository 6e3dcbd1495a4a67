"""XLA's FFI in ctypes: the structures against XLA's header, and calls as XLA would make them.

Frames are built by hand here; tests/test_jax.py has XLA itself call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cpgemm import xla_ffi
from cpgemm.errors import ArgumentError, DeviceError
from cpgemm.layout import FP8
from cpgemm.xla_ffi import Buffer, Handler, target

# ctypes class, name in c_api.h, fields of ours that have another name there
STRUCTURES = (
    (xla_ffi._ApiVersion, "XLA_FFI_Api_Version", {}),
    (xla_ffi._Metadata, "XLA_FFI_Metadata", {}),
    (xla_ffi._MetadataExtension, "XLA_FFI_Metadata_Extension", {}),
    (
        xla_ffi._Api,
        "XLA_FFI_Api",
        {name: f"XLA_FFI_{name}" for name in xla_ffi._FUNCTIONS},
    ),
    (xla_ffi._ErrorCreateArgs, "XLA_FFI_Error_Create_Args", {}),
    (xla_ffi._ErrorDestroyArgs, "XLA_FFI_Error_Destroy_Args", {}),
    (xla_ffi._StreamGetArgs, "XLA_FFI_Stream_Get_Args", {}),
    (xla_ffi._Buffer, "XLA_FFI_Buffer", {}),
    (xla_ffi._ByteSpan, "XLA_FFI_ByteSpan", {}),
    (xla_ffi._Scalar, "XLA_FFI_Scalar", {}),
    (xla_ffi._Args, "XLA_FFI_Args", {}),
    (xla_ffi._Args, "XLA_FFI_Rets", {"args": "rets"}),
    (xla_ffi._Attrs, "XLA_FFI_Attrs", {}),
    (xla_ffi._CallFrame, "XLA_FFI_CallFrame", {}),
)
RENAMED = {  # by API version 0.4
    "XLA_FFI_Error_GetMessage": "XLA_FFI_Error_GetDetails",
}


def header() -> Path:
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        pytest.skip("jaxlib, which carries XLA's header, is not installed")
    return Path(found.origin).parent / "include/xla/ffi/api/c_api.h"


def compile_and_run(tmp_path: Path, body: str) -> list[str]:
    """Words that a C program over XLA's header prints."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(
        f'#include <stdio.h>\n#include "{header()}"\nint main(void) {{\n{body}\nreturn 0;\n}}\n'
    )
    # As C++, because the header uses structures without the word in a few places.
    done = subprocess.run(
        [compiler, "-x", "c++", "-w", "-o", program, source, "-Wno-invalid-offsetof"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()


def test_structures_lie_as_in_the_header_of_this_jaxlib(tmp_path: Path) -> None:
    text = header().read_text()
    body, expected = [], []
    for structure, name, other in STRUCTURES:
        for field, *_ in structure._fields_:
            theirs = other.get(field, field)
            if theirs not in text:
                theirs = RENAMED[theirs]
            body.append(
                f'printf("%zu %zu\\n", offsetof({name}, {theirs}), sizeof((({name}*)0)->{theirs}));'
            )
            member = getattr(structure, field)
            expected += [f"{name}.{field}", member.offset, member.size]
    got = iter(compile_and_run(tmp_path, "\n".join(body)))
    for field, offset, size in zip(expected[::3], expected[1::3], expected[2::3], strict=True):
        theirs = (int(next(got)), int(next(got)))
        assert theirs == (offset, size), field


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    names = {
        "XLA_FFI_ExecutionStage_EXECUTE": xla_ffi._EXECUTE,
        "XLA_FFI_Extension_Metadata": xla_ffi._METADATA,
        "XLA_FFI_ArgType_BUFFER": xla_ffi._BUFFER,
        "XLA_FFI_RetType_BUFFER": xla_ffi._BUFFER,
        "XLA_FFI_AttrType_SCALAR": xla_ffi._SCALAR,
        "XLA_FFI_AttrType_STRING": xla_ffi._STRING,
        "XLA_FFI_Error_Code_INVALID_ARGUMENT": xla_ffi._INVALID_ARGUMENT,
        "XLA_FFI_Error_Code_FAILED_PRECONDITION": xla_ffi._FAILED_PRECONDITION,
        "XLA_FFI_Error_Code_INTERNAL": xla_ffi._INTERNAL,
    }
    short = {
        "PRED": "bool", "S32": "int32", "S64": "int64", "F16": "float16", "F32": "float32",
        "BF16": "bfloat16", "F8E4M3FN": "float8_e4m3fn",
    }  # fmt: skip
    by_name = {str(dtype): code for code, dtype in xla_ffi._DTYPES.items()}
    assert set(short.values()) == set(by_name)
    names |= {f"XLA_FFI_DataType_{theirs}": by_name[ours] for theirs, ours in short.items()}
    got = compile_and_run(tmp_path, "\n".join(f'printf("%d\\n", (int){name});' for name in names))
    assert dict(zip(names, map(int, got), strict=True)) == names
    (major,) = compile_and_run(tmp_path, 'printf("%d\\n", XLA_FFI_API_MAJOR);')
    assert int(major) == xla_ffi.API_VERSION[0]


# ---------------------------------------------------------------------------- frames by hand

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
TOKEN = 0x1000  # stands for an XLA_FFI_Error*


class Xla:
    """Just enough of XLA to call a handler: an API that keeps what it is told."""

    def __init__(self) -> None:
        self.errors: list[tuple[int, str]] = []
        self.destroyed: list[int] = []
        self.refuses = False
        self.kept: list[object] = []
        self.api = xla_ffi._Api(struct_size=ctypes.sizeof(xla_ffi._Api))
        self.api.api_version.major_version = 0
        self.api.api_version.minor_version = 3
        for name in ("Error_Create", "Error_Destroy", "Stream_Get"):
            function = FUNCTION(getattr(self, name.lower()))
            self.kept.append(function)
            setattr(self.api, name, ctypes.cast(function, ctypes.c_void_p).value)

    def error_create(self, address: int) -> int:
        args = xla_ffi._ErrorCreateArgs.from_address(address)
        self.errors.append((args.errc, args.message.decode()))
        return TOKEN

    def error_destroy(self, address: int) -> None:
        self.destroyed.append(xla_ffi._ErrorDestroyArgs.from_address(address).error)

    def stream_get(self, address: int) -> int | None:
        args = xla_ffi._StreamGetArgs.from_address(address)
        assert args.ctx == 77
        args.stream = 0xABCD
        return TOKEN + 1 if self.refuses else None

    def frame(self, arguments=(), results=(), **attributes) -> xla_ffi._CallFrame:
        frame = xla_ffi._CallFrame(
            struct_size=xla_ffi._size_through(xla_ffi._CallFrame, "attrs"),
            api=ctypes.addressof(self.api),
            ctx=77,
            stage=xla_ffi._EXECUTE,
        )
        for part, buffers in ((frame.args, arguments), (frame.rets, results)):
            part.struct_size = ctypes.sizeof(xla_ffi._Args)
            self._fill(part, [self._buffer(*buffer) for buffer in buffers], "args", 1)
        frame.attrs.struct_size = ctypes.sizeof(xla_ffi._Attrs)
        self._fill(frame.attrs, [self._span(name) for name in attributes], "names", 1)
        kinds = [4 if isinstance(value, str) else 3 for value in attributes.values()]
        values = [
            self._span(value) if isinstance(value, str) else self._scalar(value)
            for value in attributes.values()
        ]
        self._fill(frame.attrs, values, "attrs", 3)
        for index, kind in enumerate(kinds):
            frame.attrs.types[index] = kind
        return frame

    def _fill(self, part, items, field: str, kind: int) -> None:
        pointers = (ctypes.c_void_p * max(len(items), 1))(*map(ctypes.addressof, items))
        kinds = (ctypes.c_int * max(len(items), 1))(*[kind] * len(items))
        self.kept += [items, pointers, kinds]
        part.size = len(items)
        part.types = ctypes.cast(kinds, ctypes.POINTER(ctypes.c_int))
        setattr(part, field, ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p)))

    def _buffer(self, code: int, pointer: int, shape: tuple[int, ...]) -> xla_ffi._Buffer:
        dims = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self.kept.append(dims)
        return xla_ffi._Buffer(
            struct_size=ctypes.sizeof(xla_ffi._Buffer),
            dtype=code,
            data=pointer,
            rank=len(shape),
            dims=ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64)),
        )

    def _span(self, text: str) -> xla_ffi._ByteSpan:
        memory = ctypes.create_string_buffer(text.encode())
        self.kept.append(memory)
        return xla_ffi._ByteSpan(ptr=ctypes.addressof(memory), len=len(text.encode()))

    def _scalar(self, value: int | bool) -> xla_ffi._Scalar:
        memory = ctypes.c_bool(value) if isinstance(value, bool) else ctypes.c_int64(value)
        self.kept.append(memory)
        return xla_ffi._Scalar(
            dtype=1 if isinstance(value, bool) else 5, value=ctypes.addressof(memory)
        )

    def call(self, function, frame=None) -> int | None:
        frame = self.frame() if frame is None else frame
        self.kept.append(frame)
        return Handler(function).pointer(ctypes.addressof(frame))


def test_a_call_shows_buffers_and_attributes() -> None:
    xla, seen = Xla(), []
    frame = xla.frame(
        [(20, 0x100, (4, 16)), (11, 0, (0, 3))], [(16, 0x200, ())], n=-7, flag=True, text="ab"
    )

    def function(call) -> None:
        seen.append((call.arguments, call.results, call.attributes, call.stream))

    assert xla.call(function, frame) is None and not xla.errors
    ((arguments, results, attributes, stream),) = seen
    assert arguments == (
        Buffer(0x100, (4, 16), FP8),
        Buffer(0, (0, 3), np.dtype(np.float32)),
    )
    assert [buffer.size for buffer in arguments] == [64, 0]
    assert results[0].shape == () and str(results[0].dtype) == "bfloat16"
    assert attributes == {"n": -7, "flag": True, "text": "ab"} and attributes["flag"] is True
    assert stream == 0xABCD


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArgumentError("a: wrong"), 3),
        (DeviceError("no GPU"), 9),
        (ValueError("ä\0b"), 13),
        (KeyboardInterrupt(), 13),
        (SystemExit(2), 13),
    ],
)
def test_every_exception_becomes_an_error(error: BaseException, code: int) -> None:
    xla = Xla()

    def function(call) -> None:
        raise error

    assert xla.call(function) == TOKEN
    assert xla.errors == [(code, f"{type(error).__name__}: {error}".replace("\0", "?"))]


def test_no_stream_is_an_error_and_xla_is_told_to_free_its_own() -> None:
    xla = Xla()
    xla.refuses = True
    assert xla.call(lambda call: call.stream) == TOKEN
    assert xla.destroyed == [TOKEN + 1]
    assert xla.errors == [
        (9, "DeviceError: XLA: gives this call no CUDA stream; is its platform CUDA?")
    ]


def _grow(part: str):
    def change(xla: Xla, frame: xla_ffi._CallFrame) -> None:
        getattr(frame, part).struct_size += 8

    return change


def _set(name: str, value: int):
    def change(xla: Xla, frame: xla_ffi._CallFrame) -> None:
        setattr(frame, name, value)

    return change


def _old_api(xla: Xla, frame: xla_ffi._CallFrame) -> None:
    xla.api.struct_size -= 8


def _other_major(xla: Xla, frame: xla_ffi._CallFrame) -> None:
    xla.api.api_version.major_version = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_grow("args"), "XLA_FFI_Args must have 40 bytes; got 48"),
        (_grow("rets"), "XLA_FFI_Rets must have 40 bytes; got 48"),
        (_grow("attrs"), "XLA_FFI_Attrs must have 48 bytes; got 56"),
        (_set("struct_size", 160), "XLA_FFI_CallFrame must have at least 168 bytes; got 160"),
        (_set("stage", 1), "the handler is for execution only; got stage 1"),
        (_old_api, "XLA_FFI_Api must have at least 88 bytes; got 80"),
        (_other_major, "must be of major version 0; got 1.3"),
    ],
)
def test_another_layout_is_an_error_and_nothing_is_read(change, message: str) -> None:
    xla = Xla()
    frame = xla.frame()
    change(xla, frame)
    called: list[object] = []
    assert xla.call(called.append, frame) == TOKEN
    assert message in xla.errors[0][1] and not called


def test_unknown_kinds_are_errors() -> None:
    for frame, message in (
        (lambda xla: xla.frame([(2, 1, (1,))]), "arguments[0] has a dtype that is not known"),
        (lambda xla: xla.frame((), [(2, 1, (1,))]), "results[0] has a dtype that is not known"),
    ):
        xla = Xla()
        assert xla.call(lambda call: None, frame(xla)) == TOKEN
        assert message in xla.errors[0][1]
    xla = Xla()
    frame = xla.frame([(11, 1, (1,))], x=1)
    frame.args.types[0] = 2
    assert xla.call(lambda call: None, frame) == TOKEN
    assert "arguments[0] must be a buffer; got type 2" in xla.errors[0][1]
    xla = Xla()
    frame = xla.frame(x=1)
    frame.attrs.types[0] = 2  # a dictionary
    assert xla.call(lambda call: None, frame) == TOKEN
    assert "attributes must be integers, bools or strings; got type 2" in xla.errors[0][1]


@pytest.mark.parametrize(("minor", "told"), [(3, 3), (4, 4), (9, 4)])
def test_metadata(minor: int, told: int) -> None:
    """The version is the runtime's, but none newer than is known; no traits are claimed."""
    xla = Xla()
    xla.api.api_version.minor_version = minor
    metadata = xla_ffi._Metadata(
        struct_size=xla_ffi._size_through(xla_ffi._Metadata, "traits"), traits=0xFF
    )
    extension = xla_ffi._MetadataExtension(metadata=ctypes.addressof(metadata))
    extension.extension_base.type = 1
    frame = xla.frame()
    frame.extension_start = ctypes.addressof(extension)
    called: list[object] = []
    assert xla.call(called.append, frame) is None and not called and not xla.errors
    version = metadata.api_version
    assert (version.major_version, version.minor_version, metadata.traits) == (0, told, 0)
    assert version.struct_size == 24

    metadata.struct_size -= 8  # too small to be written to
    version.minor_version = -1
    assert xla.call(called.append, frame) is None and version.minor_version == -1

    extension.extension_base.type = 2  # another extension of an ordinary call
    assert xla.call(called.append, frame) is None and len(called) == 1


def test_a_target_keeps_its_address() -> None:
    seen: list[str] = []
    first = target("test_xla_ffi", "cpu", lambda call: seen.append("first"))
    address = ctypes.cast(first.pointer, ctypes.c_void_p).value
    second = target("test_xla_ffi", "cpu", lambda call: seen.append("second"))
    assert second is first and ctypes.cast(second.pointer, ctypes.c_void_p).value == address
    assert target("test_xla_ffi", "CUDA", lambda call: None) is not first
    xla = Xla()
    frame = xla.frame()
    assert first.pointer(ctypes.addressof(frame)) is None
    assert seen == ["second"]
