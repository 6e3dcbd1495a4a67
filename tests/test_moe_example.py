"""The layer of examples/02_moe_layer.py: against float64, and its layouts against each other."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from example_modules import load_example

import cpgemm

LAYOUTS = ["offsets", "m_indices", "ends"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("02_moe_layer.py")


def small_layer(example: ModuleType, rng: np.random.Generator, xp: Any = np) -> Any:
    up = rng.standard_normal((6, 256, 256), np.float32) / np.float32(16)
    down = rng.standard_normal((6, 256, 128), np.float32) / np.float32(11)
    return example.Layer(
        cpgemm.quantize(xp.asarray(up), (128, 128)),
        cpgemm.quantize(xp.asarray(down), (128, 128)),
        2,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_reports_its_error(
    example: ModuleType, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the GPU where there is one, on NumPy elsewhere; sizes that leave an expert few rows."""
    sizes = {"tokens": 40, "hidden": 256, "inner": 128, "experts": 8, "top-k": 2}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    assert example.main([*options, "--layout", layout]) == 0
    found = re.search(r"relative error (0\.\d+) against float64", capsys.readouterr().out)
    assert found is not None and 0.02 < float(found.group(1)) <= example.TOLERANCE


def test_experts_are_the_best(example: ModuleType, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((50, 9)).astype(np.float32)
    before = logits.copy()
    ids, weights = example.choose_experts(logits, 3)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :3])
    chosen = np.take_along_axis(logits, ids, axis=1).astype(np.float64)
    softmax = np.exp(chosen) / np.exp(chosen).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, softmax, rtol=1e-6)
    assert ids.dtype == np.int32 and weights.dtype == np.float32


def test_layouts_agree(example: ModuleType, rng: np.random.Generator) -> None:
    layer = small_layer(example, rng)
    x = rng.standard_normal((70, 256), np.float32)
    logits = rng.standard_normal((70, 6), np.float32)
    results = [layer(x, logits, layout).view(np.uint16) for layout in LAYOUTS]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_no_tokens(example: ModuleType, rng: np.random.Generator) -> None:
    out = small_layer(example, rng)(np.empty((0, 256), np.float32), np.empty((0, 6), np.float32))
    assert out.shape == (0, 256) and out.dtype == ml_dtypes.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_layer_equals_numpy(example: ModuleType, rng: np.random.Generator, layout: str) -> None:
    """Products differ by the order of sums, which may move an e4m3 code of the second product by
    one step (2^-3 of it at most, seldom), and bfloat16 results by a unit: some 2^-8 in the 2-norm.
    """
    import cupy

    state = rng.bit_generator.state
    host = small_layer(example, rng)
    rng.bit_generator.state = state
    device = small_layer(example, rng, cupy)
    x = rng.standard_normal((300, 256), np.float32)
    logits = rng.standard_normal((300, 6), np.float32)
    got = device(cupy.asarray(x), cupy.asarray(logits), layout)
    values = got.view(np.uint16).get().view(ml_dtypes.bfloat16).astype(np.float64)
    wanted = host(x, logits, layout).astype(np.float64)
    assert np.linalg.norm(values - wanted) <= 0.01 * np.linalg.norm(wanted)
