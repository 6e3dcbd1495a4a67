"""``KernelConfig``: the decisions compiled into a dense kernel, and the numbers they imply.

A configuration belongs to a family: one template over the shared headers.  Another family (swapped
operands, split-K, ping-pong) is another template and another class beside this one; ``heuristics``
and ``kernels`` take whatever offers the same properties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from cpgemm.grouped_problem import MAX_GROUPS
from cpgemm.problem import GemmProblem, OutDtype

__all__ = [
    "SHARED_LIMIT",
    "TAIL_ROWS",
    "AdaptiveKernelConfig",
    "GroupedKernelConfig",
    "KernelConfig",
    "SplitKernelConfig",
]

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block may have on Hopper
TAIL_ROWS = 64  # of A in one box of a last tile that is far from full

_BLOCK_K = 128
_REGISTER_FILE = 65536  # 32-bit registers of one SM


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class KernelConfig:
    """One kernel of the dense family (``templates/dense.cu.j2``).

    - ``block_m`` x ``block_n``: the tile of D that a block computes; K goes in steps of 128
    - ``stages``: depth of the ring of shared-memory stages
    - ``consumers``: warpgroups that issue wgmma; waves of 64 rows go to them in turn
    - ``cluster_m``: 2: two blocks share a column tile and B is multicast to both
    - ``cluster_n``: 2: two blocks share a row tile and A is multicast to both
    - ``out_dtype``: "bfloat16" or "float32", of C and D
    - ``raster_group``: rows of tiles that are walked together, so that operands stay in L2
    - ``unroll``: k-blocks in one turn of the main loop
    - ``column_parts``: consumers that share a tile's columns instead of its rows: 1 or all

    Raises ``ArgumentError`` for numbers that make no kernel.
    """

    block_m: int
    block_n: int
    stages: int
    consumers: int = 2
    cluster_m: int = 1
    cluster_n: int = 1
    out_dtype: OutDtype = "bfloat16"
    raster_group: int = 8
    unroll: int = 3
    column_parts: int = 1

    family: ClassVar[str] = "dense"
    template: ClassVar[str] = "dense.cu.j2"
    entry: ClassVar[str] = "cpgemm_dense"

    def __post_init__(self) -> None:
        problem = self._malformed()
        if problem:
            raise ValueError(f"KernelConfig: {problem}; got {self!r}")

    def _malformed(self) -> str | None:
        """What hardware or template cannot do, whatever the problem; None when all is well."""
        if self.consumers not in (1, 2, 3):
            return "consumers must be 1, 2 or 3: the register file holds no more"
        if self.column_parts not in (1, self.consumers) or self.block_n % (16 * self.column_parts):
            return "column_parts must be 1 or consumers, with multiples of 16 columns for each"
        if self.block_m % (64 * self.row_parts) or not 64 <= self.block_m <= 256:
            return "block_m must be a multiple of 64 per consumer, 256 at most (TMA's box)"
        if self.block_n % 16 or not 16 <= self.block_n <= 256:
            return "block_n must be a multiple of 16 between 16 and 256 (wgmma's N, stmatrix x4)"
        if (self.waves + 1) * self.wave_n // 2 > 200:
            return "accumulators need more than 200 registers a thread and would spill"
        if (self.cluster_m, self.cluster_n) not in ((1, 1), (2, 1), (1, 2)):
            return "a cluster has two blocks at most, along M or along N"
        if self.stages < 2:
            return "stages must be at least 2"
        if self.shared_bytes > SHARED_LIMIT:
            return f"shared memory of {self.shared_bytes} bytes exceeds {SHARED_LIMIT}"
        return None

    # ------------------------------------------------------------------ derived, for the template

    @property
    def name(self) -> str:
        """Readable and unique, e.g. ``dense_256x128_s3_w2_multicast_a_bfloat16``."""
        columns = "_by_columns" if self.column_parts > 1 else ""
        multicast = {(1, 1): "", (1, 2): "_multicast_a", (2, 1): "_multicast_b"}
        return (
            f"{self.family}_{self.block_m}x{self.block_n}_s{self.stages}_w{self.consumers}"
            f"{columns}{multicast[self.cluster_m, self.cluster_n]}_{self.out_dtype}"
        )

    @property
    def waves(self) -> int:
        """m64 waves of wgmma that each consumer issues for one k-block."""
        return self.block_m // (64 * self.row_parts)

    @property
    def row_parts(self) -> int:
        """Consumers that share the rows of a tile."""
        return self.consumers // self.column_parts

    @property
    def wave_n(self) -> int:
        """Columns of a consumer's waves."""
        return self.block_n // self.column_parts

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and one producer warpgroup."""
        return 128 * (self.consumers + 1)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_m * self.cluster_n

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread keeps after ``setmaxnreg`` (a multiple of 8)."""
        return 32 if self.consumers == 3 else 24

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread gets: what the producer leaves of the launch's, 240 at most.

        A block owns what its threads entered with, a multiple of 8 each, not the register file:
        ``setmaxnreg.inc`` for more than that waits for ever.
        """
        entry = _REGISTER_FILE // self.threads // 8 * 8
        left = entry * (self.consumers + 1) - self.producer_registers
        return min(left // self.consumers // 8 * 8, 240)

    @property
    def scale_segment(self) -> int:
        """Columns of the tile that surely share one scale of B, wherever the tile starts."""
        return math.gcd(self.wave_n, _BLOCK_K)

    @property
    def scale_rows(self) -> int:
        """Scales of A that a stage has room for."""
        return self.block_m

    @property
    def store_chunk(self) -> int:
        """Columns of one TMA store box: the widest of TMA's swizzle spans that divides the tile."""
        return next(width for width in (64, 32, 16) if self.wave_n % width == 0)

    @property
    def staged(self) -> bool:
        """Whether D goes through shared memory and TMA; float32 is stored from registers."""
        return self.out_dtype == "bfloat16"

    @property
    def store_box(self) -> tuple[int, int]:
        """Rows and columns of one TMA store: those of a wave, ``store_chunk`` columns."""
        return (64, self.store_chunk)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; the kernel asserts that its ``struct Shared`` has this size."""
        staging = self.block_m * self.block_n * 2 if self.staged else 1024
        tiles = self.stages * (self.block_m + self.block_n) * _BLOCK_K + staging
        row_scales = self.stages * self.scale_rows * 4
        column_scales = self.stages * (self.block_n // self.scale_segment) * 4
        barriers = 2 * self.stages * 8
        scales_end = _round_up(tiles, 128) + row_scales + column_scales
        return _round_up(_round_up(scales_end, 8) + barriers, 1024)

    def _repr_html_(self) -> str:
        from cpgemm.displays.config import config_html

        return config_html(self)

    # -------------------------------------------------------------------- derived, for the launch

    def rows_loaded(self, m: int) -> int:
        """Rows of A (of ``m``) that a stage of the first tile really loads.

        The rest of the stage keeps old bytes; they only reach rows of D that are never stored.
        """
        return self.block_m if self.cluster_n > 1 else min(self.block_m, _round_up(m, 8))

    def column_tiles(self, n: int) -> int:
        """Tiles side by side over ``n`` columns, those that pad the last cluster included."""
        return -(-n // (self.block_n * self.cluster_n)) * self.cluster_n

    def tiles(self, problem: GemmProblem) -> int:
        """Block tiles of a ``problem``, those that pad the last cluster included."""
        row_tiles = -(-problem.m // (self.block_m * self.cluster_m)) * self.cluster_m
        return row_tiles * self.column_tiles(problem.n)

    def blocks(self, tiles: int, sms: int) -> int:
        """Blocks of the persistent launch for ``tiles`` tiles on ``sms`` multiprocessors."""
        return min(sms // self.cluster * self.cluster, tiles)

    def why_not(self, problem: GemmProblem) -> str | None:
        """Why this kernel cannot compute ``problem``; None when it can."""
        if problem.out_dtype != self.out_dtype:
            return f"it writes {self.out_dtype}, the problem wants {problem.out_dtype}"
        if 0 in (problem.m, problem.n, problem.k):
            return "an empty product needs no kernel"
        return None


@dataclass(frozen=True)
class SplitKernelConfig(KernelConfig):
    """One kernel of ``templates/dense_split.cu.j2``: a cluster of blocks splits the K of a tile.

    Fields as in ``KernelConfig``; ``splits`` is how many blocks share a tile.  Blocks are not
    persistent: there is one cluster for each tile.
    """

    splits: int = 2

    family: ClassVar[str] = "dense_split"
    template: ClassVar[str] = "dense_split.cu.j2"
    entry: ClassVar[str] = "cpgemm_dense_split"

    def _malformed(self) -> str | None:
        if self.splits not in (2, 4, 8) or (self.cluster_m, self.cluster_n) != (1, 1):
            return "splits must be 2, 4 or 8, without multicast"
        if self.waves != 1 or self.block_n % (8 * self.splits):
            return "consumers have one wave each, and every block whole groups of 8 columns"
        return super()._malformed()

    @property
    def name(self) -> str:
        """Readable and unique, e.g. ``dense_split_64x64_k4_s6_w1_bfloat16``."""
        return (
            f"{self.family}_{self.block_m}x{self.block_n}_k{self.splits}_s{self.stages}"
            f"_w{self.consumers}_{self.out_dtype}"
        )

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and one producer warp."""
        return 128 * self.consumers + 32

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that a multiprocessor may hold at once."""
        return 2 if 2 * (self.shared_bytes + 1024) <= 228 * 1024 else 1

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages, and a slot for the sums of each block of the cluster."""
        tiles = self.stages * (self.block_m + self.block_n) * _BLOCK_K + 1024
        small = self.stages * (self.scale_rows + self.block_n // self.scale_segment) * 4
        main = _round_up(_round_up(tiles + small, 8) + 16 * self.stages, 1024)
        return _round_up(main + self.block_m * self.block_n * 4, 1024)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits

    def column_tiles(self, n: int) -> int:
        """Tiles side by side over ``n`` columns."""
        return -(-n // self.block_n)

    def tiles(self, problem: GemmProblem) -> int:
        """Tiles, each of a cluster."""
        return -(-problem.m // self.block_m) * self.column_tiles(problem.n)

    def blocks(self, tiles: int, sms: int) -> int:
        """Blocks of the launch."""
        return tiles * self.splits


@dataclass(frozen=True)
class GroupedKernelConfig(KernelConfig):
    """One kernel of the grouped family (``templates/grouped.cu.j2``): rows in groups, a B for each.

    Fields as in ``KernelConfig``; ``cluster_m`` is always 1.
    """

    family: ClassVar[str] = "grouped"
    template: ClassVar[str] = "grouped.cu.j2"
    entry: ClassVar[str] = "cpgemm_grouped"
    max_groups: ClassVar[int] = MAX_GROUPS

    def _malformed(self) -> str | None:
        if self.cluster_m != 1:
            return "row tiles of a group have no fixed neighbour to share a column tile with"
        return super()._malformed()

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the dense kernel's, a place per stage and the table of groups."""
        return _round_up(self._block_bytes + self._table_bytes, 1024)

    @property
    def _block_bytes(self) -> int:
        """``GroupedForm::Shared``."""
        return super().shared_bytes + _round_up(16 * self.stages, 1024)

    @property
    def _table_bytes(self) -> int:
        """``GroupTable``: a count per group, three for each warp and turn."""
        warps = self.threads // 32
        turns = -(-self.max_groups // self.threads)
        return 4 * (self.max_groups + 1 + 3 * turns * warps)

    @property
    def scale_box(self) -> int:
        """Scales of A in one TMA box. A tile may start at any row, a box at multiples of 4."""
        return 128

    @property
    def scale_rows(self) -> int:
        """Whole boxes that hold the scales of a tile and up to three in front of them."""
        return _round_up(self.block_m + 3, self.scale_box)

    @property
    def row_box(self) -> int:
        """Rows of A in one TMA box, of both blocks where A is multicast."""
        return self.block_m if self.cluster > 1 else 64

    @property
    def few_box(self) -> int:
        """Rows of the small boxes: short tiles load no more than they must."""
        return 64 if self.cluster > 1 else 16

    @property
    def few_rows(self) -> int:
        """Up to how many rows a tile is loaded by small boxes."""
        return self.block_m - 64 if self.cluster > 1 else 16

    @property
    def shares_wave(self) -> bool:
        """Whether two consumers share the columns of a tile's third wave."""
        return self.staged and self.consumers == 2 and self.waves == 2

    def why_not_layout(self, layout: str, n: int) -> str | None:
        """Why this kernel suits no product of ``layout`` with ``n`` columns; None when it does."""
        if layout == "m_indices" and self.block_m not in (64, 128, 256):
            return "its tiles straddle the blocks of 128 rows that m_indices is made of"
        if self.column_tiles(n) * self.block_n - n >= self.block_n:
            return "an odd number of column tiles would idle one block of a pair"
        return None


@dataclass(frozen=True)
class AdaptiveKernelConfig(GroupedKernelConfig):
    """One kernel of ``templates/grouped_adaptive.cu.j2``: its tile, or a flat one, by the sizes.

    Fields as in ``KernelConfig`` for the tall tile.  ``flat_n`` and ``flat_stages`` are those of
    the flat tile, which has 64 rows and one consumer; ``flat_unroll`` its ``unroll``.
    """

    flat_n: int = 96
    flat_stages: int = 2
    flat_unroll: int = 3

    family: ClassVar[str] = "grouped_adaptive"
    template: ClassVar[str] = "grouped_adaptive.cu.j2"
    entry: ClassVar[str] = "cpgemm_grouped_adaptive"

    def _malformed(self) -> str | None:
        if self.cluster > 1 or self.consumers < 2:
            return "an adaptive kernel has two consumers at least and no clusters"
        return super()._malformed()

    @property
    def flat(self) -> GroupedKernelConfig:
        """The flat tile, as the kernel that it would be on its own."""
        return GroupedKernelConfig(
            64, self.flat_n, self.flat_stages, 1, out_dtype=self.out_dtype, unroll=self.flat_unroll
        )

    @property
    def name(self) -> str:
        """Readable and unique, e.g. ``grouped_adaptive_256x128_s3_w2_or_64x96_s10_bfloat16``."""
        tall = super().name.removesuffix(f"_{self.out_dtype}")
        return f"{tall}_or_64x{self.flat_n}_s{self.flat_stages}_{self.out_dtype}"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the larger of the two forms'."""
        block = max(self._block_bytes, self.flat._block_bytes)
        return _round_up(block + self._table_bytes, 1024)
