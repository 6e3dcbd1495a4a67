"""The finite set of kernels: from configurations to sources, and the list of all of them.

A kernel with an epilogue is its user's: it is none of the set.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from cpgemm.config import KernelConfig
from cpgemm.epilogue_spec import EpilogueSpec
from cpgemm.grouped_heuristics import grouped_configurations
from cpgemm.heuristics import configurations
from cpgemm.problem import OUT_DTYPES
from cpgemm.render import KernelSource, render

__all__ = ["all_sources", "gemm_source"]


@functools.lru_cache(maxsize=256)
def gemm_source(config: KernelConfig, epilogue: EpilogueSpec | None = None) -> KernelSource:
    """The rendered kernel of a configuration, with an epilogue or without."""
    source = _rendered(config, epilogue)
    if epilogue is None or not epilogue.files:
        return source
    # The compiler shall count a user's lines from 1, and go on behind them as in the file.
    lines = source.text.splitlines()
    resumed = tuple(i + 1 for i, line in enumerate(lines, 1) if line.startswith('#line 0 "'))
    return _rendered(config, replace(epilogue, resume_lines=resumed))


def _rendered(config: KernelConfig, epilogue: EpilogueSpec | None) -> KernelSource:
    values: dict[str, object] = {"config": config, "epilogue": epilogue}
    name = config.name
    if epilogue is not None:
        name = f"{name}_{epilogue.name}"
        values["source_name"] = f"{name}.cu"
    return render(
        config.template,
        name=name,
        entry=config.entry,
        values=values,
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
