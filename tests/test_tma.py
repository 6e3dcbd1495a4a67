"""Tensor maps are cached by all that they hold. What they move is shown by the GEMM's own tests."""

import numpy as np
import pytest

from cpgemm.tma import _Matrix, tensor_map


def test_the_matrix_tells_its_layout():
    interface = _Matrix(4096, 3, 5, 32, 2).__cuda_array_interface__
    assert interface["data"] == (4096, False) and interface["typestr"] == "<u2"
    assert interface["shape"] == (3, 5) and interface["strides"] == (32, 2)


@pytest.mark.gpu
def test_maps_are_cached_by_content():
    import cupy as cp

    data = cp.zeros((64, 256), np.uint8)
    key = (data.data.ptr, 64, 256, 256, 1, (64, 128), 128, 0)
    first = tensor_map(*key)
    assert tensor_map(*key) is first
    assert tensor_map(*key[:5], (32, 128), 128, 0) is not first
