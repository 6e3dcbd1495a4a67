"""``cpgemm.jax``: the same bits as cpgemm on NumPy or CuPy, whatever JAX does to the calls.

What could lock up or end the process runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import operands

import cpgemm
from cpgemm import xla_calls, xla_ffi
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.scaled import ScaledTensor

# Before JAX starts: CuPy's tests share the GPU with it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax", reason="JAX is not installed")
import jax.numpy as jnp  # noqa: E402

import cpgemm.jax as cpj  # noqa: E402

BF16 = np.dtype(ml_dtypes.bfloat16)
ROOT = Path(__file__).resolve().parent.parent
# ValueError when a repeated call fails at once, the other in all other cases.
AT_RUN_TIME = (ValueError, jax.errors.JaxRuntimeError)


@pytest.fixture(autouse=True)
def on_cpu(request):
    """Everything on JAX's CPU device, except in tests that are marked gpu."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def bits(array) -> np.ndarray:
    """Bits of a JAX, NumPy or CuPy array, on the host."""
    if hasattr(array, "get"):
        array = array.view(f"u{array.dtype.itemsize}").get()
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same(got, expected) -> None:
    assert got.shape == tuple(expected.shape) and got.dtype == expected.dtype
    np.testing.assert_array_equal(bits(got), bits(expected))


def arrays(*tensors: ScaledTensor, device=None) -> list:
    """Data and scales of NumPy or CuPy tensors as JAX arrays."""

    def host(array):
        return bits(array).view(array.dtype)

    parts = [host(array) for tensor in tensors for array in (tensor.data, tensor.scales)]
    return [jax.device_put(part, device) if device else jnp.asarray(part) for part in parts]


def layer(x, w):
    return cpj.gemm(*cpj.quantize(x), *cpj.quantize(w, (128, 128)))


def example(rng, m=33, n=136, k=272):
    """Float inputs of ``layer`` and its result by NumPy."""
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    return x, w, cpgemm.gemm(cpgemm.quantize(x), cpgemm.quantize(w, (128, 128)))


# ------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("granularity", [(1, 128), (128, 128), (128, 1)])
@pytest.mark.parametrize("shape", [(48, 144), (2, 32, 256), (0, 128), (16, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_quantize(rng, shape, granularity, dtype, jit) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    function = jax.jit(cpj.quantize, static_argnums=1) if jit else cpj.quantize
    data, scales = function(jnp.asarray(x), granularity)
    expected = cpgemm.quantize(x, granularity)
    assert isinstance(data, jax.Array) and isinstance(scales, jax.Array)
    assert_same(data, expected.data)
    assert_same(scales, expected.scales)


def test_quantize_to_powers_of_two(rng) -> None:
    x = rng.standard_normal((5, 144), np.float32)
    data, scales = cpj.quantize(x, scale_format="pow2")
    expected = cpgemm.quantize(x, scale_format="pow2")
    assert_same(data, expected.data)
    assert_same(scales, expected.scales)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16", "float32", jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (6, 200, 144), (129, 136, 512), (0, 8, 128), (4, 0, 128)]
)
def test_gemm(rng, m, n, k, out_dtype, jit) -> None:
    a, b = operands(rng, m, n, k)
    function = jax.jit(cpj.gemm, static_argnames="out_dtype") if jit else cpj.gemm
    d = function(*arrays(a, b), out_dtype=out_dtype)
    assert isinstance(d, jax.Array)
    assert_same(d, cpgemm.gemm(a, b, out_dtype=None if out_dtype is None else np.dtype(out_dtype)))


@pytest.mark.parametrize("k", [0, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_c_is_added_and_says_the_dtype(rng, dtype, k) -> None:
    a, b = operands(rng, 6, 16, k)
    c = rng.standard_normal((6, 16)).astype(dtype)
    before = c.copy()
    expected = cpgemm.gemm(a, b, c=c)
    assert_same(cpj.gemm(*arrays(a, b), c=jnp.asarray(c)), expected)
    assert_same(jax.jit(lambda c: cpj.gemm(*arrays(a, b), c=c))(c), expected)
    assert_same(cpj.gemm(*arrays(a, b), c=c), expected)
    assert_same(c, before)


@pytest.mark.parametrize("jit", [False, True])
def test_grouped_gemm_contiguous(rng, jit) -> None:
    a, _ = operands(rng, 300, 8, 144)
    b = cpgemm.quantize(rng.standard_normal((3, 16, 144), np.float32), (128, 128))
    indices = {
        "offsets": np.array([2, 100, 100, 270], np.int32),
        "ends": np.array([100, 200, 280], np.int32),
        "m_indices": np.repeat(np.array([0, 1, -1], np.int32), (128, 128, 44)),
    }
    for name, index in indices.items():
        for out_dtype in ("bfloat16", "float32"):

            def run(index, name=name, out_dtype=out_dtype):
                return cpj.grouped_gemm_contiguous(
                    *arrays(a, b), **{name: index}, out_dtype=out_dtype
                )

            got = (jax.jit(run) if jit else run)(jnp.asarray(index))
            expected = cpgemm.grouped_gemm_contiguous(
                a, b, out_dtype=out_dtype, fill_padding=True, **{name: index}
            )
            assert_same(got, expected)


def test_grouped_sizes_are_data(rng) -> None:
    """One compiled program serves any offsets."""
    a, _ = operands(rng, 40, 8, 144)
    b = cpgemm.quantize(rng.standard_normal((2, 16, 144), np.float32), (128, 128))
    traces = []

    @jax.jit
    def run(offsets):
        traces.append(1)
        return cpj.grouped_gemm_contiguous(*arrays(a, b), offsets=offsets, fill_padding=False)

    for middle in (0, 7, 40):
        offsets = np.array([0, middle, 40], np.int32)
        assert_same(run(offsets), cpgemm.grouped_gemm_contiguous(a, b, offsets=offsets))
    assert len(traces) == 1


@pytest.mark.parametrize("jit", [False, True])
def test_grouped_gemm_masked(rng, jit) -> None:
    a = cpgemm.quantize(rng.standard_normal((3, 6, 144), np.float32))
    b = cpgemm.quantize(rng.standard_normal((3, 16, 144), np.float32), (128, 128))
    counts = np.array([6, 0, 3], np.int32)
    expected = np.zeros((3, 6, 16), np.float32)
    cpgemm.grouped_gemm_masked(a, b, expected, masked_m=counts)

    def run(counts, fill_padding=True):
        return cpj.grouped_gemm_masked(
            *arrays(a, b),
            masked_m=counts,
            expected_m=3,
            out_dtype="float32",
            fill_padding=fill_padding,
        )

    got = (jax.jit(run, static_argnames="fill_padding") if jit else run)(jnp.asarray(counts))
    assert_same(got, expected)
    loose = np.asarray(run(counts, fill_padding=False))
    for group, count in enumerate(counts):
        assert_same(loose[group, :count], expected[group, :count])


# -------------------------------------------------------------------------------- what JAX does


def test_no_copy_between_quantising_and_multiplying(rng) -> None:
    """Inside one program the scales pass from one call to the other as they are."""
    x, w, expected = example(rng, m=32)
    program = jax.jit(layer).lower(x, w).compile()
    assert_same(program(x, w), expected)
    lines = [line for line in program.as_text().splitlines() if " = " in line]
    names = {match[1] for line in lines if (match := re.search(r"[)}\]] ([a-z][\w-]*)\(", line))}
    assert names == {"parameter", "custom-call", "get-tuple-element"}


def test_scan(rng) -> None:
    x, w, expected = example(rng)

    @jax.jit
    def run(x, w):
        return jax.lax.scan(lambda carry, _: (carry, layer(carry, w)), x, None, length=12)[1]

    for d in run(x, w):
        assert_same(d, expected)


def test_while_and_cond(rng) -> None:
    x, w, expected = example(rng)

    @jax.jit
    def run(x, w, turns):
        zero = jnp.zeros(expected.shape, jnp.bfloat16)
        return jax.lax.fori_loop(
            0, turns, lambda i, d: jax.lax.cond(i % 2 == 0, lambda: layer(x, w), lambda: d), zero
        )

    assert_same(run(x, w, 3), expected)
    assert not np.asarray(run(x, w, 0)).any()


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 1)])
def test_vmap_of_products(rng, axes) -> None:
    parts = [example(rng) for _ in range(3)]
    xs = [parts[i if axes[0] is not None else 0][0] for i in range(3)]
    ws = [parts[i if axes[1] is not None else 0][1] for i in range(3)]
    args = [
        items[0] if axis is None else np.stack(items, axis)
        for items, axis in zip((xs, ws), axes, strict=True)
    ]
    for function in (jax.vmap(layer, axes), jax.jit(jax.vmap(layer, axes))):
        for got, x, w in zip(function(*args), xs, ws, strict=True):
            expected = cpgemm.gemm(cpgemm.quantize(x), cpgemm.quantize(w, (128, 128)))
            assert_same(got, expected)


@pytest.mark.parametrize("granularity", [(1, 128), (128, 128), (128, 1)])
def test_vmap_of_quantize_is_one_call(rng, granularity) -> None:
    x = rng.standard_normal((2, 3, 16, 144), np.float32)

    def run(x):
        return jax.vmap(jax.vmap(lambda x: cpj.quantize(x, granularity)))(x)

    data, scales = jax.jit(run)(x)
    expected = cpgemm.quantize(x.reshape(6, 16, 144), granularity)
    assert_same(data.reshape(6, 16, 144), expected.data)
    assert_same(scales.reshape(expected.scales.shape), expected.scales)
    text = jax.jit(run).lower(x).compile().as_text()
    assert text.count("custom-call(") == 1 and "while(" not in text


def test_donated_arguments(rng) -> None:
    a, b = operands(rng, 6, 16, 256)
    expected = np.zeros((6, 16), np.float32)
    c = jnp.zeros((6, 16), jnp.float32)
    step = jax.jit(lambda c, *operands: cpj.gemm(*operands, c=c), donate_argnums=0)
    for _ in range(20):
        expected = cpgemm.gemm(a, b, c=expected)
        c = step(c, *arrays(a, b))
    assert_same(c, expected)


def test_checkpoint(rng) -> None:
    x, w, expected = example(rng)
    assert_same(jax.jit(jax.checkpoint(layer))(x, w), expected)


def test_many_programs_under_way(rng) -> None:
    x, w, expected = example(rng)
    run = jax.jit(layer)
    results = [run(x, w) for _ in range(200)]
    del results[::2]
    gc.collect()
    for d in results:
        assert_same(d, expected)


def test_threads(rng) -> None:
    x, w, expected = example(rng)
    run = jax.jit(layer)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            device = jax.devices("cpu")[0]
            with jax.default_device(device):
                for turn in range(15):
                    m = 1 + (seed * 7 + turn) % 5
                    d = run(x[:m], w) if turn % 2 else layer(x[:m], w)
                    assert_same(d, expected[:m])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


def test_derivatives_are_refused_and_can_be_cut(rng) -> None:
    x, w, _ = example(rng)
    with pytest.raises(ArgumentError, match=r"cpgemm\.jax\.quantize: has no derivative"):
        jax.grad(lambda x: layer(x, w).astype(jnp.float32).sum())(x)
    a, b = operands(rng, 6, 16, 256)
    a_data, a_scales, b_data, b_scales = arrays(a, b)
    with pytest.raises(ArgumentError, match=r"cpgemm\.jax\.gemm: has no derivative"):
        jax.jit(jax.grad(lambda s: cpj.gemm(a_data, s, b_data, b_scales).astype(float).sum()))(
            a_scales
        )
    cut = jax.grad(lambda x: (x.sum() * layer(jax.lax.stop_gradient(x), w)).sum().astype(float))(x)
    assert cut.shape == x.shape


# ------------------------------------------------------------------------------------- errors


def check_message(function, message: str, kind=ArgumentError) -> None:
    for run in (function, lambda: jax.eval_shape(function)):
        with pytest.raises(kind) as caught:
            run()
        assert message in str(caught.value)


def test_gemm_rules(rng) -> None:
    a_data, a_scales, b_data, b_scales = arrays(*operands(rng, 6, 16, 256))
    for args, message in (
        ((a_data[None], a_scales, b_data, b_scales), "a_data: must have 2 axes (M, K); got shape"),
        ((a_data, a_scales, b_data[0], b_scales), "b_data: must have 2 axes (N, K); got shape"),
        ((a_data, a_scales.T, b_data, b_scales), "a_scales: must have shape (6, 2) for data"),
        ((a_data, a_scales, b_data, b_scales.T), "b_scales: must have shape (1, 2) for data"),
        ((a_data, a_scales, b_data[:, :128], b_scales), "b_data: must have as many columns (K)"),
        ((a_data[:, :8], a_scales, b_data[:, :8], b_scales), "a_data: K must be a multiple of 16"),
        ((a_data, a_scales, b_data[:9], b_scales), "b_data: N must be a multiple of 8; got 9"),
    ):
        check_message(lambda args=args: cpj.gemm(*args), message)
    good = (a_data, a_scales, b_data, b_scales)
    c = jnp.zeros((6, 8), jnp.float32)
    check_message(lambda: cpj.gemm(*good, c=c), "c: must have shape (6, 16)")
    for args, options, message in (
        ((a_data.view(jnp.uint8), *good[1:]), {}, "a_data: must have dtype float8_e4m3fn"),
        ((a_data, a_scales.astype(jnp.bfloat16), *good[2:]), {}, "a_scales: must have dtype float"),
        ((a_data, np.ones((6, 2)), *good[2:]), {}, "a_scales: must have dtype float32; got float6"),
        ((a_data, a_scales, [1.0], b_scales), {}, "b_data: must be a JAX array; got builtins.list"),
        (good, {"out_dtype": "float16"}, "out_dtype: must be 'bfloat16' or 'float32'"),
        (good, {"c": c, "out_dtype": "bfloat16"}, "c: must have dtype bfloat16; got float32"),
        (good, {"c": c.astype(jnp.float16)}, "c: must have dtype bfloat16; got float16"),
    ):
        check_message(
            lambda args=args, options=options: cpj.gemm(*args, **options),
            message,
            ArgumentTypeError,
        )


def test_quantize_rules() -> None:
    x = jnp.zeros((4, 100))
    check_message(lambda: cpj.quantize(x), "x: its extent along the 128 values")
    check_message(lambda: cpj.quantize(x, (128, 1)), "multiple of 16; got 4")
    check_message(lambda: cpj.quantize(x[0]), "x: must have 2 axes (rows, K) or 3 axes")
    check_message(lambda: cpj.quantize(x, (1, 64)), "granularity: must be (1, 128)")
    check_message(lambda: cpj.quantize(x, scale_format="e8m0"), "scale_format: must be 'float32'")
    check_message(lambda: cpj.quantize(x.astype(int)), "x: must have dtype", ArgumentTypeError)


def test_grouped_rules(rng) -> None:
    a, _ = operands(rng, 6, 8, 256)
    b = cpgemm.quantize(rng.standard_normal((2, 16, 256), np.float32), (128, 128))
    good = arrays(a, b)
    offsets = jnp.array([0, 3, 6], jnp.int32)
    run = cpj.grouped_gemm_contiguous
    check_message(lambda: run(*good), "m_indices, offsets, ends: exactly one of them")
    check_message(lambda: run(*good, offsets=offsets[1:]), "offsets: must have shape (3,)")
    check_message(
        lambda: run(good[0], good[1], good[2][0], good[3], offsets=offsets),
        "b_data: must have 3 axes (groups, N, K)",
    )
    for options, message in (
        ({"offsets": offsets.astype(jnp.int16)}, "offsets: must have dtype int32; got int16"),
        ({"offsets": [0, 3, 6]}, "offsets: must be a JAX array"),
        ({"offsets": offsets, "fill_padding": 1}, "fill_padding: must be True or False; got int"),
    ):
        check_message(lambda options=options: run(*good, **options), message, ArgumentTypeError)
    masked = arrays(cpgemm.quantize(rng.standard_normal((3, 6, 256), np.float32)), b)
    counts = jnp.array([1, 2], jnp.int32)
    check_message(
        lambda: cpj.grouped_gemm_masked(*masked, masked_m=counts),
        "a_data: must have as many groups as b_data, 2",
    )
    check_message(
        lambda: cpj.grouped_gemm_masked(*masked, masked_m=counts, expected_m=-1),
        "expected_m: must not be negative",
    )
    with pytest.raises(ArgumentTypeError, match="expected_m: must be an integer of the host"):
        jax.jit(lambda e: cpj.grouped_gemm_masked(*masked, masked_m=counts, expected_m=e))(3)


def test_contents_that_break_a_rule_show_at_run_time(rng) -> None:
    a, _ = operands(rng, 6, 8, 256)
    b = cpgemm.quantize(rng.standard_normal((2, 16, 256), np.float32), (128, 128))
    run = jax.jit(lambda o: cpj.grouped_gemm_contiguous(*arrays(a, b), offsets=o))
    good, bad = np.array([0, 3, 6], np.int32), np.array([0, 3, 700], np.int32)
    for _ in range(3):
        with pytest.raises(AT_RUN_TIME, match=r"ArgumentError: offsets: must not exceed the rows"):
            run(bad).block_until_ready()
        assert_same(run(good), cpgemm.grouped_gemm_contiguous(a, b, offsets=good))


@pytest.mark.parametrize("size", [8, 256])
def test_exceptions_of_a_handler_are_raised_by_jax(rng, monkeypatch, size) -> None:
    """Small programs run on this thread, larger ones on XLA's: the text arrives from both."""
    x, w, expected = example(rng, m=size, n=size, k=512)

    def fail(call) -> None:
        raise RuntimeError(f"told to fail ü {len(call.arguments)}")

    run = jax.jit(layer)
    assert_same(run(x, w), expected)
    with monkeypatch.context() as patch:
        patch.setattr(xla_ffi._targets[xla_calls.GEMM, "cpu"], "function", fail)
        with pytest.raises(AT_RUN_TIME, match="RuntimeError: told to fail ü 4"):
            run(x, w).block_until_ready()
    assert_same(run(x, w), expected)


# --------------------------------------------------------------------------- other processes


def run_alone(code: str, *, limit: float = 240, devices: int = 1, cuda: bool = False) -> str:
    """Output of a program of its own, which must end well and in time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not cuda:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        capture_output=True,
        text=True,
        timeout=limit,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PREAMBLE = """
import faulthandler, gc, sys, threading
faulthandler.dump_traceback_later(200, exit=True)  # says where it hangs
import numpy as np, jax, jax.numpy as jnp
import cpgemm, cpgemm.jax as cpj
rng = np.random.default_rng(0)
x, w = rng.standard_normal((33, 272), np.float32), rng.standard_normal((136, 272), np.float32)
def layer(x, w):
    return cpj.gemm(*cpj.quantize(x), *cpj.quantize(w, (128, 128)))
def bits(d):
    return np.asarray(d).view(np.uint16)
expected = bits(cpgemm.gemm(cpgemm.quantize(x), cpgemm.quantize(w, (128, 128))))
scan = jax.jit(lambda x, w: jax.lax.scan(
    lambda carry, _: (carry + 1, layer(carry, w).astype(jnp.float32).sum()), x, None, length=25))
"""


def test_several_devices() -> None:
    """Sharded arrays under jit, shard_map and pmap, each device on a part of the rows."""
    out = run_alone(
        """
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
both = np.concatenate([x, x])
mesh = Mesh(np.array(jax.devices()), ("i",))
rows, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
results = {"jit": jax.jit(layer)(jax.device_put(both, rows), jax.device_put(w, whole))}
for check in (True, False):
    results[f"shard_map {check}"] = jax.jit(jax.shard_map(
        layer, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"), check_vma=check))(both, w)
results["pmap"] = jax.pmap(layer, in_axes=(0, None))(both.reshape(2, *x.shape), w).reshape(66, -1)
for name, d in results.items():
    assert (bits(d) == np.concatenate([expected, expected])).all(), name
for device in jax.devices():
    d = jax.jit(layer)(jax.device_put(x, device), jax.device_put(w, device))
    assert d.devices() == {device} and (bits(d) == expected).all()
print("done")
""",
        devices=2,
    )
    assert out == "done\n"


# Each waits for a program that is under way, whose handlers need the GIL.
WAITS = {
    "np.asarray": "np.asarray(d)",
    "device_get": "jax.device_get(d)",
    "float": "float(d[0])",
    "tolist": "d.tolist()",
    "repr": "repr(d)",
    "dlpack": "np.from_dlpack(d)",
    "delete": "d.delete()",
    "device_put": "jax.device_put(d).block_until_ready()",
    "collect": "gc.collect()",
    "another program": "float((d + 1).sum())",
    "clear_caches": "jax.clear_caches()",
    "callback": "jax.pure_callback(np.sin, jax.ShapeDtypeStruct(d.shape, d.dtype), d).sum()",
}


def test_waiting_does_not_lock_up() -> None:
    body = "".join(f"d = scan(x, w)[1]; {wait}; print({name!r})\n" for name, wait in WAITS.items())
    assert run_alone(body).splitlines() == list(WAITS)


# Handlers take their time, so that programs outlast the lines that start them, and are counted: the
# number is printed at exit after cpgemm has waited, since what is registered first runs last.
SLOW = """
import atexit, time
atexit.register(lambda: print(calls[0] / one if one else "", flush=True))
from cpgemm import xla_calls, xla_ffi
calls, one = [0], 0
for handler in xla_ffi._targets.values():
    def slow(call, function=handler.function):
        time.sleep(0.02)
        function(call)
        calls[0] += 1
    handler.function = slow
scan(x, w)[1].block_until_ready()
one, calls[0] = calls[0], 0
"""
# Code, and how many scans it starts.
ENDINGS = {
    "held": ("d = scan(x, w)", 1),
    "thrown away": ("scan(x, w); scan(x, w)", 2),
    "of another thread": (
        """
kept = []
thread = threading.Thread(target=lambda: kept.append(scan(x, w)))
thread.start(); thread.join()
""",
        1,
    ),
    "never run": ("jax.jit(layer).lower(x, w)", 0),
    "failed": (
        """
bad = jax.jit(lambda o: cpj.grouped_gemm_contiguous(
    *cpj.quantize(x @ x.T @ x), *cpj.quantize(w[None], (128, 128)), offsets=o))
try:
    d = bad(np.array([0, 700], np.int32))
except (ValueError, jax.errors.JaxRuntimeError):
    pass
calls[0] = 0
""",
        0,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_with_programs_under_way(ending) -> None:
    """It waits for them: one that called a handler after the interpreter's end would hang it."""
    code, scans = ENDINGS[ending]
    assert run_alone(SLOW + code + "\nprint(jax.default_backend())\n") == f"cpu\n{scans:.1f}\n"


def test_only_its_own_import_imports_jax() -> None:
    code = "import sys, cpgemm; before = 'jax' in sys.modules; import cpgemm.jax; print(before)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "False\n"


def test_importing_it_starts_no_platform() -> None:
    """Once JAX has set up its platforms it refuses this setting."""
    code = (
        "import cpgemm.jax, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.devices())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and done.stdout.count("CpuDevice") == 3, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------- GPU


@pytest.fixture
def gpu():
    """JAX's first CUDA device; skips visibly where JAX has none."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no CUDA device: {error}")


@pytest.mark.gpu
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (7, 576, 144), (130, 264, 1152), (512, 1024, 2048), (4, 16, 0)]
)
def test_gpu_gemm(rng, gpu, m, n, k, out_dtype, jit) -> None:
    import cupy as cp

    a, b = operands(rng, m, n, k, cp)
    function = jax.jit(cpj.gemm, static_argnames="out_dtype") if jit else cpj.gemm
    d = function(*arrays(a, b, device=gpu), out_dtype=out_dtype)
    assert d.devices() == {gpu}
    assert_same(d, cpgemm.gemm(a, b, out_dtype=out_dtype))
    c = cp.asarray(rng.standard_normal((m, n), dtype=np.float32))
    if out_dtype == "float32":
        d = function(*arrays(a, b, device=gpu), c=jax.device_put(c.get(), gpu))
        assert_same(d, cpgemm.gemm(a, b, c=c))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", [(1, 128), (128, 128), (128, 1)])
@pytest.mark.parametrize("shape", [(48, 144), (3, 128, 1024), (16, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpu_quantize(rng, gpu, shape, granularity, dtype) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    expected = cpgemm.quantize(x, granularity)  # the GPU gives the same bits
    for function in (cpj.quantize, jax.jit(cpj.quantize, static_argnums=1)):
        data, scales = function(jax.device_put(x, gpu), granularity)
        assert data.devices() == {gpu}
        assert_same(data, expected.data)
        assert_same(scales, expected.scales)


@pytest.mark.gpu
def test_gpu_grouped(rng, gpu) -> None:
    import cupy as cp

    x = cp.asarray(rng.standard_normal((300, 512), dtype=np.float32))
    w = cp.asarray(rng.standard_normal((3, 256, 512), dtype=np.float32))
    a, b = cpgemm.quantize(x), cpgemm.quantize(w, (128, 128))
    offsets = cp.asarray(np.array([2, 100, 100, 270], np.int32))
    got = jax.jit(cpj.grouped_gemm_contiguous)(
        *arrays(a, b, device=gpu), offsets=jax.device_put(offsets.get(), gpu)
    )
    assert_same(got, cpgemm.grouped_gemm_contiguous(a, b, offsets=offsets, fill_padding=True))
    a = cpgemm.quantize(x.reshape(3, 100, 512))
    counts = cp.asarray(np.array([100, 0, 17], np.int32))
    got = jax.jit(cpj.grouped_gemm_masked)(
        *arrays(a, b, device=gpu), masked_m=jax.device_put(counts.get(), gpu)
    )
    expected = cp.zeros((3, 100, 256), np.uint16).view(BF16)
    cpgemm.grouped_gemm_masked(a, b, expected, masked_m=counts)
    assert_same(got, expected)


def slow(x):
    """x after some tens of milliseconds of work on a GPU that cannot be left out."""
    square = jnp.full((8192, 8192), 2.0**-13, jnp.bfloat16) + x[0, 0].astype(jnp.bfloat16) * 0
    for _ in range(60):
        square = square @ square
    return x + (square[0, 0] * 0).astype(x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("together", [False, True])
def test_gpu_work_is_in_order_and_nothing_waits(rng, gpu, together) -> None:
    """Operands that a long computation writes just before, and results read just after.

    The results are not there when the call returns: the host has not waited for the operands.
    """
    x, w = (jax.device_put(rng.standard_normal(shape, np.float32), gpu)
            for shape in ((256, 2048), (512, 2048)))  # fmt: skip
    expected = layer(x, w)
    run = jax.jit(lambda x, w: layer(slow(x), w)) if together else jax.jit(layer)
    first = jax.jit(slow)
    for turn in range(3):  # the first compiles; XLA makes CUDA graphs after a few
        scale = 2.0**turn  # exact, so that results are scaled exactly
        source = jax.block_until_ready(x * scale)
        jax.block_until_ready(first(source))
        d = run(source, w) if together else run(first(source), w)
        if turn:
            assert not d.is_ready(), "the host waited"
        assert_same(d / scale, expected)


@pytest.mark.gpu
def test_gpu_programs_follow_each_other(rng, gpu) -> None:
    """XLA gives the memory of dropped results to the next program: order must hold there too."""
    import cupy as cp

    x, w = (cp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((64, 512), (128, 512)))
    b = cpgemm.quantize(w, (128, 128))
    run = jax.jit(lambda x, s, w: layer(x * s, w))
    on_gpu = [jax.device_put(array.get(), gpu) for array in (x, w)]
    results = [run(on_gpu[0], 2.0 ** (i % 7), on_gpu[1]) for i in range(300)][::3]
    for i, d in zip(range(0, 300, 3), results, strict=True):
        assert_same(d, cpgemm.gemm(cpgemm.quantize(x * np.float32(2.0 ** (i % 7))), b))


@pytest.mark.gpu
def test_gpu_loops_and_threads(rng, gpu) -> None:
    x, w = (jax.device_put(rng.standard_normal(shape, np.float32), gpu)
            for shape in ((64, 512), (128, 512)))  # fmt: skip
    expected = layer(x, w)
    scan = jax.jit(
        lambda x, w: jax.lax.scan(lambda carry, _: (carry, layer(carry, w)), x, None, length=10)[1]
    )
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                for d in scan(x, w):
                    assert_same(d, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads) and not failures, failures


@pytest.mark.gpu
def test_gpu_allocates_nothing_through_cupy(rng, gpu) -> None:
    import cupy as cp

    x, w = (jax.device_put(rng.standard_normal(shape, np.float32), gpu)
            for shape in ((64, 512), (128, 512)))  # fmt: skip
    run = jax.jit(layer)
    run(x, w).block_until_ready()
    pool = cp.get_default_memory_pool()  # of all threads, XLA's included
    gc.collect()
    pool.free_all_blocks()
    before = pool.total_bytes()
    run(x, w).block_until_ready()
    assert pool.total_bytes() == before


@pytest.mark.gpu
def test_gpu_another_device(rng) -> None:
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        pytest.skip(f"JAX has no CUDA device: {error}")
    if len(devices) < 2:
        pytest.skip("one CUDA device")
    x, w = rng.standard_normal((64, 512), np.float32), rng.standard_normal((128, 512), np.float32)
    results = [layer(jax.device_put(x, device), jax.device_put(w, device)) for device in devices]
    for device, d in zip(devices, results, strict=True):
        assert d.devices() == {device}
        assert_same(d, results[0])


@pytest.mark.gpu
def test_gpu_errors_come_from_jax(rng, gpu, monkeypatch) -> None:
    x, w = (jax.device_put(rng.standard_normal(shape, np.float32), gpu)
            for shape in ((64, 512), (128, 512)))  # fmt: skip
    run = jax.jit(layer)
    expected = run(x, w)

    def fail(call) -> None:
        raise RuntimeError("told to fail")

    with monkeypatch.context() as patch:
        patch.setattr(xla_ffi._targets[xla_calls.GEMM, "CUDA"], "function", fail)
        with pytest.raises(AT_RUN_TIME, match="RuntimeError: told to fail"):
            run(x, w).block_until_ready()
    assert_same(run(x, w), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ending", ["waits", *ENDINGS])
def test_gpu_processes_end(gpu, ending) -> None:
    if ending == "waits":
        body = "".join(
            f"d = scan(x, w)[1]; {wait}; print({name!r})\n"
            for name, wait in WAITS.items()
            if name != "dlpack"  # NumPy takes nothing from a GPU
        )
        assert run_alone(body, cuda=True).splitlines()[-1] == list(WAITS)[-1]
    else:
        code, scans = ENDINGS[ending]
        out = run_alone(SLOW + code + "\nprint(jax.default_backend())\n", cuda=True)
        assert out.splitlines()[0] == "gpu"
        if ending != "failed":  # a GPU clamps what a CPU refuses, and goes on
            assert out.splitlines()[1] == f"{scans:.1f}"
