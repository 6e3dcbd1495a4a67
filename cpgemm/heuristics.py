"""Which kernel computes a problem: a finite set, a cost model with physical terms, an explanation.

The model needs no GPU.  Its terms, in clocks of one multiprocessor unless said otherwise:

tensor     block_m * block_n / 32 per k-block: 4096 multiply-adds a clock
shared     bytes that wgmma reads (8 KiB of A and 128 * block_n bytes of B for each m64 wave) and
           that TMA writes, at 128 bytes a clock; the larger of tensor and shared counts
promotion  one FFMA per accumulator and k-block, weighted by what other consumers leave exposed
chain      a consumer's own wgmma, wait and promotion for one k-block: a lower limit
epilogue   per tile: a fixed part, and one for each element that is converted, staged and stored
waves      tiles over multiprocessors, rounded up
clock      falls from 1.9 to 1.57 GHz as the tensor rate nears 1200 TFLOPS: power
L2, DRAM   bytes over bandwidth, for the machine as a whole; a row of A or B that is not a multiple
           of 128 bytes long touches two lines of L2 for each 128 bytes

Split kernels take part where all of their blocks run at once: the chain of a block is that of its
share of K, and summing over the cluster costs a fixed time.

Compute, L2 and DRAM overlap imperfectly: their 3-norm is taken, and launching added.  The weights
were fitted to 1,020 timings of 17 tiles, two of which never won and were dropped, on 70 shapes on
one H200; docs/performance.md says how well they do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from cpgemm import settings
from cpgemm.config import SHARED_LIMIT, KernelConfig, SplitKernelConfig
from cpgemm.errors import reject
from cpgemm.problem import GemmProblem, OutDtype

__all__ = [
    "H200",
    "Candidate",
    "Explanation",
    "Machine",
    "Tile",
    "TileTimes",
    "choose",
    "configurations",
    "deepest",
    "explain",
    "fastest",
    "predict",
    "tile_times",
]

_Config = TypeVar("_Config", bound=KernelConfig)

_MOST_STAGES = 16

# Fitted weights, in clocks at the unthrottled clock unless their name says otherwise.
_BUSY = 0.602  # of the larger of tensor and shared: consumers overlap them with everything else
_PROMOTION = {2: 2.15, 3: 1.89}  # per FFMA, by consumers
_CHAIN = 312.0  # latency of one m64 wave: issue, wait, release ...
_CHAIN_COLUMN = {1: 1.45, 2: 2.5, 3: 2.5}  # ... and per column of the tile: wgmma and promotion
_EPILOGUE = 283.0
_EPILOGUE_ELEMENT = {1: 0.0703, 2: 0.0703, 3: 0.0558}
_FULL_GHZ, _FULL_TFLOPS = 1.566, 1200.0
_LAUNCH_US = 2.39
_TAIL = 0.6  # of idle places in the last turn, on the time that DRAM takes
_SPLIT_CHAIN = 300.0  # clocks per k-block of a split kernel's block
_SPLIT_US = 1.3  # to exchange and add the sums
_CLUSTER_US = 0.5  # pairs of blocks start together and end together


class Tile(NamedTuple):
    """The fields of a configuration that are chosen; the rest follows."""

    block_m: int
    block_n: int
    consumers: int
    cluster_m: int = 1
    cluster_n: int = 1
    column_parts: int = 1
    unroll: int = 3


# What won somewhere among what was tried: docs/performance.md.
_TILES = (
    Tile(256, 128, 2, unroll=4),
    Tile(256, 128, 2, cluster_n=2, unroll=8),
    Tile(192, 128, 3),
    Tile(192, 128, 3, cluster_m=2),
    Tile(128, 192, 2),
    Tile(128, 192, 2, cluster_m=2),
    Tile(128, 128, 2),
    Tile(128, 128, 2, cluster_n=2),
    Tile(128, 96, 2),
    Tile(128, 64, 2),
    Tile(64, 128, 2, column_parts=2),
    Tile(64, 64, 2, column_parts=2),
    Tile(64, 32, 1),
    Tile(64, 16, 1),
)


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU.

    - ``name``: as the driver says it
    - ``sms``: multiprocessors
    - ``clock_ghz``: the clock when the GPU is cool, GHz
    - ``dram_tbs``, ``l2_tbs``: bandwidths of memory and of L2, TB/s
    """

    name: str
    sms: int
    clock_ghz: float
    dram_tbs: float
    l2_tbs: float

    @property
    def peak_tflops(self) -> float:
        """FP8 rate at 1.4 GHz of perfect issue, about what power allows: the floor's arithmetic."""
        return self.sms * 8192 * 1.387e-3

    @classmethod
    def of_device(cls, device: int) -> Machine:
        """Scale the H200's figures by what CuPy says of ``device``; ``settings.sms`` limits it."""
        machine, limit = _machine_of_device(device), settings.sms()
        return machine if limit is None else replace(machine, sms=min(limit, machine.sms))


H200 = Machine("NVIDIA H200", sms=132, clock_ghz=1.9, dram_tbs=4.3, l2_tbs=13.75)


@functools.lru_cache(maxsize=16)
def _machine_of_device(device: int) -> Machine:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    attributes = cupy.cuda.Device(device).attributes
    sms = int(attributes["MultiProcessorCount"])
    # Double data rate; a copy reaches 87.5 % of the pins' rate on the H200.
    pins = 2e3 * attributes["MemoryClockRate"] * attributes["GlobalMemoryBusWidth"] / 8
    dram = 0.875 * pins / 1e12 if pins else H200.dram_tbs
    name = properties["name"].decode()
    return Machine(name, sms, H200.clock_ghz, dram, H200.l2_tbs * sms / H200.sms)


@functools.lru_cache(maxsize=2)
def configurations(out_dtype: OutDtype) -> tuple[KernelConfig, ...]:
    """The finite set of dense kernels for one output dtype."""
    whole = (deepest(KernelConfig, tile, out_dtype) for tile in _TILES)
    # Two blocks of five stages fit a multiprocessor: all clusters run at once.
    split = [SplitKernelConfig(64, 64, 5, 1, out_dtype=out_dtype, splits=k) for k in (2, 4)]
    if out_dtype == "bfloat16":
        split.append(SplitKernelConfig(128, 64, 7, 2, out_dtype=out_dtype, splits=2))
    return (*whole, *split)


def deepest(kind: type[_Config], tile: Tile, out_dtype: OutDtype) -> _Config:
    """The configuration of a tile with as many stages as fit."""
    least = kind(stages=2, out_dtype=out_dtype, **tile._asdict())
    operands = (tile.block_m + tile.block_n) * 128
    small = least.scale_rows * 4 + 64  # scales, barriers and a tile's place
    stages = 2 + (SHARED_LIMIT - least.shared_bytes) // (operands + small)
    return replace(least, stages=min(stages, _MOST_STAGES))


@dataclass(frozen=True)
class Candidate:
    """A configuration ``config`` with its predicted time and the terms that make it up.

    ``waves``: turns of the blocks over the multiprocessors.  Microseconds: ``predicted_us``, of
    which ``compute_us``, ``l2_us`` and ``dram_us`` are the parts that overlap.
    """

    config: KernelConfig
    predicted_us: float
    waves: int
    compute_us: float
    l2_us: float
    dram_us: float

    @property
    def launch_us(self) -> float:
        """What the terms do not make up: launching, clusters, the exchange of split kernels."""
        return self.predicted_us - _overlapped(self.compute_us, self.l2_us, self.dram_us)

    @property
    def bound(self) -> str:
        """The term that decides."""
        terms = {"compute": self.compute_us, "L2": self.l2_us, "DRAM": self.dram_us}
        return max(terms, key=lambda name: terms[name])


def _tensor_clocks(config: KernelConfig) -> float:
    return config.block_m * config.block_n / 32


def _shared_clocks(config: KernelConfig) -> float:
    read = config.block_m / 64 * (8192 + 128 * config.block_n)
    written = 128 * (config.block_m + config.block_n)
    return (read + written) / 128


def _k_block_clocks(config: KernelConfig) -> float:
    busy = _BUSY * max(_tensor_clocks(config), _shared_clocks(config))
    chain = config.waves * (_CHAIN + _CHAIN_COLUMN[config.row_parts] * config.wave_n)
    if config.row_parts == 1:
        return max(busy, chain)
    promotion = config.block_m / 64 * config.block_n / 2
    return max(busy + _PROMOTION[config.consumers] * promotion, chain)


def _turns(config: KernelConfig, tiles: int, machine: Machine) -> int:
    """How many tiles the busiest multiprocessor takes one after another."""
    return math.ceil(tiles / config.blocks(machine.sms, machine.sms))


def _epilogue_clocks(config: KernelConfig) -> float:
    return _EPILOGUE + _EPILOGUE_ELEMENT[config.consumers] * config.block_m * config.block_n


def _l2_us(box_rows: float, problem: GemmProblem, machine: Machine) -> float:
    """Time for ``box_rows`` rows of boxes, in all tiles together, for each k-block."""
    lines = 2 if problem.k % 128 else 1  # of L2 that 128 bytes of a row touch
    return box_rows * problem.k_blocks * 128 * lines / (machine.l2_tbs * 1e6)


def _overlapped(*us: float) -> float:
    return float(sum(term**3 for term in us) ** (1 / 3))


def _suits(problem: GemmProblem, config: KernelConfig, machine: Machine) -> bool:
    """Whether a configuration is worth a prediction on this machine."""
    if config.cluster > machine.sms:
        return False
    if not isinstance(config, SplitKernelConfig):
        if problem.m <= 64:  # taller tiles hold fewer stages of weights and multiply empty rows
            return config.block_m == 64
        # Shared columns pay within one tile of rows; of two, each reads all weights again.
        return config.column_parts == 1
    # Graphics clusters have 16 or 18 multiprocessors: of clusters of four, 62 run at once, not 66.
    places = machine.sms * config.blocks_per_sm // config.splits
    return config.tiles(problem) <= (places if config.splits == 2 else places * 62 // 66)


def _predict_split(problem: GemmProblem, config: SplitKernelConfig, machine: Machine) -> Candidate:
    tiles = config.tiles(problem)
    clocks = -(-problem.k_blocks // config.splits) * _SPLIT_CHAIN
    compute_us = clocks / (machine.clock_ghz * 1e3)
    l2_us = _l2_us(tiles * (config.rows_loaded(problem.m) + config.block_n), problem, machine)
    dram_us = problem.bytes / (machine.dram_tbs * 1e6)
    predicted = _LAUNCH_US + _SPLIT_US + _overlapped(compute_us, l2_us, dram_us)
    return Candidate(config, predicted, 1, compute_us, l2_us, dram_us)


def _predict(problem: GemmProblem, config: KernelConfig, machine: Machine) -> Candidate:
    if isinstance(config, SplitKernelConfig):
        return _predict_split(problem, config, machine)
    tiles = config.tiles(problem)
    waves = _turns(config, tiles, machine)
    clocks = waves * (problem.k_blocks * _k_block_clocks(config) + _epilogue_clocks(config))
    cool_us = clocks / (machine.clock_ghz * 1e3)
    load = min(1.0, problem.flops / cool_us / 1e6 / _FULL_TFLOPS)
    compute_us = clocks / ((machine.clock_ghz - load * (machine.clock_ghz - _FULL_GHZ)) * 1e3)
    rows = config.rows_loaded(problem.m) / config.cluster_n
    l2_us = _l2_us(tiles * (rows + config.block_n / config.cluster_m), problem, machine)
    # Where the last turn leaves multiprocessors idle, the others cannot draw all of the bandwidth.
    share = waves * config.blocks(machine.sms, machine.sms) / tiles
    dram_us = problem.bytes / (machine.dram_tbs * 1e6) * share**_TAIL
    launch_us = _LAUNCH_US + (_CLUSTER_US if config.cluster > 1 else 0.0)
    predicted = launch_us + _overlapped(compute_us, l2_us, dram_us)
    return Candidate(config, predicted, waves, compute_us, l2_us, dram_us)


@dataclass(frozen=True)
class TileTimes:
    """The model's terms for one tile of one block, in microseconds.

    ``k_blocks``: of 128 that the block multiplies.  ``load_us``: between two stages, where L2 or
    DRAM deliver to all blocks at once.  ``multiply_us``: a k-block, with promotion; ``tensor_us``:
    how long it keeps tensor cores or shared memory busy.  ``epilogue_us``: what follows the last
    k-block: stores, or the exchange of a split kernel's sums.
    """

    k_blocks: int
    load_us: float
    multiply_us: float
    tensor_us: float
    epilogue_us: float


def tile_times(problem: GemmProblem, config: KernelConfig, machine: Machine) -> TileTimes:
    """The terms of ``predict`` for one tile."""
    whole = _predict(problem, config, machine)
    busy = _BUSY * max(_tensor_clocks(config), _shared_clocks(config))
    if isinstance(config, SplitKernelConfig):
        k_blocks = -(-problem.k_blocks // config.splits)
        us = 1 / (machine.clock_ghz * 1e3)
        step, epilogue = _SPLIT_CHAIN, _SPLIT_US / us
    else:
        k_blocks = problem.k_blocks
        step, epilogue = _k_block_clocks(config), _epilogue_clocks(config)
        us = whole.compute_us / (whole.waves * (k_blocks * step + epilogue))
    load = max(whole.l2_us, whole.dram_us) / (whole.waves * k_blocks)
    return TileTimes(k_blocks, load, step * us, min(busy, step) * us, epilogue * us)


@dataclass(frozen=True)
class Explanation:
    """The choice for a ``problem`` on a ``machine``, and what it was chosen from.

    ``candidates``: every kernel that suits with its predicted time in microseconds, fastest first.
    ``floor_us``: the larger of the fewest bytes over the memory's bandwidth and the operations over
    the FP8 rate that power allows; launch not counted.
    """

    problem: GemmProblem
    machine: Machine
    candidates: tuple[Candidate, ...]
    floor_us: float

    @property
    def choice(self) -> Candidate:
        """The fastest candidate."""
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
    candidates = sorted(
        (
            _predict(problem, config, machine)
            for config in configurations(problem.out_dtype)
            if _suits(problem, config, machine)
        ),
        key=lambda candidate: candidate.predicted_us,  # stable: ties go to the earlier tile
    )
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


def predict(problem: GemmProblem, config: KernelConfig, machine: Machine = H200) -> Candidate:
    """The prediction for one configuration, for those that ``explain`` leaves out too."""
    return _predict(problem, config, machine)


def fastest(
    problem: GemmProblem, candidates: Sequence[KernelConfig], machine: Machine
) -> KernelConfig:
    """Of these configurations the one that the model predicts to be fastest."""
    suited = [config for config in candidates if _suits(problem, config, machine)]
    return min(
        suited or candidates, key=lambda config: _predict(problem, config, machine).predicted_us
    )
