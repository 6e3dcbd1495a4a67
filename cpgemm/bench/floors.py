"""The live floors: how long the memory traffic of a call takes alone, and how long its arithmetic.

The memory floor streams what a call reads through shared memory by the copy engine, with 128 KiB in
flight in each multiprocessor, and writes as many bytes as the call writes; with programmatic
dependent launch its loads do not wait for the kernel before.  The compute floor issues the wgmma
batches of a product from operands that stay in shared memory, promotion included.  Both run in the
same windows as what they are compared with, at the clock that power allows then.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpgemm.layout import pointer
from cpgemm.render import KernelSource, render

__all__ = [
    "ComputeFloorConfig",
    "MemoryFloorConfig",
    "Region",
    "columns",
    "compute_floor",
    "compute_units",
    "floor_sources",
    "memory_floor",
    "regions_bytes",
    "whole",
]

_MOST_REGIONS = 8
_ALIGNMENT = 16  # bytes; of what the copy engine moves


@dataclass(frozen=True)
class MemoryFloorConfig:
    """``stages`` pieces of ``piece`` bytes in flight in each block, issued by ``loaders`` warps.

    Stores are of ``store_piece`` bytes.
    """

    stages: int = 8
    piece: int = 16384  # in pieces of 8 KiB a floor was slower than what it is a floor of
    loaders: int = 1
    store_piece: int = 16384
    regions: int = _MOST_REGIONS

    @property
    def threads(self) -> int:
        """Threads of a block: a warp for each loader, and one that stores."""
        return 32 * (self.loaders + 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the pieces, one to store from, barriers in units of 1 KiB."""
        return self.piece * self.stages + self.store_piece + 1024


@dataclass(frozen=True)
class ComputeFloorConfig:
    """``waves`` m64n128 waves for each of two warpgroups: a unit of block_m x 128 x 128."""

    waves: int = 2

    @property
    def block_m(self) -> int:
        """Rows of a unit."""
        return 128 * self.waves

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: one k-block of A and of B."""
        return (self.block_m + 128) * 128


@dataclass(frozen=True)
class Region:
    """Device memory that a call reads or writes: ``runs`` stretches of ``run_bytes`` bytes.

    Addresses, lengths and ``pitch``, the bytes from one stretch to the next, are multiples of 16.
    """

    address: int
    run_bytes: int
    runs: int = 1
    pitch: int = 0

    def pieces(self, piece: int) -> int:
        """Copies of at most ``piece`` bytes that each stretch takes."""
        return -(-self.run_bytes // piece)

    def packed(self, piece: int) -> bytes:
        """``struct Region`` of the template."""
        for value in (self.address, self.run_bytes, self.pitch):
            if value % _ALIGNMENT or not 0 <= value < (1 << 63):
                raise ValueError(f"{self}: addresses and sizes must be multiples of {_ALIGNMENT}")
        return struct.pack(
            "<QQQII", self.address, self.pitch, self.run_bytes, self.runs, self.pieces(piece)
        )


def whole(array: Any, rows: int | None = None) -> Region:
    """All of ``array``, gaps between its rows included, or the first rows of each of its groups.

    Rows are contiguous.  Lengths are rounded up to 16 bytes, which stays inside any allocation of
    CuPy's.  ``rows``: of each group of (G, R, C) (None: all of the array).
    """
    pitch = int(array.strides[-2])
    if rows is None:
        groups, group = (array.shape[0], int(array.strides[0])) if array.ndim == 3 else (1, 0)
        last = (array.shape[-2] - 1) * pitch + array.shape[-1] * array.itemsize
        return Region(pointer(array), _rounded((groups - 1) * group + last))
    return Region(pointer(array), _rounded(rows * pitch), array.shape[0], int(array.strides[0]))


def columns(array: Any, count: int) -> Region:
    """The first ``count`` columns of (G, R, C), whose rows follow one another at one pitch."""
    pitch = int(array.strides[-2])
    run = _rounded(count * int(array.itemsize))
    return Region(pointer(array), run, array.shape[0] * array.shape[1], pitch)


def regions_bytes(regions: Sequence[Region]) -> int:
    """Bytes of all regions."""
    return sum(region.runs * region.run_bytes for region in regions)


def _rounded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


@functools.cache
def memory_source(config: MemoryFloorConfig) -> KernelSource:
    """The rendered kernel."""
    return render(
        "memory_floor.cu.j2",
        name=f"memory_floor_{config.piece >> 10}k_s{config.stages}_w{config.loaders}",
        entry="cpgemm_memory_floor",
        values={"config": config},
        shared_bytes=config.shared_bytes,
    )


@functools.cache
def compute_source(config: ComputeFloorConfig) -> KernelSource:
    """The rendered kernel."""
    return render(
        "compute_floor.cu.j2",
        name=f"compute_floor_{config.block_m}x128",
        entry="cpgemm_compute_floor",
        values={"config": config},
        shared_bytes=config.shared_bytes,
    )


MEMORY_FLOOR = MemoryFloorConfig()
_COMPUTE_FLOORS = {waves: ComputeFloorConfig(waves) for waves in (1, 2)}


def floor_sources() -> list[KernelSource]:
    """Every floor kernel."""
    return [
        memory_source(MEMORY_FLOOR),
        *(compute_source(config) for config in _COMPUTE_FLOORS.values()),
    ]


def memory_arguments(
    config: MemoryFloorConfig, reads: Sequence[Region], writes: Sequence[Region]
) -> tuple[Any, ...]:
    """The kernel's parameters in their order."""
    reads = [region for region in reads if region.runs and region.run_bytes]
    writes = [region for region in writes if region.runs and region.run_bytes]
    if len(reads) + len(writes) > config.regions:
        raise ValueError(f"at most {config.regions} regions; got {len(reads) + len(writes)}")
    sides = ((reads, config.piece), (writes, config.store_piece))
    table = b"".join(region.packed(piece) for side, piece in sides for region in side)
    pieces = [sum(region.runs * region.pieces(piece) for region in side) for side, piece in sides]
    return (
        table.ljust(config.regions * struct.calcsize("<QQQII"), b"\0"),
        np.int32(len(reads)), np.int32(pieces[0]), np.int32(pieces[1]),
    )  # fmt: skip


def memory_floor(
    reads: Sequence[Region],
    writes: Sequence[Region],
    *,
    pdl: bool,
    config: MemoryFloorConfig = MEMORY_FLOOR,
) -> Callable[[], None]:
    """A launch on the current device: reads ``reads`` once, fills ``writes`` with a pattern."""
    from cpgemm.compiler import load_kernel
    from cpgemm.launch import PreparedLaunch

    return PreparedLaunch(
        load_kernel(memory_source(config)), _multiprocessors(), config.threads,
        memory_arguments(config, reads, writes), shared_bytes=config.shared_bytes, pdl=pdl,
    )  # fmt: skip


def compute_units(rows: Sequence[int], n: int, k: int) -> tuple[ComputeFloorConfig, int]:
    """The kernel for groups of ``rows`` rows each (one group: a dense product), and its units.

    A product needs ceil(rows / 64) * ceil(n / 128) * ceil(k / 128) batches of m64n128k128 for each
    group.  Groups of up to 128 rows take the unit of 128 rows.  The batches are dealt out evenly
    over the multiprocessors, so that no order of tiles can need fewer.
    """
    batches = sum(-(-count // 64) for count in rows) * -(-n // 128) * -(-k // 128)
    config = _COMPUTE_FLOORS[1 if max(rows, default=0) <= 128 else 2]
    return config, -(-batches // (2 * config.waves))


def compute_floor(codes: Any, rows: Sequence[int], n: int, k: int) -> Callable[[], None]:
    """A launch on the current device that multiplies as much as the product needs.

    ``codes``: a CuPy array of e4m3 codes without NaN, 48 KiB of it are used as operands (more rows
    are made by repeating it).
    """
    import cupy

    from cpgemm.compiler import load_kernel
    from cpgemm.launch import PreparedLaunch

    config, units = compute_units(rows, n, k)
    blocks = max(1, min(_multiprocessors(), units))
    flat = codes.view(np.uint8).reshape(-1)[: config.shared_bytes]
    operands = cupy.tile(flat, -(-config.shared_bytes // flat.size))[: config.shared_bytes].copy()
    sums = cupy.empty(blocks * 256, np.float32)
    launch = PreparedLaunch(
        load_kernel(compute_source(config)), blocks, 256,
        (np.uint64(pointer(operands)), np.uint64(pointer(sums)), np.int32(units),
         np.float32(1e-4)),
        shared_bytes=config.shared_bytes,
    )  # fmt: skip
    return _Kept(launch, (operands, sums))


class _Kept:
    """A launch together with the memory that it works on."""

    def __init__(self, launch: Callable[[], None], memory: tuple[Any, ...]) -> None:
        self._launch, self.memory = launch, memory

    def __call__(self) -> None:
        self._launch()


def _multiprocessors() -> int:
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])
