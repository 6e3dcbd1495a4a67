"""Large arrays from a small pool, and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from cpgemm.random_data import POOL, repeated, seed_or_fresh


@pytest.mark.parametrize(("size", "start"), [(0, 0), (3, 2), (7, 0), (8, 0), (5, 4), (30, 6)])
def test_a_pool_is_repeated(size: int, start: int) -> None:
    got = repeated(np.arange(7), size, start)
    assert got.tolist() == [at % 7 for at in range(start, start + size)]


def test_one_pass_shares_memory() -> None:
    pool = np.arange(7, dtype=np.uint8)
    assert np.shares_memory(repeated(pool, 5, 2), pool)


def test_the_pool_is_prime() -> None:
    assert all(POOL % divisor for divisor in range(2, int(POOL**0.5) + 1))


def test_seeds() -> None:
    assert seed_or_fresh(0) == 0
    fresh = {seed_or_fresh(None) for _ in range(8)}
    assert len(fresh) > 1 and all(0 <= seed < 2**32 for seed in fresh)
