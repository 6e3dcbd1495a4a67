"""Which block computes which tile in which turn: the arithmetic of the kernels' schedulers.

Persistent kernels: ``cuda_src/scheduler.cuh``, line by line (the test compiles that header for the
host and compares).  Split kernels have a cluster for each tile, numbered down the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpgemm.config import KernelConfig, SplitKernelConfig
from cpgemm.problem import GemmProblem

__all__ = ["Place", "grid", "places"]


@dataclass(frozen=True)
class Place:
    """A tile's place: ``turn`` of ``block``, and ``row``, ``column`` in units of tiles.

    Tiles that pad the last cluster lie outside of the grid.
    """

    turn: int
    block: int
    row: int
    column: int


def grid(problem: GemmProblem, config: KernelConfig) -> tuple[int, int]:
    """Rows and columns of tiles that D has, padding not counted."""
    return -(-problem.m // config.block_m), -(-problem.n // config.block_n)


def places(problem: GemmProblem, config: KernelConfig, sms: int) -> Iterator[Place]:
    """Every tile of the launch on ``sms`` multiprocessors, in the order of the schedule."""
    if isinstance(config, SplitKernelConfig):
        rows, _ = grid(problem, config)
        for tile in range(config.tiles(problem)):
            for block in range(config.splits):
                yield Place(0, tile * config.splits + block, tile % rows, tile // rows)
        return
    clusters = config.blocks(config.tiles(problem), sms) // config.cluster
    rows = -(-problem.m // (config.block_m * config.cluster_m))
    columns = -(-problem.n // (config.block_n * config.cluster_n))
    for tile in range(rows * columns):
        turn, cluster = divmod(tile, clusters)
        group, in_group = divmod(tile, config.raster_group * columns)
        first_row = group * config.raster_group
        group_rows = min(rows - first_row, config.raster_group)
        column, row = divmod(in_group, group_rows)
        for rank in range(config.cluster):
            yield Place(
                turn,
                cluster * config.cluster + rank,
                (first_row + row) * config.cluster_m + (rank if config.cluster_m > 1 else 0),
                column * config.cluster_n + (rank if config.cluster_n > 1 else 0),
            )
