"""What instructions a kernel has, as a whole and in its main loops, in terms that people use.

The main loop is found in the machine code (``machine_code.find_loops``), not in the source: it is
the innermost loop with the most ``wgmma``, for a kernel without any the one with the most FFMA.
One turn of it may hold several k-blocks, where the compiler was told to unroll.  The load loop is
the innermost one that starts asynchronous copies and touches barriers: a producer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cpgemm.console import table_text
from cpgemm.errors import CompileError
from cpgemm.machine_code import Loop, count_instructions, find_loops, text_sections

__all__ = ["InstructionCounts", "count_by_loop"]

# What people count -> mnemonics of the machine code.
KINDS: dict[str, tuple[str, ...]] = {
    "wgmma": ("QGMMA", "HGMMA", "IGMMA", "BGMMA"),
    "wgmma fences and waits": ("WARPGROUP",),
    "mma": ("HMMA",),
    "FFMA": ("FFMA",),
    "FMUL": ("FMUL",),
    "FADD": ("FADD",),
    "TMA loads": ("UTMALDG",),
    "TMA stores": ("UTMASTG", "UTMAREDG"),
    "TMA prefetches": ("UTMAPF",),
    "bulk copies": ("UBLKCP", "UBLKRED"),
    "asynchronous copies": ("LDGSTS",),
    "mbarrier operations": ("SYNCS", "ARRIVES"),
    "block barriers": ("BAR",),
    "cluster barriers": ("UCGABAR",),
    "shared loads": ("LDS", "LDSM"),
    "shared stores": ("STS", "STSM"),
    "global loads": ("LDG",),
    "global stores": ("STG",),
    "local memory": ("LDL", "STL"),
    "shuffles": ("SHFL",),
}
ALL = "all instructions"
_COPIES = ("UTMALDG", "UBLKCP", "LDGSTS")
_BARRIERS = ("SYNCS", "ARRIVES", "BAR")


@dataclass(frozen=True)
class InstructionCounts:
    """Instructions in the machine code, not their executions, by kind (see ``kinds``).

    - ``whole``: of the kernel, its device functions included
    - ``main_loop``: of one turn of the main loop (this module says which that is); None without one
    - ``load_loop``: of one turn of the loop that starts asynchronous copies; None without one
    - ``loops``: every loop of the kernel: offsets in bytes, depth, counts by mnemonic

    Kinds that are absent count 0: ``counts.main_loop["wgmma"]``.
    """

    whole: Mapping[str, int]
    main_loop: Mapping[str, int] | None
    load_loop: Mapping[str, int] | None
    loops: tuple[Loop, ...]

    def rows(self) -> list[tuple[str, int, int | None, int | None]]:
        """(kind, whole, main loop, load loop) of every kind that occurs."""
        return [
            (
                kind,
                number,
                None if self.main_loop is None else self.main_loop[kind],
                None if self.load_loop is None else self.load_loop[kind],
            )
            for kind, number in self.whole.items()
            if number
        ]

    def __str__(self) -> str:
        cells = [
            (kind, *("-" if number is None else str(number) for number in numbers))
            for kind, *numbers in self.rows()
        ]
        columns = ("instructions", "kernel", "main loop", "load loop")
        return table_text(columns, cells, numbers=columns[1:])


def count_by_loop(cubin: bytes, entry: str) -> InstructionCounts:
    """The counts of kernel ``entry``; raises ``CompileError`` when the cubin does not hold it."""
    code = dict(text_sections(cubin)).get(f".text.{entry}")
    if code is None:
        raise CompileError(f"the cubin holds no kernel {entry!r}")
    counts, total = count_instructions(cubin)
    loops = find_loops(code)
    main = _most(loops, KINDS["wgmma"]) or _most(loops, KINDS["FFMA"])
    load = _most(loops, _COPIES, lambda loop: any(loop.counts.get(name) for name in _BARRIERS))
    return InstructionCounts(
        _by_kind(counts, total),
        None if main is None else _by_kind(main.counts, main.total),
        None if load is None else _by_kind(load.counts, load.total),
        loops,
    )


def _by_kind(counts: Mapping[str, int], total: int) -> dict[str, int]:
    kinds = {kind: sum(counts.get(name, 0) for name in names) for kind, names in KINDS.items()}
    return {**kinds, ALL: total}


def _most(
    loops: Sequence[Loop],
    mnemonics: Sequence[str],
    also: Callable[[Loop], bool] = lambda _loop: True,
) -> Loop | None:
    """Of the innermost loops with any of ``mnemonics`` (that ``also`` takes) the one with most.

    Most kinds first: a loop that only fetches one operand ahead is unrolled and has many of a kind.
    """

    def number(loop: Loop) -> tuple[int, int]:
        found = [loop.counts.get(name, 0) for name in mnemonics]
        return sum(map(bool, found)), sum(found)

    suited = [loop for loop in loops if any(number(loop)) and also(loop)]
    innermost = [loop for loop in suited if not any(other.body < loop.body for other in suited)]
    return max(innermost, key=lambda loop: (*number(loop), loop.total), default=None)
