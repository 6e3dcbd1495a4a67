"""Which kernel computes a problem: a finite set, a cost model with physical terms, an explanation.

The model needs no GPU.  Its terms (clocks of one multiprocessor unless said otherwise):

tensor     block_m * block_n / 32 per k-block: 4096 multiply-adds a clock
shared     bytes that wgmma reads (8 KiB of A and 128 * block_n bytes of B for each m64 wave) and
           that TMA writes, at 128 bytes a clock
promotion  one FFMA per accumulator and k-block and a fixed part per wave; other consumers' wgmma
           hides half of it with two consumers and most with three
epilogue   per tile: conversion, staging, store, and the start of the next main loop
waves      tiles over multiprocessors, rounded up
L2, DRAM   bytes over bandwidth, for the machine as a whole

The constants were fitted to timings of eleven tiles on one H200 (docs/performance.md); the large
rows come out within 7 %.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from cpgemm.config import SHARED_LIMIT, KernelConfig
from cpgemm.errors import reject
from cpgemm.problem import GemmProblem, OutDtype

__all__ = ["H200", "Candidate", "Explanation", "Machine", "choose", "configurations", "explain"]

_MOST_STAGES = 16

# (block_m, block_n, consumers, cluster_m, cluster_n): see docs/architecture.md for why these.
_TILES = (
    (256, 128, 2, 1, 1),
    (256, 128, 2, 1, 2),
    (192, 128, 3, 1, 1),
    (192, 128, 3, 1, 2),
    (128, 192, 2, 1, 1),
    (128, 192, 2, 2, 1),
    (128, 128, 2, 1, 1),
    (128, 128, 2, 1, 2),
    (128, 96, 2, 1, 1),
    (128, 64, 2, 1, 1),
    (128, 32, 2, 1, 1),
    (128, 16, 2, 1, 1),
    (64, 128, 1, 1, 1),
    (64, 96, 1, 1, 1),
    (64, 64, 1, 1, 1),
    (64, 32, 1, 1, 1),
    (64, 16, 1, 1, 1),
)


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU: multiprocessors, clock under load, bandwidths."""

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
        """Scale the H200's figures by what CuPy says of ``device``."""
        return _machine_of_device(device)


H200 = Machine("NVIDIA H200", sms=132, clock_ghz=1.6, dram_tbs=4.3, l2_tbs=8.0)


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
    return tuple(_configuration(tile, out_dtype) for tile in _TILES)


def _configuration(tile: tuple[int, int, int, int, int], out_dtype: OutDtype) -> KernelConfig:
    block_m, block_n, consumers, cluster_m, cluster_n = tile
    stage = (block_m + block_n) * 128 + block_m * 4 + 64
    staging = block_m * block_n * 2 if out_dtype == "bfloat16" else 1024
    stages = min((SHARED_LIMIT - staging - 2048) // stage, _MOST_STAGES)
    return KernelConfig(block_m, block_n, stages, consumers, cluster_m, cluster_n, out_dtype)


@dataclass(frozen=True)
class Candidate:
    """A configuration with its predicted time in microseconds and the terms that make it up."""

    config: KernelConfig
    predicted_us: float
    waves: int
    compute_us: float
    l2_us: float
    dram_us: float

    @property
    def bound(self) -> str:
        """The term that decides."""
        terms = {"compute": self.compute_us, "L2": self.l2_us, "DRAM": self.dram_us}
        return max(terms, key=lambda name: terms[name])


def _k_block_clocks(config: KernelConfig) -> float:
    m64 = config.block_m / 64
    tensor = config.block_m * config.block_n / 32
    read = m64 * (8192 + 128 * config.block_n)
    written = 128 * (config.block_m + config.block_n)
    segments = config.block_n // config.scale_segment
    promotion = m64 * (config.block_n / 2 + 2 * segments + 30)
    busy = 1.05 * max(tensor, (read + written) / 128)
    if config.consumers == 1:  # nothing hides the wait for wgmma and the promotion
        return busy + promotion + 150
    exposed = busy + promotion * (0.5 if config.consumers == 2 else 0.2)
    chain = config.waves * (64 * config.block_n / 32 + promotion / m64 + 150)
    return max(exposed, chain)


def _predict(problem: GemmProblem, config: KernelConfig, machine: Machine) -> Candidate:
    tiles = config.tiles(problem)
    waves = math.ceil(tiles / (machine.sms // config.cluster * config.cluster))
    epilogue = 400 + 0.04 * config.block_m * config.block_n
    clocks = waves * (problem.k_blocks * _k_block_clocks(config) + epilogue)
    compute_us = clocks / (machine.clock_ghz * 1e3)
    rows = config.rows_loaded(problem.m)
    loaded = (
        tiles
        * problem.k_blocks
        * 128
        * (rows / config.cluster_n + config.block_n / config.cluster_m)
    )
    l2_us = loaded / (machine.l2_tbs * 1e6)
    # Loads in flight on the multiprocessors that have a tile: 64 KiB each fill the memory system.
    in_flight = (
        min(tiles, machine.sms) / machine.sms * min(config.stages * config.block_n * 128, 65536)
    )
    dram_us = problem.bytes / (machine.dram_tbs * 1e6) / min(1.0, (in_flight / 65536) ** 0.5)
    launch_us = 2.2
    predicted = launch_us + max(compute_us, l2_us, dram_us)
    return Candidate(config, predicted, waves, compute_us, l2_us, dram_us)


@dataclass(frozen=True)
class Explanation:
    """The choice for a problem, every candidate (fastest first), and the machine's floor.

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
        (_predict(problem, config, machine) for config in configurations(problem.out_dtype)),
        key=lambda candidate: candidate.predicted_us,  # stable: ties go to the earlier tile
    )
    floor_us = max(
        problem.bytes / (machine.dram_tbs * 1e6), problem.flops / (machine.peak_tflops * 1e6)
    )
    return Explanation(problem, machine, tuple(candidates), floor_us)


def choose(problem: GemmProblem, machine: Machine = H200) -> KernelConfig:
    """The configuration that the model predicts to be fastest."""
    return _explain(problem, machine).choice.config
