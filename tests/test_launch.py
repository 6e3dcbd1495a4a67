"""Launches: parameters laid out once, launched on any stream."""

import ctypes

import numpy as np
import pytest
from tiny_kernels import fresh_copy

from cpgemm import launch


def test_parameters_are_naturally_aligned():
    given = [np.int32(7), b"\x05" * 128, np.uint64(9), np.int32(1), np.float64(2.5)]
    buffer, addresses = launch._laid_out(given)
    end = ctypes.addressof(buffer) + len(buffer)
    for address, value in zip(addresses, given, strict=True):
        raw = value if isinstance(value, bytes) else value.tobytes()
        assert ctypes.addressof(buffer) <= address <= end - len(raw)
        assert ctypes.string_at(address, len(raw)) == raw
        assert address % min(len(raw), 64) == 0


def copy_of(kernel, given, got, **options):
    arguments = (np.uint64(given.data.ptr), np.uint64(got.data.ptr), np.int32(given.size))
    return launch.PreparedLaunch(kernel, 8, 128, arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_launch_on_the_current_stream(pdl):
    import cupy as cp

    from cpgemm.compiler import load_kernel

    kernel = load_kernel(fresh_copy("launch"))
    given = cp.arange(1000, dtype=cp.float32)
    got = cp.full(1000, cp.nan, dtype=cp.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    prepared = copy_of(kernel, given, got, pdl=pdl)
    with stream:
        prepared()
    stream.synchronize()
    np.testing.assert_array_equal(got.get(), given.get())
    got[...] = cp.nan
    cp.cuda.Device().synchronize()
    prepared.on(stream.ptr)  # again, by handle
    stream.synchronize()
    np.testing.assert_array_equal(got.get(), given.get())


@pytest.mark.gpu
def test_streams_that_come_and_go_are_forgotten():
    import cupy as cp

    from cpgemm.compiler import load_kernel

    given = cp.arange(1000, dtype=cp.float32)
    prepared = copy_of(load_kernel(fresh_copy("launch")), given, cp.empty_like(given))
    for _ in range(3):
        streams = [cp.cuda.Stream(non_blocking=True) for _ in range(50)]
        for stream in streams:
            prepared.on(stream.ptr)
        cp.cuda.Device().synchronize()
    assert len(prepared._configs) <= 65


@pytest.mark.gpu
def test_what_the_driver_refuses_is_said():
    import cupy as cp

    from cpgemm.compiler import load_kernel

    given = cp.arange(1000, dtype=cp.float32)
    prepared = copy_of(load_kernel(fresh_copy("launch")), given, given, shared_bytes=64 << 20)
    with pytest.raises(RuntimeError, match=r"refuses to launch .*67108864 bytes of shared memory"):
        prepared()
