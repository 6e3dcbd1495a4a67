"""Streams of other libraries as CuPy's, and where their results' memory comes from."""

import numpy as np
import pytest

from cpgemm import streams


def test_memory_of_the_cpu_is_numpys():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert torch is not None
    assert streams.allocator("torch", np.zeros(2)) is np
    assert streams.allocator("numpy", np.zeros(2)) is np


def test_a_foreign_stream_is_not_cupys_to_destroy(monkeypatch):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    stream = streams.external_stream(0x1234)
    assert stream.ptr == 0x1234 and isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream))
    assert streams.external_stream(0x1234) is stream
    streams._external.cache_clear()
    del stream  # a driver that was told to destroy it would crash or complain


@pytest.mark.gpu
def test_work_inside_is_on_torchs_stream():
    import cupy as cp

    torch = pytest.importorskip("torch", reason="torch is not installed")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), streams.working_stream("torch", 0):
        assert cp.cuda.get_current_stream().ptr == stream.cuda_stream
    with streams.working_stream("torch", 0):
        assert cp.cuda.get_current_stream().ptr == torch.cuda.current_stream().cuda_stream
    with streams.working_stream("cupy", 0):
        assert cp.cuda.get_current_stream().ptr == cp.cuda.Stream.null.ptr


@pytest.mark.gpu
def test_memory_for_torch_is_torchs():
    import cupy as cp

    torch = pytest.importorskip("torch", reason="torch is not installed")
    like = cp.zeros(3, np.uint8)
    before = torch.cuda.memory_allocated()
    array = streams.allocator("torch", like).empty((64, 512), np.uint8)
    assert isinstance(array, cp.ndarray) and array.shape == (64, 512)
    assert torch.cuda.memory_allocated() - before == 64 * 512
    del array
    assert torch.cuda.memory_allocated() == before
