"""The live memory floor: a kernel that streams a matrix once by TMA and computes nothing.

Memory-bound products (decode) are measured against it in the same run; a datasheet's bandwidth says
less, because small sizes never reach it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpgemm import settings
from cpgemm.compiler import load_kernel
from cpgemm.launch import launch
from cpgemm.render import KernelSource, render
from cpgemm.tma import matrix_map

__all__ = ["StreamConfig", "stream", "stream_source"]


@dataclass(frozen=True)
class StreamConfig:
    """Boxes of ``rows`` x 128 bytes, ``stages`` of them in flight in each block: 128 KiB."""

    rows: int = 128
    stages: int = 8

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the boxes and two barriers for each, in units of 1 KiB."""
        return self.rows * 128 * self.stages + 1024


@functools.lru_cache(maxsize=1)
def stream_source() -> KernelSource:
    """The rendered kernel."""
    config = StreamConfig()
    return render(
        "stream_floor.cu.j2",
        name="stream_floor",
        entry="cpgemm_stream_floor",
        values={"config": config},
        shared_bytes=config.shared_bytes,
    )


def stream(matrix: Any) -> None:
    """Read a CuPy array of bytes (R, C), or (G, R, C) without gaps, once on the current stream.

    Rows are contiguous, address and pitch multiples of 16 bytes.  One block per multiprocessor.
    """
    config = StreamConfig()
    device = matrix.device
    codes = matrix.view(np.uint8)
    rows = int(np.prod(codes.shape[:-1]))
    arguments = (
        matrix_map(codes, (config.rows, 128), 128),
        np.int32(rows),
        np.int32(codes.shape[-1]),
    )
    launch(
        load_kernel(stream_source()),
        int(device.attributes["MultiProcessorCount"]),
        32,
        arguments,
        shared_bytes=config.shared_bytes,
        pdl=settings.pdl(),
    )
