"""Calls that were made before: what their key holds, and when they are forgotten."""

import gc
import weakref

import numpy as np
import pytest
from gemm_checks import operands

import cpgemm
from cpgemm import calls, settings
from cpgemm.gemm import _ready

BITS = np.uint16


class Launch:
    """Stands in for a launch; only kept and handed out here."""


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
