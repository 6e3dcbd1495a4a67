"""Calls that were made before: what their key holds, and when they are forgotten."""

import gc
import weakref

import numpy as np
import pytest
from gemm_checks import operands

import cpgemm
from cpgemm import ScaledTensor, calls, dlpack_abi, settings
from cpgemm.gemm import _ready
from cpgemm.layout import FP8
from cpgemm.plan import call_key

BITS = np.uint16


class Launch:
    """Stands in for a launch; only kept and handed out here."""

    def __call__(self):
        raise AssertionError("nobody launches here")


@pytest.fixture(autouse=True)
def restored():
    yield
    settings.set_sms(None)
    settings.set_pdl(None)


def test_a_launch_is_found_until_a_setting_changes():
    ready, launch = calls.ReadyCalls(), Launch()
    ready.put("key", launch)
    assert ready.get("key") is launch and ready.get("other") is None and ready.get(None) is None
    settings.set_sms(7)
    assert ready.get("key") is None
    ready.put("key", launch)
    assert ready.get("key") is launch and len(ready) == 1


def test_the_oldest_are_forgotten():
    ready = calls.ReadyCalls()
    for number in range(calls._LIMIT + 3):
        ready.put(number, Launch())
    assert len(ready) == calls._LIMIT
    assert ready.get(2) is None and ready.get(3) is not None


def on_gpu(address, shape, dtype, strides=None):
    """A CuPy array that nobody may look into: there need not be a GPU."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    return dlpack_abi.cupy_view(address, 1 << 30, None, 0, shape, np.dtype(dtype), strides)


def scaled_on_gpu(address=1 << 40, shape=(64, 256), framework="cupy"):
    scales = on_gpu((1 << 40) + (1 << 30), (shape[0], 2), np.float32, (4, 4 * shape[0]))
    data = on_gpu(address, shape, FP8)
    return ScaledTensor.of_checked(data, scales, (1, 128), "float32", framework)


def test_tensors_on_the_same_memory_have_the_same_signature():
    one, same = scaled_on_gpu(), scaled_on_gpu()
    assert calls.signature(one) is not None and calls.signature(one) == calls.signature(same)
    others = (
        scaled_on_gpu(1 << 41), scaled_on_gpu(shape=(32, 256)), scaled_on_gpu(framework="torch"),
    )  # fmt: skip
    assert len({calls.signature(tensor) for tensor in (one, same, *others)}) == 4


def test_keys_of_products_tell_apart_what_matters():
    a, b = scaled_on_gpu(), scaled_on_gpu(1 << 41)
    out = on_gpu(1 << 42, (64, 64), np.uint16)
    key = call_key(a, b, out, None)
    assert key == call_key(scaled_on_gpu(), scaled_on_gpu(1 << 41), out[...], None)
    keys = {
        key, call_key(b, a, out, None), call_key(a, b, on_gpu(1 << 43, (64, 64), np.uint16), None),
        call_key(a, b, on_gpu(1 << 42, (64, 64), np.uint16, (256, 2)), None),
        call_key(a, b, on_gpu(1 << 42, (64, 64), np.float32), None), call_key(a, b, out, out),
        call_key(a, b, out, None, "batch_invariant"), call_key(a, b, out, None, True, True),
    }  # fmt: skip
    assert len(keys) == 8
    assert call_key(a, b, np.zeros((64, 64)), None) is None
    assert call_key(a, b, out, np.zeros((64, 64))) is None
    assert call_key(a, b, None, None) is None


def test_arrays_of_the_cpu_have_no_signature(rng):
    a, _ = operands(rng, 4, 16, 32)
    assert calls.signature(a) is None and calls.signature(np.zeros(3)) is None
    assert calls.signature(None) is None and calls.signature("text") is None


def test_whose_stream():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros(4)
    assert calls.working_framework(np.zeros(2), None) == "cupy"
    assert calls.working_framework(np.zeros(2), tensor) == "torch"


@pytest.mark.gpu
def test_a_repeated_call_is_ready_and_right(rng):
    import cupy as cp

    a, b = operands(rng, 33, 264, 400, cp)
    out = cpgemm.gemm(a, b)
    want = out.view(BITS).get()
    before = len(_ready)
    for _ in range(3):
        out.view(BITS)[...] = 0xFFFF
        assert cpgemm.gemm(a, b, out) is out
        np.testing.assert_array_equal(out.view(BITS).get(), want)
    assert len(_ready) == before + 1


@pytest.mark.gpu
def test_every_difference_is_another_call(rng):
    """Operands, result, C, pitch: none is mistaken for another."""
    import cupy as cp

    a, b = operands(rng, 40, 264, 400, cp)
    other_a, other_b = operands(rng, 40, 264, 400, cp)
    wide = cp.zeros((40, 304), BITS)
    c = cpgemm.gemm(other_a, other_b)
    results = {}
    for name, x, y, addend in (
        ("ab", a, b, None), ("Ab", other_a, b, None), ("aB", a, other_b, None),
        ("abc", a, b, c), ("AB", other_a, other_b, None),
    ):  # fmt: skip
        wanted = cpgemm.gemm(x, y, c=addend).view(BITS).get()
        for out in (cp.zeros((40, 264), BITS), wide[:, :264]):
            view = out.view(c.dtype)
            for _ in range(2):
                view.view(BITS)[...] = 0xFFFF
                cpgemm.gemm(x, y, view, c=addend)
                np.testing.assert_array_equal(view.view(BITS).get(), wanted)
        results[name] = wanted
    assert len({value.tobytes() for value in results.values()}) == len(results)
    with pytest.raises(cpgemm.ArgumentError, match="out: must have shape"):
        cpgemm.gemm(a, b, wide.view(c.dtype))


@pytest.mark.gpu
def test_nothing_is_kept_alive(rng):
    import cupy as cp

    a, b = operands(rng, 33, 264, 400, cp)
    out = cpgemm.gemm(a, b)
    cpgemm.gemm(a, b, out)
    gone = [weakref.ref(out), weakref.ref(a.data), weakref.ref(b.data)]
    del a, b, out
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.gpu
def test_a_repeated_call_may_go_to_another_stream(rng):
    """A spinning kernel delays what writes A: a launch on another stream would read the old A."""
    import cupy as cp

    a, b = operands(rng, 64, 264, 400, cp)
    new, _ = operands(rng, 64, 264, 400, cp)
    out = cpgemm.gemm(a, b)
    cpgemm.gemm(a, b, out)
    want = cpgemm.gemm(new, b).view(BITS).get()
    spin = cp.RawKernel(
        "extern \"C\" __global__ void spin() { long long t = clock64(); "
        "while (clock64() - t < 100000000) {} }", "spin",
    )  # fmt: skip
    spin.compile()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        spin((1,), (1,), ())
        a.data.view(np.uint8)[...] = new.data.view(np.uint8)
        a.scales[...] = new.scales
        cpgemm.gemm(a, b, out)
    stream.synchronize()
    np.testing.assert_array_equal(out.view(BITS).get(), want)


@pytest.mark.gpu
def test_settings_reach_calls_that_are_ready(rng):
    import cupy as cp

    a, b = operands(rng, 300, 520, 400, cp)
    out = cpgemm.gemm(a, b)
    want = out.view(BITS).get()
    for change in (lambda: settings.set_sms(3), lambda: settings.set_pdl(True)):
        cpgemm.gemm(a, b, out)
        change()
        out.view(BITS)[...] = 0
        cpgemm.gemm(a, b, out)
        np.testing.assert_array_equal(out.view(BITS).get(), want)
