"""Which dense kernel computes a problem: a finite set, the model's choice, its explanation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from cpgemm.config import SHARED_LIMIT, KernelConfig, SplitKernelConfig
from cpgemm.cost_model import H200, Candidate, Machine, predict, suits
from cpgemm.errors import reject
from cpgemm.problem import GemmProblem, OutDtype

__all__ = [
    "Explanation",
    "Tile",
    "choose",
    "configurations",
    "deepest",
    "explain",
    "fastest",
]

_Config = TypeVar("_Config", bound=KernelConfig)


class Tile(NamedTuple):
    """The fields of a configuration that are chosen; the rest follows.

    ``most_stages``: more are not used even where they fit.
    """

    block_m: int
    block_n: int
    consumers: int
    cluster_m: int = 1
    cluster_n: int = 1
    column_parts: int = 1
    unroll: int = 3
    most_stages: int = 16


_TIE = 1.008  # times the shortest prediction: not told apart, the earlier tile is taken

# What won somewhere among what was tried: docs/performance.md.
_TILES = (
    Tile(256, 128, 2, cluster_n=2, unroll=8),
    Tile(256, 128, 2, unroll=4),
    Tile(192, 128, 3, cluster_m=2),
    Tile(192, 128, 3),
    Tile(128, 96, 2),
    Tile(128, 192, 2),
    Tile(128, 192, 2, cluster_m=2),
    Tile(128, 128, 2),
    Tile(128, 128, 2, cluster_n=2),
    Tile(128, 64, 2),
    Tile(64, 128, 2, column_parts=2),
    Tile(64, 64, 1, unroll=8, most_stages=8),
    Tile(64, 32, 1),
)


@functools.lru_cache(maxsize=2)
def configurations(out_dtype: OutDtype) -> tuple[KernelConfig, ...]:
    """The finite set of dense kernels for one output dtype."""
    whole = (deepest(KernelConfig, tile, out_dtype) for tile in _TILES)
    # Of five stages two blocks fit a multiprocessor; of eight one, with more bytes under way.
    split = [
        SplitKernelConfig(64, 64, stages, 1, out_dtype=out_dtype, splits=splits)
        for splits, stages in ((2, 8), (2, 5), (4, 5))
    ]
    if out_dtype == "bfloat16":
        split.append(SplitKernelConfig(128, 64, 7, 2, out_dtype=out_dtype, splits=2))
    return (*whole, *split)


def deepest(kind: type[_Config], tile: Tile, out_dtype: OutDtype) -> _Config:
    """The configuration of a tile with as many stages as fit, or as it wants."""
    fields = tile._asdict()
    most_stages = fields.pop("most_stages")
    least = kind(stages=2, out_dtype=out_dtype, **fields)
    operands = (tile.block_m + tile.block_n) * 128
    small = least.scale_rows * 4 + 64  # scales, barriers and a tile's place
    stages = 2 + (SHARED_LIMIT - least.shared_bytes) // (operands + small)
    return replace(least, stages=min(stages, most_stages))


@dataclass(frozen=True)
class Explanation:
    """The choice for a ``problem`` on a ``machine``, and what it was chosen from.

    ``candidates``: every kernel that suits with its predicted time in microseconds, fastest first;
    those within 0.8 % of the fastest in the order of the finite set.
    ``floor_us``: the larger of the fewest bytes over the memory's bandwidth and the operations over
    the FP8 rate that power allows; launch not counted.
    """

    problem: GemmProblem
    machine: Machine
    candidates: tuple[Candidate, ...]
    floor_us: float

    @property
    def choice(self) -> Candidate:
        """The fastest candidate, or the first of those that are not told apart."""
        return self.candidates[0]

    def _repr_html_(self) -> str:
        from cpgemm.displays.plan import explanation_html

        return explanation_html(self)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"{p.m} x {p.n} x {p.k} -> {p.out_dtype}{' + C' if p.accumulate else ''} "
            f"on {self.machine.name}: {self.choice.config.name}",
            f"floor {self.floor_us:.1f} us ({p.bytes / 1e6:.1f} MB, {p.flops / 1e9:.1f} GFLOP); "
            f"predicted {self.choice.predicted_us:.1f} us, bound by {self.choice.bound}",
            f"  {'kernel':44} {'us':>8} {'tiles':>6} {'waves':>5} {'compute':>8} {'L2':>7} "
            f"{'DRAM':>7}",
        ]
        for candidate in self.candidates:
            c = candidate
            lines.append(
                f"  {c.config.name:44} {c.predicted_us:8.1f} {c.config.tiles(p):6d} {c.waves:5d} "
                f"{c.compute_us:8.1f} {c.l2_us:7.1f} {c.dram_us:7.1f}"
            )
        return "\n".join(lines)


def explain(
    m: int,
    n: int,
    k: int,
    *,
    out_dtype: OutDtype = "bfloat16",
    accumulate: bool = False,
    machine: Machine = H200,
) -> Explanation:
    """Which kernel ``gemm`` uses for (m, k) x (n, k), why, the predicted time and its floor."""
    return _explain(GemmProblem(m, n, k, out_dtype, accumulate), machine)


@functools.lru_cache(maxsize=4096)
def _explain(problem: GemmProblem, machine: Machine) -> Explanation:
    if 0 in (problem.m, problem.n, problem.k):
        reject(
            "m, n, k",
            "must not be 0 to be explained",
            (problem.m, problem.n, problem.k),
            "An empty product launches no kernel.",
        )
    candidates = [
        predict(problem, config, machine)
        for config in configurations(problem.out_dtype)
        if suits(problem, config, machine)
    ]
    tie_us = _TIE * min(candidate.predicted_us for candidate in candidates)
    candidates.sort(key=lambda candidate: max(candidate.predicted_us, tie_us))
    floor_us = max(
        problem.bytes / (machine.dram_tbs * 1e6), problem.flops / (machine.peak_tflops * 1e6)
    )
    return Explanation(problem, machine, tuple(candidates), floor_us)


def choose(problem: GemmProblem, machine: Machine = H200, *, unsplit: bool = False) -> KernelConfig:
    """The configuration that the model predicts to be fastest.

    ``unsplit``: among those that do not split K.
    """
    candidates = _explain(problem, machine).candidates
    return next(
        candidate.config
        for candidate in candidates
        if not (unsplit and isinstance(candidate.config, SplitKernelConfig))
    )


def fastest(
    problem: GemmProblem, candidates: Sequence[KernelConfig], machine: Machine
) -> KernelConfig:
    """Of these configurations the one that the model predicts to be fastest."""
    suited = [config for config in candidates if suits(problem, config, machine)]
    return min(
        suited or candidates, key=lambda config: predict(problem, config, machine).predicted_us
    )
