"""Epilogues: NumPy and GPU against float64 formulas, composition, refusals, kernels."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from epilogue_checks import (
    add,
    assert_quantized,
    assert_within,
    gelu,
    gelu_tanh,
    product,
    put,
    scale,
    silu,
    swiglu,
)
from gemm_checks import assert_guards_intact, guarded, operands, to_numpy
from tiny_kernels import needs_nvrtc

import cpgemm
from cpgemm import custom_epilogue, epilogue_step, epilogues
from cpgemm.compiler import compile_kernel
from cpgemm.config import KernelConfig
from cpgemm.epilogue_heuristics import fused_configurations
from cpgemm.epilogue_step import Chain
from cpgemm.epilogues import GELU, Bias, Custom, Quantize, Residual, Scale, SiLU, SwiGLU
from cpgemm.errors import (
    ArgumentError,
    ArgumentTypeError,
    CompileError,
    FrozenError,
)
from cpgemm.kernels import all_sources, gemm_source

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BF16, "float32": np.dtype(np.float32)}
BOTH = [pytest.param("numpy"), pytest.param("cupy", marks=pytest.mark.gpu)]
SHAPES = ((1, 16, 16), (7, 304, 144), (64, 592, 1040), (131, 272, 400), (600, 1040, 512))


@pytest.fixture(params=BOTH)
def xp(request):
    return pytest.importorskip(request.param)


def normal(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])


def mild(rng, m, n, k, xp):
    """Operands whose product is of the order of 1: activations are curved there."""
    x, w = normal(rng, m, k), normal(rng, n, k) / np.float32(np.sqrt(k))
    return cpgemm.quantize(xp.asarray(x)), cpgemm.quantize(xp.asarray(w), (128, 128))


def elementwise(rng, xp, m, n, out_dtype):
    """Each step that keeps D's shape: (epilogue, formula of a pair)."""
    bias, wide = normal(rng, n), normal(rng, n, dtype="bfloat16")
    residual = normal(rng, m, n, dtype=out_dtype)
    factor = normal(rng, 1)
    put_residual = put(xp, residual)
    return {
        "bias": (Bias(put(xp, bias)), lambda p: add(p, bias)),
        "bias bfloat16": (Bias(put(xp, wide)), lambda p: add(p, wide)),
        "silu": (SiLU(), silu),
        "gelu": (GELU(), gelu),
        "gelu tanh": (GELU("tanh"), gelu_tanh),
        "residual": (Residual(put_residual), lambda p: add(p, residual)),
        "scale": (Scale(-2.5), lambda p: scale(p, -2.5)),
        "scale array": (Scale(put(xp, factor)), lambda p: scale(p, float(factor[0]))),
        "all": (
            Bias(put(xp, bias)) | SiLU() | Scale(3) | Residual(put_residual) | GELU("tanh"),
            lambda p: gelu_tanh(add(scale(silu(add(p, bias)), 3), residual)),
        ),
    }


STEPS = (
    "bias", "bias bfloat16", "silu", "gelu", "gelu tanh", "residual", "scale", "scale array", "all",
)  # fmt: skip


# ----------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_elementwise(rng, xp, step, out_dtype):
    for m, n, k in SHAPES:
        a, b = mild(rng, m, n, k, xp)
        epilogue, formula = elementwise(rng, xp, m, n, out_dtype)[step]
        poison, out = guarded(m, n, DTYPES[out_dtype], xp)
        assert cpgemm.gemm(a, b, out, epilogue=epilogue) is out
        assert_within(out, formula(product(a, b)))
        assert_guards_intact(poison, m, n)
        made = cpgemm.gemm(a, b, out_dtype=out_dtype, epilogue=epilogue)
        assert made.dtype == DTYPES[out_dtype]
        assert (to_numpy(made) == to_numpy(out)).all()


def test_c_is_added_first(rng, xp):
    a, b = mild(rng, 70, 144, 256, xp)
    c = normal(rng, 70, 144, dtype="bfloat16")
    out = cpgemm.gemm(a, b, c=put(xp, c), epilogue=SiLU())
    assert_within(out, silu(product(a, b, c)))


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_swiglu(rng, xp, out_dtype):
    for m, n, k in SHAPES:
        a, b = mild(rng, m, n, k, xp)
        bias, after = normal(rng, n), normal(rng, n // 2)
        residual = normal(rng, m, n // 2, dtype=out_dtype)
        for epilogue, formula in (
            (SwiGLU(), swiglu),
            (
                Bias(put(xp, bias)) | SwiGLU() | Bias(put(xp, after)) | Residual(put(xp, residual)),
                lambda p, bias=bias, after=after, residual=residual: add(
                    add(swiglu(add(p, bias)), after), residual
                ),
            ),
        ):
            poison, out = guarded(m, n // 2, DTYPES[out_dtype], xp)
            cpgemm.gemm(a, b, out, epilogue=epilogue)
            assert_within(out, formula(product(a, b)))
            assert_guards_intact(poison, m, n // 2)
            assert cpgemm.gemm(a, b, epilogue=epilogue, out_dtype=out_dtype).shape == (m, n // 2)


@pytest.mark.parametrize("scale_format", ["float32", "pow2"])
@pytest.mark.parametrize("first", ["nothing", "bias", "swiglu"])
def test_quantize(rng, xp, first, scale_format):
    for m, n, k in (*SHAPES[1:], (1, 32, 16)):
        n = -(-n // 32) * 32
        a, b = mild(rng, m, n, k, xp)
        bias = normal(rng, n)
        residual = normal(rng, m, n, dtype="bfloat16")
        epilogue, formula = {
            "nothing": (Quantize(scale_format), lambda p: p),
            "bias": (
                Bias(put(xp, bias)) | Residual(put(xp, residual)) | Quantize(scale_format),
                lambda p, bias=bias, residual=residual: add(add(p, bias), residual),
            ),
            "swiglu": (SwiGLU() | Quantize(scale_format), swiglu),
        }[first]
        out, check = poisoned_result(xp, (m, n // 2 if first == "swiglu" else n), scale_format)
        assert cpgemm.gemm(a, b, out, epilogue=epilogue) is out
        assert_quantized(out, formula(product(a, b)))
        check()
        made = cpgemm.gemm(a, b, epilogue=epilogue)
        assert made.scale_format == scale_format and made.is_k_major
        assert (to_numpy(made).data.view(np.uint8) == to_numpy(out).data.view(np.uint8)).all()


def poisoned_result(xp, shape, scale_format="float32"):
    """A ScaledTensor in the middle of poison, and what checks that the poison is still there."""
    *outer, rows, columns = shape
    blocks = -(-columns // 128)
    codes = xp.full((*outer, rows, columns + 32), 0x7F, xp.uint8)
    scales = xp.full((*outer, blocks + 1, -(-rows // 4) * 4 + 4), np.nan, xp.float32)
    out = cpgemm.ScaledTensor.from_arrays(
        codes[..., :columns],
        scales[..., :blocks, :rows].swapaxes(-1, -2),
        (1, 128),
        scale_format=scale_format,
    )

    def check():
        assert bool((codes[..., columns:] == 0x7F).all())
        assert bool(xp.isnan(scales[..., rows:]).all() and xp.isnan(scales[..., blocks, :]).all())

    return out, check


def test_quantized_result_feeds_the_next_product(rng, xp):
    """A block of two layers: nothing lies between the two launches."""
    a, up = mild(rng, 40, 512, 256, xp)
    _, down = mild(rng, 1, 128, 256, xp)
    h = cpgemm.gemm(a, up, epilogue=SwiGLU() | Quantize())
    out = cpgemm.gemm(h, down)
    exact = to_numpy(h).dequantize().astype(np.float64)
    wanted = exact @ to_numpy(down).dequantize().astype(np.float64).T
    error = np.linalg.norm(to_numpy(out).astype(np.float64) - wanted)
    assert error <= 0.002 * np.linalg.norm(wanted)  # gemm_checks.NORM_BFLOAT16


@pytest.mark.parametrize("scale_format", ["float32", "pow2"])
def test_quantize_is_what_the_quantiser_makes(rng, xp, scale_format):
    """Of the same float32 values, bit for bit: the sums of both kernels have one order."""
    a, b = operands(rng, 1500, 528, 384, xp)  # too many rows for a split kernel
    bias = put(xp, normal(rng, 528))
    fused = cpgemm.gemm(a, b, epilogue=Bias(bias) | Quantize(scale_format))
    plain = cpgemm.gemm(a, b, epilogue=Bias(bias), out_dtype="float32")
    wanted = to_numpy(cpgemm.quantize(plain, scale_format=scale_format))
    np.testing.assert_array_equal(to_numpy(fused).scales, wanted.scales)
    np.testing.assert_array_equal(to_numpy(fused).data.view(np.uint8), wanted.data.view(np.uint8))


def test_quantize_of_what_is_not_finite(rng, xp):
    """NaN and infinity get the code NaN and do not touch their block's scale; zeros the scale 1."""
    a, b = mild(rng, 70, 256, 128, xp)
    bias = np.zeros(256, np.float32)
    bias[[3, 200]] = np.inf, np.nan
    out = to_numpy(cpgemm.gemm(a, b, epilogue=Bias(put(xp, bias)) | Quantize()))
    codes = out.data.view(np.uint8) & 0x7F
    assert (codes[:, [3, 200]] == 0x7F).all() and (np.delete(codes, [3, 200], 1) != 0x7F).all()
    assert np.isfinite(out.scales).all()
    zeros = to_numpy(cpgemm.gemm(a, b, epilogue=Scale(0) | Quantize()))
    assert (zeros.scales == 1).all() and not (zeros.data.view(np.uint8) & 0x7F).any()


def test_large_negative_and_positive_values(rng, xp):
    """Activations at the ends of the range: no NaN from infinity over infinity."""
    a, b = mild(rng, 9, 64, 128, xp)
    for by in (1e4, 1e30):
        for step in (SiLU(), GELU(), GELU("tanh")):
            value = to_numpy(cpgemm.gemm(a, b, epilogue=Scale(by), out_dtype="float32"))
            got = to_numpy(cpgemm.gemm(a, b, epilogue=Scale(by) | step, out_dtype="float32"))
            np.testing.assert_allclose(got, np.maximum(value, 0), atol=1.0, rtol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(0, 32), (4, 0), (0, 0)])
def test_empty_sizes(rng, xp, m, n):
    a, b = operands(rng, m, n, 128, xp)
    assert cpgemm.gemm(a, b, epilogue=SiLU()).shape == (m, n)
    assert cpgemm.gemm(a, b, epilogue=SwiGLU()).shape == (m, n // 2)
    assert cpgemm.gemm(a, b, epilogue=Quantize()).shape == (m, n)


def test_residual_may_be_out(rng, xp):
    a, b = mild(rng, 140, 272, 256, xp)
    residual = normal(rng, 140, 272, dtype="bfloat16")
    out = put(xp, residual.copy())
    cpgemm.gemm(a, b, out, epilogue=Residual(out))
    assert_within(out, add(product(a, b), residual))


def test_interleaved_weights_give_swiglu(rng, xp):
    """SwiGLU of interleaved weights is silu(gate) * up of the two halves."""
    x, w = normal(rng, 12, 128), normal(rng, 64, 128) / np.float32(11)
    a, b = (
        cpgemm.quantize(xp.asarray(x)),
        cpgemm.quantize(epilogues.interleave_gate_up(xp.asarray(w)), (128, 128)),
    )
    gate, up = w[:32], w[32:]
    mixed = to_numpy(epilogues.interleave_gate_up(xp.asarray(w)))
    assert (mixed[0::2] == gate).all() and (mixed[1::2] == up).all()
    h = np.asarray(to_numpy(a).dequantize(), np.float64) @ to_numpy(b).dequantize().T
    wanted = h[:, 0::2] / (1 + np.exp(-h[:, 0::2])) * h[:, 1::2]
    got = to_numpy(cpgemm.gemm(a, b, epilogue=SwiGLU(), out_dtype="float32"))
    np.testing.assert_allclose(got, wanted, atol=1e-3 * abs(wanted).max())
    groups = np.stack((w, 2 * w))
    assert (epilogues.interleave_gate_up(groups)[1] == 2 * epilogues.interleave_gate_up(w)).all()


# --------------------------------------------------------------------------------------- grouped


class Groups:
    """A grouped product whose rows of no group, and all memory around, are poison."""

    def __init__(self, rng, layout, sizes, n, k, xp):
        from grouped_checks import Case

        self.case = Case(rng, layout, sizes, n, k, xp, spare=128, m_max=max(sizes) + 5)
        self.layout, self.n, self.xp = layout, n, xp
        self.rows = self.case.problem.rows
        self.shape = (*self.case.problem.shape[:-1], n)
        self.groups = len(sizes)

    def call(self, epilogue, out=None, **options):
        case = self.case
        if self.layout == "masked":
            return cpgemm.grouped_gemm_masked(
                case.a, case.b, out, masked_m=case.index, epilogue=epilogue, **options
            )
        options[self.layout] = case.index
        return cpgemm.grouped_gemm_contiguous(case.a, case.b, out, epilogue=epilogue, **options)

    def pairs(self):
        """(group, begin, end, exact and bound) of each run of rows."""
        case = self.case
        for group, begin, end in case.ranges:
            rows = cpgemm.ScaledTensor.from_arrays(
                case.plain_a.data[begin:end], case.plain_a.scales[begin:end], (1, 128)
            )
            yield group, begin, end, product(rows, case.group_of_b(group))

    def outside(self):
        return self.case.cover() == 0


LAYOUTS = ("offsets", "m_indices", "ends", "masked")
SIZES = {"few": (3, 0, 64, 17), "tall": (300, 129, 0, 260, 1)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_elementwise(rng, xp, layout, out_dtype, sizes):
    groups = Groups(rng, layout, SIZES[sizes], 272, 272, xp)
    n, count = groups.n, groups.groups
    shared, own = normal(rng, n), normal(rng, count, n, dtype="bfloat16")
    residual = normal(rng, *groups.shape, dtype=out_dtype)
    flat_residual = residual.reshape(-1, n)
    epilogue = Bias(put(xp, own)) | Scale(0.25) | Bias(put(xp, shared))
    epilogue = epilogue | Residual(put(xp, residual)) | SiLU()
    poison, flat = guarded(groups.rows, n, DTYPES[out_dtype], xp)
    out = flat.reshape(groups.shape)
    assert groups.call(epilogue, out) is out
    for group, begin, end, pair in groups.pairs():
        pair = add(scale(add(pair, own[group]), 0.25), shared)
        assert_within(flat[begin:end], silu(add(pair, flat_residual[begin:end])))
    assert_guards_intact(poison, groups.rows, n)
    limit = np.iinfo(poison.dtype).max
    bits = to_numpy(poison)[1:-1, :n]
    assert (bits[groups.outside()] == limit).all(), "a row outside every group has changed"


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_swiglu(rng, xp, layout, sizes):
    groups = Groups(rng, layout, SIZES[sizes], 304, 272, xp)
    own = normal(rng, groups.groups, groups.n)
    poison, flat = guarded(groups.rows, groups.n // 2, BF16, xp)
    out = flat.reshape(*groups.shape[:-1], groups.n // 2)
    groups.call(Bias(put(xp, own)) | SwiGLU(), out)
    for group, begin, end, pair in groups.pairs():
        assert_within(flat[begin:end], swiglu(add(pair, own[group])))
    assert_guards_intact(poison, groups.rows, groups.n // 2)
    bits = to_numpy(poison)[1:-1, : groups.n // 2]
    assert (bits[groups.outside()] == 0xFFFF).all()


@pytest.mark.parametrize("first", ["nothing", "swiglu"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_quantize(rng, xp, layout, sizes, first):
    groups = Groups(rng, layout, SIZES[sizes], 288, 272, xp)
    columns = groups.n // 2 if first == "swiglu" else groups.n
    epilogue = SwiGLU() | Quantize() if first == "swiglu" else Quantize()
    out, check = poisoned_result(xp, (*groups.shape[:-1], columns))
    assert groups.call(epilogue, out) is out
    whole = to_numpy(out)
    height = groups.shape[-2]
    for group, begin, end, pair in groups.pairs():
        pair = swiglu(pair) if first == "swiglu" else pair
        if layout == "masked":
            at = slice(begin - group * height, end - group * height)
            codes, scales = whole.data[group, at], whole.scales[group, at]
        else:
            codes, scales = whole.data[begin:end], whole.scales[begin:end]
        assert_quantized(cpgemm.ScaledTensor.from_arrays(codes, scales, (1, 128)), pair)
    check()
    flat = whole.data.view(np.uint8).reshape(-1, columns)
    assert (flat[groups.outside()] == 0x7F).all(), "a row outside every group has changed"


def test_grouped_fill_padding(rng, xp):
    groups = Groups(rng, "offsets", (3, 0, 64, 17), 272, 272, xp)
    out = groups.call(Scale(2) | SiLU(), fill_padding=True)
    assert not to_numpy(out).view(np.uint16)[groups.outside()].any()
    with pytest.raises(ArgumentError, match="fill_padding: cannot be had with SwiGLU"):
        groups.call(SwiGLU(), fill_padding=True)


# ---------------------------------------------------------------------------------------- custom

CLIP = """
// Clips to a limit for each column, and adds one.
__device__ float clip(float value, int row, int column, Array<float> limits,
                      Array<bfloat16> shift) {
    return fminf(fmaxf(value, -limits[column]), limits[column]) + shift(row, column);
}
"""


def clip_numpy(values, rows, columns, limits, shift):
    limit = limits[columns]
    return np.clip(values, -limit, limit) + shift[rows, columns].astype(np.float32)


def clip(pair, limits, shift):
    value, bound = pair
    return add((np.clip(value, -limits, limits), bound), shift)


@pytest.mark.parametrize("layout", ["dense", "offsets"])
def test_custom(rng, xp, tmp_path, layout):
    file = tmp_path / "clip.cuh"
    file.write_text(CLIP)
    n, limits = 272, abs(normal(rng, 272))
    if layout == "dense":
        a, b = mild(rng, 70, n, 256, xp)
        shift = normal(rng, 70, n, dtype="bfloat16")
        step = Custom(file, put(xp, limits), put(xp, shift), numpy=clip_numpy)
        assert step.function == "clip"
        out = cpgemm.gemm(a, b, epilogue=Scale(2) | step | SiLU())
        assert_within(out, silu(clip(scale(product(a, b), 2), limits, shift)))
        return
    groups = Groups(rng, layout, (70, 0, 3), n, 256, xp)
    shift = normal(rng, *groups.shape, dtype="bfloat16")
    step = Custom(CLIP, put(xp, limits), put(xp, shift), numpy=clip_numpy)
    out = groups.call(step)
    for _, begin, end, pair in groups.pairs():
        assert_within(out[begin:end], clip(pair, limits, shift[begin:end]))


def test_custom_before_quantize_and_behind_swiglu(rng, xp):
    double = Custom(
        "__device__ float twice(float x, int row, int column) { return 2 * x + column; }",
        numpy=lambda x, rows, columns: 2 * x + columns,
    )
    a, b = mild(rng, 70, 288, 256, xp)
    value, bound = swiglu(product(a, b))
    out = cpgemm.gemm(a, b, epilogue=SwiGLU() | double | Quantize())
    exact = 2 * value + np.arange(144)
    assert_quantized(out, (exact, 2 * bound + 2.0**-22 * abs(exact)))


def test_custom_refusals(rng, tmp_path):
    a, b = operands(rng, 4, 32, 128)
    text = "__device__ float same(float x, int row, int column) { return x; }"
    with pytest.raises(ArgumentTypeError, match="numpy: must be given to use a Custom"):
        cpgemm.gemm(a, b, epilogue=Custom(text))
    with pytest.raises(ArgumentError, match="source: must define __device__ float NAME"):
        Custom("int main() {}")
    with pytest.raises(ArgumentError, match="source: must define"):
        Custom("// __device__ float same(float x)\nint x() {}")
    with pytest.raises(ArgumentError, match="source: must be CUDA text or the path"):
        Custom(tmp_path / "missing.cuh")
    with pytest.raises(ArgumentTypeError, match=r"arrays\[1\]: must have dtype"):
        Custom(text, np.zeros(3, np.float32), np.zeros(3, np.float64))
    with pytest.raises(ArgumentError, match=r"arrays\[0\]: must have contiguous rows"):
        Custom(text, np.zeros(6, np.float32)[::2])
    assert Custom(text + text.replace("same", "other")).function == "other"
    assert Custom(text + text.replace("same", "other"), function="same").function == "same"


# -------------------------------------------------------------------------------------- refusals


def test_compositions_that_cannot_be():
    with pytest.raises(ArgumentError, match="epilogue: nothing can follow Quantize"):
        Quantize() | SiLU()
    with pytest.raises(ArgumentError, match="epilogue: must have SwiGLU once"):
        SwiGLU() | SiLU() | SwiGLU()
    with pytest.raises(TypeError):
        SiLU() | 3
    assert repr(Scale(2) | SiLU() | GELU("tanh")) == "Scale(2) | SiLU() | GELU('tanh')"


def test_arguments_of_steps():
    with pytest.raises(ArgumentTypeError, match="bias: must have dtype float32 or bfloat16"):
        Bias(np.zeros(8))
    with pytest.raises(ArgumentError, match="bias: must have 1 axis"):
        Bias(np.zeros((2, 2, 8), np.float32))
    with pytest.raises(ArgumentError, match="bias: must be contiguous"):
        Bias(np.zeros(16, np.float32)[::2])
    with pytest.raises(ArgumentTypeError, match="scale: must be a number"):
        Scale("2")
    with pytest.raises(ArgumentTypeError, match="scale: an array must hold one float32"):
        Scale(np.zeros(2, np.float32))
    with pytest.raises(ArgumentError, match="approximate: must be"):
        GELU("erf")
    with pytest.raises(ArgumentError, match="scale_format"):
        Quantize("e8m0")
    with pytest.raises(ArgumentError, match="w: must be an array"):
        epilogues.interleave_gate_up(np.zeros((3, 8), np.float32))


def test_rules_leave_out_untouched(rng):
    a, b = operands(rng, 4, 40, 128)
    out = np.zeros((4, 40), BF16)
    f32 = np.float32
    for epilogue, message in (
        (SiLU, "epilogue: must be made of cpgemm.epilogues"),
        (Bias(np.ones(24, f32)), r"bias: must have shape \(40,\)"),
        (Bias(np.ones((2, 40), f32)), r"bias: must have shape \(40,\)"),
        (Residual(np.ones((4, 40), f32)), "residual: must have D's dtype, bfloat16"),
        (Residual(np.ones((5, 40), BF16)), r"residual: must have shape \(4, 40\)"),
        (Residual(np.ones((40, 4), BF16).T), "residual: must have contiguous rows"),
        (SwiGLU(), "b: N must be a multiple of 16 for SwiGLU"),
        (Quantize(), "b: D must have a multiple of 16 columns"),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
            cpgemm.gemm(a, b, out, epilogue=epilogue)
    b = operands(rng, 4, 32, 128)[1]
    with pytest.raises(ArgumentError, match=r"out: must have shape \(4, 16\)"):
        cpgemm.gemm(a, b, out[:, :32], epilogue=SwiGLU())
    with pytest.raises(ArgumentTypeError, match="out: must be a ScaledTensor"):
        cpgemm.gemm(a, b, out[:, :32], epilogue=Quantize())
    with pytest.raises(ArgumentError, match="out: must have the shape"):
        cpgemm.gemm(a, b, poisoned_result(np, (4, 32), "pow2")[0], epilogue=Quantize())
    with pytest.raises(ArgumentError, match="c: cannot be added before SwiGLU or Quantize"):
        cpgemm.gemm(a, b, c=out[:, :32], epilogue=SwiGLU())
    shifted = np.zeros(4 * 32 + 1, BF16)
    with pytest.raises(ArgumentError, match="out: must not overlap residual"):
        cpgemm.gemm(
            a, b, shifted[1:].reshape(4, 32), epilogue=Residual(shifted[:-1].reshape(4, 32))
        )
    empty = operands(rng, 4, 32, 0)
    with pytest.raises(ArgumentError, match="a: K must not be 0"):
        cpgemm.gemm(*empty, epilogue=SiLU())
    assert not out.any() and not shifted.any()


def test_rules_of_grouped_products(rng):
    groups = Groups(rng, "masked", (3, 2), 32, 128, np)
    with pytest.raises(ArgumentError, match=r"bias: must have shape \(2, 32\)"):
        groups.call(Bias(np.zeros((3, 32), np.float32)))
    with pytest.raises(ArgumentError, match=r"residual: must have shape \(2, 8, 32\)"):
        groups.call(Residual(np.zeros((16, 32), BF16)))
    with pytest.raises(ArgumentError, match=r"out: must have shape \(2, 8, 16\)"):
        groups.call(SwiGLU(), np.zeros((2, 8, 32), BF16))


# --------------------------------------------------------------------------------------- kernels

_LINE = np.zeros(8, np.float32)
_HALF = np.zeros(8, BF16)
LONGEST = {  # a step of each kind, or what goes with others
    "values": Bias(_LINE) | SiLU() | GELU() | Scale(2) | GELU("tanh") | Residual(_HALF[None])
    | Custom(CLIP, _LINE, _HALF),
    "swiglu": Bias(_LINE) | SwiGLU() | Residual(_HALF[None]),
    "quantize": Bias(_LINE[None]) | SiLU() | Quantize(),
    "swiglu, quantize": Bias(_HALF) | SwiGLU() | Scale(2) | Quantize("pow2"),
}  # fmt: skip


@pytest.mark.parametrize(
    "step",
    [
        Bias,
        Scale,
        Residual,
        lambda x: Custom("__device__ float f(float x, const float* y, int s, int r, int c)\n{}", x),
    ],
    ids=["bias", "scale", "residual", "custom"],
)
def test_a_signature_has_the_library_of_its_array(monkeypatch, step):
    """torch's arrays are worked on on torch's stream, so that a launch is not another's."""
    for module in (epilogue_step, custom_epilogue):
        monkeypatch.setattr(module, "signature", lambda array: "the same memory")
        monkeypatch.setattr(module, "framework_of", lambda given: given.framework)

    class Given(np.ndarray):
        framework = "cupy"

    array = np.ones((1, 1) if step is Residual else 1, np.float32).view(Given)
    mine = step(array).signature
    assert mine == step(array).signature
    array.framework = "torch"
    assert mine != step(array).signature


def test_what_is_refused_before_there_are_operands(rng):
    """Plans and compilations ahead take what ``gemm`` takes."""
    a, b = operands(rng, 4, 48, 128)
    with pytest.raises(ArgumentError, match="deterministic: "):
        cpgemm.gemm(a, b, epilogue=SiLU(), deterministic="never")
    with pytest.raises(ArgumentTypeError, match="out_dtype: "):
        epilogues.compile_ahead(SiLU(), out_dtype="float64")
    with pytest.raises(ArgumentError, match="steps: must be one at least"):
        Chain(())
    for epilogue in (SwiGLU(), Quantize()):
        with pytest.raises(ArgumentError, match="accumulate: cannot be had with SwiGLU"):
            cpgemm.plan_gemm(64, 128, 128, accumulate=True, epilogue=epilogue)
        with pytest.raises(ArgumentError) as refused:
            cpgemm.gemm(*operands(rng, 4, 40, 128), epilogue=epilogue)
        with pytest.raises(ArgumentError, match=re.escape(str(refused.value).partition(";")[0])):
            cpgemm.plan_gemm(4, 40, 128, epilogue=epilogue)


@needs_nvrtc
@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
@pytest.mark.parametrize("what", LONGEST)
def test_every_family_compiles(what, grouped):
    """Long epilogues in every kernel that may take them: no spills, wgmma not serialised (such
    builds are refused), the main loop's instructions those of the plain kernel."""
    kernels = epilogues.compile_ahead(LONGEST[what], grouped=grouped)
    assert kernels
    for kernel in kernels:
        config = (
            next(
                config
                for config in fused_configurations(LONGEST[what].spec("bfloat16"), grouped=grouped)
                if kernel.source.name.startswith(config.name)
            )
            if what == "values"
            else None
        )
        report = kernel.report
        assert report.spill_store_bytes == report.local_bytes == 0 and not report.serialized
        if config is not None:
            assert report.wgmma == compile_kernel(gemm_source(config)).report.wgmma


@needs_nvrtc
@pytest.mark.parametrize("step", [SiLU(), GELU(), GELU("tanh"), Scale(2)], ids=repr)
def test_single_steps_compile(step):
    assert cpgemm.plan_gemm(4096, 4096, 512, epilogue=step).compile().report.wgmma
    assert cpgemm.plan_gemm(8, 4096, 7168, epilogue=step).compile().report.wgmma


HEAVY = """
__device__ float helper(float x) { return tanhf(x); }
__device__ float first(float x, int row, int column, Array<float> a) {
    return helper(x * a[column]) * expf(x);
}
__device__ float second(float x, int row, int column) { return helper(x) - row; }
"""


@needs_nvrtc
@pytest.mark.parametrize(
    "epilogue",
    [
        GELU() | Bias(_LINE[None]) | SwiGLU(),
        Custom(HEAVY, _LINE, function="first") | GELU() | Scale(2),
        Custom(HEAVY, function="second") | Custom(HEAVY, _LINE, function="first") | Quantize(),
        GELU() | SiLU() | Bias(_HALF) | Bias(_LINE[None]) | GELU("tanh") | Quantize("pow2"),
    ],
    ids=repr,
)
def test_long_chains_do_not_spill(epilogue):
    """On the tiles with most accumulators; steps whose instructions were mixed did spill."""
    spec = epilogue.spec("codes" if "Quantize" in repr(epilogue) else "float32")
    tall = [
        config
        for config in fused_configurations(spec)
        if config.block_m * config.block_n // config.consumers >= 8192 * 3 // 2
    ]
    assert tall
    for config in tall[:4]:
        assert compile_kernel(gemm_source(config, spec)).report.local_bytes == 0


@needs_nvrtc
def test_a_users_file_may_be_used_twice():
    """Its text stands in the kernel once, whichever of its functions are called, and how often."""
    first, second = Custom(HEAVY, _LINE, function="first"), Custom(HEAVY, function="second")
    plan = cpgemm.plan_gemm(64, 256, 256, epilogue=first | second | SiLU() | first)
    assert plan.source.text.count("float helper(float x)") == 1
    assert plan.source.text.count("\n#line ") == 2
    assert plan.compile().report.wgmma


def test_families():
    """Few rows go to split kernels; what quantises to consumers with whole blocks of columns."""
    both = SwiGLU() | Quantize()
    assert "split" in cpgemm.plan_gemm(8, 4096, 7168, epilogue=SiLU()).config.name
    assert "split" in cpgemm.plan_gemm(8, 4096, 7168, epilogue=SwiGLU()).config.name
    for m in (1, 64, 65, 4096):
        wide = cpgemm.plan_gemm(m, 4096, 7168, epilogue=both).config
        assert wide.column_parts * wide.wave_n == 256
        plain = cpgemm.plan_gemm(m, 4096, 7168, epilogue=Quantize()).config
        assert plain.column_parts * plain.wave_n == 128
    with pytest.raises(ArgumentError, match="config: must suit"):
        cpgemm.plan_gemm(8, 256, 256, epilogue=both, config=KernelConfig(128, 192, 3))


def test_default_kernels_know_of_no_epilogue():
    for source in all_sources():
        assert "fused" not in source.text and "Fused" not in source.text


def test_one_source_for_equal_epilogues():
    first = Bias(np.zeros(8, np.float32)) | SiLU()
    second = Bias(np.ones(16, np.float32)) | SiLU()
    assert first.spec("bfloat16") == second.spec("bfloat16")
    plans = [cpgemm.plan_gemm(64, 256, 256, epilogue=one) for one in (first, second)]
    assert plans[0] is plans[1] and "bias (float32) | silu" in plans[0].source.text
    with pytest.raises(ArgumentError, match="epilogue: a plan with one prepares its kernel"):
        plans[0](None, None, None)


@needs_nvrtc
def test_a_compile_error_names_the_users_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "wrong.cuh"
    file.write_text(
        "__device__ float wrong(float x, int row, int column) {\n"
        "    float y = x;\n"
        "    return y * undefined_name;\n"
        "}\n"
    )
    with pytest.raises(CompileError) as caught:
        cpgemm.plan_gemm(64, 256, 256, epilogue=SiLU() | Custom(file)).compile()
    message = str(caught.value)
    assert f"{file}(3): error" in message and ">     3 |     return y * undefined_name;" in message
    file.write_text("__device__ float wrong(float x, int row) { return x; }\n")
    with pytest.raises(CompileError, match=r"_wrong\.cu\(\d+\): error") as caught:
        plan = cpgemm.plan_gemm(64, 256, 256, epilogue=SiLU() | Custom(file))
        plan.compile()
    # Behind the user's text the rendered kernel's own lines count again.
    line = int(re.search(r"_wrong\.cu\((\d+)\): error", str(caught.value))[1])
    assert "wrong(values[i], row, column)" in plan.source.text.splitlines()[line - 1]


@needs_nvrtc
def test_frozen_unless_compiled_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    plan = cpgemm.plan_gemm(8, 4096, 7168, epilogue=SiLU())
    with cpgemm.freeze(), pytest.raises(FrozenError, match="nothing may be compiled"):
        plan.compile()
    assert not plan.compile().cached
    with cpgemm.freeze():
        assert plan.compile().cached


@pytest.mark.gpu
def test_gpu_rules(rng):
    import cupy as cp

    a, b = operands(rng, 16, 128, 256, cp)
    with pytest.raises(ArgumentError, match="bias: must be where the operands are"):
        cpgemm.gemm(a, b, epilogue=Bias(np.zeros(128, np.float32)))
    with pytest.raises(ArgumentError, match="bias: must start at a 16-byte aligned address"):
        cpgemm.gemm(a, b, epilogue=Bias(cp.zeros(129, np.float32)[1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["bias", "swiglu", "quantize", "both"])
def test_gpu_capture_and_repeat(rng, what):
    """A repeated call is ready, allocates its result only, and can be captured."""
    import cupy as cp

    a, b = mild(rng, 130, 512, 256, cp)
    bias = put(cp, normal(rng, 512))
    epilogue = {
        "bias": Bias(bias) | SiLU(),
        "swiglu": SwiGLU(),
        "quantize": Bias(bias) | Quantize(),
        "both": SwiGLU() | Quantize(),
    }[what]

    def bits(result):
        parts = (result.data, result.scales) if hasattr(result, "scales") else (result,)
        return [to_numpy(part).tobytes() for part in parts]

    out = cpgemm.gemm(a, b, epilogue=epilogue)
    wanted = bits(out)
    from cpgemm import fused

    for _ in range(3):
        assert bits(cpgemm.gemm(a, b, epilogue=epilogue)) == wanted
    cpgemm.gemm(a, b, out, epilogue=epilogue)
    before = len(fused._ready)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(fused, "FusedResult")  # where rules are checked: not again
        for _ in range(3):
            assert bits(cpgemm.gemm(a, b, out, epilogue=epilogue)) == wanted
    assert len(fused._ready) == before
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        cpgemm.gemm(a, b, out, epilogue=epilogue)
        graph = stream.end_capture()
    part = out.data if hasattr(out, "scales") else out
    part.view(cp.uint8)[...] = 0
    cp.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert bits(out) == wanted


@pytest.mark.gpu
def test_gpu_scale_is_read_when_the_kernel_runs(rng):
    import cupy as cp

    a, b = mild(rng, 20, 64, 128, cp)
    factor = cp.ones(1, cp.float32)
    epilogue = Scale(factor)
    first = to_numpy(cpgemm.gemm(a, b, epilogue=epilogue)).astype(np.float32)
    factor[...] = 4
    assert (to_numpy(cpgemm.gemm(a, b, epilogue=epilogue)).astype(np.float32) == 4 * first).all()


@pytest.mark.gpu
def test_gpu_torch(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, w = normal(rng, 40, 256), normal(rng, 128, 256)
    a = cpgemm.quantize(torch.tensor(x, device="cuda"))
    b = cpgemm.quantize(torch.tensor(w, device="cuda"), (128, 128))
    bias = torch.randn(128, device="cuda", dtype=torch.bfloat16)
    out = cpgemm.gemm(a, b, epilogue=Bias(bias) | SiLU())
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
    plain = cpgemm.gemm(a, b, out_dtype="float32")
    wanted = torch.nn.functional.silu(plain + bias.float())
    torch.testing.assert_close(out.float(), wanted, rtol=2.0**-8, atol=1e-5)
    quantized = cpgemm.gemm(a, b, epilogue=Quantize())
    assert quantized.framework == "torch"
    codes, _ = quantized.to_torch()
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == (40, 128)
