"""The two compilers that turn a ``KernelSource`` into a cubin: NVRTC and nvcc.

NVRTC comes from a wheel and is the default: no toolkit, no driver, no GPU.  nvcc is for comparing.
Both get the same options, both hand back the report of ``ptxas -v`` in their log.
"""

from __future__ import annotations

import abc
import functools
import io
import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

from cpgemm import env
from cpgemm.errors import CompileError, DeviceError, MissingDependencyError, reject
from cpgemm.render import KernelSource

__all__ = ["Nvcc", "Nvrtc", "Toolchain", "numbered_source", "toolchain"]

# Level 10 lets ptxas use every register it may: one block fills an SM, occupancy is no aim here.
PTXAS_OPTIONS = ("-v", "--register-usage-level=10")
_LOCATION = re.compile(r"^([^\s(][^\n(]*)\((\d+)\): (?:catastrophic )?error", re.MULTILINE)
_CONTEXT = 3
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


class Nvrtc(Toolchain):
    """NVRTC through cuda.core."""

    name = "nvrtc"

    @property
    def version(self) -> str:
        return _nvrtc_version()

    def options(self, arch: str) -> tuple[str, ...]:
        return (
            f"arch={arch}",
            "std=c++17",
            "ftz=false",
            "no-source-include",
            "no-cache",
            *PTXAS_OPTIONS,
        )

    def compile(self, source: KernelSource, arch: str) -> tuple[bytes, str, float]:
        core = _cuda_core()
        options = core.ProgramOptions(
            name=f"{source.name}.cu",
            arch=arch,
            std="c++17",
            ftz=False,
            # Without it NVRTC would also look for headers in the current folder.
            no_source_include=True,
            # NVRTC 13 keeps results of its own; a hit has no log, and the log is what is checked.
            no_cache=True,
            include_path=[str(env.header_dir())],
            ptxas_options=list(PTXAS_OPTIONS),
        )
        logs = io.StringIO()
        start = time.perf_counter()
        try:
            code = core.Program(source.text, "c++", options).compile("cubin", logs=logs)
        except Exception as error:
            # cuda.core puts the program log into the message and keeps its error class private.
            log = _clean(logs.getvalue() + str(error).partition("compilation log:")[2])
            reason = "does not compile" if log else f"does not compile: {error}"
            raise CompileError(_failure(source, reason, log), log=log or str(error)) from error
        seconds = time.perf_counter() - start
        return bytes(code.code), _clean(logs.getvalue()), seconds


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
        with tempfile.TemporaryDirectory(prefix="cpgemm-nvcc-") as folder:
            text, cubin = Path(folder, f"{source.name}.cu"), Path(folder, "kernel.cubin")
            text.write_text(source.text, encoding="utf-8")
            command = [
                self._path(),
                *self.options(arch),
                f"-I{env.header_dir()}",
                "-o",
                str(cubin),
                str(text),
            ]
            start = time.perf_counter()
            log, status = _run(command)
            seconds = time.perf_counter() - start
            log = _clean(log.replace(f"{folder}{os.sep}", ""))
            if status != 0 or not cubin.is_file():
                reason = f"does not compile (nvcc ended with {status})"
                raise CompileError(_failure(source, reason, log), log=log)
            return cubin.read_bytes(), log, seconds


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
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise _missing("cuda-bindings", error) from error
    try:
        _, major, minor = nvrtc.nvrtcVersion()
        _, program = nvrtc.nvrtcCreateProgram(b"", b"version.cu", 0, [], [])
        nvrtc.nvrtcCompileProgram(program, 1, [b"-arch=compute_90a"])
        _, size = nvrtc.nvrtcGetPTXSize(program)
        ptx = b" " * size
        nvrtc.nvrtcGetPTX(program, ptx)
        nvrtc.nvrtcDestroyProgram(program)
    except RuntimeError as error:  # The library is not there: cuda.pathfinder says where it looked.
        raise _missing("the NVRTC library", error) from error
    match = re.search(rb"V(\d+\.\d+\.\d+)", ptx)
    return match[1].decode() if match else f"{major}.{minor}"


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
    parts = [f"{source.name}: {reason}", numbered_source(source, log), log.rstrip()]
    return "\n\n".join(part for part in parts if part)


def numbered_source(source: KernelSource, log: str) -> str:
    """The lines around the first errors that ``log`` names, numbered, of kernel or header."""
    blocks: list[str] = []
    for file, number in dict.fromkeys(_LOCATION.findall(log)):
        if len(blocks) == _SHOWN_ERRORS:
            break
        if Path(file).name == f"{source.name}.cu":
            text = source.text
        elif Path(file).is_file():
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        else:
            continue
        lines, line = text.splitlines(), int(number)
        first, last = max(1, line - _CONTEXT), min(len(lines), line + _CONTEXT)
        shown = [
            f"{'>' if at == line else ' '} {at:5d} | {lines[at - 1]}"
            for at in range(first, last + 1)
        ]
        blocks.append("\n".join([f"{Path(file).name}:{line}", *shown]))
    return "\n\n".join(blocks)
