"""``cpgemm.torch.Linear``: products, gradients, the quantised weight, and what torch does to it.

How gradients are compared: each product is compared with the float64 product of the very operands
that it multiplies (codes and scales, or bfloat16 values), within what its sums and its one rounding
allow.  What the quantisation itself costs is bounded against ``torch.nn.Linear``: an operand in
e4m3 is off by about 2.6 % in the 2-norm, a product by 3.7 % (docs/numerics.md).
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

import numpy as np
import pytest
from gemm_checks import assert_close

import cpgemm
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.layout import pointer

torch = pytest.importorskip("torch", reason="torch is not installed")

from test_torch import (  # noqa: E402, F401
    NO_CUDA,
    assert_same,
    floats,
    fresh_compiler,
    host,
    needs_compiler,
    on_devices,
)

import cpgemm.torch as cpt  # noqa: E402
from cpgemm import torch_weights  # noqa: E402

QUANTISED = 0.06  # of a product of two quantised operands against the float product


def relative(got, expected) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def layer(rng, k=144, n=80, bias=True, device="cpu", dtype=torch.float32):
    made = cpt.Linear(k, n, bias, device=device, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(floats(rng, n, k))
        if bias:
            made.bias.copy_(floats(rng, n))
    return made


def gradients(module, x, grad):
    """(y, dx, dw, db) of one step."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad, module.weight.grad, module.bias.grad


def made_copies() -> int:
    """Weights that have quantised copies."""
    gc.collect()
    return sum(
        copies.straight is not None or copies.transposed is not None
        for views in torch_weights._known.values()
        for copies in views.values()
    )


@pytest.fixture
def quantised(monkeypatch):
    """Counts what torch_weights quantises."""
    real, seen = torch_weights.quantize, []

    def quantize(x, *rest, **options):
        seen.append(x)
        return real(x, *rest, **options)

    monkeypatch.setattr(torch_weights, "quantize", quantize)
    return seen


# --------------------------------------------------------------------------- products and gradients


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(144,), (37, 144), (3, 1, 19, 144), (0, 144)], ids=str)
def test_each_product_is_that_of_its_operands(rng, device, dtype, weight_dtype, shape):
    linear = layer(rng, device=device, dtype=weight_dtype)
    x = floats(rng, *shape, device=device, dtype=dtype)
    grad = floats(rng, *shape[:-1], 80, device=device, dtype=dtype)
    y, dx, dw, db = gradients(linear, x, grad)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (grad.shape, dtype, x.shape, dtype)
    assert dw.dtype == db.dtype == weight_dtype and dw.shape == (80, 144)

    rows, grad_rows = host(x).reshape(-1, 144), host(grad).reshape(-1, 80)
    weight = cpgemm.quantize(host(linear.weight), (128, 128))
    plain = copy.deepcopy(linear)
    plain.bias = None
    assert_close(host(plain(x)).reshape(-1, 80), cpgemm.quantize(rows), weight)
    assert_same(y, plain(x).detach() + linear.bias.detach().to(dtype))
    assert_close(host(dx).reshape(-1, 144), cpgemm.quantize(grad_rows), weight.T.k_major())

    left, right = (host(part.bfloat16()).astype(np.float64) for part in (grad, x))
    left, right = left.reshape(-1, 80).T, right.reshape(-1, 144)
    exact = left @ right
    # float32 sums of exact products in any order, then one rounding of half a unit of 8 bits.
    bound = (left.shape[1] + 4) * 2.0**-23 * (abs(left) @ abs(right))
    bound = bound + (2.0**-8 * (abs(exact) + bound) if weight_dtype == torch.bfloat16 else 0)
    assert (abs(host(dw).astype(np.float64) - exact) <= bound + 1e-38).all()
    exact = grad.double().reshape(-1, 80).sum(0).cpu()
    error = (db.double().cpu() - exact).norm()
    assert error <= 2.0**-7 * grad.double().reshape(-1, 80).abs().sum(0).norm()


@on_devices
def test_gradients_are_those_of_a_float_layer_but_for_quantisation(rng, device):
    linear = layer(rng, 528, 272, device=device)
    exact = torch.nn.Linear(528, 272, device=device, dtype=torch.float64)
    with torch.no_grad():
        exact.weight.copy_(linear.weight)
        exact.bias.copy_(linear.bias)
    x, grad = (floats(rng, 5, 77, size, device=device) for size in (528, 272))
    ours, theirs = gradients(linear, x, grad), gradients(exact, x.double(), grad.double())
    limits = (QUANTISED, QUANTISED, 0.005, 1e-5)
    for got, wanted, limit in zip(ours, theirs, limits, strict=True):
        assert relative(got, wanted) < limit  # 0.005: two operands of 8 bits


@on_devices
def test_a_finite_difference_agrees_coarsely(rng, device):
    """Steps far above the distance of e4m3 numbers; rounding errors of both ends average out."""
    linear = layer(rng, 528, 272, device=device)
    x, v, r = floats(rng, 64, 528), floats(rng, 64, 528), floats(rng, 64, 272)
    x, v, r = x.to(device), v.to(device), r.to(device)
    _, dx, dw, _ = gradients(linear, x, r)
    v = v + dx / dx.norm() * v.norm()  # with a part along the gradient, or there is little to see
    with torch.no_grad():
        rise = ((linear(x + v) - linear(x - v)) * r).sum() / 2
        assert abs(rise / (dx * v).sum() - 1) < 0.02
        step = dw / dw.norm() * linear.weight.norm()
        values = []
        for sign in (1, -2):
            linear.weight.add_(sign * step)
            values.append((linear(x) * r).sum())
        assert abs((values[0] - values[1]) / 2 / (dw * step).sum() - 1) < 0.02


@on_devices
def test_only_what_is_wanted_is_computed(rng, device):
    linear = layer(rng, device=device)
    x = floats(rng, 7, 144, device=device)
    linear(x).sum().backward()
    storage = linear.weight.untyped_storage()
    (copies,) = torch_weights._known[storage].values()
    assert copies.straight is not None and copies.transposed is None  # x asked for nothing
    linear.weight.requires_grad_(False)
    y = linear(x.requires_grad_())
    saved, *_ = y.grad_fn.next_functions[0][0].saved_tensors
    assert saved is None  # x serves the gradient of the weight only
    y.sum().backward()
    assert x.grad is not None and copies.transposed is not None
    with torch.no_grad():
        y = linear(x)
    assert y.grad_fn is None and not y.requires_grad


def test_without_gradients_activations_are_not_kept(rng):
    linear = layer(rng)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        kept = mode is torch.enable_grad
        with mode():
            x = floats(rng, 7, 144)
            ref = weakref.ref(x)
            y = linear(x)
            del x
            gc.collect()
            assert (ref() is not None) is kept, mode
            assert y.shape == (7, 80)


def test_a_second_derivative_is_refused(rng):
    linear, x = layer(rng), floats(rng, 7, 144).requires_grad_()
    with pytest.raises(ArgumentError, match=r"^create_graph: must be False"):
        torch.autograd.grad(linear(x).sum(), x, create_graph=True)


def test_a_weight_changed_between_forward_and_backward_is_noticed(rng):
    linear, x = layer(rng), floats(rng, 7, 144).requires_grad_()
    y = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@on_devices
def test_it_learns(rng, device):
    """A regression to a linear map of the same size."""
    torch.manual_seed(int(rng.integers(2**31)))
    linear = cpt.Linear(64, 32, device=device)
    target, x = floats(rng, 32, 64, device=device), floats(rng, 512, 64, device=device)
    y = x @ target.t() + 1
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((linear(x) - y) ** 2).mean() / (y**2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Quantising leaves 0.037**2 of the variance.
    assert losses[0] > 0.5 and losses[-1] < 2 * 0.037**2


# ----------------------------------------------------------------------------- the quantised weight


def sgd(linear, **options):
    torch.optim.SGD(linear.parameters(), lr=0.5, **options).step()


def compiled_sgd(linear, **options):
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5, **options)
    torch.compile(optimizer.step, backend="aot_eager")()


CHANGES = {
    "sgd": sgd,
    # Fused optimizers change parameters without counting it in their versions.
    "fused": lambda linear: sgd(linear, fused=True),
    "compiled": compiled_sgd,
    "compiled and fused": lambda linear: compiled_sgd(linear, fused=True),
    "load": lambda linear: linear.load_state_dict(cpt.Linear(144, 80).state_dict()),
    "swap": lambda linear: setattr(linear, "weight", torch.nn.Parameter(linear.weight.data + 1)),
    "data": lambda linear: setattr(linear.weight, "data", linear.weight.data + 1),
}


@on_devices
@pytest.mark.parametrize("change", CHANGES)
def test_the_weight_is_quantised_when_it_changes(rng, device, change, quantised):
    linear, x = layer(rng, device=device), floats(rng, 7, 144, device=device)
    grad = floats(rng, 7, 80, device=device)
    for _ in range(3):
        old = gradients(linear, x, grad)
    assert len(quantised) == 1
    CHANGES[change](linear)
    new = gradients(linear, x, grad)
    gradients(linear, x, grad)
    assert len(quantised) == 2
    assert not torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])
    for got, expected in zip(new, gradients(copy.deepcopy(linear), x, grad), strict=True):
        assert_same(got, expected)


@on_devices
def test_a_change_that_torch_does_not_count_needs_a_refresh(rng, device):
    linear, x = layer(rng, device=device), floats(rng, 7, 144, device=device)
    grad = floats(rng, 7, 80, device=device)
    old = gradients(linear, x, grad)
    places = addresses(linear)
    linear.weight.data.mul_(-1)
    assert_same(gradients(linear, x, grad)[0], old[0])  # what documentation warns of
    linear.refresh()
    linear.bias.data.mul_(-1)
    new = gradients(linear, x, grad)
    assert_same(new[0], -old[0])
    assert_same(new[1], -old[1])
    assert addresses(linear) == places and len(places) == 4  # captured graphs read there


def copies_of(linear):
    (copies,) = torch_weights._known[linear.weight.untyped_storage()].values()
    return copies


def addresses(linear):
    copies = copies_of(linear)
    tensors = copies.straight.tensor, copies.transposed.tensor
    return [pointer(array) for tensor in tensors for array in (tensor.data, tensor.scales)]


@on_devices
def test_copies_die_with_their_weight(rng, device):
    before = made_copies()
    linear, x = layer(rng, device=device), floats(rng, 7, 144, device=device)
    weight = cpgemm.quantize(floats(rng, 80, 144, device=device), (128, 128))
    scaled = cpt.Linear.from_scaled(weight)
    for module in (linear, scaled):
        module(x.requires_grad_()).sum().backward()
    assert made_copies() == before + 2
    freed = weakref.ref(copies_of(linear).straight.tensor.data)
    assert freed() is not None
    del linear, scaled, module, weight
    x.grad = None
    assert made_copies() == before and freed() is None


def test_a_weight_made_in_inference_mode_is_quantised_each_time(rng, quantised):
    with torch.inference_mode():
        linear, x = layer(rng), floats(rng, 7, 144)
        y = linear(x)
        linear.weight.mul_(-1)
        linear.bias.mul_(-1)
        assert_same(linear(x), -y)
    assert len(quantised) == 2


# --------------------------------------------------------------------------- other ways to make one


def test_parameters_are_drawn_as_torch_draws_them():
    torch.manual_seed(5)
    ours = cpt.Linear(64, 32)
    torch.manual_seed(5)
    theirs = torch.nn.Linear(64, 32)
    for name, value in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], value)
    assert repr(ours) == "Linear(in_features=64, out_features=32, bias=True, weight=float32)"
    assert cpt.Linear(16, 16, bias=False, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_from_linear_shares_the_parameters(rng):
    theirs = torch.nn.Linear(144, 80, dtype=torch.bfloat16).eval()
    ours = cpt.Linear.from_linear(theirs)
    assert ours.weight is theirs.weight and ours.bias is theirs.bias and not ours.training
    assert (ours.in_features, ours.out_features) == (144, 80)
    x = floats(rng, 9, 144).bfloat16()
    assert relative(ours(x), theirs(x)) < QUANTISED
    assert cpt.Linear.from_linear(torch.nn.Linear(16, 16, bias=False)).bias is None


@on_devices
def test_from_scaled_is_the_layer_of_those_codes(rng, device):
    linear = layer(rng, device=device)
    weight = cpgemm.quantize(linear.weight.detach(), (128, 128))
    scaled = cpt.Linear.from_scaled(weight, linear.bias)
    assert scaled.weight.data_ptr() == weight.to_torch()[0].data_ptr()  # shared
    x, grad = floats(rng, 7, 144, device=device), floats(rng, 7, 80, device=device)
    expected = gradients(linear, x, grad)
    x = x.requires_grad_()
    y = scaled(x)
    y.backward(grad)
    assert_same(y.detach(), expected[0])
    assert_same(x.grad, expected[1])
    assert scaled.weight.grad is None and scaled.bias is linear.bias
    assert [name for name, _ in scaled.named_parameters()] == ["bias"]
    plain = cpt.Linear.from_scaled(weight, linear.bias.detach())
    assert not plain.bias.requires_grad
    with pytest.raises(ArgumentError, match=r"^weight: must be a float weight"):
        scaled.reset_parameters()


def test_from_scaled_follows_to_and_keeps_its_dtypes(rng):
    scaled = cpt.Linear.from_scaled(
        cpgemm.quantize(floats(rng, 80, 144), (128, 128)), floats(rng, 80)
    )
    x = floats(rng, 7, 144)
    expected = scaled(x)
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        changed = change(copy.deepcopy(scaled))
        assert changed.weight.dtype == torch.float8_e4m3fn
        assert changed.weight_scale_inv.dtype == torch.float32
        assert changed.bias.dtype != torch.float32
        assert relative(changed(x), expected) < 0.005
    assert scaled.to("meta").weight.is_meta and scaled.weight_scale_inv.is_meta
    assert scaled(x.to("meta")).shape == (7, 80)


@pytest.mark.parametrize("scaled", [False, True])
def test_state_dict_round_trip(rng, scaled):
    def make():
        if scaled:
            weight = cpgemm.quantize(floats(rng, 80, 144), (128, 128))
            return cpt.Linear.from_scaled(weight, floats(rng, 80))
        return layer(rng)

    first, second, x = make(), make(), floats(rng, 7, 144)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    expected = first(x).detach()
    assert not torch.equal(second(x), expected)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same(second(x).detach(), expected)
    assert sorted(first.state_dict()) == ["bias", "weight"] + ["weight_scale_inv"] * scaled
    assert_same(copy.deepcopy(first)(x).detach(), expected)


# ---------------------------------------------------------------------------- what torch does to it


@on_devices
def test_autocast_converts_the_activations(rng, device):
    linear, x = layer(rng, device=device), floats(rng, 7, 144, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = linear(x.requires_grad_())
    assert_same(y.detach(), linear(x.detach().bfloat16()).detach())
    y.sum().backward()
    assert x.grad.dtype == linear.weight.grad.dtype == torch.float32
    refusal = r"^x: must have dtype torch.bfloat16 or torch.float32; got torch.float16"
    half = torch.autocast(device, dtype=torch.float16)
    with half, pytest.raises(ArgumentTypeError, match=refusal):
        linear(x)


class Model(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def model(rng, device):
    second = cpgemm.quantize(floats(rng, 48, 80, device=device), (128, 128))
    return Model(layer(rng, device=device), cpt.Linear.from_scaled(second))


def step(module, x):
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return y.detach(), x.grad, module.first.weight.grad, module.first.bias.grad


@on_devices
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_without_a_break(rng, device, backend, quantised):
    module = model(rng, device)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    for rows in (5, 9):
        x = floats(rng, 2, rows, 144, device=device)
        expected = step(module, x)
        quantised.clear()
        got = step(compiled, x)
        assert not quantised  # the copies serve compiled code too
        for ours, theirs in zip(got, expected, strict=True):
            # Inductor adds the bias and sums its gradient in an order of its own.
            assert relative(ours, theirs) < 1e-6
        optimizer.step()
        with torch.no_grad():
            assert_same(compiled(x), module(x))


@on_devices
def test_exported(rng, device):
    module, x = model(rng, device), floats(rng, 2, 5, 144, device=device)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: rows},))
    assert "cpgemm.linear" in str(program.graph)
    x = floats(rng, 2, 77, 144, device=device)
    expected = module(x).detach()
    assert_same(program.module()(x).detach(), expected)
    assert_same(program.run_decompositions().module()(x).detach(), expected)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(x).detach(), expected)


# ------------------------------------------------------------------------------------------ errors


def bad_uses():
    linear = cpt.Linear(144, 80)
    x = torch.ones(7, 144)
    good = cpgemm.quantize(torch.ones(80, 144), (128, 128))
    value, kind = ArgumentError, ArgumentTypeError
    return [
        (value, "in_features: must be a positive multiple of 16", lambda: cpt.Linear(100, 32)),
        (value, "out_features: must be a positive multiple", lambda: cpt.Linear(32, 40)),
        (kind, "in_features: must be an integer", lambda: cpt.Linear(32.0, 32)),
        (kind, "dtype: must be", lambda: cpt.Linear(32, 32, dtype=torch.float16)),
        (kind, "linear: must be", lambda: cpt.Linear.from_linear(linear)),
        (
            kind,
            "linear.weight: must be",
            lambda: cpt.Linear.from_linear(torch.nn.Linear(32, 32).half()),
        ),
        (value, "out_features", lambda: cpt.Linear.from_linear(torch.nn.Linear(32, 10))),
        (kind, "weight: must be a ScaledTensor", lambda: cpt.Linear.from_scaled(linear.weight)),
        (
            value,
            "weight: must have granularity",
            lambda: cpt.Linear.from_scaled(cpgemm.quantize(x, (1, 128))),
        ),
        (value, "weight: must have granularity", lambda: cpt.Linear.from_scaled(good.T)),
        (value, "bias: must have shape", lambda: cpt.Linear.from_scaled(good, torch.ones(3))),
        (kind, "x: must have dtype", lambda: linear(x.half())),
        (kind, "x: must have dtype", lambda: linear(x.double())),
        (value, "x: its last axis must have 144", lambda: linear(x[:, :80])),
        (value, "x: its last axis", lambda: linear(x.sum())),
        (value, "weight: must be on the device of x", lambda: linear(x.to("meta"))),
        (kind, "weight: must have dtype", lambda: copy.deepcopy(linear).half()(x)),
    ]


USES = bad_uses()


@pytest.mark.parametrize("at", range(len(USES)), ids=lambda at: USES[at][1])
def test_a_broken_rule_is_named(at):
    kind, message, use = USES[at]
    with pytest.raises(kind, match=f"^{message}"):
        use()


# ---------------------------------------------------------------------------------- only on a GPU


def captured(function):
    """A CUDA graph of ``function`` after one call of it, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.gpu
@NO_CUDA
def test_a_graph_for_inference_reads_the_copy(rng, quantised):
    linear, x = layer(rng, device="cuda"), floats(rng, 7, 144, device="cuda")

    @torch.no_grad()
    def infer():
        return linear(x)

    graph, y = captured(infer)
    assert len(quantised) == 1
    for refresh in (linear.refresh, infer):
        with torch.no_grad():
            linear.weight.copy_(floats(rng, 80, 144))
        x.copy_(floats(rng, 7, 144))
        refresh()  # either brings the copy up to date, where it is
        graph.replay()
        assert_same(y, infer())


@pytest.mark.gpu
@NO_CUDA
def test_a_graph_for_training_quantises_the_weight_itself(rng):
    linear, x = layer(rng, device="cuda"), floats(rng, 32, 144, device="cuda")
    grad = floats(rng, 32, 80, device="cuda")
    x.requires_grad_()

    def train():
        for tensor in (x, *linear.parameters()):
            tensor.grad = None
        y = linear(x)
        y.backward(grad)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.add_(parameter.grad, alpha=-0.01)
        return y.detach()

    graph, y = captured(train)
    for _ in range(3):
        twin = cpt.Linear(144, 80, device="cuda")
        twin.load_state_dict(linear.state_dict())
        expected = gradients(twin, x, grad)
        graph.replay()
        for got, wanted in zip((y, x.grad), expected, strict=False):
            assert_same(got, wanted)
        # Replays change the weight without torch counting it: calls outside must notice.
        fresh = cpt.Linear(144, 80, device="cuda")
        fresh.load_state_dict(linear.state_dict())
        assert_same(linear(x).detach(), fresh(x).detach())


@pytest.mark.gpu
@NO_CUDA
@needs_compiler
@pytest.mark.parametrize("training", [False, True])
def test_compiled_into_cuda_graphs(rng, training):
    module = model(rng, "cuda")
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-5) for m in (module, twin)]
    for _ in range(5):
        x = floats(rng, 16, 144, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        if training:
            for got, wanted in zip(step(compiled, x), step(twin, x), strict=True):
                assert relative(got, wanted) < 1e-5
            for optimizer in optimizers:
                optimizer.step()
        else:
            with torch.no_grad():
                assert relative(compiled(x), twin(x)) < 1e-6


@pytest.mark.gpu
@NO_CUDA
def test_a_copy_made_on_one_stream_is_waited_for_on_another(rng):
    import cupy

    linear, x = layer(rng, device="cuda"), floats(rng, 64, 144, device="cuda")
    old = linear(x).detach()
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin() { long long t = clock64(); '
        "while (clock64() - t < 100000000) {} }",
        "spin",
    )
    spin.compile()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.no_grad():
        linear.weight.mul_(-1)
        linear.bias.mul_(-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(first), cupy.cuda.ExternalStream(first.cuda_stream):
        spin((1,), (1,), ())
        linear(x)  # quantises the weight, when the spinning ends
    with torch.cuda.stream(second):
        y = linear(x).detach()
    torch.cuda.synchronize()
    assert_same(y, -old)
