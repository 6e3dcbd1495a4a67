"""Launch configurations are made once; launches go to CuPy's current stream."""

import numpy as np
import pytest
from tiny_kernels import fresh_copy

pytest.importorskip("cuda.core", reason="cuda.core is not installed")

from cpgemm import launch


def test_configurations_are_made_once():
    first = launch.launch_config(132, 384, 1024, False)
    assert first is launch.launch_config(132, 384, 1024, False)
    assert first is not launch.launch_config(132, 384, 1024, True)
    assert tuple(first.grid) == (132, 1, 1) and tuple(first.block) == (384, 1, 1)
    assert first.shmem_size == 1024


@pytest.mark.gpu
def test_launch_on_the_current_stream():
    import cupy as cp

    from cpgemm.compiler import load_kernel

    kernel = load_kernel(fresh_copy("launch"))
    given = cp.arange(1000, dtype=cp.float32)
    got = cp.full(1000, cp.nan, dtype=cp.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        assert launch.current_stream().handle is not None
        arguments = (np.uint64(given.data.ptr), np.uint64(got.data.ptr), np.int32(1000))
        launch.launch(kernel, 8, 128, arguments)
    stream.synchronize()
    np.testing.assert_array_equal(got.get(), given.get())
