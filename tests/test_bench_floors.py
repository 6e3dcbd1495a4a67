"""The floors: kernels that compile, every byte once, as much arithmetic as a product has."""

from __future__ import annotations

import struct
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_kernels import needs_nvrtc

from cpgemm.bench import floors
from cpgemm.bench.contenders import regions
from cpgemm.bench.floors import MemoryFloorConfig, Region, compute_units, memory_arguments
from cpgemm.bench.operands import Pool, Product
from cpgemm.bench.result import Case
from cpgemm.compiler import compile_kernel
from cpgemm.config import SHARED_LIMIT

DENSE = Case("dense", 33, 264, 592)
MASKED = Case("masked", 5, 136, 272, 3)


TRIED = MemoryFloorConfig(stages=12, piece=8192, loaders=4, store_piece=8192)


@needs_nvrtc
@pytest.mark.parametrize(
    "source", [*floors.floor_sources(), floors.memory_source(TRIED)], ids=lambda source: source.name
)
def test_kernels_compile(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CPGEMM_COMPILER", raising=False)
    report = compile_kernel(source).report  # which refuses spills and serialised wgmma
    if source.entry == "cpgemm_compute_floor":
        assert report.wgmma % 4 == 0 and report.wgmma > 0 and report.bulk_copies == 0
    else:
        assert report.wgmma == 0 and report.bulk_copies == 2, "one load, one store"


def test_bytes_in_flight() -> None:
    """What saturates memory, with and without overlap; and no more than a block may have."""
    config = floors.MEMORY_FLOOR
    assert config.stages * config.piece >= 128 << 10
    assert config.shared_bytes <= SHARED_LIMIT and config.stages % config.loaders == 0


def walk(arguments: tuple[Any, ...], piece: int, *, writes: bool) -> list[tuple[int, int]]:
    """(address, bytes) of every piece, found as the kernel's ``find`` finds it."""
    table, reads, read_pieces, write_pieces = arguments
    entries = [struct.unpack_from("<QQQII", table, 32 * at) for at in range(len(table) // 32)]
    found = []
    for number in range(int(write_pieces if writes else read_pieces)):
        at, left = (int(reads) if writes else 0), number
        while left >= entries[at][3] * entries[at][4]:
            left -= entries[at][3] * entries[at][4]
            at += 1
        address, pitch, run_bytes, _runs, pieces = entries[at]
        offset = left % pieces * piece
        found.append((address + left // pieces * pitch + offset, min(run_bytes - offset, piece)))
    return found


def test_every_byte_of_every_region_is_met_once() -> None:
    reads = [Region(1 << 20, 20000), Region(2 << 20, 48, runs=7, pitch=112), Region(3 << 20, 8192)]
    writes = [Region(4 << 20, 16400, runs=3, pitch=32768)]
    for config in (floors.MEMORY_FLOOR, floors.MemoryFloorConfig(stages=2, piece=8192)):
        arguments = memory_arguments(config, reads, writes)
        assert len(arguments[0]) == 32 * config.regions
        for side, wanted in ((False, reads), (True, writes)):
            met: dict[int, int] = {}
            piece = config.store_piece if side else config.piece
            for address, count in walk(arguments, piece, writes=side):
                assert 0 < count <= piece and address % 16 == count % 16 == 0
                for byte in range(address, address + count, 16):
                    met[byte] = met.get(byte, 0) + 1
            assert set(met.values()) == {1}
            assert 16 * len(met) == floors.regions_bytes(wanted)
            starts = {region.address + at * region.pitch for region in wanted
                      for at in range(region.runs)}  # fmt: skip
            assert starts <= set(met)


@pytest.mark.parametrize("loaders", [1, 3, 4])
@pytest.mark.parametrize("pieces", [0, 1, 131, 132, 133, 1000])
def test_every_piece_belongs_to_one_loader_of_one_block(pieces: int, loaders: int) -> None:
    """The kernel's arithmetic: which piece numbers a loader walks through."""
    met: list[int] = []
    for block in range(132):
        share = max(pieces - block + 131, 0) // 132
        for warp in range(loaders):
            mine = (share - warp + loaders - 1) // loaders
            met += [block + (warp + at * loaders) * 132 for at in range(mine)]
    assert sorted(met) == list(range(pieces))


def test_nothing_to_move_takes_no_region() -> None:
    config = MemoryFloorConfig()
    arguments = memory_arguments(config, [Region(16, 0), Region(32, 16)], [])
    assert [int(value) for value in arguments[1:]] == [1, 1, 0]
    with pytest.raises(ValueError, match="at most 8 regions"):
        memory_arguments(config, [Region(16, 16)] * 9, [])
    with pytest.raises(ValueError, match="multiples of 16"):
        memory_arguments(config, [Region(8, 16)], [])


@pytest.mark.parametrize("case", [DENSE, MASKED], ids=lambda case: case.name)
def test_regions_of_a_product(case: Case) -> None:
    """Codes, scales and result, no more than the counted bytes and what alignment adds."""
    pools = Pool(0, np), Pool(1, np)
    product = Product.make(case, *pools, np, sets=1)
    one = product.sets[0]
    reads, writes = regions(product, one)
    groups, m, n, k, blocks = max(case.groups, 1), case.m, case.n, case.k, -(-case.k // 128)
    codes_a, scales_a, codes_b, scales_b = map(floors.regions_bytes, ([r] for r in reads))
    assert codes_a == groups * m * k and codes_b == groups * n * k
    assert groups * blocks * m * 4 <= scales_a <= groups * blocks * (m + 3) * 4
    assert 0 <= scales_b - groups * blocks * -(-n // 128) * 4 < 16
    assert floors.regions_bytes(writes) == groups * m * n * 2
    # The last group's rows end where its region ends.
    last = writes[0].address + (writes[0].runs - 1) * writes[0].pitch + writes[0].run_bytes
    rows = one.out[-1, : case.m] if case.groups else one.out
    assert last == rows.__array_interface__["data"][0] + (len(rows) - 1) * rows.strides[0] + 2 * n


@pytest.mark.parametrize(
    ("rows", "n", "k", "block_m", "units"),
    [
        ([4096], 7168, 2048, 256, 16 * 56 * 16),
        ([4096], 2112, 7168, 256, 16 * 17 * 56),
        ([300], 128, 128, 256, 2),  # five batches of 64 rows, four in a unit
        ([64], 128, 1024, 128, 4),  # eight, two in a unit
        ([1], 8, 16, 128, 1),
        ([20] * 32, 4096, 4096, 128, 32 * 32 * 32 // 2),
        ([512, 512], 128, 128, 256, 4),
    ],
)
def test_arithmetic_of_the_compute_floor(
    rows: list[int], n: int, k: int, block_m: int, units: int
) -> None:
    config, found = compute_units(rows, n, k)
    assert (config.block_m, found) == (block_m, units)
    assert found * config.block_m * 128 * 128 >= sum(rows) * n * k, "not less than the product"


# ----------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("config", [floors.MEMORY_FLOOR, TRIED], ids=["chosen", "tried"])
def test_the_memory_floor_reads_and_writes(pdl: bool, config: MemoryFloorConfig) -> None:
    """All of D is written and nothing behind it; faster than memory would mean left-out parts."""
    import cupy as cp

    source = cp.zeros(1 << 30, cp.uint8)
    target = cp.full((3, 1000, 1024), 0xFFFF, cp.uint16)
    reads, writes = [floors.whole(source.reshape(1, -1))], [floors.whole(target, 500)]
    call = floors.memory_floor(reads, writes, pdl=pdl, config=config)
    call()
    start, end = cp.cuda.Event(), cp.cuda.Event()
    start.record()
    call()
    end.record()
    end.synchronize()
    assert not bool((target[:, :500] == 0xFFFF).any())
    assert bool((target[:, 500:] == 0xFFFF).all())
    rate = source.nbytes / cp.cuda.get_elapsed_time(start, end) / 1e9
    print(f"{rate:.2f} TB/s")
    assert 1.0 < rate < 5.0


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "units"), [([4096], 16 * 16 * 8), ([64], 8 * 16 // 2)])
def test_the_compute_floor_multiplies_all_units(rows: list[int], units: int) -> None:
    import cupy as cp

    ones = cp.full(1 << 16, 0x38, cp.uint8)  # the code of 1
    call: Any = floors.compute_floor(ones, rows, 2048, 1024)
    call()
    sums = call.memory[1]
    config, found = compute_units(rows, 2048, 1024)
    assert found == units
    # Each element of a unit is 128 times the scale; totals are float32.
    wanted = units * config.block_m * 128 * 128 * 1e-4
    assert float(sums.sum(dtype=cp.float64)) == pytest.approx(wanted, rel=1e-4)


def test_whole_arrays_round_up_to_16_bytes() -> None:
    array = types.SimpleNamespace(
        data=types.SimpleNamespace(ptr=4096), strides=(28, 4), shape=(3, 7), ndim=2, itemsize=4,
        __array_interface__={"data": (4096, False)},
    )  # fmt: skip
    assert floors.whole(array) == Region(4096, 96)  # 2 * 28 + 7 * 4 = 84
