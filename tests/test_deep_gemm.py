"""``cpgemm.deep_gemm``: DeepGEMM's names on torch tensors, CuPy and NumPy arrays."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from deep_gemm_checks import (
    BF16,
    FP8,
    KINDS,
    Kind,
    assert_product,
    codes_of,
    dequantised,
    factors_of,
    operand,
    power_of_two,
)
from tiny_kernels import ROOT

from cpgemm import deep_gemm, settings
from cpgemm.deep_gemm import casts
from cpgemm.deep_gemm.absent import ABSENT
from cpgemm.errors import ArgumentError, ArgumentTypeError

DOCUMENT = (ROOT / "docs" / "deep_gemm.md").read_text(encoding="utf-8")


@pytest.fixture(params=KINDS)
def kind(request):
    return Kind(request.param)


def give(kind, pair):
    return tuple(kind.give(array) for array in pair)


# ----------------------------------------------------------------------------------------- casts

CASTS = {
    "per_token_cast_to_fp8": (1, 128),
    "per_channel_cast_to_fp8": (128, 1),
    "per_block_cast_to_fp8": (128, 128),
}


def matrix(rng, rows, columns, dtype):
    """Rows of very different magnitude, a zero block, and a block below the least amax."""
    x = rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-8, 9, (rows, 1))
    x[:128, :128] = 0
    x[:, 128:200] *= 2.0**-30
    return x.astype(dtype)


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", CASTS)
def test_casts_are_right_to_the_last_bit(kind, name, dtype, use_ue8m0, rng):
    rows, columns = CASTS[name]
    x = matrix(rng, 256 if columns == 1 else 200, 333, dtype)
    codes, factors = getattr(deep_gemm, name)(kind.give(x), use_ue8m0)
    assert kind.of(codes) and kind.of(factors)
    assert kind.strides(codes) == (333, 1)
    codes, factors = kind.take(codes), kind.take(factors)
    wanted = factors_of(x, rows, columns, use_ue8m0)
    assert codes.dtype == FP8 and codes.shape == x.shape
    assert factors.dtype == np.float32 and factors.shape == wanted.shape
    if kind.name == "torch-cuda" and not use_ue8m0:
        # torch multiplies by the reciprocal of 448 there.
        assert np.abs(factors.view(np.int32) - wanted.view(np.int32)).max() <= 1
    else:
        assert np.array_equal(factors, wanted)
    assert np.array_equal(codes.view(np.uint8), codes_of(x, factors, rows, columns))


@pytest.mark.parametrize("name", CASTS)
def test_granularity_of_casts(kind, name, rng):
    rows, columns = (64 if extent == 128 else 1 for extent in CASTS[name])
    x = rng.standard_normal((128, 100)).astype(np.float32)
    codes, factors = getattr(deep_gemm, name)(kind.give(x), use_ue8m0=True, gran_k=64)
    assert np.array_equal(kind.take(factors), factors_of(x, rows, columns, True))
    wanted = codes_of(x, kind.take(factors), rows, columns)
    assert np.array_equal(kind.take(codes).view(np.uint8), wanted)


def test_casts_of_what_is_not_finite(kind):
    x = np.ones((3, 128), np.float32)
    x[0, 5], x[1, 7] = np.nan, np.inf
    codes, factors = map(kind.take, deep_gemm.per_token_cast_to_fp8(kind.give(x)))
    values = codes.astype(np.float32)
    assert np.isnan(values[0]).all() and np.isnan(factors[0, 0])
    assert np.isnan(values[1, 7]) and np.isinf(factors[1, 0])
    assert (np.delete(values[1], 7) == 0).all()
    assert np.isfinite(values[2]).all() and np.isfinite(factors[2, 0])


def test_casts_of_nothing(kind):
    for shape in ((0, 256), (3, 0)):
        for name in CASTS:
            if name == "per_channel_cast_to_fp8" and shape[0] % 128:
                continue
            codes, _ = getattr(deep_gemm, name)(kind.give(np.ones(shape, np.float32)))
            assert tuple(codes.shape) == shape


def test_custom_dims(kind, rng):
    x = (rng.standard_normal((4, 3, 64)) * 2.0 ** rng.integers(-4, 5, (4, 1, 1))).astype(BF16)
    codes, factors = deep_gemm.per_custom_dims_cast_to_fp8(kind.give(x), (0,), True)
    assert tuple(factors.shape) == (4,)
    flat = x.reshape(4, -1)
    wanted = factors_of(flat, 1, flat.shape[1], True)
    assert np.array_equal(kind.take(factors), wanted[:, 0])
    got = kind.take(codes).view(np.uint8).reshape(flat.shape)
    assert np.array_equal(got, codes_of(flat, wanted, 1, flat.shape[1]))


def test_encoding_of_every_exponent_and_tie():
    """The road that CuPy takes, on NumPy arrays."""
    coarse = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([coarse + step for step in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        wanted = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    got = casts.encode_e4m3(values).view(np.uint8)
    nan = (wanted & 0x7F) == 0x7F
    assert nan.any() and np.array_equal((got & 0x7F) == 0x7F, nan)
    assert np.array_equal(got[~nan], wanted[~nan])


def test_powers_of_two(kind):
    x = np.array([1.0, 1.1, -2.0, 448.0, 3e38, 0.0, 2.0**-126, 2.5e-38], np.float32)
    got = kind.take(deep_gemm.ceil_to_ue8m0(kind.give(x)))
    wanted = [power_of_two(abs(float(value))) if value else 2.0**-126 for value in x]
    wanted[4] = 2.0**127  # 2**128 is no float32
    assert got.tolist() == wanted


@pytest.mark.parametrize(
    ("name", "x", "error", "says"),
    [
        ("per_token_cast_to_fp8", np.ones((4, 128)), ArgumentTypeError, "x: must have dtype"),
        ("per_token_cast_to_fp8", np.ones(128, np.float32), ArgumentError, "x: must have 2 axes"),
        ("per_channel_cast_to_fp8", np.ones((100, 8), np.float32), ArgumentError, "x: its rows"),
    ],
)
def test_casts_reject(kind, name, x, error, says):
    with pytest.raises(error, match=re.escape(says)):
        getattr(deep_gemm, name)(kind.give(x))


def test_casts_reject_other_objects():
    with pytest.raises(ArgumentTypeError, match="x: must be a torch tensor, a CuPy array or"):
        deep_gemm.per_block_cast_to_fp8([[1.0]])


def test_packed_factors_are_not_there():
    with pytest.raises(NotImplementedError, match="leave use_packed_ue8m0 out"):
        deep_gemm.per_token_cast_to_fp8(np.ones((4, 512), np.float32), True, 128, True)


# --------------------------------------------------------------------------------------- layouts


def test_alignment():
    for name in ("m", "k", "mk", "theoretical_mk"):
        assert getattr(deep_gemm, f"get_{name}_alignment_for_contiguous_layout")() == 128
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(expected_m=40) == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    with pytest.raises(ArgumentError, match="new_value: must be 128"):
        deep_gemm.set_mk_alignment_for_contiguous_layout(224)


def test_sizes():
    assert [deep_gemm.get_tma_aligned_size(x, 4) for x in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert deep_gemm.get_tma_aligned_size(17, 1) == 32
    with pytest.raises(ArgumentError, match="element_size: must divide 16"):
        deep_gemm.get_tma_aligned_size(4, 3)
    assert (deep_gemm.ceil_div(257, 128), deep_gemm.cell_div(256, 128)) == (3, 2)
    assert deep_gemm.align(257, 128) == 384


@pytest.mark.parametrize("shape", [(70, 3), (64, 1), (1, 5), (0, 3), (4, 70, 3), (2, 1, 1)])
def test_rows_fastest_factors(kind, shape, rng):
    sf = rng.standard_normal(shape, dtype=np.float32)
    rows, columns = shape[-2:]
    pitch = -(-rows // 4) * 4
    wanted = (1, pitch) if len(shape) == 2 else (pitch * columns, 1, pitch)
    laid = deep_gemm.get_mn_major_tma_aligned_tensor(kind.give(sf))
    assert kind.of(laid)
    assert np.array_equal(kind.take(laid), sf)
    if laid.shape[-2]:
        assert kind.pointer(laid) % 16 == 0
    if min(shape) > 1:
        assert kind.strides(laid) == wanted
        # What is in the layout stays where it is.
        assert kind.pointer(deep_gemm.get_mn_major_tma_aligned_tensor(laid)) == kind.pointer(laid)
        assert kind.pointer(deep_gemm.get_col_major_tma_aligned_tensor(laid)) == kind.pointer(laid)


def test_factors_with_other_strides(kind, rng):
    base = rng.standard_normal((3, 150), dtype=np.float32)
    view = kind.turned(kind.give(base))[:70]  # MN-major with a pitch that TMA cannot take
    laid = deep_gemm.get_mn_major_tma_aligned_tensor(view)
    assert kind.strides(laid) == (1, 72)
    assert np.array_equal(kind.take(laid), base.T[:70])


def test_factors_reject(kind):
    with pytest.raises(ArgumentError, match="sf: must have 2 or 3 axes"):
        deep_gemm.get_mn_major_tma_aligned_tensor(kind.give(np.ones(4, np.float32)))
    with pytest.raises(ArgumentTypeError, match="sf: must be float32"):
        deep_gemm.get_mn_major_tma_aligned_tensor(kind.give(np.ones((4, 4), np.int32)))


def test_transformed_factors(kind, rng):
    transform = deep_gemm.transform_sf_into_required_layout
    sfa = kind.give(rng.standard_normal((70, 3), dtype=np.float32))
    for recipe, options in (((1, 128, 128), {"is_sfa": True}), ((1, 128), {})):
        laid = transform(sfa, 70, 300, recipe, disable_ue8m0_cast=True, **options)
        assert kind.strides(laid) == (1, 72) and np.array_equal(kind.take(laid), kind.take(sfa))
    sfb = kind.give(rng.standard_normal((4, 2, 3), dtype=np.float32))
    # As a server calls it for weights.
    same = transform(sf=sfb, mn=200, k=300, recipe=(1, 128, 128), num_groups=4, is_sfa=False)
    assert same is sfb
    assert transform(sfb, 200, 300, (128, 128), 4) is sfb
    with pytest.raises(ArgumentError, match=re.escape("sf: must have shape (4, 2, 2)")):
        transform(sfb, 200, 256, (128, 128), 4)
    with pytest.raises(NotImplementedError, match=r"recipe \(1, 32\) is not there; use"):
        transform(sfa, 70, 96, (1, 32))
    with pytest.raises(NotImplementedError, match="use float32 factors"):
        transform(kind.give(np.ones((70, 3), np.int32)), 70, 300, (1, 128))


# ---------------------------------------------------------------------------------- dense calls


@pytest.mark.parametrize("out_dtype", [BF16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("layout", ["row-major", "aligned"])
def test_nt(kind, layout, out_dtype, rng):
    a, b = operand(rng, (70, 400), 1), operand(rng, (136, 400), 128)
    given = give(kind, a)
    if layout == "aligned":
        given = given[0], deep_gemm.get_mn_major_tma_aligned_tensor(given[1])
    d = kind.poisoned((70, 136), out_dtype)
    assert deep_gemm.fp8_gemm_nt(given, give(kind, b), d) is None
    assert_product(kind.take(d), a, b)


@pytest.mark.parametrize("out_dtype", [BF16, np.float32], ids=["bf16", "f32"])
def test_accumulation(kind, out_dtype, rng):
    a, b = operand(rng, (70, 256), 1), operand(rng, (136, 256), 128)
    c = rng.standard_normal((70, 136), dtype=np.float32).astype(out_dtype)
    d = kind.poisoned(c.shape, out_dtype)
    deep_gemm.fp8_gemm_nt(give(kind, a), give(kind, b), d, c=kind.give(c))
    assert_product(kind.take(d), a, b, c)
    d = kind.give(c)
    deep_gemm.fp8_gemm_nt(give(kind, a), give(kind, b), d, d)
    assert_product(kind.take(d), a, b, c)


@pytest.mark.parametrize("stored", ["as the name says", "along K"])
@pytest.mark.parametrize("orientation", ["nn", "tn", "tt"])
def test_other_orientations(kind, orientation, stored, rng):
    a, b = operand(rng, (72, 400), 1), operand(rng, (136, 400), 128)

    def turned(pair):
        if stored == "along K":  # the transpose is a view
            return tuple(kind.turned(array) for array in give(kind, pair))
        return tuple(kind.give(np.ascontiguousarray(array.T)) for array in pair)

    left = turned(a) if orientation[0] == "t" else give(kind, a)
    right = turned(b) if orientation[1] == "n" else give(kind, b)
    d = kind.poisoned((72, 136), np.float32)
    assert getattr(deep_gemm, f"fp8_gemm_{orientation}")(left, right, d) is None
    assert_product(kind.take(d), a, b)


def test_slices_of_larger_buffers(kind, rng):
    """What servers pass: the first rows of buffers, factors with a larger pitch."""
    a, b = operand(rng, (96, 384), 1), operand(rng, (136, 384), 128)
    codes, factors = give(kind, a)
    d = kind.poisoned((96, 136), BF16)
    few = a[0][:33], a[1][:33]
    for sf in (factors, deep_gemm.get_mn_major_tma_aligned_tensor(factors)):
        deep_gemm.fp8_gemm_nt((codes[:33], sf[:33]), give(kind, b), d[:33])
        assert_product(kind.take(d)[:33], few, b)
    assert np.isnan(kind.take(d)[33:].astype(np.float32)).all()


def test_factors_of_b_column_major(kind, rng):
    a, b = operand(rng, (16, 384), 1), operand(rng, (256, 384), 128)
    codes, factors = give(kind, (b[0], np.ascontiguousarray(b[1].T)))
    d = kind.poisoned((16, 256), np.float32)
    deep_gemm.fp8_gemm_nt(give(kind, a), (codes, kind.turned(factors)), d)
    assert_product(kind.take(d), a, b)


@pytest.mark.parametrize(("m", "n"), [(0, 136), (16, 0)])
def test_empty_products(kind, m, n, rng):
    a, b = operand(rng, (m, 256), 1), operand(rng, (n, 256), 128)
    d = kind.poisoned((m, n), BF16)
    deep_gemm.fp8_gemm_nt(give(kind, a), give(kind, b), d)


def test_as_servers_call_it(kind, rng):
    a, b = operand(rng, (8, 256), 1), operand(rng, (128, 256), 128)
    for options in (
        {"disable_ue8m0_cast": True},
        {"recipe": (1, 128, 128), "compiled_dims": "nk"},
        {"recipe_a": (1, 128), "recipe_b": [128, 128]},
    ):
        d = kind.poisoned((8, 128), BF16)
        deep_gemm.fp8_gemm_nt(list(give(kind, a)), give(kind, b), d, **options)
        assert_product(kind.take(d), a, b)
    d = kind.poisoned((8, 128), BF16)
    deep_gemm.gemm_fp8_fp8_bf16_nt(give(kind, a), give(kind, b), d)
    assert_product(kind.take(d), a, b)


# -------------------------------------------------------------------------------- grouped calls

SIZES = (70, 0, 128, 130)


def groups_of(rng, n=136, k=272):
    """Rows padded to multiples of 128, poisoned between the groups; (a, b, starts)."""
    starts = np.cumsum([0, *(-(-size // 128) * 128 for size in SIZES)])
    codes, factors = operand(rng, (int(starts[-1]), k), 1)
    for size, start, end in zip(SIZES, starts[:-1], starts[1:], strict=True):
        codes.view(np.uint8)[start + size : end] = 0x7F
        factors[start + size : end] = np.nan
    return (codes, factors), operand(rng, (len(SIZES), n, k), 128), starts


def index_of(starts):
    index = np.full(starts[-1], -1, np.int32)
    for group, (size, start) in enumerate(zip(SIZES, starts[:-1], strict=True)):
        index[start : start + size] = group
    return index


def assert_groups(d, a, b, starts, padding):
    """Every group's rows are its product; the rows between hold ``padding``, NaN or 0."""
    inside = np.zeros(d.shape[0], bool)
    for group, (size, start) in enumerate(zip(SIZES, starts[:-1], strict=True)):
        rows = slice(start, start + size)
        inside[rows] = True
        assert_product(d[rows], (a[0][rows], a[1][rows]), (b[0][group], b[1][group]))
    rest = d[~inside].astype(np.float32)
    assert np.isnan(rest).all() if np.isnan(padding) else (rest == padding).all()


@pytest.mark.parametrize("call", ["positional", "m_indices", "2025"])
def test_contiguous_by_index(kind, call, rng):
    a, b, starts = groups_of(rng)
    index = kind.give(index_of(starts))
    d = kind.poisoned((starts[-1], 136), BF16)
    arguments = (give(kind, a), give(kind, b), d)
    if call == "positional":
        done = deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            *arguments, index, disable_ue8m0_cast=True
        )
    elif call == "m_indices":
        done = deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*arguments, m_indices=index)
    else:
        done = deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(*arguments, index)
    assert done is None
    assert_groups(kind.take(d), a, b, starts, padding=np.nan)


@pytest.mark.parametrize("ensure_zero_padding", [True, False])
def test_contiguous_by_ends(kind, ensure_zero_padding, rng):
    a, b, starts = groups_of(rng)
    # The empty group repeats the end before it, as a running sum with aligned starts gives it.
    ends = np.array([70, 128, 256, 256 + 130], np.int32)
    assert starts.tolist() == [0, 128, 128, 256, 512]
    d = kind.poisoned((512, 136), BF16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        give(kind, a),
        give(kind, b),
        d,
        kind.give(ends),
        use_psum_layout=True,
        ensure_zero_padding=ensure_zero_padding,
        expected_m_for_psum_layout=100,
    )
    assert_groups(kind.take(d), a, b, starts, padding=0 if ensure_zero_padding else np.nan)


@pytest.mark.parametrize("stored", ["as the name says", "along K"])
def test_contiguous_nn(kind, stored, rng):
    a, b, starts = groups_of(rng)
    if stored == "along K":
        right = tuple(kind.turned(array) for array in give(kind, b))
    else:
        right = give(kind, tuple(np.ascontiguousarray(array.swapaxes(1, 2)) for array in b))
    d = kind.poisoned((starts[-1], 136), BF16)
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(give(kind, a), right, d, kind.give(index_of(starts)))
    assert_groups(kind.take(d), a, b, starts, padding=np.nan)


@pytest.mark.parametrize("name", ["fp8_m_grouped_gemm_nt_masked", "2025"])
@pytest.mark.parametrize("layout", ["row-major", "aligned"])
def test_masked(kind, name, layout, rng):
    m_max = 130
    a, b = operand(rng, (4, m_max, 272), 1), operand(rng, (4, 136, 272), 128)
    for group, size in enumerate(SIZES):
        a[0].view(np.uint8)[group, size:] = 0x7F
        a[1][group, size:] = np.nan
    given = give(kind, a)
    if layout == "aligned":
        given = given[0], deep_gemm.get_mn_major_tma_aligned_tensor(given[1])
    d = kind.poisoned((4, m_max, 136), BF16)
    counts = kind.give(np.array(SIZES, np.int32))
    if name == "2025":
        function = deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked
        assert function(given, give(kind, b), d, counts, 82) is None
    else:
        function = getattr(deep_gemm, name)
        assert function(given, give(kind, b), d, masked_m=counts, expected_m=82) is None
    got = kind.take(d)
    for group, size in enumerate(SIZES):
        rows = a[0][group, :size], a[1][group, :size]
        assert_product(got[group, :size], rows, (b[0][group], b[1][group]))
        assert np.isnan(got[group, size:].astype(np.float32)).all()


def test_masked_with_gaps_between_the_factors_of_groups(kind, rng):
    a, b = operand(rng, (2, 64, 256), 1), operand(rng, (2, 128, 256), 128)
    wide = kind.turned(kind.give(np.zeros((2, 3, 72), np.float32)))[:, :64, :2]
    wide[...] = kind.give(a[1])
    d = kind.poisoned((2, 64, 128), BF16)
    counts = kind.give(np.array([64, 5], np.int32))
    deep_gemm.m_grouped_fp8_gemm_nt_masked((kind.give(a[0]), wide), give(kind, b), d, counts, 64)
    got = kind.take(d)
    assert_product(got[0], (a[0][0], a[1][0]), (b[0][0], b[1][0]))
    assert_product(got[1, :5], (a[0][1, :5], a[1][1, :5]), (b[0][1], b[1][1]))


# ------------------------------------------------------------------------------ what is rejected


def small(kind, rng):
    a, b = operand(rng, (16, 256), 1), operand(rng, (128, 256), 128)
    return give(kind, a), give(kind, b), kind.poisoned((16, 128), BF16)


def test_rejected_operands(kind, rng):
    a, b, d = small(kind, rng)
    for wrong, error, says in (
        ((a[0], b, d), ArgumentTypeError, "a: must be a pair"),
        ((a, b, None), ArgumentTypeError, "d: must be given"),
        (((a[0], a[1][:8]), b, d), ArgumentError, "a, scales: must have shape (16, 2)"),
        ((a, (b[0], b[1][:, :1]), d), ArgumentError, "b, scales: must have shape (1, 2)"),
        (((a[1], a[1]), b, d), ArgumentTypeError, "a, data: must have dtype float8_e4m3fn"),
        ((a, b, d[:8]), ArgumentError, "d: must have shape (16, 128)"),
    ):
        with pytest.raises(error, match=re.escape(says)):
            deep_gemm.fp8_gemm_nt(*wrong)
    with pytest.raises(ArgumentError, match=re.escape("out: must have shape (16, 128)")):
        deep_gemm.gemm_fp8_fp8_bf16_nt(a, b, d[:8])
    assert np.isnan(kind.take(d).astype(np.float32)).all()


def test_rejected_index(kind, rng):
    a, b, d = small(kind, rng)
    b = tuple(array[None] for array in b)
    index = kind.give(np.zeros(16, np.int32))
    contiguous = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    for wrong, options in ((index[:8], {}), (index, {"use_psum_layout": True}), (None, {})):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^grouped_layout: "):
            contiguous(a, b, d, wrong, **options)
    with pytest.raises(ArgumentError, match=r"^m_indices: "):
        deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, b, d, index[:8])


@pytest.mark.parametrize(
    "options", [{"recipe": (1, 1, 128)}, {"recipe_a": (1, 32)}, {"recipe_b": (1, 128)}]
)
def test_other_recipes_are_not_there(options, rng):
    a, b, d = small(Kind("numpy"), rng)
    groups = tuple(array[None] for array in b)
    every = tuple(array[None] for array in a)
    index = np.zeros(16, np.int32)
    for call in (
        lambda: deep_gemm.fp8_gemm_nt(a, b, d, **options),
        lambda: deep_gemm.fp8_gemm_nn(a, b, d, **options),
        lambda: deep_gemm.fp8_gemm_tn(a, b, d, **options),
        lambda: deep_gemm.fp8_gemm_tt(a, b, d, **options),
        lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, groups, d, index, **options),
        lambda: deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, groups, d, index, **options),
        lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(
            every, groups, d[None], np.array([16], np.int32), 16, **options
        ),
    ):
        with pytest.raises(NotImplementedError, match=r"is not there, only .*; cast A with"):
            call()


def test_overlap_is_not_there(rng):
    a, b, d = (tuple(x[None] for x in pair) for pair in small(Kind("numpy"), rng))
    with pytest.raises(NotImplementedError, match="enable_overlap is not there; call without it"):
        deep_gemm.fp8_m_grouped_gemm_nt_masked(
            a, b, d, np.array([16], np.int32), 16, enable_overlap=True, max_block_n=160
        )


# ------------------------------------------------------------------------------------- measures


def test_difference(kind, rng):
    x = rng.standard_normal((30, 40), dtype=np.float32).astype(BF16)
    y = (x.astype(np.float32) * 1.5).astype(BF16)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    wanted = 1 - 2 * (wide_x * wide_y).sum() / (wide_x**2 + wide_y**2).sum()
    assert float(deep_gemm.calc_diff(kind.give(x), kind.give(y))) == pytest.approx(wanted)
    assert float(deep_gemm.calc_diff(kind.give(x), kind.give(x))) == pytest.approx(0, abs=1e-12)
    zero = kind.give(np.zeros((3, 3), np.float32))
    assert deep_gemm.calc_diff(zero, zero) == 0.0


def test_bytes(kind):
    x, y = kind.give(np.ones((3, 5), np.float32)), kind.give(np.ones(7, FP8))
    assert deep_gemm.testing.count_bytes(x, (y, [x, None])) == 60 + 7 + 60


# ------------------------------------------------------------------------------------- settings


@pytest.fixture
def restored():
    """Settings as they were, afterwards."""
    yield
    settings.set_sms(None)
    settings.set_pdl(None)
    deep_gemm.set_tc_util(100)
    deep_gemm.set_compile_mode(0)


def test_multiprocessors(restored):
    every = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(every - 20)
    assert deep_gemm.get_num_sms() == settings.sms() == every - 20
    deep_gemm.set_num_sms(every)  # as a server restores it
    assert deep_gemm.get_num_sms() == every and settings.sms() is None
    deep_gemm.set_num_sms(8)
    deep_gemm.set_num_sms(0)
    assert deep_gemm.get_num_sms() == every
    for wrong, error in ((-1, ArgumentError), (every + 1, ArgumentError), (8.0, ArgumentTypeError)):
        with pytest.raises(error, match="num_sms: must be"):
            deep_gemm.set_num_sms(wrong)
    assert deep_gemm.get_num_sms() == every


def test_dependent_launch(restored):
    for value in (True, False):
        deep_gemm.set_pdl(value)
        assert deep_gemm.get_pdl() is value and settings.pdl() is value


def test_hints(restored):
    assert deep_gemm.get_tc_util() == 100
    deep_gemm.set_tc_util(60)
    assert deep_gemm.get_tc_util() == 60
    with pytest.raises(ArgumentError, match="new_tc_util: must be between 0 and 100"):
        deep_gemm.set_tc_util(101)
    assert deep_gemm.get_compile_mode() == 0
    deep_gemm.set_compile_mode(1)
    assert deep_gemm.get_compile_mode() == 1
    deep_gemm.set_ignore_compile_dims(True)


@pytest.mark.gpu
@pytest.mark.parametrize("sms", [1, 2, 3, 64])
def test_products_on_few_multiprocessors(restored, sms, rng):
    kind = Kind("cupy")
    deep_gemm.set_num_sms(sms)
    for m, n, k in ((70, 136, 400), (512, 768, 512)):
        a, b = operand(rng, (m, k), 1), operand(rng, (n, k), 128)
        d = kind.poisoned((m, n), BF16)
        deep_gemm.fp8_gemm_nt(give(kind, a), give(kind, b), d)
        assert_product(kind.take(d), a, b)
    a, b, starts = groups_of(rng)
    d = kind.poisoned((starts[-1], 136), BF16)
    index = kind.give(index_of(starts))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(give(kind, a), give(kind, b), d, index)
    assert_groups(kind.take(d), a, b, starts, padding=np.nan)


@pytest.mark.gpu
def test_the_limit_leaves_multiprocessors_idle(restored, rng):
    """A sixteenth of the GPU takes at least four times as long for a product that fills it."""
    import cupy

    kind = Kind("cupy")
    a = give(kind, operand(rng, (4096, 2048), 1))
    b = give(kind, operand(rng, (4096, 2048), 128))
    a = a[0], deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
    d = kind.poisoned((4096, 4096), BF16)
    every = deep_gemm.get_num_sms()
    took = {}
    for sms in (every, every // 16):
        deep_gemm.set_num_sms(sms)
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(3):
            deep_gemm.fp8_gemm_nt(a, b, d)
        start.record()
        for _ in range(10):
            deep_gemm.fp8_gemm_nt(a, b, d)
        end.record()
        end.synchronize()
        took[sms] = cupy.cuda.get_elapsed_time(start, end)
    assert took[every // 16] > 4 * took[every], took


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["row-major", "aligned"])
def test_in_a_cuda_graph_of_torch(layout, rng):
    """Servers capture their decoding step; a replay sees new values, no launch is on the host."""
    kind = Kind("torch-cuda")
    torch = kind.torch
    a, b = operand(rng, (8, 512), 1), operand(rng, (256, 512), 128)
    other = operand(rng, (8, 512), 1)
    codes, factors = give(kind, a)
    if layout == "aligned":
        factors = deep_gemm.get_mn_major_tma_aligned_tensor(factors)
    right, d = give(kind, b), kind.poisoned((8, 256), BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        deep_gemm.fp8_gemm_nt((codes, factors), right, d)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        deep_gemm.fp8_gemm_nt((codes, factors), right, d)
    codes.copy_(kind.give(other[0]))
    factors.copy_(kind.give(other[1]))
    graph.replay()
    torch.cuda.synchronize()
    assert_product(kind.take(d), other, b)


# ---------------------------------------------------------------------------- names of DeepGEMM

DENSE = "a b d c recipe recipe_a recipe_b compiled_dims disable_ue8m0_cast"
GROUPED = "a b d grouped_layout recipe recipe_a recipe_b compiled_dims disable_ue8m0_cast"
SIGNATURES = {
    "fp8_gemm_nt": DENSE,
    "fp8_gemm_nn": DENSE,
    "fp8_gemm_tn": DENSE,
    "fp8_gemm_tt": DENSE,
    "m_grouped_fp8_gemm_nt_contiguous": GROUPED
    + " use_psum_layout ensure_zero_padding expected_m_for_psum_layout",
    "m_grouped_fp8_gemm_nn_contiguous": GROUPED + " use_psum_layout ensure_zero_padding",
    "m_grouped_fp8_gemm_nt_masked": "a b d masked_m expected_m recipe recipe_a recipe_b "
    "compiled_dims disable_ue8m0_cast",
    "gemm_fp8_fp8_bf16_nt": "lhs rhs out",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous": "lhs rhs out m_indices",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked": "lhs rhs out masked_m expected_m",
    "transform_sf_into_required_layout": "sf mn k recipe num_groups is_sfa disable_ue8m0_cast "
    "psum_layout",
    "per_token_cast_to_fp8": "x use_ue8m0 gran_k use_packed_ue8m0",
    "per_channel_cast_to_fp8": "x use_ue8m0 gran_k",
    "per_block_cast_to_fp8": "x use_ue8m0 gran_k",
    "per_custom_dims_cast_to_fp8": "x dims use_ue8m0",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_order_of_arguments(name):
    parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[name].split()


@pytest.mark.parametrize("name", ABSENT)
def test_absent_names_say_what_to_use(name):
    function = getattr(deep_gemm, name)
    with pytest.raises(NotImplementedError) as caught:
        function(1, 2, keyword=3)
    assert str(caught.value) == f"cpgemm.deep_gemm.{name} is not there; {ABSENT[name]}"
    assert function.__name__ == name and len(ABSENT[name]) > 20


def test_unknown_names():
    assert not hasattr(deep_gemm, "no_such_name")
    with pytest.raises(AttributeError, match=r"no attribute 'jit'; docs/deep_gemm.md lists"):
        deep_gemm.jit  # noqa: B018
    for name in deep_gemm.__all__:
        assert name in dir(deep_gemm) and hasattr(deep_gemm, name)


def test_utils_hold_the_same_objects():
    for module in (deep_gemm.utils, deep_gemm.utils.layout, deep_gemm.utils.math):
        for name in set(module.__all__) - {"layout", "math"}:
            assert getattr(module, name) is getattr(deep_gemm, name)
        with pytest.raises(NotImplementedError):
            module.per_token_cast_to_fp4(None)
    assert deep_gemm.testing.numeric.calc_diff is deep_gemm.calc_diff


def rows_of_the_table():
    """Name -> text of the second column, for each name of the table of names."""
    found = {}
    table = DOCUMENT.partition("\n## Names\n")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*)$", table, re.MULTILINE):
        names, state, _ = (cell.strip() for cell in row.split("|", 2))
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found, f"{name} stands in two rows"
            found[name] = state
    return found


def test_the_table_names_what_is_there():
    states = rows_of_the_table()
    absent = {name for name, state in states.items() if state == "no"}
    assert absent == set(ABSENT)
    assert {state for state in states.values()} == {"yes", "hint", "no"}
    assert set(states) - absent == set(deep_gemm.__all__) - set(ABSENT)


def run_alone(code):
    """What ``code`` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SERVER = """
import sys

import cpgemm.deep_gemm

sys.modules["deep_gemm"] = cpgemm.deep_gemm
heavy = {"torch", "jax", "cupy"} & set(sys.modules) - before
assert not heavy, heavy

# From here on nothing knows of cpgemm.
import importlib
import importlib.util

assert importlib.util.find_spec("deep_gemm") is not None
import deep_gemm
import deep_gemm.utils.layout
import deep_gemm.utils.math
from deep_gemm import calc_diff, ceil_div, fp8_gemm_nt, get_num_sms
from deep_gemm import fp8_mqa_logits, m_grouped_fp8_fp4_gemm_nt_contiguous
from deep_gemm.jit_kernels.gemm import gemm_fp8_fp8_bf16_nt
from deep_gemm.jit_kernels.utils import get_m_alignment_for_contiguous_layout
from deep_gemm.testing import calc_diff
from deep_gemm.testing.numeric import count_bytes
from deep_gemm.utils import align, per_block_cast_to_fp8, per_token_cast_to_fp8
from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

assert deep_gemm.utils.layout.get_mn_major_tma_aligned_tensor is get_mn_major_tma_aligned_tensor
assert gemm_fp8_fp8_bf16_nt is deep_gemm.gemm_fp8_fp8_bf16_nt
assert calc_diff is deep_gemm.calc_diff and get_m_alignment_for_contiguous_layout() == 128

# Names are looked up, as a server does that supports several releases.
module = importlib.import_module("deep_gemm")
for name in ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "fp8_m_grouped_gemm_nt_masked",
             "fp8_mqa_logits", "get_mn_major_tma_aligned_tensor", "set_num_sms", "set_pdl",
             "get_mk_alignment_for_contiguous_layout", "transform_sf_into_required_layout"):
    assert callable(getattr(module, name, None)), name
assert int(deep_gemm.__version__.split(".")[0]) == 2

{arrays}


def linear(x, weight):
    a, sfa = per_token_cast_to_fp8(x, use_ue8m0=False)
    out = empty((x.shape[0], weight[0].shape[0]))
    fp8_gemm_nt((a, get_mn_major_tma_aligned_tensor(sfa)), weight, out, disable_ue8m0_cast=True)
    return out


x, w = normal(40, 512), normal(256, 512)
got = linear(x, per_block_cast_to_fp8(w, use_ue8m0=False))
difference = float(calc_diff(got, x @ w.T))
assert difference < 1e-3, difference

try:
    fp8_mqa_logits(x, x, x, x, x)
except NotImplementedError as error:
    assert "keep DeepGEMM" in str(error)
else:
    raise AssertionError("no error")
print("served", difference)
"""
ARRAYS = {
    "numpy": """
import ml_dtypes
import numpy as np
rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
empty = lambda shape: np.empty(shape, ml_dtypes.bfloat16)
""",
    "torch": """
import torch
device = DEVICE
normal = lambda *shape: torch.randn(*shape, device=device)
empty = lambda shape: torch.empty(shape, dtype=torch.bfloat16, device=device)
""",
    "cupy": """
import cupy
import ml_dtypes
import numpy as np
rng = np.random.default_rng(0)
normal = lambda *shape: cupy.asarray(rng.standard_normal(shape, dtype=np.float32))
empty = lambda shape: cupy.empty(shape, dtype=cupy.uint16).view(ml_dtypes.bfloat16)
""",
}


def test_a_server_needs_the_alias_only(kind):
    """In a process of its own, which imports nothing but the alias before the server's code."""
    device = "'cuda'" if kind.name == "torch-cuda" else "'cpu'"
    arrays = ARRAYS[kind.name.partition("-")[0]].replace("DEVICE", device)
    # A .pth file may have imported something already.
    code = "import sys\nbefore = set(sys.modules)\n" + SERVER.replace("{arrays}", arrays)
    assert run_alone(code).startswith("served")


def test_casts_feed_products(kind, rng):
    """Cast and multiply as the names are meant to be used together; 2 x e4m3's rounding."""
    x = rng.standard_normal((100, 512), dtype=np.float32)
    w = rng.standard_normal((256, 512), dtype=np.float32)
    a = deep_gemm.per_token_cast_to_fp8(kind.give(x))
    b = deep_gemm.per_block_cast_to_fp8(kind.give(w))
    d = kind.poisoned((100, 256), BF16)
    deep_gemm.fp8_gemm_nt(a, b, d)
    host = [tuple(map(kind.take, pair)) for pair in (a, b)]
    assert_product(kind.take(d), *host)
    # Each code is off by 1/16 of its value at most, the least codes by half a unit of 2**-9.
    assert np.abs(dequantised(host[0], 1) - x).max() <= np.abs(x).max() / 16
