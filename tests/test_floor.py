"""The streaming floor kernel: it reads what it should, at the rate that memory allows."""

import numpy as np
import pytest

from cpgemm.floor import StreamConfig, stream, stream_source


def test_source():
    source = stream_source()
    assert source is stream_source() and source.entry == "cpgemm_stream_floor"
    assert source.shared_bytes == StreamConfig().shared_bytes == 128 * 128 * 8 + 1024


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16), (129, 200 // 8 * 16), (3, 77, 1024)])
def test_odd_shapes_end(shape):
    """Boxes that hang over the end, blocks without any box: every barrier completes."""
    import cupy as cp

    stream(cp.zeros(shape, np.uint8))
    cp.cuda.Device().synchronize()


@pytest.mark.gpu
def test_streams_at_the_rate_of_memory():
    """A kernel that left parts out would be faster than memory can be."""
    import cupy as cp

    matrix = cp.zeros((65536, 16384), np.uint8)
    start, end = cp.cuda.Event(), cp.cuda.Event()
    stream(matrix)
    start.record()
    stream(matrix)
    end.record()
    end.synchronize()
    rate = matrix.nbytes / cp.cuda.get_elapsed_time(start, end) / 1e9
    print(f"{rate:.2f} TB/s")
    assert rate < 5.0, "faster than the pins of any Hopper GPU: something was not read"
