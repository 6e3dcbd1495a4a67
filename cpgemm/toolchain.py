"""The two compilers that turn a ``KernelSource`` into a cubin: NVRTC and nvcc.

NVRTC comes from a wheel and is the default: no toolkit, no driver, no GPU.  nvcc is for comparing.
Both get the same options, both hand back the report of ``ptxas -v`` in their log.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import io
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from cpgemm import env
from cpgemm.errors import CompileError, DeviceError, MissingDependencyError, reject
from cpgemm.render import KernelSource
from cpgemm.source_map import excerpt

__all__ = ["Nvcc", "Nvrtc", "Toolchain", "numbered_source", "toolchain"]

# Level 10 lets ptxas use every register it may: one block fills an SM, occupancy is no aim here.
PTXAS_OPTIONS = ("-v", "--register-usage-level=10")
_LOCATION = re.compile(r"^([^\s(][^\n(]*)\((\d+)\): (?:catastrophic )?error", re.MULTILINE)
_SHOWN_ERRORS = 3
_NVCC_SECONDS = 300
_IMPORT_LOCK = threading.Lock()


class Toolchain(abc.ABC):
    """A compiler: its name, full version and path-free options are part of the cache key."""

    name: str

    @property
    @abc.abstractmethod
    def version(self) -> str:
        """Release and build, such as ``12.9.86``."""

    @abc.abstractmethod
    def options(self, arch: str) -> tuple[str, ...]:
        """Options for ``arch``, without the header folder, so that keys hold on other machines."""

    @abc.abstractmethod
    def compile(self, source: KernelSource, arch: str) -> tuple[bytes, str, float]:
        """(cubin, log, seconds); ``CompileError`` with the log when the source does not compile."""

    @abc.abstractmethod
    def ptx(self, source: KernelSource, arch: str) -> str:
        """The PTX that the cubin is made from; ``CompileError`` as ``compile`` raises it."""


def _nvrtc_settings(arch: str) -> dict[str, Any]:
    """What ``Nvrtc`` compiles with, beside ptxas's options; the cache's key has all of it."""
    return {
        "arch": arch,
        "std": "c++17",
        "ftz": False,
        # Without it NVRTC would also look for headers in the current folder.
        "no_source_include": True,
        # NVRTC 13 keeps results of its own; a hit has no log, which is what is checked.
        "no_cache": True,
    }


def _flag(name: str, value: object) -> str:
    """A setting in the words of the command line."""
    flag = name.replace("_", "-")
    return flag if value is True else f"{flag}={str(value).lower()}"


class Nvrtc(Toolchain):
    """NVRTC through cuda.core."""

    name = "nvrtc"

    @property
    def version(self) -> str:
        return _nvrtc_version()

    def options(self, arch: str) -> tuple[str, ...]:
        return (*(_flag(*one) for one in _nvrtc_settings(arch).items()), *PTXAS_OPTIONS)

    def compile(self, source: KernelSource, arch: str) -> tuple[bytes, str, float]:
        core = _cuda_core()
        logs = io.StringIO()
        with _header_folder(source) as headers:
            options = core.ProgramOptions(
                name=f"{source.name}.cu",
                include_path=[headers],
                ptxas_options=list(PTXAS_OPTIONS),
                **_nvrtc_settings(arch),
            )
            start = time.perf_counter()
            try:
                code = core.Program(source.text, "c++", options).compile("cubin", logs=logs)
            except Exception as error:
                # cuda.core puts the program log into the message and keeps its error class private.
                log = _clean(logs.getvalue() + str(error).partition("compilation log:")[2])
                log = _without_folder(log, headers, source)
                reason = "does not compile" if log else f"does not compile: {error}"
                raise CompileError(_failure(source, reason, log), log=log or str(error)) from error
            seconds = time.perf_counter() - start
        return bytes(code.code), _without_folder(_clean(logs.getvalue()), headers, source), seconds

    def ptx(self, source: KernelSource, arch: str) -> str:
        with _header_folder(source) as headers:
            options = (
                f"-arch={arch.replace('sm_', 'compute_')}",
                "-std=c++17",
                "-ftz=false",
                "-no-source-include",
                f"-I{headers}",
            )
            ptx, log = _nvrtc_ptx(source.text, f"{source.name}.cu", options)
            log = _without_folder(_clean(log), headers, source)
        if ptx is None:
            raise CompileError(_failure(source, "does not compile", log), log=log)
        return ptx


class Nvcc(Toolchain):
    """nvcc as a subprocess (``CPGEMM_COMPILER=nvcc``)."""

    name = "nvcc"

    def _path(self) -> str:
        path = env.nvcc_path()
        if path is None:
            reject(
                "CPGEMM_COMPILER",
                "nvcc must be on PATH, in $CUDA_HOME/bin or named by CPGEMM_NVCC",
                "no nvcc",
                "Install the CUDA toolkit (12.3 or newer), or unset CPGEMM_COMPILER to use NVRTC.",
                kind=DeviceError,
            )
        return path

    @property
    def version(self) -> str:
        path = self._path()
        try:
            stamp = os.stat(path).st_mtime_ns
        except OSError:
            stamp = 0
        return _nvcc_version(path, stamp)

    def options(self, arch: str) -> tuple[str, ...]:
        virtual = arch.replace("sm_", "compute_")
        return (
            "-cubin",
            f"-gencode=arch={virtual},code={arch}",
            "-std=c++17",
            "-ftz=false",
            "-Xptxas",
            ",".join(PTXAS_OPTIONS),
        )

    def compile(self, source: KernelSource, arch: str) -> tuple[bytes, str, float]:
        return self._compile(source, self.options(arch))

    def ptx(self, source: KernelSource, arch: str) -> str:
        options = ("-ptx", f"-arch={arch.replace('sm_', 'compute_')}", *self.options(arch)[2:4])
        return self._compile(source, options)[0].decode("utf-8")

    def _compile(self, source: KernelSource, options: tuple[str, ...]) -> tuple[bytes, str, float]:
        with (
            tempfile.TemporaryDirectory(prefix="cpgemm-nvcc-") as folder,
            _header_folder(source) as headers,
        ):
            text, made = Path(folder, f"{source.name}.cu"), Path(folder, "kernel.out")
            text.write_text(source.text, encoding="utf-8")
            command = [self._path(), *options, f"-I{headers}", "-o", str(made), str(text)]
            start = time.perf_counter()
            log, status = _run(command)
            seconds = time.perf_counter() - start
            log = _clean(log.replace(f"{folder}{os.sep}", ""))
            log = _without_folder(log, headers, source)
            if status != 0 or not made.is_file():
                reason = f"does not compile (nvcc ended with {status})"
                raise CompileError(_failure(source, reason, log), log=log)
            return made.read_bytes(), log, seconds


@contextlib.contextmanager
def _header_folder(source: KernelSource) -> Iterator[str]:
    """The folder to search for headers: the package's, or one with those of a user's kernel.

    Compilers look beside the including header first: only in one folder can a user's header take
    the place of the package's for the package's other headers.
    """
    if source.origin is None:
        yield str(env.header_dir())
        return
    with tempfile.TemporaryDirectory(prefix="cpgemm-headers-") as folder:
        for header in source.origin.headers:
            target = Path(folder, header.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(header.content)
        yield folder


def _without_folder(log: str, folder: str, source: KernelSource) -> str:
    """The log with names of headers, where the folder that they lay in is gone again."""
    return log if source.origin is None else log.replace(f"{folder}{os.sep}", "")


def toolchain(name: str | None = None) -> Toolchain:
    """The compiler called ``name``, or the one that ``CPGEMM_COMPILER`` chooses."""
    chosen = env.compiler() if name is None else name
    if chosen == "nvrtc":
        return Nvrtc()
    if chosen == "nvcc":
        return Nvcc()
    reject("compiler", "must be 'nvrtc' or 'nvcc'", repr(chosen), "Leave it out for the default.")


def _cuda_core() -> ModuleType:
    """cuda.core, whole: it copies its names from a versioned module while it is being imported, and
    of threads that import it at once all but the first can get it without them.
    """
    with _IMPORT_LOCK:
        try:
            import cuda.core
        except ImportError as error:
            raise _missing("cuda-core", error) from error
        return cuda.core


@functools.lru_cache(maxsize=1)
def _nvrtc_version() -> str:
    """Release and build of the NVRTC that is really loaded.

    ``nvrtcVersion`` leaves the build out, and builds differ in the code they make; the head of any
    PTX names it, and an empty program compiles in some ten milliseconds.
    """
    ptx, log = _nvrtc_ptx("", "version.cu", ("-arch=compute_90a",))
    match = re.search(r"V(\d+\.\d+\.\d+)", ptx or "")
    if match is None:
        raise DeviceError(f"NVRTC: its PTX names no version; got {(ptx or log)[:200]!r}")
    return match[1]


def _nvrtc_ptx(text: str, name: str, options: Sequence[str]) -> tuple[str | None, str]:
    """(PTX, log) by NVRTC's own interface: cuda.core's asks the driver, which may not be there.

    No PTX when the program does not compile.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise _missing("cuda-bindings", error) from error
    try:
        status, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
        try:
            encoded = [option.encode() for option in options]
            (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            # Written in place: bytes would do that to the interpreter's one b" " for a size of 1.
            log = bytearray(size)
            nvrtc.nvrtcGetProgramLog(program, log)
            ptx = None
            if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
                _, size = nvrtc.nvrtcGetPTXSize(program)
                ptx = bytearray(size)
                nvrtc.nvrtcGetPTX(program, ptx)
        finally:
            nvrtc.nvrtcDestroyProgram(program)
    except RuntimeError as error:  # The library is not there: cuda.pathfinder says where it looked.
        raise _missing("the NVRTC library", error) from error
    return None if ptx is None else ptx.rstrip(b"\0").decode(), log.decode("utf-8", "replace")


@functools.lru_cache(maxsize=4)
def _nvcc_version(path: str, _stamp: int) -> str:
    text, status = _run([path, "--version"])
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    if status != 0 or match is None:
        raise DeviceError(f"CPGEMM_NVCC: {path} --version does not answer as nvcc does; got {text}")
    return match[1]


def _run(command: list[str]) -> tuple[str, int]:
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_NVCC_SECONDS,
        )
    except OSError as error:
        raise DeviceError(
            f"CPGEMM_NVCC: {command[0]} cannot be run: {error}. Name a working nvcc, or unset "
            "CPGEMM_COMPILER to use NVRTC."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} did not end within {_NVCC_SECONDS} s") from error
    return done.stdout + done.stderr, done.returncode


def _missing(what: str, error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"{what}: compiling kernels needs it; got {type(error).__name__}: {error}. "
        'Run: pip install "cpgemm[cuda12]" (or cuda13).'
    )


def _clean(log: str) -> str:
    """The log without the NULs that NVRTC ends it with, and with one newline at its end."""
    text = log.replace("\0", "").strip()
    return f"{text}\n" if text else ""


def _failure(source: KernelSource, reason: str, log: str) -> str:
    if source.origin is not None:
        log = source.origin.translate(log, f"{source.name}.cu")
    parts = [f"{source.name}: {reason}", numbered_source(source, log), log.rstrip()]
    return "\n\n".join(part for part in parts if part)


def numbered_source(source: KernelSource, log: str) -> str:
    """The lines around the first errors that ``log`` names, numbered, of kernel or header."""
    blocks: list[str] = []
    for file, number in dict.fromkeys(_LOCATION.findall(log)):
        if len(blocks) == _SHOWN_ERRORS:
            break
        known = source.origin.text_of(file) if source.origin is not None else None
        if known is not None:
            text = known
        elif Path(file).name == f"{source.name}.cu":
            text = source.text
        elif Path(file).is_file():
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        else:
            continue
        shown = file if source.origin is not None else Path(file).name
        blocks.append(f"{shown}:{number}\n{excerpt(text, int(number))}")
    return "\n\n".join(blocks)
