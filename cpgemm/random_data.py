"""Random data for trials, checks and benchmarks: its seed, and large arrays from a small pool."""

from __future__ import annotations

import random

from cpgemm.layout import Array, array_module

__all__ = ["POOL", "repeated", "seed_or_fresh"]

POOL = 4194301
"""Values that are enough for an array of any size: prime, so that no two rows of it repeat."""


def seed_or_fresh(seed: int | None) -> int:
    """``seed``, or one that nobody has chosen, below 2**32."""
    return random.SystemRandom().randrange(2**32) if seed is None else seed


def repeated(pool: Array, size: int, start: int = 0) -> Array:
    """``size`` elements of ``pool`` from number ``start`` on, over and over; shared if one pass."""
    end = start + size
    if end > len(pool):
        pool = array_module(pool).tile(pool, -(-end // len(pool)))
    return pool[start:end]
