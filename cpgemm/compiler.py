"""From a ``KernelSource`` to a cubin on disk, and from there to a function on the GPU.

One folder per kernel::

    <cache>/<arch>/<name>-<key>/kernel.cu      rendered source
                                kernel.cubin   machine code
                                kernel.log     the compiler's log, ptxas -v included
                                report.json    resources, versions, checksum; written last
    <cache>/<arch>/failed/<name>-<key>/        what was refused, for looking at

The key covers the source with the headers it really includes, options, compiler with its version,
architecture and the format of this folder, and no path: a cache can be carried to another machine.
Any number of threads and processes may ask for one kernel at once: one of them compiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpgemm import env
from cpgemm.errors import (
    CompileError,
    DeviceError,
    FrozenError,
    KernelWarning,
    MissingDependencyError,
    reject,
)
from cpgemm.locking import locked
from cpgemm.problem import HOPPER
from cpgemm.render import KernelSource
from cpgemm.resources import ResourceReport, parse_report
from cpgemm.toolchain import Toolchain, toolchain

__all__ = [
    "ARCH",
    "CompiledKernel",
    "LoadedKernel",
    "compile_count",
    "compile_kernel",
    "freeze",
    "load_kernel",
    "ptx_of",
    "require_cupy",
]

ARCH = "sm_90a"
_FORMAT = 1  # of the cache folder; a new number abandons every old entry
_LOCK_SECONDS = 600.0

_state = threading.Lock()
_compiled = 0
_frozen = 0
_load_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel in the disk cache.

    ``cubin`` is the path of the machine code, ``log`` the compiler's text, ``seconds`` what the
    compilation took when it was made, ``cached`` whether this call found it made already.
    """

    source: KernelSource
    cubin: Path
    log: str
    report: ResourceReport
    seconds: float
    cached: bool


@dataclasses.dataclass(frozen=True)
class LoadedKernel:
    """A kernel on one GPU: ``function`` is CuPy's ``RawKernel``, ``handle`` the ``CUfunction``."""

    compiled: CompiledKernel
    function: Any
    handle: int
    device: int


_loaded: dict[tuple[int, str, str, str, int, bool], LoadedKernel] = {}


def compile_kernel(
    source: KernelSource,
    *,
    arch: str = ARCH,
    compiler: str | None = None,
    force: bool = False,
) -> CompiledKernel:
    """Compile ``source`` or find it in the cache; needs no GPU and no driver.

    ``compiler`` is ``"nvrtc"``, ``"nvcc"`` or None for ``CPGEMM_COMPILER``; ``force`` compiles even
    when the cache has the kernel.

    Raises ``CompileError`` (with log and kept source) when the source does not compile or uses
    local memory, serialises its wgmma or loses its setmaxnreg (for a source that is not ``strict``
    these are a ``KernelWarning``); ``FrozenError`` inside ``freeze()``;
    ``MissingDependencyError`` and ``DeviceError`` when compiler or cache folder are not usable.
    """
    kernel = _compiled_or_cached(source, arch, compiler, force)
    if not source.strict and (faults := kernel.report.faults()):
        warnings.warn(f"{source.name}: {'; '.join(faults)}", KernelWarning, stacklevel=2)
    return kernel


def ptx_of(source: KernelSource, *, arch: str = ARCH, compiler: str | None = None) -> str:
    """The PTX of ``source``, for reading: nothing loads it, so that ``freeze()`` allows it.

    Raises what ``compile_kernel`` raises for a source or a compiler that is not usable.
    """
    global _compiled
    with _state:
        _compiled += 1
    return toolchain(compiler).ptx(source, arch)


def _compiled_or_cached(
    source: KernelSource, arch: str, compiler: str | None, force: bool
) -> CompiledKernel:
    if arch != ARCH:
        reject("arch", f"must be {ARCH}", repr(arch), "Kernels use wgmma, which is Hopper's alone.")
    tool = toolchain(compiler)
    key = _key(source, arch, tool)
    folder = env.cache_dir() / arch / f"{source.name}-{key[:16]}"
    if not force and (entry := _read_entry(source, folder, key)):
        return entry
    _refuse_when_frozen(source)
    with _writable_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / ".locks" / f"{folder.name}.lock"):
        # Whoever held the lock before has most likely made it.
        if not force and (entry := _read_entry(source, folder, key)):
            return entry
        return _build(source, arch, tool, key, folder)


def load_kernel(source: KernelSource) -> LoadedKernel:
    """Load ``source`` on CuPy's current device, compiling it first if the cache lacks it.

    Loaded kernels stay loaded, one per device.  Dynamic shared memory is raised to
    ``source.shared_bytes``.  Raises ``DeviceError`` without a GPU of compute capability 9.0.
    """
    cupy = require_cupy()
    try:
        device = int(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"device: running a kernel needs a Hopper GPU and its driver; got {error}. "
            "NumPy arrays are multiplied without one."
        ) from error
    slot = (
        device, source.digest, source.entry, env.compiler(), source.shared_bytes, source.strict
    )  # fmt: skip
    if found := _loaded.get(slot):
        return found
    capability = str(cupy.cuda.Device(device).compute_capability)
    if capability != HOPPER:
        reject(
            "device",
            f"{ARCH} kernels run on compute capability 9.0 only",
            f"{capability[:-1]}.{capability[-1:]} (device {device})",
            "Use a Hopper GPU, or NumPy arrays.",
            kind=DeviceError,
        )
    compiled = compile_kernel(source)
    with _load_lock:
        if found := _loaded.get(slot):
            return found
        function = cupy.RawModule(path=str(compiled.cubin)).get_function(source.entry)
        try:
            handle = int(function.kernel.ptr)
            # CuPy shares functions of one file: what another kernel has raised must not sink.
            if source.shared_bytes > function.max_dynamic_shared_size_bytes:
                function.max_dynamic_shared_size_bytes = source.shared_bytes
        except cupy.cuda.driver.CUDADriverError as error:
            raise DeviceError(f"{source.name}: {compiled.cubin} does not load: {error}") from error
        loaded = LoadedKernel(compiled, function, handle, device)
        _loaded[slot] = loaded
        return loaded


@contextlib.contextmanager
def freeze() -> Iterator[None]:
    """Make every compilation inside an error, in all threads of this process.

    Kernels that the disk cache holds are still loaded.  Calls may be nested.  What would compile
    raises ``FrozenError`` and changes nothing.
    """
    global _frozen
    with _state:
        _frozen += 1
    try:
        yield
    finally:
        with _state:
            _frozen -= 1


def compile_count() -> int:
    """How many times this process has called a compiler, failures included."""
    return _compiled


def _refuse_when_frozen(source: KernelSource) -> None:
    if _frozen:
        raise FrozenError(
            f"kernel: nothing may be compiled inside cpgemm.freeze(); got {source.name}, which is "
            f"not in {env.cache_dir()}. Call once before freezing, or run "
            "python -m cpgemm compile --all."
        )


def _key(source: KernelSource, arch: str, tool: Toolchain) -> str:
    parts = [_FORMAT, source.digest, source.entry, arch, tool.name, tool.version]
    return hashlib.sha256(json.dumps([*parts, *tool.options(arch)]).encode()).hexdigest()


def _read_entry(source: KernelSource, folder: Path, key: str) -> CompiledKernel | None:
    """The cached kernel, or None when it is absent, of another key, or damaged in any way."""
    try:
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        log = (folder / "kernel.log").read_text(encoding="utf-8")
        cubin = folder / "kernel.cubin"
        if record["key"] != key or not (folder / "kernel.cu").is_file():
            return None
        if hashlib.sha256(cubin.read_bytes()).hexdigest() != record["cubin_sha256"]:
            return None
        report = ResourceReport(**record["resources"])
        if source.strict and report.faults():  # made for one that was not
            return None
        return CompiledKernel(source, cubin, log, report, float(record["seconds"]), cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    source: KernelSource, arch: str, tool: Toolchain, key: str, folder: Path
) -> CompiledKernel:
    global _compiled
    _refuse_when_frozen(source)
    with _state:
        _compiled += 1
    log, cubin = "", b""
    try:
        cubin, log, seconds = tool.compile(source, arch)
        report = parse_report(log, cubin, source.entry)
        if source.strict and (faults := report.faults()):
            said = "".join(f"\n{line}" for line in log.splitlines() if "Performance Loss" in line)
            raise CompileError(f"{source.name} is refused: {'; '.join(faults)}{said}", log=log)
    except CompileError as error:
        kept = _keep_failure(source, error.log, cubin, folder)
        raise CompileError(
            f"{error}\n\nsource: {kept}", log=error.log, source_path=kept
        ) from error.__cause__
    record = {
        "key": key,
        "name": source.name,
        "entry": source.entry,
        "template": source.template,
        "digest": source.digest,
        "arch": arch,
        "compiler": tool.name,
        "compiler_version": tool.version,
        "options": list(tool.options(arch)),
        "seconds": round(seconds, 6),
        "shared_bytes": source.shared_bytes,
        "cubin_bytes": len(cubin),
        "cubin_sha256": hashlib.sha256(cubin).hexdigest(),
        "resources": dataclasses.asdict(report),
    }
    with _writable_cache():
        _publish(folder, source, cubin, log, record)
    return CompiledKernel(source, folder / "kernel.cubin", log, report, seconds, cached=False)


def _publish(
    folder: Path, source: KernelSource, cubin: bytes, log: str, record: dict[str, object]
) -> None:
    """Put the four files in place, each at once, the report last: it vouches for the others."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as temporary:
        build = Path(temporary)
        _write_files(build, source, cubin, log)
        report = json.dumps(record, indent=1) + "\n"
        (build / "report.json").write_text(report, encoding="utf-8")
        if folder.exists() and not folder.is_dir():
            folder.unlink()
        folder.mkdir(exist_ok=True)
        for name in ("kernel.cu", "kernel.cubin", "kernel.log", "report.json"):
            target = folder / name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(build / name, target)


def _write_files(folder: Path, source: KernelSource, cubin: bytes, log: str) -> None:
    (folder / "kernel.cu").write_text(source.text, encoding="utf-8")
    (folder / "kernel.log").write_text(log, encoding="utf-8")
    (folder / "kernel.cubin").write_bytes(cubin)


def _keep_failure(source: KernelSource, log: str, cubin: bytes, folder: Path) -> str:
    """Keep what was refused; the path of its source."""
    failed = folder.parent / "failed" / folder.name
    with _writable_cache():
        failed.mkdir(parents=True, exist_ok=True)
        _write_files(failed, source, cubin, log)
    return str(failed / "kernel.cu")


@contextlib.contextmanager
def _writable_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeviceError(
            f"CPGEMM_CACHE_DIR: must be a folder that can be written; got {env.cache_dir()} "
            f"({error.strerror or error}). Set CPGEMM_CACHE_DIR to another folder."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one kernel."""
    with contextlib.ExitStack() as held:
        with _writable_cache():
            try:
                held.enter_context(locked(path, _LOCK_SECONDS))
            except TimeoutError as error:
                raise CompileError(
                    f"{path}: another process has held this lock for {_LOCK_SECONDS:.0f} s; end "
                    "it, or set CPGEMM_CACHE_DIR to another folder"
                ) from error
        yield


def require_cupy() -> Any:
    """CuPy, or ``MissingDependencyError``."""
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            "cupy: running a kernel needs it; it is not installed. "
            'Run: pip install "cpgemm[cuda12]" (or cuda13).'
        ) from error
    return cupy
