"""``cpgemm.torch``: the same bits as cpgemm, whatever torch does to the calls.

Tests run on the CPU and, marked gpu, on a Hopper GPU.  The layer has a file of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gemm_checks import assert_close

import cpgemm
from cpgemm.dlpack import as_native
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.scaled import ScaledTensor

torch = pytest.importorskip("torch", reason="torch is not installed")

import cpgemm.torch as cpt  # noqa: E402
from cpgemm import torch_ops  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
on_devices = pytest.mark.parametrize("device", DEVICES)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch's compiler needs a C++ compiler",
)
ops = torch.ops.cpgemm
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def host(tensor):
    """A tensor as a NumPy array."""
    return as_native("tensor", tensor.detach().cpu())


def assert_same(got, expected) -> None:
    """Equal dtypes, shapes, strides and bits."""
    assert (got.dtype, got.shape, got.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    unsigned = f"u{got.element_size()}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(host(got)).view(unsigned),
        np.ascontiguousarray(host(expected)).view(unsigned),
    )


def floats(rng, *shape, device="cpu", dtype=torch.float32):
    values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return values.to(device=device, dtype=dtype)


def scaled(pair, granularity):
    """The pair that ``cpgemm.torch.quantize`` returns, on the host."""
    data, scales = (host(part) for part in pair)
    return ScaledTensor.from_arrays(data, scales, granularity)


def operands(rng, m, n, k, device="cpu", groups=None):
    """Quantised (m, k), and (n, k) or (groups, n, k)."""
    outer = () if groups is None else (groups,)
    a = cpt.quantize(floats(rng, m, k, device=device))
    return a, cpt.quantize(floats(rng, *outer, n, k, device=device), (128, 128))


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


# -------------------------------------------------------------------------------------- functions


@on_devices
@pytest.mark.parametrize("granularity", [(1, 128), (128, 128), (128, 1)], ids=str)
@pytest.mark.parametrize("shape", [(37, 272), (3, 48, 144), (1, 16), (0, 32), (16, 1040)], ids=str)
def test_quantize_gives_the_bits_and_the_layout_of_cpgemm(rng, device, granularity, shape):
    if granularity == (128, 1):
        shape = (*shape[:-2], shape[-1], shape[-2])
    for dtype, scale_format in ((torch.float32, "float32"), (torch.bfloat16, "pow2")):
        x = floats(rng, *shape, device=device, dtype=dtype)
        data, scales = cpt.quantize(x, granularity, scale_format=scale_format)
        expected = cpgemm.quantize(host(x), granularity, scale_format=scale_format)
        assert data.device == scales.device == x.device and data.dtype == FP8
        np.testing.assert_array_equal(host(data).view(np.uint8), expected.data.view(np.uint8))
        np.testing.assert_array_equal(host(scales), expected.scales)
        # As it is, without a copy: this is the layout that kernels read.
        wrapped = ScaledTensor.from_arrays(data, scales, granularity)
        assert wrapped.scales_pitch == expected.scales_pitch
        if scales.numel():
            assert wrapped.to_torch()[1].data_ptr() == scales.data_ptr()


@on_devices
def test_strides_are_those_that_are_documented(rng, device):
    x = floats(rng, 3, 37, 272, device=device)
    for granularity, strides in (
        ((1, 128), (3 * 40, 1, 40)),
        ((128, 128), (3, 3, 1)),
    ):
        data, scales = cpt.quantize(x, granularity)
        assert data.is_contiguous() and scales.stride() == strides
    data, scales = cpt.quantize(x[0].t(), (128, 1))
    assert data.stride() == (1, 272) and scales.stride() == (40, 1)


@on_devices
@pytest.mark.parametrize("m,n,k", [(37, 264, 272), (1, 8, 16), (0, 16, 32), (5, 16, 0)])
def test_gemm_is_that_of_cpgemm(rng, device, m, n, k):
    (a, b), c = operands(rng, m, n, k, device), floats(rng, m, n, device=device)
    left = ScaledTensor.from_arrays(*a, (1, 128))
    right = ScaledTensor.from_arrays(*b, (128, 128))
    for options in ({}, {"c": c}, {"c": c.bfloat16()}, {"out_dtype": torch.float32}):
        got = cpt.gemm(*a, *b, **options)
        named = {**options}
        if "out_dtype" in options:
            named["out_dtype"] = "float32"
        assert_same(got, cpgemm.gemm(left, right, **named))
        out = torch.full_like(got, float("nan"))
        assert cpt.gemm_out(*a, *b, out, c=options.get("c")) is out
        assert_same(out, got)
    assert_close(host(cpt.gemm(*a, *b)), scaled(a, (1, 128)), scaled(b, (128, 128)))


@on_devices
def test_gemm_out_writes_into_padded_rows_and_adds_to_itself(rng, device):
    a, b = operands(rng, 37, 264, 272, device)
    wide = torch.full((37, 304), -7.0, device=device)
    out = wide[:, :264]
    before = out._version
    cpt.gemm_out(*a, *b, out)
    assert out._version == wide._version == before + 1  # autograd must see the change
    once = out.clone()
    cpt.gemm_out(*a, *b, out, c=out)
    assert_same(out.contiguous(), cpt.gemm(*a, *b, c=once))
    assert (wide[:, 264:] == -7).all()


@on_devices
def test_scales_of_another_layout_are_copied(rng, device):
    a, b = operands(rng, 37, 264, 272, device)
    expected = cpt.gemm(*a, *b)
    for _ in range(2):
        assert_same(cpt.gemm(a[0], a[1].contiguous(), b[0], b[1].t().contiguous().t()), expected)


@on_devices
@pytest.mark.parametrize("layout", ["offsets", "m_indices", "ends"])
def test_contiguous_groups_are_those_of_cpgemm(rng, device, layout):
    a, b = operands(rng, 300, 72, 144, device, groups=3)
    index = int32(
        {
            "offsets": [0, 7, 7, 300],
            "m_indices": [0] * 100 + [-1] * 28 + [2] * 128 + [1] * 40 + [-1] * 4,
            "ends": [100, 256, 296],
        }[layout],
        device,
    )
    left = ScaledTensor.from_arrays(*a, (1, 128))
    right = ScaledTensor.from_arrays(*b, (128, 128))
    for dtype, name in ((None, "bfloat16"), (torch.float32, "float32")):
        got = cpt.grouped_gemm_contiguous(
            *a, *b, **{layout: index}, out_dtype=dtype, fill_padding=True
        )
        options = {layout: index, "out_dtype": name, "fill_padding": True}
        assert_same(got, cpgemm.grouped_gemm_contiguous(left, right, **options))
    if layout == "offsets":  # nothing to fill
        assert_same(
            cpt.grouped_gemm_contiguous(*a, *b, offsets=index, out_dtype=torch.float32), got
        )


@on_devices
def test_masked_groups_are_those_of_cpgemm(rng, device):
    a = cpt.quantize(floats(rng, 3, 37, 144, device=device))
    b = cpt.quantize(floats(rng, 3, 72, 144, device=device), (128, 128))
    counts = int32([0, 37, 12], device)
    got = cpt.grouped_gemm_masked(*a, *b, masked_m=counts, fill_padding=True)
    left = ScaledTensor.from_arrays(*a, (1, 128))
    right = ScaledTensor.from_arrays(*b, (128, 128))
    expected = torch.zeros_like(got)
    cpgemm.grouped_gemm_masked(left, right, expected, masked_m=counts)
    assert_same(got, expected)
    loose = cpt.grouped_gemm_masked(*a, *b, masked_m=counts)
    assert_same(loose[2, :12].clone(), expected[2, :12].clone())


# ------------------------------------------------------------------------- what torch asks of them


@pytest.fixture
def fp8_can_be_compared(monkeypatch):
    """opcheck looks whether arguments were changed with allclose, which torch lacks for FP8."""
    allclose = torch.allclose

    def comparing(left, right, *args, **options):
        if left.dtype == FP8:
            left, right = left.view(torch.uint8), right.view(torch.uint8)
        return allclose(left, right, *args, **options)

    monkeypatch.setattr(torch, "allclose", comparing)


@on_devices
def test_every_operator_keeps_the_rules_of_torch(rng, device, fp8_can_be_compared):
    (a, b), c = operands(rng, 37, 264, 272, device), floats(rng, 37, 264, device=device)
    _, groups = operands(rng, 1, 264, 272, device, groups=3)
    several = cpt.quantize(floats(rng, 3, 9, 272, device=device))
    weight = floats(rng, 32, 64, device=device)
    x, grad = (floats(rng, 2, 3, size, device=device) for size in (64, 32))
    tall = floats(rng, 3, 48, 35, device=device).bfloat16()
    cases = [
        ("quantize", (x[0], 1, 128), {}),
        ("quantize", (c[:, :256], 128, 128, "pow2"), {}),
        ("quantize", (tall, 128, 1), {}),
        ("gemm", (*a, *b), {}),
        ("gemm", (*a, *b), {"c": c, "out_dtype": torch.float32}),
        ("gemm_out", (*a, *b), {"out": torch.zeros_like(c), "c": c}),
        ("gemm_out", (*a, *b), {"out": torch.zeros_like(c)}),
        ("grouped_gemm_contiguous", (*a, *groups), {"offsets": int32([0, 5, 5, 37], device)}),
        (
            "grouped_gemm_masked",
            (*several, *groups),
            {"masked_m": int32([9, 0, 4], device), "fill_padding": True},
        ),
        ("linear_forward", (x, weight), {}),
        ("linear_dgrad", (grad, weight, None, True), {}),
        ("linear_wgrad", (grad, x, torch.float32), {}),
        ("linear", (x.clone().requires_grad_(), weight.clone().requires_grad_()), {}),
        ("linear", (x, *cpt.quantize(weight, (128, 128)), True), {}),
    ]
    known = {name.partition("::") for name in torch._C._dispatch_get_all_op_names()}
    known = {name for space, _, name in known if space == "cpgemm"}
    assert {name for name, _, _ in cases} == known
    for name, args, options in cases:
        torch.library.opcheck(getattr(ops, name).default, args, options)


def everything(x, w, offsets):
    """A function of all the operators."""
    b = cpt.quantize(w[0], (128, 128))
    a = cpt.quantize(x * 2)
    d = cpt.gemm(*a, *b)
    out = torch.ones_like(d, dtype=torch.float32)
    cpt.gemm_out(*a, *b, out)
    cpt.gemm_out(*a, *b, out, c=out)
    groups = cpt.quantize(w, (128, 128))
    grouped = cpt.grouped_gemm_contiguous(*a, *groups, offsets=offsets)
    several = cpt.quantize((x * 2).expand(w.shape[0], -1, -1).contiguous())
    masked = cpt.grouped_gemm_masked(*several, *groups, masked_m=offsets[1:], fill_padding=True)
    return *a, d, out, grouped, masked


def arguments(rng, device, m=37):
    return (
        floats(rng, m, 272, device=device),
        floats(rng, 2, 264, 272, device=device),
        int32([0, 5, m], device),
    )


@on_devices
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_without_a_break(rng, device, backend):
    compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (37, 50, 99):  # sizes are symbols: compiled once
            inputs = arguments(rng, device, m)
            for got, expected in zip(compiled(*inputs), everything(*inputs), strict=True):
                assert_same(got, expected)


@on_devices
def test_exported(rng, device):
    class Module(torch.nn.Module):
        def forward(self, x, w, offsets):
            return everything(x, w, offsets)

    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        Module(), arguments(rng, device), dynamic_shapes=({0: rows}, None, None)
    )
    inputs = arguments(rng, device, 99)
    for got, expected in zip(program.module()(*inputs), everything(*inputs), strict=True):
        assert_same(got, expected)


def test_one_call_costs_no_layer_of_python_for_autograd():
    """The reason for ``Library.define``: a kernel, a stand-in, and nothing of ``custom_op``."""
    for name in ("gemm", "gemm_out", "quantize", "linear_forward"):
        qualified = f"cpgemm::{name}"
        for key, there in (("CPU", True), ("CUDA", True), ("Autograd", False)):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key) is there, name


# ------------------------------------------------------------------------------------------ errors


def bad_calls():
    x = torch.ones(37, 272)
    a, b = cpt.quantize(x), cpt.quantize(torch.ones(264, 272), (128, 128))
    groups = cpt.quantize(torch.ones(3, 264, 272), (128, 128))
    offsets = int32([0, 5, 5, 37])
    out = torch.empty(37, 264)
    value, kind = ArgumentError, ArgumentTypeError
    return [
        (value, "a_scales: must have shape .37, 3", lambda: cpt.gemm(a[0], b[1], *b)),
        (value, "b: must have as many columns", lambda: cpt.gemm(*a, b[0][:, :256], b[1])),
        (value, "b: N must be a multiple of 8", lambda: cpt.gemm(*a, b[0][:3], b[1][:1])),
        (value, "a: must have 2 axes", lambda: cpt.gemm(*groups, *b)),
        (kind, "a: must have dtype torch.float8", lambda: cpt.gemm(x, a[1], *b)),
        (kind, "b_scales: must have dtype", lambda: cpt.gemm(*a, b[0], b[1].bfloat16())),
        (kind, "out_dtype: must be", lambda: cpt.gemm(*a, *b, out_dtype=torch.float16)),
        (kind, "c: must have dtype", lambda: cpt.gemm(*a, *b, c=out.half())),
        (kind, "c: must have dtype", lambda: cpt.gemm_out(*a, *b, out, c=out.bfloat16())),
        (value, "c: must have shape", lambda: cpt.gemm(*a, *b, c=out[1:])),
        (value, "out: must have shape", lambda: cpt.gemm_out(*a, *b, out[:, :8])),
        (kind, "out: must have dtype", lambda: cpt.gemm_out(*a, *b, out.half())),
        (value, "b: must be on the device of a, cpu", lambda: cpt.gemm(*a, b[0].to("meta"), b[1])),
        (
            value,
            "m_indices, offsets, ends: exactly one",
            lambda: cpt.grouped_gemm_contiguous(*a, *groups),
        ),
        (
            kind,
            "offsets: must have dtype",
            lambda: cpt.grouped_gemm_contiguous(*a, *groups, offsets=offsets.long()),
        ),
        (
            value,
            "ends: must have shape",
            lambda: cpt.grouped_gemm_contiguous(*a, *groups, ends=offsets),
        ),
        (
            value,
            "a: must have 3 axes",
            lambda: cpt.grouped_gemm_masked(*a, *groups, masked_m=offsets),
        ),
        (value, "x: its extent", lambda: cpt.quantize(torch.ones(4, 20))),
        (value, "x: must have 2 axes", lambda: cpt.quantize(torch.ones(32))),
        (kind, "x: must have dtype", lambda: cpt.quantize(torch.ones(4, 32, dtype=torch.int32))),
        (value, "granularity", lambda: cpt.quantize(x, (1, 64))),
        (value, "scale_format", lambda: cpt.quantize(x, scale_format="e8m0")),
        (value, "x: must not require gradients", lambda: cpt.quantize(x.clone().requires_grad_())),
        (
            value,
            "c: must not require gradients",
            lambda: cpt.gemm(*a, *b, c=out.clone().requires_grad_()),
        ),
        (
            value,
            "out: must not require gradients",
            lambda: cpt.gemm_out(*a, *b, out.clone().requires_grad_()),
        ),
    ]


CALLS = bad_calls()


@pytest.mark.parametrize("at", range(len(CALLS)), ids=lambda at: CALLS[at][1])
def test_a_broken_rule_is_named(at):
    kind, message, call = CALLS[at]
    with pytest.raises(kind, match=f"^{message}"):
        call()


@pytest.mark.parametrize("at", range(len(CALLS)), ids=lambda at: CALLS[at][1])
def test_a_broken_rule_is_named_while_torch_traces(at):
    kind, message, call = CALLS[at]
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode, pytest.raises(kind, match=f"^{message}"):
        call()


def test_what_depends_on_memory_is_named_when_a_call_runs(rng):
    a, b = operands(rng, 32, 32, 32)
    out = torch.empty(32, 64)
    with pytest.raises(ArgumentError, match=r"^a: must be contiguous along K"):
        cpt.gemm(a[0].t(), a[1], *b)
    with pytest.raises(ArgumentError, match=r"^out: must be contiguous along its rows"):
        cpt.gemm_out(*a, *b, out[:, ::2])
    with pytest.raises(ArgumentError, match=r"^a: data: must be contiguous along one"):
        cpt.gemm(torch.zeros(32, 64, dtype=torch.uint8).view(FP8)[:, ::2], a[1], *b)
    with pytest.raises(ArgumentError, match=r"^x: must have contiguous rows"):
        cpt.quantize(torch.ones(32, 32).t())
    overlapping = torch.zeros(64, 32)
    with pytest.raises(ArgumentError, match=r"^out: must not overlap c"):
        cpt.gemm_out(*a, *b, overlapping[:32], c=overlapping[8:40])


def test_values_that_want_gradients_are_taken_where_torch_records_none(rng):
    x = floats(rng, 16, 32).requires_grad_()
    with torch.no_grad():
        assert_same(cpt.quantize(x)[0], cpt.quantize(x.detach())[0])
        a, b = operands(rng, 16, 32, 32)
        out = torch.zeros(16, 32, requires_grad=True)
        cpt.gemm_out(*a, *b, out, c=out)
    assert_same(out.detach(), cpt.gemm(*a, *b, out_dtype=torch.float32))


def test_without_torch_the_message_says_so():
    code = """
import sys
sys.modules["torch"] = None
import cpgemm
try:
    import cpgemm.torch
except cpgemm.MissingDependencyError as error:
    print(error)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert shown.startswith("torch: cpgemm.torch needs it")


# ---------------------------------------------------------------------------------- only on a GPU


@pytest.fixture
def spin():
    """Keeps a torch stream busy for some 50 ms."""
    import cupy

    kernel = cupy.RawKernel(
        'extern "C" __global__ void spin() { long long t = clock64(); '
        "while (clock64() - t < 100000000) {} }",
        "spin",
    )
    kernel.compile()

    def start(stream):
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            kernel((1,), (1,), ())

    return start


@pytest.mark.gpu
@NO_CUDA
def test_a_repeated_call_is_ready_and_right(rng):
    a, b = operands(rng, 33, 264, 400, "cuda")
    out = torch.empty(33, 264, dtype=torch.bfloat16, device="cuda")
    expected = cpt.gemm_out(*a, *b, out).clone()
    groups = cpt.quantize(floats(rng, 2, 264, 400, device="cuda"), (128, 128))
    offsets = int32([0, 9, 33], "cuda")
    grouped = cpt.grouped_gemm_contiguous(*a, *groups, offsets=offsets)
    expected_groups = grouped.clone()
    before = len(torch_ops._ready)
    for _ in range(3):
        out.fill_(float("nan"))
        assert_same(cpt.gemm_out(*a, *b, out), expected)
    assert len(torch_ops._ready) == before
    for _ in range(3):  # the result goes to the address that the last one had left
        grouped.fill_(float("nan"))
        del grouped
        grouped = cpt.grouped_gemm_contiguous(*a, *groups, offsets=offsets)
        assert_same(grouped, expected_groups)
    assert len(torch_ops._ready) <= before + 1
    copied = a[1].contiguous()
    before = len(torch_ops._ready)
    assert_same(cpt.gemm_out(a[0], copied, *b, out), expected)
    assert len(torch_ops._ready) == before  # it read a copy that is gone


@pytest.mark.gpu
@NO_CUDA
def test_work_goes_to_the_current_stream_of_torch(rng, spin):
    """On any other stream the operands would be read before they are written."""
    x, w = floats(rng, 64, 400, device="cuda"), floats(rng, 264, 400, device="cuda")
    b = cpt.quantize(w, (128, 128))
    expected = cpt.gemm(*cpt.quantize(x), *b)
    late = torch.zeros_like(x)
    cpt.gemm(*cpt.quantize(late), *b)  # kernels are loaded
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        spin(stream)
        late.copy_(x)
        got = cpt.gemm(*cpt.quantize(late), *b)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.gpu
@NO_CUDA
def test_a_cuda_graph_replays_them(rng):
    inputs = arguments(rng, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(*inputs)  # kernels are loaded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything(*inputs)
    for _ in range(2):
        for held, new in zip(inputs, arguments(rng, "cuda"), strict=True):
            held.copy_(new)
        graph.replay()
        for got, expected in zip(results, everything(*inputs), strict=True):
            assert_same(got, expected)


@pytest.mark.gpu
@NO_CUDA
def test_tensors_of_two_devices_are_named(rng):
    a, b = operands(rng, 32, 32, 32)
    on_gpu = [part.cuda() for part in (*a, *b)]
    for at, name in enumerate(("a", "a_scales", "b", "b_scales")):
        mixed = list(on_gpu)
        mixed[at] = (*a, *b)[at]
        other = "b" if name == "a" else name  # a says where the others must be
        with pytest.raises(ArgumentError, match=f"^{other}: must be on the device of"):
            cpt.gemm(*mixed)
    out = torch.empty(32, 32)
    with pytest.raises(ArgumentError, match=r"^out: must be on the device of a, cuda"):
        cpt.gemm_out(*on_gpu, out)
    with pytest.raises(ArgumentError, match=r"^c: must be on the device of a, cuda"):
        cpt.gemm(*on_gpu, c=out)
    x = floats(rng, 33, 32, device="cuda").reshape(-1)[1:1025].reshape(32, 32)
    with pytest.raises(ArgumentError, match=r"^x: its address"):
        cpt.quantize(x)
