"""What a compiled kernel uses: read from the ptxas report and from the machine code itself.

The counts of instructions come from the cubin itself (``machine_code``): no toolkit is needed.
"""

from __future__ import annotations

import dataclasses
import re

from cpgemm.errors import CompileError
from cpgemm.machine_code import count_instructions

__all__ = ["ResourceReport", "parse_report"]

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers\b(.*)")
_CUMULATIVE = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+) bytes smem")
_LOCAL = re.compile(r"(\d+) bytes lmem")
# The codes (C7510 to C7515 for wgmma, C7508 for setmaxnreg) move between versions; the words stay.
_SERIALIZED = re.compile(r"instructions are serialized|wgmma.*serializ", re.IGNORECASE)
_SETMAXNREG_IGNORED = re.compile(r"setmaxnreg.*ignored", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ResourceReport:
    """Resources of one kernel.  Sizes in bytes; local memory, stack and spills per thread.

    ``wgmma``, ``tma_loads``, ``tma_stores``, ``bulk_copies`` and ``local_instructions`` count
    instructions in the machine code, not their executions.  ``tma_stores`` includes reductions,
    ``tma_prefetches`` are loads into L2, ``bulk_copies`` are the forms without a tensor map.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    local_bytes: int
    static_shared_bytes: int
    wgmma: int
    tma_loads: int
    tma_stores: int
    tma_prefetches: int
    bulk_copies: int
    local_instructions: int
    instructions: int
    serialized: bool
    setmaxnreg_ignored: bool

    def faults(self) -> tuple[str, ...]:
        """Why this kernel must not be used, one sentence each; empty when it may."""
        faults: list[str] = []
        if self.spill_store_bytes or self.spill_load_bytes:
            faults.append(
                f"registers are spilled ({self.spill_store_bytes} bytes stored, "
                f"{self.spill_load_bytes} bytes loaded per thread)"
            )
        if self.stack_bytes or self.local_bytes or self.local_instructions:
            faults.append(
                f"local memory is used ({max(self.stack_bytes, self.local_bytes)} bytes per "
                f"thread, {self.local_instructions} instructions); index arrays by constants only"
            )
        if self.serialized:
            faults.append(
                "wgmma instructions are serialized; keep accumulators untouched and every call "
                "inlined between the first wgmma and its wait"
            )
        if self.setmaxnreg_ignored:
            faults.append("setmaxnreg is ignored; give __launch_bounds__ both of its arguments")
        return tuple(faults)


def parse_report(log: str, cubin: bytes, entry: str) -> ResourceReport:
    """The report of ``entry`` from the log of ``ptxas -v`` and from the cubin's machine code.

    Frames and spills are the maximum over all functions in the log: a device function that was not
    inlined counts against the kernel that calls it.  Raises ``CompileError`` when the log does not
    name the entry or the cubin is no ELF file.
    """
    entries: list[str] = []
    registers = stack = stores = loads = local = shared = 0
    current = ""
    seen = False
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            current = match[1]
            entries.append(current)
        if match := _FRAME.search(line):
            stack = max(stack, int(match[1]))
            stores = max(stores, int(match[2]))
            loads = max(loads, int(match[3]))
        if (match := _USED.search(line)) and current == entry:
            seen = True
            registers = int(match[1])
            shared = _number(_SHARED, match[2])
            local = max(local, _number(_LOCAL, match[2]))
            stack = max(stack, _number(_CUMULATIVE, match[2]))
    if not seen:
        raise CompileError(
            f"the compiler reports no kernel {entry!r}; it reports "
            f'{", ".join(entries) or "none"}. Declare it extern "C" __global__.',
            log=log,
        )
    counts, total = count_instructions(cubin)
    return ResourceReport(
        registers=registers,
        stack_bytes=stack,
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        local_bytes=local,
        static_shared_bytes=shared,
        wgmma=sum(counts[op] for op in ("QGMMA", "HGMMA", "IGMMA", "BGMMA")),
        tma_loads=counts["UTMALDG"],
        tma_stores=counts["UTMASTG"] + counts["UTMAREDG"],
        tma_prefetches=counts["UTMAPF"],
        bulk_copies=counts["UBLKCP"] + counts["UBLKRED"],
        local_instructions=counts["LDL"] + counts["STL"],
        instructions=total,
        serialized=_SERIALIZED.search(log) is not None,
        setmaxnreg_ignored=_SETMAXNREG_IGNORED.search(log) is not None,
    )


def _number(pattern: re.Pattern[str], text: str) -> int:
    return sum(int(number) for number in pattern.findall(text))
