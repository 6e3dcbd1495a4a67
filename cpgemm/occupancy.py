"""How many blocks of a kernel one multiprocessor of Hopper holds at once, and what decides it.

Limits of compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"): 64 warps, 32 blocks, 65536 registers and 228 KiB of shared memory, of which a block
may have 227 KiB and the system keeps 1 KiB for each.  Registers are given to whole warps in units
of 256, from the part of the register file that belongs to the warp's quarter of the multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpgemm.errors import reject

__all__ = ["Occupancy", "occupancy"]

_WARPS = 64
_BLOCKS = 32
_QUARTERS = 4
_QUARTER_REGISTERS = 16384
_REGISTER_UNIT = 256  # a warp's
_SHARED = 228 * 1024
_SHARED_RESERVED = 1024  # for each block
_SHARED_UNIT = 128
_MAX_THREADS = 1024


@dataclass(frozen=True)
class Occupancy:
    """What fits on one multiprocessor.

    - ``blocks_per_sm``: blocks at once; 0 when not even one fits
    - ``warps_per_sm``: their warps, of the 64 that there is room for
    - ``limits``: blocks that each resource alone would allow, by its name
    - ``decided_by``: the resources that allow the fewest
    """

    blocks_per_sm: int
    warps_per_sm: int
    limits: dict[str, int]

    @property
    def decided_by(self) -> tuple[str, ...]:
        """Names of the resources that limit the blocks."""
        return tuple(name for name, blocks in self.limits.items() if blocks == self.blocks_per_sm)

    @property
    def fraction(self) -> float:
        """Warps over the 64 that a multiprocessor holds."""
        return self.warps_per_sm / _WARPS

    def __str__(self) -> str:
        plural = "" if self.blocks_per_sm == 1 else "s"
        return (
            f"{self.blocks_per_sm} block{plural} per SM, {100 * self.fraction:.0f} % of its warps, "
            f"decided by {' and '.join(self.decided_by)}"
        )


def occupancy(threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """``Occupancy`` of blocks of ``threads`` with ``registers`` each and ``shared_bytes`` in all.

    ``shared_bytes`` is static and dynamic shared memory of a block.  A kernel that moves registers
    (``setmaxnreg``) counts with those that it is launched with.  Raises ``ArgumentError``.
    """
    if not 1 <= threads <= _MAX_THREADS:
        reject("threads", f"must be between 1 and {_MAX_THREADS}", threads, "Give a block's size.")
    if registers < 0 or shared_bytes < 0:
        reject("registers, shared_bytes", "must not be negative", (registers, shared_bytes), "")
    warps = -(-threads // 32)
    per_warp = _round_up(32 * max(registers, 1), _REGISTER_UNIT)
    shared = _round_up(shared_bytes, _SHARED_UNIT) + _SHARED_RESERVED
    limits = {
        "registers": _QUARTER_REGISTERS // per_warp * _QUARTERS // warps,
        "shared memory": _SHARED // shared,
        "warps": _WARPS // warps,
        "blocks": _BLOCKS,
    }
    blocks = min(limits.values())
    return Occupancy(blocks, blocks * warps, limits)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
