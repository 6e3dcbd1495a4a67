"""The finite set of kernels: from configurations to sources, and the list of all of them."""

from __future__ import annotations

import functools

from cpgemm.config import KernelConfig
from cpgemm.grouped_heuristics import grouped_configurations
from cpgemm.heuristics import configurations
from cpgemm.problem import OUT_DTYPES
from cpgemm.render import KernelSource, render

__all__ = ["all_sources", "gemm_source"]


@functools.lru_cache(maxsize=256)
def gemm_source(config: KernelConfig) -> KernelSource:
    """The rendered kernel of a configuration."""
    return render(
        config.template,
        name=config.name,
        entry=config.entry,
        values={"config": config},
        shared_bytes=config.shared_bytes,
    )


def all_sources() -> list[KernelSource]:
    """Every kernel that cpgemm may ever compile by itself; no shape adds another."""
    from cpgemm.bench.floors import floor_sources
    from cpgemm.floor import stream_source
    from cpgemm.moe_kernels import moe_sources
    from cpgemm.quantize_kernels import quantize_sources

    dense = [gemm_source(config) for name in OUT_DTYPES for config in configurations(name)]
    grouped = [
        gemm_source(config) for name in OUT_DTYPES for config in grouped_configurations(name)
    ]
    return [
        *dense,
        *grouped,
        *quantize_sources(),
        *moe_sources(),
        stream_source(),
        *floor_sources(),
    ]
