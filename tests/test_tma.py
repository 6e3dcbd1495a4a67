"""Tensor maps are cached by all that they hold. What they move is shown by the GEMM's own tests."""

import numpy as np
import pytest

from cpgemm.tma import MAP_BYTES, row_pitch, tensor_map


def test_the_pitch_of_a_single_row_is_that_of_a_fresh_allocation():
    assert row_pitch(np.zeros((3, 48), np.uint8)) == 48
    assert row_pitch(np.zeros((1, 40), np.uint8)) == 48
    assert row_pitch(np.zeros((2, 1, 48), np.uint8)) == 48


@pytest.mark.gpu
def test_maps_are_cached_by_content():
    import cupy as cp

    data = cp.zeros((64, 256), np.uint8)
    key = (data.data.ptr, 64, 256, 256, 1, (64, 128), 128)
    first = tensor_map(*key)
    assert isinstance(first, bytes) and len(first) == MAP_BYTES
    assert tensor_map(*key) is first
    assert tensor_map(*key[:5], (32, 128), 128) != first


@pytest.mark.gpu
def test_what_the_driver_refuses_is_said():
    with pytest.raises(RuntimeError, match=r"refuses a tensor map .*at 0x1001, pitch 256"):
        tensor_map(4097, 64, 256, 256, 1, (64, 128), 128)
