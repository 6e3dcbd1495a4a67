"""``KernelConfig``: the numbers it implies and what it refuses."""

import dataclasses

import pytest

from cpgemm.config import SHARED_LIMIT, KernelConfig
from cpgemm.problem import GemmProblem

LARGE = KernelConfig(256, 128, 3)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LARGE.stages = 4  # type: ignore[misc]


def test_name_tells_the_decisions():
    assert LARGE.name == "dense_256x128_s3_w2_bfloat16"
    multicast = KernelConfig(128, 192, 4, 2, cluster_m=2, out_dtype="float32")
    assert multicast.name == "dense_128x192_s4_w2_multicast_b_float32"


@pytest.mark.parametrize(
    ("consumers", "block_m", "registers"), [(2, 256, (24, 240)), (3, 192, (32, 160))]
)
def test_registers_fit_the_register_file(consumers, block_m, registers):
    config = KernelConfig(block_m, 128, 3, consumers)
    assert (config.producer_registers, config.consumer_registers) == registers
    pool = 128 * (config.producer_registers + consumers * config.consumer_registers)
    assert pool <= 65536 and config.consumer_registers % 8 == 0
    # setmaxnreg.inc blocks for ever when the pool cannot give what all consumers ask for.
    entry = 65536 // config.threads // 8 * 8
    assert pool <= entry * config.threads


@pytest.mark.parametrize(
    ("block_n", "segment", "chunk"), [(128, 128, 64), (192, 64, 64), (96, 32, 32), (176, 16, 16)]
)
def test_segment_and_chunk(block_n, segment, chunk):
    config = KernelConfig(128, block_n, 3)
    assert (config.scale_segment, config.store_chunk) == (segment, chunk)
    # A segment never straddles two scales of B, wherever a tile starts.
    assert all((n * block_n + s) % 128 + segment <= 128 for n in range(8)
               for s in range(0, block_n, segment))  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"block_m": 96},
        {"block_m": 512},
        {"block_n": 24},
        {"block_n": 256},
        {"stages": 1},
        {"stages": 9},
        {"consumers": 4},
        {"cluster_m": 2, "cluster_n": 2},
    ],
)
def test_malformed_is_refused(fields):
    with pytest.raises(ValueError, match=r"KernelConfig: .*; got KernelConfig"):
        dataclasses.replace(LARGE, **fields)


def test_shared_memory_counts_everything():
    tiles = 3 * (256 + 128) * 128 + 256 * 128 * 2
    assert tiles + 3 * (256 + 1) * 4 + 48 <= LARGE.shared_bytes <= SHARED_LIMIT


def test_rows_loaded_match_m():
    small = KernelConfig(64, 32, 8, 1)
    assert [small.rows_loaded(m) for m in (1, 8, 9, 64, 300)] == [8, 8, 16, 64, 64]
    assert KernelConfig(256, 128, 3, cluster_n=2).rows_loaded(1) == 256
    assert KernelConfig(256, 128, 3, cluster_m=2).rows_loaded(9) == 16


def test_tiles_and_grid():
    problem = GemmProblem(4096, 2112, 7168)
    assert LARGE.tiles(problem) == 16 * 17
    assert LARGE.blocks(LARGE.tiles(problem), 132) == 132
    pairs = KernelConfig(256, 128, 3, cluster_n=2)
    assert pairs.tiles(problem) == 16 * 18
    assert pairs.blocks(pairs.tiles(GemmProblem(1, 8, 16)), 132) == 2
    assert pairs.blocks(pairs.tiles(problem), 133) == 132
    assert [pairs.column_tiles(n) for n in (8, 256, 264)] == [2, 2, 4]


def test_why_not():
    assert LARGE.why_not(GemmProblem(64, 128, 128)) is None
    assert "float32" in str(LARGE.why_not(GemmProblem(64, 128, 128, "float32")))
    assert "empty" in str(LARGE.why_not(GemmProblem(0, 128, 128)))
