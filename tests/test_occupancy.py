"""Occupancy: figures of NVIDIA's occupancy calculator for compute capability 9.0."""

from __future__ import annotations

import pytest

from cpgemm.errors import ArgumentError
from cpgemm.occupancy import occupancy


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks", "limit"),
    [
        (384, 168, 217088, 1, ("registers", "shared memory")),
        (256, 32, 0, 8, ("registers", "warps")),
        (1024, 64, 0, 1, ("registers",)),
        (1024, 32, 0, 2, ("registers", "warps")),
        (32, 16, 0, 32, ("blocks",)),
        (128, 84, 16384, 5, ("registers",)),  # 84 count as 88: 23 warps, in quarters 20
        (128, 32, 100 * 1024, 2, ("shared memory",)),
        (128, 32, 113 * 1024, 2, ("shared memory",)),  # 113 + 1 KiB, twice, is all there is
        (128, 32, 113 * 1024 + 1, 1, ("shared memory",)),
        (1024, 255, 0, 0, ("registers",)),
    ],
)
def test_blocks(threads: int, registers: int, shared: int, blocks: int, limit: tuple) -> None:
    found = occupancy(threads, registers, shared)
    assert found.blocks_per_sm == blocks and found.decided_by == limit
    assert found.warps_per_sm == blocks * -(-threads // 32)
    assert found.fraction == found.warps_per_sm / 64


def test_in_words() -> None:
    assert str(occupancy(384, 168, 217088)) == (
        "1 block per SM, 19 % of its warps, decided by registers and shared memory"
    )
    assert str(occupancy(32, 16, 0)).startswith("32 blocks per SM, 50 %")


@pytest.mark.parametrize("threads", [0, 1025])
def test_a_block_has_1_to_1024_threads(threads: int) -> None:
    with pytest.raises(ArgumentError, match=f"threads: .*got {threads}"):
        occupancy(threads, 32, 0)


def test_negative_amounts() -> None:
    with pytest.raises(ArgumentError, match="must not be negative"):
        occupancy(32, -1, 0)
