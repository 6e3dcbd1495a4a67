"""Samples of results, and how far they are off."""

from __future__ import annotations

import numpy as np
import pytest

import cpgemm
from cpgemm.sampled_check import largest_errors, relative_error, select_rows, stratified


@pytest.mark.parametrize("extent", [1, 7, 256, 257, 4096, 24576])
def test_the_sample_meets_every_stretch(extent: int, rng: np.random.Generator) -> None:
    count = min(extent, 256)
    indices = stratified(extent, 256, rng)
    assert indices.shape == (count,) and np.all(np.diff(indices) > 0)
    assert indices[0] >= 0 and indices[-1] < extent
    edges = np.linspace(0, extent, count + 1).astype(int)
    assert np.all((edges[:-1] <= indices) & (indices < edges[1:]))


def test_relative_error() -> None:
    wanted = np.array([[3.0, 4.0]])
    assert relative_error(np.array([[3.0, 4.5]]), wanted) == pytest.approx(0.1)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.ones(2), np.zeros(2)) == float("inf")
    assert np.isnan(relative_error(np.array([np.nan, 1.0]), np.ones(2)))


def test_few_elements_may_be_off_by_half_a_unit_each() -> None:
    assert largest_errors(4096, 2112) == largest_errors(1, 1024) == (0.002, 0.1)
    assert largest_errors(1, 8)[0] > 2.0**-8


def test_selected_rows_stand_for_the_same_values(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((300, 336), dtype=np.float32)
    for granularity in ((1, 128), (128, 128)):
        tensor = cpgemm.quantize(weights, granularity)
        rows = np.array([0, 5, 127, 128, 299])
        assert np.array_equal(select_rows(tensor, rows).dequantize(), tensor.dequantize()[rows])


@pytest.mark.gpu
def test_selected_rows_of_the_gpu_come_to_the_host(rng: np.random.Generator) -> None:
    import cupy as cp

    tensor = cpgemm.quantize(cp.asarray(rng.standard_normal((300, 336), dtype=np.float32)))
    rows = np.array([0, 5, 299])
    selected = select_rows(tensor, rows)
    assert isinstance(selected.data, np.ndarray)
    assert np.array_equal(selected.dequantize(), tensor.dequantize().get()[rows])
