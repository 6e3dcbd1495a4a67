"""``Kernel``: one kernel to look into - source, PTX, machine code, resources, counts, log.

Nothing happens until a property is asked for; no property needs a GPU.
"""

from __future__ import annotations

import functools
import html
from dataclasses import dataclass

from cpgemm.compiler import CompiledKernel, compile_kernel, ptx_of
from cpgemm.console import table_text
from cpgemm.disassembler import disassemble
from cpgemm.instruction_counts import InstructionCounts, count_by_loop
from cpgemm.machine_code import threads_of
from cpgemm.occupancy import Occupancy, occupancy
from cpgemm.render import KernelSource
from cpgemm.resources import ResourceReport

__all__ = ["Kernel", "KernelResources"]


@dataclass(frozen=True)
class KernelResources:
    """What a launch of a kernel takes.

    - ``registers``: of a thread at launch (``setmaxnreg`` moves them between warpgroups later)
    - ``threads``: of a block; None when neither the source nor its launch says so
    - ``shared_bytes``: dynamic shared memory of a block, ``static_shared_bytes`` the declared one
    - ``report``: all that log and machine code say: spills, local memory, faults
    - ``occupancy``: blocks per multiprocessor and what limits them; None without ``threads``
    """

    registers: int
    threads: int | None
    shared_bytes: int
    static_shared_bytes: int
    report: ResourceReport
    occupancy: Occupancy | None

    @property
    def spill_bytes(self) -> int:
        """Bytes that a thread stores to and loads from local memory for want of registers."""
        return self.report.spill_store_bytes + self.report.spill_load_bytes

    @property
    def local_bytes(self) -> int:
        """Bytes of local memory of a thread: its stack frame and what else lies there."""
        return max(self.report.stack_bytes, self.report.local_bytes)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of each, as people read them."""
        fits = self.occupancy
        return [
            ("registers per thread", str(self.registers)),
            ("threads per block", "unknown" if self.threads is None else str(self.threads)),
            ("dynamic shared memory", f"{self.shared_bytes} bytes"),
            ("static shared memory", f"{self.static_shared_bytes} bytes"),
            ("spills per thread", f"{self.spill_bytes} bytes"),
            ("local memory per thread", f"{self.local_bytes} bytes"),
            ("blocks per SM", "unknown" if fits is None else str(fits.blocks_per_sm)),
            ("warps per SM", "unknown" if fits is None else f"{fits.warps_per_sm} of 64"),
            ("decided by", "unknown" if fits is None else ", ".join(fits.decided_by)),
            ("faults", "; ".join(self.report.faults()) or "none"),
        ]

    def __str__(self) -> str:
        return table_text(("resource", "value"), self.rows())


class Kernel:
    """One kernel, to be looked into.  ``cpgemm.kernel`` and ``plan.kernel`` make them.

    ``source``: as rendered.  ``threads``: of a block (None: what ``__launch_bounds__`` says).

    Each property is worked out when it is first asked for and kept; those behind ``source`` compile
    the kernel or find it in the disk cache, and raise what ``compile_kernel`` raises.
    """

    def __init__(self, source: KernelSource, *, threads: int | None = None) -> None:
        self._source = source
        self._threads = threads

    @property
    def rendered(self) -> KernelSource:
        """The rendered kernel with name, entry, digest and shared memory."""
        return self._source

    @property
    def name(self) -> str:
        """Readable and, for the package's own kernels, unique."""
        return self._source.name

    @property
    def entry(self) -> str:
        """The kernel's ``extern "C"`` symbol."""
        return self._source.entry

    @property
    def source(self) -> str:
        """CUDA C++ as rendered; the headers that it includes are files of ``cuda_src``."""
        return self._source.text

    @functools.cached_property
    def compiled(self) -> CompiledKernel:
        """The kernel in the disk cache: ``.compiled.cubin`` is the path of its machine code."""
        return compile_kernel(self._source)

    @functools.cached_property
    def ptx(self) -> str:
        """PTX, made by a second run of the compiler's front end; nothing of cpgemm loads it."""
        return ptx_of(self._source)

    @functools.cached_property
    def sass(self) -> str:
        """Machine code as nvdisasm prints it.

        Raises ``MissingDependencyError`` without nvdisasm (``pip install "cpgemm[inspect]"``).
        """
        return disassemble(self.compiled.cubin)

    @functools.cached_property
    def resources(self) -> KernelResources:
        """Registers, shared memory, spills, threads, occupancy."""
        report = self.compiled.report
        threads = self._threads
        if threads is None:
            threads = threads_of(self.compiled.cubin.read_bytes(), self.entry)
        dynamic = self._source.shared_bytes
        fits = None
        if threads is not None:
            fits = occupancy(threads, report.registers, dynamic + report.static_shared_bytes)
        return KernelResources(
            report.registers, threads, dynamic, report.static_shared_bytes, report, fits
        )

    @functools.cached_property
    def counts(self) -> InstructionCounts:
        """Instructions by kind: of the kernel, of its main loop and of its load loop."""
        return count_by_loop(self.compiled.cubin.read_bytes(), self.entry)

    @property
    def log(self) -> str:
        """The compiler's log, ``ptxas -v`` included; places in a user's template by its lines."""
        origin, log = self._source.origin, self.compiled.log
        return log if origin is None else origin.translate(log, f"{self.name}.cu")

    def _title(self) -> str:
        lines = self.source.count("\n") + 1
        return f"{self.name}: {self.entry}, {lines} lines from {self._source.template}"

    def _facts(self) -> list[str]:
        """What is known, in a line or two; compiles nothing."""
        if "compiled" not in self.__dict__:
            return ["not compiled yet: ask for .resources, .counts, .sass, .ptx or .log"]
        found = self.resources
        shared = found.shared_bytes + found.static_shared_bytes
        text = f"{found.registers} registers a thread, {shared} bytes of shared memory, "
        text += f"{found.spill_bytes} bytes spilled"
        return [text] if found.occupancy is None else [text, str(found.occupancy)]

    def __repr__(self) -> str:
        return "\n  ".join([f"<{type(self).__name__} {self._title()}", *self._facts()]) + ">"

    def _repr_html_(self) -> str:
        """For notebooks: what is known, and the source folded away."""
        lines = "<br>".join(html.escape(line) for line in self._facts())
        return (
            f"<div><b>{html.escape(self._title())}</b><br>{lines}"
            f"<details><summary>source</summary><pre>{html.escape(self.source)}</pre></details>"
            "</div>"
        )
