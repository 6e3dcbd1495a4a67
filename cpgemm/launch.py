"""Launches a loaded kernel on CuPy's current stream through cuda.core.

CuPy's own launch has no attributes; cuda.core's takes programmatic dependent launch, tensor maps by
value and streams by handle.  Cluster sizes stand in the kernels (``__cluster_dims__``), so that a
grid counts blocks everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpgemm.compiler import LoadedKernel

if TYPE_CHECKING:
    from cuda.core import LaunchConfig, Stream

__all__ = ["current_stream", "launch", "launch_config", "run"]


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Stream:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def current_stream() -> Stream:
    """CuPy's current stream of the current device, as cuda.core wants it."""
    import cupy

    return _stream(cupy.cuda.get_current_stream().ptr)


@functools.lru_cache(maxsize=4096)
def launch_config(
    grid: int | tuple[int, ...], block: int, shared_bytes: int, pdl: bool
) -> LaunchConfig:
    """Grid and block sizes, dynamic shared memory in bytes, programmatic dependent launch."""
    from cuda.core import LaunchConfig

    return LaunchConfig(
        grid=grid,
        block=block,
        shmem_size=shared_bytes,
        programmatic_stream_serialization=pdl,
    )


@functools.lru_cache(maxsize=1024)
def _kernel(handle: int) -> Any:
    from cuda.core import Kernel

    return Kernel.from_handle(handle)


def run(kernel: LoadedKernel, config: LaunchConfig, args: Sequence[Any]) -> None:
    """Enqueue ``kernel`` with a prepared configuration; returns at once."""
    from cuda.core import launch as enqueue

    enqueue(current_stream(), config, _kernel(kernel.handle), *args)


def launch(
    kernel: LoadedKernel,
    grid: int | tuple[int, ...],
    block: int,
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    pdl: bool = False,
) -> None:
    """Enqueue ``kernel`` on CuPy's current stream.

    ``args`` are NumPy scalars of the parameters' exact types (device pointers as ``np.uint64``) or
    tensor maps.
    """
    run(kernel, launch_config(grid, block, shared_bytes, pdl), args)
