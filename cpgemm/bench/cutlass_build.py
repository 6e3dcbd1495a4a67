"""CUTLASS as a peer: which variants there are, and how nvcc makes a library of each.

A variant (a tile, a cluster, an order of tiles) of our own small sources over CUTLASS's Hopper
collective for block-scaled FP8 is a shared library, compiled against the headers of the
``nvidia-cutlass`` wheel, which takes a minute, and kept beside the compiled kernels.  A library
that was built before needs neither nvcc nor headers any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cpgemm import env
from cpgemm.bench.contenders import Absent
from cpgemm.errors import CpgemmError

__all__ = [
    "VARIANTS",
    "Builder",
    "Variant",
    "cutlass_version",
    "header_folder",
    "library_path",
    "variants_of",
]

_SOURCES = Path(__file__).with_name("cutlass")
_FLAGS = (
    "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr",
    "-DNDEBUG", "-Xcompiler=-fPIC", "-shared", "-Xptxas=-v",
)  # fmt: skip
_LONGEST_S = 600.0  # of one compilation


@dataclass(frozen=True)
class Variant:
    """What is instantiated: ``source`` (dense or grouped) with the macros of its first lines."""

    source: str
    tile_m: int
    cluster: tuple[int, int] = (1, 1)
    pingpong: bool = False
    stream_k: bool = False

    @property
    def name(self) -> str:
        """Readable and unique, e.g. ``dense_128x128_1x2``."""
        parts = [self.source, f"{self.tile_m}x128", "x".join(map(str, self.cluster))]
        parts += ["pingpong"] if self.pingpong else []
        return "_".join([*parts, "streamk"] if self.stream_k else parts)

    @property
    def macros(self) -> tuple[str, ...]:
        """Options of nvcc."""
        values = {
            "TILE_M": self.tile_m, "CLUSTER_M": self.cluster[0], "CLUSTER_N": self.cluster[1],
            "PINGPONG": int(self.pingpong),
        }  # fmt: skip
        if self.source == "dense":
            values["STREAM_K"] = int(self.stream_k)
        return tuple(f"-DCPGEMM_{name}={value}" for name, value in values.items())

    @property
    def path(self) -> Path:
        """The source file."""
        return _SOURCES / f"{self.source}.cu"

    @property
    def digest(self) -> str:
        """Of source and options: what is built from them is the same but for the compiler."""
        text = "\0".join((self.path.read_text(encoding="utf-8"), *_FLAGS, *self.macros))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# Tiles of 256 x 128, and of 128 x 128 in ping-pong, spill registers with CUTLASS 4.2.
VARIANTS = (
    Variant("dense", 128, (1, 2)),
    Variant("dense", 128, (2, 1)),
    Variant("dense", 128, stream_k=True),
    Variant("dense", 64, pingpong=True),
    Variant("grouped", 128, (1, 2)),
    Variant("grouped", 64, pingpong=True),
)


def variants_of(suite: str) -> tuple[Variant, ...]:
    """What is tried for a case of this suite."""
    source = "dense" if suite == "dense" else "grouped"
    return tuple(variant for variant in VARIANTS if variant.source == source)


# --------------------------------------------------------------------------------------- building


def header_folder() -> Path | None:
    """Where CUTLASS's headers are in the ``nvidia-cutlass`` wheel; None without it."""
    try:
        spec = importlib.util.find_spec("cutlass_library")
    except (ImportError, ValueError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        headers = Path(folder) / "source" / "include"
        if (headers / "cutlass" / "cutlass.h").is_file():
            return headers
    return None


def cutlass_version(headers: Path) -> str:
    """``4.2.0`` from CUTLASS's own header."""
    text = (headers / "cutlass" / "version.h").read_text(encoding="utf-8")
    parts = ("MAJOR", "MINOR", "PATCH")
    found = [re.search(rf"#define CUTLASS_{part} (\d+)", text) for part in parts]
    return ".".join(match[1] if match else "0" for match in found)


def library_path(variant: Variant, cutlass: str, nvcc: str) -> Path:
    """Where a variant's library is kept; versions stand in the name."""
    return _folder() / f"{variant.name}-{variant.digest}-cutlass{cutlass}-nvcc{nvcc}.so"


def _folder() -> Path:
    return env.cache_dir() / "cutlass"


def _built(variant: Variant) -> Path | None:
    """The newest library of this very variant, whichever versions built it."""
    found = sorted(_folder().glob(f"{variant.name}-{variant.digest}-*.so"), key=os.path.getmtime)
    return found[-1] if found else None


class Builder:
    """Compiles the variants that are lacking, in the background, as many at once as there are CPUs.

    ``library(variant)`` waits for one.  Leaving the ``with`` block ends what still runs.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        workers = max(1, min(len(variants), os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cpgemm-bench-nvcc")
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False
        self._libraries: dict[Variant, Future[Path]] = {}
        for variant in variants:
            self._libraries[variant] = self._begin(variant)

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._ended = True
            for process in self._running:
                _end(process)
        self._pool.shutdown(cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether something is still to be compiled."""
        return not all(library.done() for library in self._libraries.values())

    def library(self, variant: Variant) -> Path:
        """Where the library is, once it is; ``Absent`` says why it never will be."""
        library = self._libraries.get(variant)
        if library is None:
            raise Absent(f"{variant.name} was not asked for")
        return library.result()

    def _begin(self, variant: Variant) -> Future[Path]:
        known: Future[Path] = Future()
        headers, compiler = header_folder(), env.nvcc_path()
        try:
            if headers is not None and compiler is not None:
                target = library_path(variant, cutlass_version(headers), _nvcc_version())
                if not target.is_file():
                    return self._pool.submit(self._compile, variant, compiler, headers, target)
                known.set_result(target)
            elif (built := _built(variant)) is not None:
                known.set_result(built)
            elif headers is None:
                known.set_exception(
                    Absent(
                        'CUTLASS\'s headers are not installed; run: pip install "cpgemm[cutlass]"'
                    )
                )
            else:
                known.set_exception(
                    Absent("CUTLASS needs nvcc: none on PATH, in $CUDA_HOME/bin or in CPGEMM_NVCC")
                )
        except (OSError, CpgemmError) as error:
            known.set_exception(Absent(f"CUTLASS cannot be compiled: {_line(error)}"))
        return known

    def _compile(self, variant: Variant, compiler: str, headers: Path, target: Path) -> Path:
        log = target.with_suffix(".log")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
                made = Path(folder, "peer.so")
                command = [compiler, *_FLAGS, *variant.macros, f"-I{headers}", "-o", str(made)]
                status = self._run([*command, str(variant.path)], log)
                if status == 0 and made.is_file():
                    os.replace(made, target)
                    return target
        except OSError as error:
            raise Absent(f"CUTLASS cannot be compiled: {_line(error)}") from error
        raise Absent(f"nvcc fails on {variant.name}: {_first_error(log)} ({log})")

    def _run(self, command: Sequence[str], log: Path) -> int:
        with log.open("wb") as output:
            with self._lock:
                if self._ended:
                    raise Absent("the run was ended")
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._running.add(process)
            try:
                return process.wait(timeout=_LONGEST_S)
            except subprocess.TimeoutExpired:
                return _end(process)
            finally:
                with self._lock:
                    self._running.discard(process)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _end(process: subprocess.Popen[bytes]) -> int:
    """End nvcc with the compilers that it started: they are a process group of their own."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _nvcc_version() -> str:
    from cpgemm.toolchain import Nvcc

    return Nvcc().version


def _first_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in lines if "error" in line), "no error in its log")[:200]
