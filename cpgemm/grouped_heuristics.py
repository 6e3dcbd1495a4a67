"""Which kernel computes a grouped product.

The sizes of the groups are on the device, so that little is decided here.  Kernels of the adaptive
family choose between tall and flat tiles themselves; the host chooses the width of the flat ones,
so that the groups' weights fill the multiprocessors evenly, and takes tall tiles with multicast
where contiguous groups are large in the mean.  docs/performance.md has the measurements.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

from cpgemm.config import AdaptiveKernelConfig, GroupedKernelConfig
from cpgemm.cost_model import H200, Machine
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.heuristics import Tile, deepest
from cpgemm.problem import OutDtype

__all__ = ["adaptive_configuration", "choose_grouped", "grouped_configurations"]

_FLAT_WIDTHS = (128, 96)
# Rows of a contiguous group in the mean; below, the tails of pairs cost more than multicast gains.
_LARGE_GROUP = 256


@functools.lru_cache(maxsize=2)
def grouped_configurations(out_dtype: OutDtype) -> tuple[GroupedKernelConfig, ...]:
    """The finite set of grouped kernels for one output dtype, the adaptive ones first."""
    # float32 stores make the tallest tile slow to compile.
    tall = Tile(256 if out_dtype == "bfloat16" else 128, 128, 2)
    adaptive = tuple(adaptive_configuration(tall, width, out_dtype) for width in _FLAT_WIDTHS)
    if out_dtype != "bfloat16":
        return adaptive
    multicast = tall._replace(cluster_n=2, unroll=8)
    return (*adaptive, deepest(GroupedKernelConfig, multicast, out_dtype))


def adaptive_configuration(tall: Tile, flat_n: int, out_dtype: OutDtype) -> AdaptiveKernelConfig:
    """A tall tile or a flat one of ``flat_n`` columns, with as many stages of each as fit."""
    # An unroll of 1 is no slower than 2 or 3 here, and compiled sooner.
    whole = deepest(GroupedKernelConfig, tall._replace(unroll=1), out_dtype)
    flat = deepest(GroupedKernelConfig, Tile(64, flat_n, 1), out_dtype)
    return AdaptiveKernelConfig(**asdict(whole), flat_n=flat_n, flat_stages=flat.stages)


@functools.lru_cache(maxsize=4096)  # it stands on the path of every grouped call
def choose_grouped(problem: GroupedProblem, machine: Machine = H200) -> GroupedKernelConfig:
    """The kernel for a grouped product of any sizes."""
    candidates = [
        config
        for config in grouped_configurations(problem.out_dtype)
        if config.cluster <= machine.sms
        and config.why_not_layout(problem.layout, problem.n) is None
    ]
    if problem.layout != "masked" and problem.m >= _LARGE_GROUP * problem.groups:
        for config in candidates:
            if config.cluster > 1:
                return config

    def flat_columns(config: AdaptiveKernelConfig) -> int:
        """Columns that the busiest multiprocessor takes when each group is one flat tile high."""
        tiles = problem.groups * config.flat.column_tiles(problem.n)
        return -(-tiles // machine.sms) * config.flat_n

    return min(
        (config for config in candidates if isinstance(config, AdaptiveKernelConfig)),
        key=flat_columns,  # ties go to the wider tile, which reads A less often
    )
