"""Fixtures and marks that all tests share."""

from __future__ import annotations

import functools
import os
import random

import numpy as np
import pytest

# JAX would take most of a GPU's memory at its first array; the tests share it with CuPy and torch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What someone has tuned on this machine must not change what the tests see.
os.environ["CPGEMM_TUNED"] = "0"


@functools.cache
def why_no_gpu() -> str | None:
    """None when the current device is a Hopper GPU, else what was found instead."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        if cupy.cuda.runtime.getDeviceCount() < 1:
            return "no CUDA device"
        capability = cupy.cuda.Device().compute_capability
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable CUDA device ({error})"
    if capability != "90":
        return f"the device has compute capability {capability[:-1]}.{capability[-1]}, not 9.0"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU (compute capability 9.0)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    reason = why_no_gpu()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=f"needs a Hopper GPU: {reason}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; the printed seed, given as CPGEMM_TEST_SEED, repeats a failure."""
    chosen = os.environ.get("CPGEMM_TEST_SEED")
    seed = int(chosen) if chosen else random.SystemRandom().randrange(2**32)
    print(f"CPGEMM_TEST_SEED={seed}")
    return np.random.default_rng(seed)
