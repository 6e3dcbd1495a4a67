"""Compile many kernels at once, without a GPU, and report what each of them uses."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpgemm import env
from cpgemm.compiler import ARCH, compile_kernel
from cpgemm.console import print_table, progress
from cpgemm.errors import CompileError
from cpgemm.render import KernelSource
from cpgemm.toolchain import toolchain

__all__ = ["CompileRow", "compile_all", "print_rows", "run", "write_json"]


@dataclasses.dataclass(frozen=True)
class CompileRow:
    """Outcome for one kernel.  Sizes in bytes; spills and local memory per thread.

    ``local_bytes`` is the larger of stack frame and local memory.  A refused kernel has ``error``
    set and its numbers at None.
    """

    name: str
    template: str
    entry: str
    seconds: float | None = None
    cached: bool | None = None
    registers: int | None = None
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None
    local_bytes: int | None = None
    local_instructions: int | None = None
    shared_static_bytes: int | None = None
    shared_dynamic_bytes: int | None = None
    wgmma: int | None = None
    tma_loads: int | None = None
    tma_stores: int | None = None
    tma_prefetches: int | None = None
    bulk_copies: int | None = None
    instructions: int | None = None
    serialized: bool | None = None
    cubin: str | None = None
    cubin_bytes: int | None = None
    error: str | None = None


def compile_all(
    sources: Sequence[KernelSource],
    *,
    arch: str = ARCH,
    compiler: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    done: Callable[[str], None] = lambda _name: None,
) -> list[CompileRow]:
    """Compile ``sources`` in ``jobs`` processes (default: one per core); rows in their order.

    A kernel that fails gives a row with ``error``; what concerns all of them alike (no compiler, no
    writable cache) raises.  ``done`` is called with the name of each kernel as it ends.  Processes
    are spawned: a script that calls this needs the ``if __name__ == "__main__"`` guard.
    """
    toolchain(compiler).version  # noqa: B018 - a missing compiler is said once, not once a kernel
    workers = max(1, min(jobs or _cores(), len(sources)))
    if workers == 1:
        rows = []
        for source in sources:
            rows.append(_compile_one(source, arch, compiler, force))
            done(source.name)
        return rows
    # Not fork: the caller may hold threads or a CUDA context, which do not survive it.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_compile_one, source, arch, compiler, force) for source in sources]
        names = {future: source.name for future, source in zip(futures, sources, strict=True)}
        for future in concurrent.futures.as_completed(futures):
            done(names[future])
        return [future.result() for future in futures]


def _compile_one(source: KernelSource, arch: str, compiler: str | None, force: bool) -> CompileRow:
    row = CompileRow(source.name, source.template, source.entry)
    try:
        kernel = compile_kernel(source, arch=arch, compiler=compiler, force=force)
    except CompileError as error:
        return dataclasses.replace(row, error=str(error))
    report = kernel.report
    return dataclasses.replace(
        row,
        seconds=round(kernel.seconds, 4),
        cached=kernel.cached,
        registers=report.registers,
        spill_store_bytes=report.spill_store_bytes,
        spill_load_bytes=report.spill_load_bytes,
        local_bytes=max(report.stack_bytes, report.local_bytes),
        local_instructions=report.local_instructions,
        shared_static_bytes=report.static_shared_bytes,
        shared_dynamic_bytes=source.shared_bytes,
        wgmma=report.wgmma,
        tma_loads=report.tma_loads,
        tma_stores=report.tma_stores,
        tma_prefetches=report.tma_prefetches,
        bulk_copies=report.bulk_copies,
        instructions=report.instructions,
        serialized=report.serialized,
        cubin=str(kernel.cubin),
        cubin_bytes=kernel.cubin.stat().st_size,
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def print_rows(rows: Sequence[CompileRow]) -> None:
    """The table that people read; the JSON file has every number."""
    numbers = ("s", "regs", "spill", "local", "shared", "wgmma", "TMA ld", "TMA st")
    columns = ("kernel", *numbers, "serialised", "from")
    cells = [
        (
            row.name,
            f"{row.seconds:.2f}",
            str(row.registers),
            str((row.spill_store_bytes or 0) + (row.spill_load_bytes or 0)),
            str(row.local_bytes),
            str((row.shared_static_bytes or 0) + (row.shared_dynamic_bytes or 0)),
            str(row.wgmma),
            str(row.tma_loads),
            str(row.tma_stores),
            "yes" if row.serialized else "no",
            "cache" if row.cached else "new",
        )
        if row.error is None
        else (row.name, *("-" for _ in numbers), "-", "REFUSED")
        for row in rows
    ]
    print_table(columns, cells, numbers=numbers)


def write_json(
    path: Path, rows: Sequence[CompileRow], *, arch: str, compiler: str | None, wall: float
) -> None:
    """Write ``rows`` with the compiler and its version; an unset value is null."""
    tool = toolchain(compiler)
    record = {
        "arch": arch,
        "compiler": tool.name,
        "compiler_version": tool.version,
        "options": list(tool.options(arch)),
        "wall_seconds": round(wall, 3),
        "refused": [row.name for row in rows if row.error is not None],
        "kernels": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def run(
    sources: Sequence[KernelSource],
    *,
    arch: str = ARCH,
    json_path: Path | None = None,
    jobs: int | None = None,
    force: bool = False,
) -> int:
    """Compile, print, write; the exit code of ``python -m cpgemm compile``: 1 if any is refused."""
    start = time.perf_counter()
    with progress("compiling", len(sources)) as done:
        rows = compile_all(sources, arch=arch, jobs=jobs, force=force, done=done)
    wall = time.perf_counter() - start
    print_rows(rows)
    made = sum(row.cached is False for row in rows)
    refused = [row for row in rows if row.error is not None]
    print(
        f"{len(rows)} kernels for {arch}: {made} compiled, {len(rows) - made - len(refused)} from "
        f"the cache, {len(refused)} refused; {wall:.1f} s; {env.cache_dir()}"
    )
    if json_path is not None:
        write_json(json_path, rows, arch=arch, compiler=None, wall=wall)
        print(f"report: {json_path}")
    for row in refused:
        print(f"\nrefused: {row.error}")
    return 1 if refused else 0
