"""The finite set of quantising kernels: what is compiled into each, and its launch grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cpgemm.render import KernelSource, render
from cpgemm.scaled import BLOCK, SCALE_FORMATS, Granularity

__all__ = ["INPUT_DTYPES", "MAX_GRID_YZ", "QuantizeConfig", "quantize_sources"]

INPUT_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MAX_GRID_YZ = 65535  # CUDA's limit for the second and third extent of a grid


@dataclass(frozen=True)
class QuantizeConfig:
    """One of the quantising kernels: what is compiled in.  Shapes and strides are arguments."""

    granularity: Granularity
    dtype: str
    scale_format: str

    @property
    def by_blocks(self) -> bool:
        """Whether a scale serves 128 x 128 values rather than 1 x 128."""
        return self.granularity == (BLOCK, BLOCK)

    @property
    def element_bytes(self) -> int:
        """Bytes of an input element."""
        return INPUT_DTYPES[self.dtype].itemsize

    @property
    def threads(self) -> int:
        """Threads of a block.  By blocks, each has eight 16-byte loads under way."""
        return 128 * self.element_bytes if self.by_blocks else 256

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that an SM must hold at once; this limits registers.

        By rows 1280 threads with four loads each, by blocks 1024 with eight: 80 and 128 KiB under
        way, where some 64 saturate the memory.
        """
        return (1024 if self.by_blocks else 1280) // self.threads

    @property
    def tile_rows(self) -> int:
        """Rows that a block takes: by rows, each of 256 threads takes four."""
        return BLOCK if self.by_blocks else 16

    @property
    def tile_columns(self) -> int:
        """Columns that a block takes: by rows, those of 1 KiB."""
        return BLOCK if self.by_blocks else 1024 // self.element_bytes

    @property
    def entry(self) -> str:
        """The kernel's symbol."""
        return "quantize_blocks" if self.by_blocks else "quantize_rows"

    @property
    def name(self) -> str:
        """Readable and unique among all kernels."""
        return f"{self.entry}_{self.dtype}_{self.scale_format}"

    def source(self) -> KernelSource:
        """The rendered kernel."""
        return render(
            f"{self.entry}.cu.j2", name=self.name, entry=self.entry, values={"config": self}
        )

    def grid(self, groups: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Blocks of a launch; tiles of one row are neighbours, for the sake of DRAM pages."""
        return (
            -(-columns // self.tile_columns),
            min(-(-rows // self.tile_rows), MAX_GRID_YZ),
            groups,
        )


def quantize_sources() -> Iterator[KernelSource]:
    """Every quantising kernel there is: 2 granularities x 3 input dtypes x 2 scale formats."""
    for granularity, dtype, scale_format in itertools.product(
        ((1, BLOCK), (BLOCK, BLOCK)), INPUT_DTYPES, SCALE_FORMATS
    ):
        yield QuantizeConfig(granularity, dtype, scale_format).source()
