"""How long a kernel takes, predicted without a GPU from physical terms.

In clocks of one multiprocessor unless said otherwise:

tensor     block_m * block_n / 32 per k-block: 4096 multiply-adds a clock
shared     bytes that wgmma reads (8 KiB of A and 128 * block_n bytes of B for each m64 wave) and
           that TMA writes, at 128 bytes a clock; the larger of tensor and shared counts
promotion  one FFMA per accumulator and k-block, weighted by what other consumers leave exposed
chain      a consumer's own wgmma, wait and promotion for one k-block: a lower limit where no other
           consumer has rows of the tile
epilogue   per tile: a fixed part, and one for each element that is converted, staged and stored;
           the last tile's overlaps nothing
turns      tiles over multiprocessors, rounded up
clock      falls from 1.9 to 1.77 GHz as the tensor rate nears 1200 TFLOPS: power
L2         bytes over bandwidth for all multiprocessors together
port       those of one multiprocessor over what its port takes, less where few bytes are under way
DRAM       bytes over bandwidth

Rows of A or B that are no multiples of 128 bytes long straddle lines of L2: half of them where the
length is a multiple of 64, three of four where it is one of 32, and so on.  Where the last turn
leaves multiprocessors idle, the others cannot draw all of the bandwidth.

The blocks of a split kernel run all at once: the chain of a block is that of its share of K, longer
where two blocks share a multiprocessor, and summing over the cluster costs a fixed time.

The parts overlap imperfectly: norms are taken, of a lower order for L2 and DRAM, which slow each
other, than for the rest, and launching is added.  The weights are fitted to the timings of
all kernels on random shapes on one H200; docs/performance.md says how good the choices are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from cpgemm import settings
from cpgemm.config import KernelConfig, SplitKernelConfig
from cpgemm.problem import GemmProblem

__all__ = ["H200", "Candidate", "Machine", "TileTimes", "predict", "suits", "tile_times"]

# Fitted weights, in clocks at the unthrottled clock unless their name says otherwise.
_BUSY = {1: 0.6913, 2: 0.6913, 3: 0.6261}  # of tensor and shared, by consumers: may overlap
_PROMOTION, _PROMOTION_ONE_WAVE = 2.529, 2.798  # per FFMA; two consumers with one wave hide less
_CHAIN = 368.5  # latency of one m64 wave: issue, wait, release ...
_CHAIN_COLUMN = 0.855  # ... and per column: wgmma and promotion
_EPILOGUE = 615.8
_EPILOGUE_ELEMENT = {1: 0.0790, 2: 0.0790, 3: 0.0772}
_FULL_GHZ, _FULL_TFLOPS = 1.772, 1200.0
_LAUNCH_US = 1.736
_TAIL = 0.3425  # of idle places in the last turn, on the time that DRAM takes
_SPLIT_CHAIN = 334.0  # per k-block of a split kernel's block ...
_SPLIT_SHARED = 0.2038  # ... and this part more for each further block of the multiprocessor
_SPLIT_US = {2: 1.255, 4: 1.429}  # to exchange and add the sums
_CLUSTER_US = 0.6474  # pairs of blocks start together and end together
_PORT_BYTES = 41.36  # a clock, from L2 into one multiprocessor, however many are under way
_PORT_CLOCKS = 109.0  # and this long for those that are
_STRADDLED_PORT = 0.2046  # power of the lines per 128 bytes, on the port's time
_MEMORY_NORM, _NORM = 7.207, 16.74


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


H200 = Machine("NVIDIA H200", sms=132, clock_ghz=1.9, dram_tbs=4.3, l2_tbs=10.0)


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


@dataclass(frozen=True)
class Candidate:
    """A configuration ``config`` with its predicted time and the terms that make it up.

    ``waves``: turns of the blocks over the multiprocessors.  Microseconds: ``predicted_us``, of
    which ``compute_us``, ``l2_us`` (all bytes, or those of one multiprocessor: the longer time) and
    ``dram_us`` overlap; ``launch_us`` is what comes on top: launching, clusters, the last tile's
    epilogue, the exchange of split kernels.
    """

    config: KernelConfig
    predicted_us: float
    waves: int
    compute_us: float
    l2_us: float
    dram_us: float
    launch_us: float

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


def _busy_clocks(config: KernelConfig) -> float:
    return _BUSY[config.consumers] * max(_tensor_clocks(config), _shared_clocks(config))


def _k_block_clocks(config: KernelConfig) -> float:
    if config.row_parts == 1:
        chain = config.waves * (_CHAIN + _CHAIN_COLUMN * config.wave_n)
        return max(_busy_clocks(config), chain)
    one_wave = config.consumers == 2 and config.waves == 1
    promotion = _PROMOTION_ONE_WAVE if one_wave else _PROMOTION
    promotion *= config.block_m / 64 * config.block_n / 2
    return _busy_clocks(config) + promotion


def _split_k_block_clocks(config: SplitKernelConfig, tiles: int, machine: Machine) -> float:
    return _SPLIT_CHAIN * (1 + _SPLIT_SHARED * (_blocks_of_one(config, tiles, machine) - 1))


def _split_us(config: SplitKernelConfig) -> float:
    return _SPLIT_US.get(config.splits, max(_SPLIT_US.values()))


def _blocks_of_one(config: SplitKernelConfig, tiles: int, machine: Machine) -> int:
    """Blocks of a split kernel that the busiest multiprocessor holds."""
    return math.ceil(tiles * config.splits / machine.sms)


def _turns(config: KernelConfig, tiles: int, machine: Machine) -> int:
    """How many tiles the busiest multiprocessor takes one after another."""
    return math.ceil(tiles / config.blocks(machine.sms, machine.sms))


def _epilogue_clocks(config: KernelConfig) -> float:
    return _EPILOGUE + _EPILOGUE_ELEMENT[config.consumers] * config.block_m * config.block_n


def _lines(problem: GemmProblem) -> float:
    """Lines of L2 that 128 bytes of a row of A or B lie in, in the mean."""
    return 2 - math.gcd(problem.k, 128) / 128


def _l2_us(box_rows: float, problem: GemmProblem, machine: Machine) -> float:
    """Time for ``box_rows`` rows of boxes, in all tiles together, for each k-block."""
    return box_rows * problem.k_blocks * 128 * _lines(problem) / (machine.l2_tbs * 1e6)


def _port_us(
    box_rows: float, k_blocks: int, stages: int, problem: GemmProblem, machine: Machine
) -> float:
    """Time for ``box_rows`` rows of boxes, ``k_blocks`` times, into one multiprocessor.

    ``stages``: how many k-blocks are under way at a time.
    """
    clocks_a_byte = 1 / _PORT_BYTES + _PORT_CLOCKS / (stages * box_rows * 128)
    lines = _lines(problem) ** _STRADDLED_PORT
    return box_rows * k_blocks * 128 * lines * clocks_a_byte / (machine.clock_ghz * 1e3)


def _norm(order: float, *us: float) -> float:
    return float(sum(term**order for term in us) ** (1 / order))


def _candidate(
    config: KernelConfig, waves: int, compute_us: float, l2_us: float, port_us: float,
    dram_us: float, launch_us: float,
) -> Candidate:  # fmt: skip
    memory_us = _norm(_MEMORY_NORM, l2_us, dram_us)
    predicted_us = launch_us + _norm(_NORM, compute_us, port_us, memory_us)
    return Candidate(
        config, predicted_us, waves, compute_us, max(l2_us, port_us), dram_us, launch_us
    )


def suits(problem: GemmProblem, config: KernelConfig, machine: Machine) -> bool:
    """Whether ``config`` is a candidate: a split kernel's blocks must all run at once."""
    if config.cluster > machine.sms:
        return False
    if not isinstance(config, SplitKernelConfig):
        return True
    # Graphics clusters have 16 or 18 multiprocessors: of clusters of four, 62 run at once, not 66.
    places = machine.sms * config.blocks_per_sm // config.splits
    return config.tiles(problem) <= (places if config.splits == 2 else places * 62 // 66)


def _predict_split(problem: GemmProblem, config: SplitKernelConfig, machine: Machine) -> Candidate:
    tiles = config.tiles(problem)
    k_blocks = -(-problem.k_blocks // config.splits)
    clocks = k_blocks * _split_k_block_clocks(config, tiles, machine)
    rows = config.rows_loaded(problem.m) + config.block_n
    blocks = _blocks_of_one(config, tiles, machine)
    share = max(1.0, machine.sms / (tiles * config.splits))
    return _candidate(
        config,
        1,
        clocks / (machine.clock_ghz * 1e3),
        _l2_us(tiles * rows, problem, machine),
        _port_us(blocks * rows, k_blocks, min(config.stages, k_blocks), problem, machine),
        problem.bytes / (machine.dram_tbs * 1e6) * share**_TAIL,
        _LAUNCH_US + _split_us(config),
    )


def predict(problem: GemmProblem, config: KernelConfig, machine: Machine = H200) -> Candidate:
    """The prediction for ``problem`` with the kernel of ``config`` on ``machine``."""
    if isinstance(config, SplitKernelConfig):
        return _predict_split(problem, config, machine)
    tiles = config.tiles(problem)
    waves = _turns(config, tiles, machine)
    epilogue = _epilogue_clocks(config)
    clocks = waves * problem.k_blocks * _k_block_clocks(config) + (waves - 1) * epilogue
    cool_us = clocks / (machine.clock_ghz * 1e3)
    load = min(1.0, problem.flops / cool_us / 1e6 / _FULL_TFLOPS)
    compute_us = clocks / ((machine.clock_ghz - load * (machine.clock_ghz - _FULL_GHZ)) * 1e3)
    rows = config.rows_loaded(problem.m)
    loaded = rows / config.cluster_n + config.block_n / config.cluster_m
    share = waves * config.blocks(machine.sms, machine.sms) / tiles
    launch_us = _LAUNCH_US + (_CLUSTER_US if config.cluster > 1 else 0.0)
    return _candidate(
        config,
        waves,
        compute_us,
        _l2_us(tiles * loaded, problem, machine),
        _port_us(
            rows + config.block_n,
            waves * problem.k_blocks,
            min(config.stages, problem.k_blocks),
            problem,
            machine,
        ),
        problem.bytes / (machine.dram_tbs * 1e6) * share**_TAIL,
        launch_us + epilogue / (machine.clock_ghz * 1e3),
    )


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
    whole = predict(problem, config, machine)
    busy = _busy_clocks(config)
    if isinstance(config, SplitKernelConfig):
        k_blocks = -(-problem.k_blocks // config.splits)
        us = 1 / (machine.clock_ghz * 1e3)
        step = _split_k_block_clocks(config, config.tiles(problem), machine)
        epilogue = _split_us(config) / us
    else:
        k_blocks = problem.k_blocks
        step, epilogue = _k_block_clocks(config), _epilogue_clocks(config)
        us = whole.compute_us / (whole.waves * (k_blocks * step + epilogue) - epilogue)
    load = max(whole.l2_us, whole.dram_us) / (whole.waves * k_blocks)
    return TileTimes(k_blocks, load, step * us, min(busy, step) * us, epilogue * us)
