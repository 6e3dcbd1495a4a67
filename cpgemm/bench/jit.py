"""The suite ``jit``: what the first call costs.  Needs no GPU, but for loading onto one.

Cold: a kernel is compiled into an empty cache folder, rendering included.  Warm: the cache has it;
on a GPU it is loaded too.  Import: ``import cpgemm`` in a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cpgemm.bench.result import Case, Row
from cpgemm.bench.session import brief
from cpgemm.compiler import CompiledKernel, compile_kernel
from cpgemm.kernels import gemm_source
from cpgemm.plan import plan_gemm
from cpgemm.render import KernelSource
from cpgemm.timing import summarize

__all__ = ["rows"]

_COLD_WINDOWS = 3  # a compilation takes up to a second
_IMPORT = "import time; t = time.perf_counter(); import cpgemm; print(time.perf_counter() - t)"


def rows(case: Case, windows: int, *, on_gpu: bool) -> list[Row]:
    """The row of one step: ``cold compile``, ``warm load`` or ``import``."""
    try:
        kernel, taken = _steps(case, windows, on_gpu)
    except Exception as error:
        return [Row(case, "cpgemm", "ours", "failed", reason=brief(error))]
    timing = summarize(taken)
    return [
        Row(
            case, "cpgemm", "ours", us=timing.median_us, spread_pct=timing.spread_pct,
            windows_us=timing.windows, kernel=kernel,
        )
    ]  # fmt: skip


def _steps(case: Case, windows: int, on_gpu: bool) -> tuple[str, list[float]]:
    if case.detail == "import":
        return "", [_import_us() for _ in range(windows)]
    config = plan_gemm(case.m, case.n, case.k).config
    source = gemm_source(config)
    if case.detail == "cold compile":
        compile_kernel(source)  # brings the compiler itself into memory
        taken = []
        for _ in range(min(windows, _COLD_WINDOWS)):
            with _fresh_cache():
                gemm_source.cache_clear()
                taken.append(_microseconds(lambda: compile_kernel(gemm_source(config))))
        return source.name, taken
    if case.detail == "warm load":
        compile_kernel(source)
        load = _load_on_gpu if on_gpu else compile_kernel
        load(source)
        return source.name, [_microseconds(lambda: load(source)) for _ in range(windows)]
    raise ValueError(f"jit: the step must be cold compile, warm load or import; got {case.detail}")


def _load_on_gpu(source: KernelSource) -> CompiledKernel:
    """Find the kernel in the cache and load it, whether it is loaded already or not."""
    import cupy

    compiled = compile_kernel(source)
    function = cupy.RawModule(path=str(compiled.cubin)).get_function(source.entry)
    assert function.kernel.ptr, "reading it loads the module"
    return compiled


def _import_us() -> float:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return float(done.stdout.split()[-1]) * 1e6


def _microseconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """An empty cache folder in the place of the user's."""
    before = os.environ.get("CPGEMM_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="cpgemm-bench-") as folder:
        os.environ["CPGEMM_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["CPGEMM_CACHE_DIR"]
            else:
                os.environ["CPGEMM_CACHE_DIR"] = before
