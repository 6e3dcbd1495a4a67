"""Quantising: the rule's bits and properties, rules for arguments, and the kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpgemm.dlpack import as_native
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.quantize import QuantizeConfig, _scales_of, quantize, quantize_sources
from cpgemm.quantize_kernels import INPUT_DTYPES
from cpgemm.scaled import ScaledTensor, empty_codes, empty_scales, pointer, scale_shape
from cpgemm.settings import changed as forget_launches

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
GRANULARITIES = [(1, 128), (128, 128)]
FORMATS = ["float32", "pow2"]


def codes_of(tensor: ScaledTensor) -> np.ndarray:
    return tensor.data.view(np.uint8)


def plain_rule(block: np.ndarray, scale_format: str) -> tuple[np.float32, np.ndarray]:
    """The documented rule for one block, said once more in scalar steps."""
    wide = block.astype(np.float32)
    finite = np.isfinite(wide)
    amax = np.max(np.abs(wide[finite]), initial=np.float32(0))
    if amax == 0:
        scale = inverse = np.float32(1)
    else:
        amax = max(amax, np.float32(2.0**-96))
        if scale_format == "float32":
            scale, inverse = amax / np.float32(448), np.float32(448) / amax
        else:
            exponent = -300
            while Fraction(2) ** exponent < Fraction(float(amax)) / 448:
                exponent += 1
            scale, inverse = np.float32(2.0**exponent), np.float32(2.0**-exponent)
    with np.errstate(invalid="ignore"):
        scaled = np.clip(np.where(finite, wide * inverse, 0), np.float32(-448), np.float32(448))
    codes = scaled.astype(FP8).view(np.uint8)
    codes[~finite] = 0x7F
    return np.float32(scale), codes


def plain_quantize(
    x: np.ndarray, granularity: tuple[int, int], scale_format: str
) -> tuple[np.ndarray, np.ndarray]:
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty(scale_shape(x.shape, granularity), np.float32)
    for *group, row, kb in np.ndindex(*scales.shape):
        rows = slice(row * granularity[0], (row + 1) * granularity[0])
        columns = slice(kb * granularity[1], (kb + 1) * granularity[1])
        where = (*group, rows, columns)
        scales[(*group, row, kb)], codes[where] = plain_rule(x[where], scale_format)
    return codes, scales


def hard_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Outliers, zero blocks, denormals, huge values, NaN and infinities, each in some blocks."""
    x = rng.standard_normal(shape).astype(np.float32)
    columns = shape[-1]
    flat = x.reshape(-1, columns)
    for row in range(len(flat)):
        for start in range(0, columns, 128):
            piece = flat[row, start : start + 128]
            tiniest = 2.0**-149 if dtype != np.float16 else 2.0**-24
            largest = 3.3e38 if dtype != np.float16 else 65504.0
            kind = rng.integers(0, 24)
            if kind == 0:
                piece[:] = 0.0
            elif kind == 1:
                piece[:] = -0.0
            elif kind == 2:
                piece[:] = tiniest * rng.integers(-9, 10, piece.shape)
            elif kind == 3:
                piece *= np.float32(largest / 8)
            elif kind == 4:
                piece[rng.integers(piece.size)] = np.inf
            elif kind == 5:
                piece[rng.integers(piece.size)] = -np.inf
                piece[rng.integers(piece.size)] = np.nan
            elif kind == 6:
                piece[:] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), piece.shape)
            elif kind == 7:
                piece[rng.integers(piece.size)] *= 1000
            elif kind == 8:
                piece *= np.float32(2.0**-100)
            elif kind == 9:
                piece[:] = 448 * 2.0 ** float(rng.integers(-12, 7))
    with np.errstate(over="ignore", under="ignore"):
        cast = x.astype(dtype)
    # NaNs of both signs and other payloads must end as the same code.
    unsigned = np.uint16 if dtype.itemsize == 2 else np.uint32
    nans = np.isnan(cast.astype(np.float32)) & (rng.random(shape) < 0.5)
    cast.view(unsigned)[nans] |= unsigned(1 << (8 * dtype.itemsize - 1) | 5)
    return cast


# ------------------------------------------------------------------------------- bits of the rule


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 144), (129, 272), (2, 130, 128), (300, 2048)])
def test_equals_the_plain_rule(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: np.dtype,
    granularity: tuple[int, int],
    scale_format: Any,
) -> None:
    x = hard_values(rng, shape, dtype)
    kept = x.copy()
    tensor = quantize(x, granularity, scale_format=scale_format)
    codes, scales = plain_quantize(x, granularity, scale_format)
    np.testing.assert_array_equal(codes_of(tensor), codes)
    np.testing.assert_array_equal(tensor.scales.view(np.uint32), scales.view(np.uint32))
    assert (tensor.granularity, tensor.scale_format) == (granularity, scale_format)
    assert tensor.is_k_major and tensor.shape == shape
    assert x.tobytes() == kept.tobytes()


def test_equals_ml_dtypes_cast_near_all_midpoints() -> None:
    """Every float32 within 64 units in the last place of a code, a midpoint or a power of two."""
    magnitudes = np.arange(0x7F, dtype=np.uint8).view(FP8).astype(np.float32)
    centres = np.concatenate(
        [magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2, np.exp2(np.arange(-20, 9.0))]
    ).astype(np.float32)
    bits = centres.view(np.int32)[:, None] + np.arange(-64, 65, dtype=np.int32)
    values = np.unique(bits[bits >= 0]).astype(np.int32).view(np.float32)
    values = values[values <= 448]
    x = np.zeros((len(values), 16), np.float32)
    x[:, 0] = 448  # fixes the scale at 1
    x[:, 1], x[:, 2] = values, -values
    for scale_format in FORMATS:
        tensor = quantize(x, scale_format=scale_format)  # type: ignore[arg-type]
        assert (tensor.scales == 1).all()
        np.testing.assert_array_equal(codes_of(tensor), x.astype(FP8).view(np.uint8))


def test_pow2_scale_is_the_smallest_that_fits() -> None:
    """Exact rational comparison around every power of two times 448, and at the ends."""
    exponents = np.arange(-96, 128)
    centres = np.concatenate([448 * np.exp2(np.arange(-104, 120.0)), np.exp2(exponents)])
    bits = centres.astype(np.float32).view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)
    amax = np.unique(np.append(bits, [0x7F7FFFFF])).astype(np.int32).view(np.float32)
    amax = amax[(amax >= 2.0**-96) & np.isfinite(amax)]
    scale, inverse = _scales_of(amax, "pow2")
    for value, s, i in zip(amax, scale, inverse, strict=True):
        assert Fraction(float(s)) * Fraction(float(i)) == 1
        assert Fraction(float(value)) <= 448 * Fraction(float(s))
        assert Fraction(float(value)) > 448 * Fraction(float(s)) / 2
    assert (np.frexp(scale)[0] == 0.5).all()


def test_tiny_blocks_use_the_lower_bound() -> None:
    x = np.full((1, 16), 2.0**-149, np.float32)
    scale = quantize(x).scales[0, 0]
    assert scale == np.float32(2.0**-96) / np.float32(448)
    assert quantize(x, scale_format="pow2").scales[0, 0] == 2.0**-104
    assert (codes_of(quantize(x)) == 0).all()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zero_blocks(granularity: tuple[int, int], scale_format: Any) -> None:
    x = np.zeros((130, 272), np.float32)
    x[:, 1] = -0.0
    tensor = quantize(x, granularity, scale_format=scale_format)
    assert (tensor.scales == 1).all()
    assert (codes_of(tensor)[:, 1] == 0x80).all() and (codes_of(tensor)[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_not_finite_values(dtype: np.dtype, granularity: tuple[int, int]) -> None:
    """They become the code 0x7F, and the scale is that of the others."""
    x = np.ones((2, 128), dtype)
    x[0, :4] = [np.nan, -np.nan, np.inf, -np.inf]
    x[1] = np.inf
    tensor = quantize(x, granularity)
    assert (codes_of(tensor)[0, :4] == 0x7F).all() and (codes_of(tensor)[1] == 0x7F).all()
    assert (codes_of(tensor)[0, 4:] == 0x7E).all()
    assert tensor.scales[0, 0] == np.float32(1) / np.float32(448)
    if granularity == (1, 128):
        assert tensor.scales[1, 0] == 1


# ---------------------------------------------------------------------------- properties of results

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.sampled_from([(1, 16), (3, 128), (2, 144)]), elements=FINITE)


@settings(deadline=None)
@given(x=ARRAYS, granularity=st.sampled_from(GRANULARITIES), scale_format=st.sampled_from(FORMATS))
def test_error_bound(x: np.ndarray, granularity: tuple[int, int], scale_format: Any) -> None:
    """Half a step of a 4-bit significand, or half the smallest step times the scale.

    2**-4 and 2**-10 are those halves; the float32 roundings of scale and product, a few 2**-24
    each, are the rest of the bound.  The lower bound of amax needs no exception: it is a scale.
    """
    tensor = quantize(x, granularity, scale_format=scale_format)
    scales = np.repeat(np.repeat(tensor.scales, granularity[0], 0), 128, 1)
    scales = scales[: x.shape[0], : x.shape[1]].astype(np.float64)
    error = np.abs(tensor.dequantize(np.float64) - x)
    bound = np.maximum(np.abs(x.astype(np.float64)) * 2.0**-4, scales * 2.0**-10)
    assert (error <= bound * (1 + 2.0**-18)).all()


@settings(deadline=None)
@given(x=ARRAYS, granularity=st.sampled_from(GRANULARITIES))
def test_pow2_is_idempotent(x: np.ndarray, granularity: tuple[int, int]) -> None:
    """Quantising what was dequantised gives the same values back.

    Codes may only differ where a smaller scale now serves, which says the same with larger codes.
    Values that would round up to 2**128 are left out: their float32 form is infinite.
    """
    x = np.where(np.abs(x) < 2.0**127, x, 0).astype(np.float32)
    first = quantize(x, granularity, scale_format="pow2")
    values = first.dequantize()
    again = quantize(values, granularity, scale_format="pow2")
    np.testing.assert_array_equal(again.dequantize(), values)
    assert (again.scales <= first.scales).all() or (values == 0).any()


def test_largest_values_need_float64() -> None:
    x = np.full((1, 16), np.finfo(np.float32).max, np.float32)
    tensor = quantize(x, scale_format="pow2")
    assert (tensor.dequantize(np.float64) == 2.0**128).all()
    assert np.isposinf(tensor.dequantize()).all()


@settings(deadline=None)
@given(x=ARRAYS, granularity=st.sampled_from(GRANULARITIES))
def test_float32_scale_uses_the_whole_range(x: np.ndarray, granularity: tuple[int, int]) -> None:
    tensor = quantize(x, granularity)
    amax = np.abs(x.astype(np.float64))
    blocks = tensor.scales.shape
    for row, kb in np.ndindex(*blocks):
        rows = slice(row * granularity[0], (row + 1) * granularity[0])
        columns = slice(kb * 128, kb * 128 + 128)
        if amax[rows, columns].max() >= 2.0**-96:
            assert (codes_of(tensor)[rows, columns] & 0x7F).max() == 0x7E


@settings(deadline=None)
@given(x=ARRAYS, power=st.integers(-20, 20))
def test_pow2_scales_commute_with_powers_of_two(x: np.ndarray, power: int) -> None:
    x = np.where(np.abs(x) < 2.0**100, x, 0)
    x = np.where(np.abs(x) > 2.0**-60, x, 0).astype(np.float32)
    one = quantize(x, scale_format="pow2")
    other = quantize(x * np.float32(2.0**power), scale_format="pow2")
    np.testing.assert_array_equal(codes_of(one), codes_of(other))


# --------------------------------------------------------------------------------- shapes, layouts


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(144, 7), (32, 300), (2, 144, 20)])
def test_columns_are_rows_of_the_transpose(
    rng: np.random.Generator, shape: tuple[int, ...], scale_format: Any
) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    tensor = quantize(x, (128, 1), scale_format=scale_format)
    turned = quantize(np.ascontiguousarray(np.swapaxes(x, -1, -2)), scale_format=scale_format)
    assert tensor.granularity == (128, 1) and tensor.shape == shape
    np.testing.assert_array_equal(codes_of(tensor.T), codes_of(turned))
    np.testing.assert_array_equal(tensor.T.scales, turned.scales)
    again = quantize(np.swapaxes(np.swapaxes(x, -1, -2).copy(), -1, -2), (128, 1))
    np.testing.assert_array_equal(
        codes_of(again), codes_of(tensor) if scale_format == "float32" else codes_of(again)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_rows_are_read_in_place(rng: np.random.Generator, dtype: np.dtype) -> None:
    storage = rng.standard_normal((20, 400)).astype(dtype)
    view = storage[3:19, 16:288]
    np.testing.assert_array_equal(codes_of(quantize(view)), codes_of(quantize(view.copy())))


def test_groups_are_independent(rng: np.random.Generator) -> None:
    x = hard_values(rng, (3, 130, 144), np.dtype(np.float32))
    for granularity in GRANULARITIES:
        together = quantize(x, granularity)
        for group in range(3):
            alone = quantize(x[group], granularity)
            np.testing.assert_array_equal(codes_of(together)[group], codes_of(alone))
            np.testing.assert_array_equal(together.scales[group], alone.scales)


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 7, 16), (2, 0, 16)])
@pytest.mark.parametrize("granularity", [*GRANULARITIES, (128, 1)])
def test_empty_inputs(shape: tuple[int, ...], granularity: tuple[int, int]) -> None:
    if granularity == (128, 1) and shape[-2] % 16:
        shape = (*shape[:-2], 16, shape[-1])
    tensor = quantize(np.zeros(shape, np.float32), granularity)
    assert tensor.shape == shape and tensor.scales.shape == scale_shape(shape, granularity)


@pytest.mark.parametrize("granularity", [*GRANULARITIES, (128, 1)])
def test_out_is_filled_and_returned(rng: np.random.Generator, granularity: tuple[int, int]) -> None:
    x = rng.standard_normal((144, 272)).astype(np.float32)
    fresh = quantize(x, granularity)
    out = quantize(x * 3, granularity)
    assert quantize(x, granularity, out=out).data is not None
    np.testing.assert_array_equal(codes_of(out), codes_of(fresh))
    np.testing.assert_array_equal(out.scales, fresh.scales)


def test_out_may_have_padded_rows_which_stay(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 144)).astype(np.float32)
    data, scales = empty_codes((10, 176)), empty_scales(12, 2, (1, 128))
    data.view(np.uint8)[...] = 0xA5
    scales[...] = 7.0
    out = ScaledTensor(data[:9, :144], scales[:9], (1, 128))
    assert quantize(x, out=out) is out
    np.testing.assert_array_equal(codes_of(out), codes_of(quantize(x)))
    assert (data.view(np.uint8)[9] == 0xA5).all() and (data.view(np.uint8)[:, 144:] == 0xA5).all()
    assert (scales[9:] == 7.0).all()


# ------------------------------------------------------------------------------- rules, one by one

X = np.ones((16, 128), np.float32)


def test_rule_array() -> None:
    with pytest.raises(
        ArgumentTypeError, match=r"x: must be a NumPy, CuPy, torch or JAX .*; got list"
    ):
        quantize([[1.0] * 16])


@pytest.mark.parametrize("dtype", [np.float64, np.int8, FP8])
def test_rule_dtype(dtype: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"x: must have dtype float32, float16 or bfloat16"):
        quantize(X.astype(dtype))


@pytest.mark.parametrize("shape", [(16,), (1, 1, 16, 128)])
def test_rule_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="x: must have 2 axes"):
        quantize(np.ones(shape, np.float32))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rule_k_multiple_of_16(granularity: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match=r"x: its extent .* multiple of 16; got 24. Pad it"):
        quantize(np.ones((16, 24), np.float32), granularity)


def test_rule_rows_multiple_of_16_for_columns() -> None:
    with pytest.raises(ArgumentError, match=r"x: its extent .* multiple of 16; got 24"):
        quantize(np.ones((24, 128), np.float32), (128, 1))


def test_rule_contiguous_rows() -> None:
    with pytest.raises(ArgumentError, match="x: must have contiguous rows; got shape"):
        quantize(X.T)


def test_rule_granularity() -> None:
    with pytest.raises(ArgumentError, match="granularity: must be"):
        quantize(X, (1, 64))


def test_rule_scale_format() -> None:
    with pytest.raises(ArgumentError, match="scale_format: must be"):
        quantize(X, scale_format="fp32")  # type: ignore[arg-type]


def test_rule_out_type() -> None:
    with pytest.raises(ArgumentTypeError, match="out: must be a ScaledTensor; got ndarray"):
        quantize(X, out=X)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        quantize(X[:8]),
        quantize(X, (128, 128)),
        quantize(X, scale_format="pow2"),
    ],
    ids=["shape", "granularity", "format"],
)
def test_rule_out_matches(other: ScaledTensor) -> None:
    before = codes_of(other).copy()
    with pytest.raises(ArgumentError, match="out: must have the shape"):
        quantize(X * 2, out=other)
    np.testing.assert_array_equal(codes_of(other), before)


def test_rule_out_layout() -> None:
    out = quantize(np.ones((128, 16), np.float32), (128, 1)).T
    turned = ScaledTensor.from_arrays(np.zeros((128, 16), np.uint8).T, out.scales, (1, 128))
    with pytest.raises(ArgumentError, match="out: must have 16-byte aligned rows"):
        quantize(np.ones((16, 128), np.float32), out=turned)


@pytest.mark.parametrize("what", ["data", "scales"])
def test_rule_out_writable(what: str) -> None:
    out = quantize(X)
    getattr(out, what).flags.writeable = False
    with pytest.raises(ArgumentError, match=f"out: must be writable; got read-only {what}"):
        quantize(X, out=out)


def test_rule_out_overlap() -> None:
    memory = empty_codes((16, 1024)).view(np.uint8)
    memory[...] = 0
    x = memory.view(np.float32)[:, :128]
    out = ScaledTensor.from_arrays(memory[:, 512:640], quantize(X).scales, (1, 128))
    with pytest.raises(ArgumentError, match="out: must not overlap x; got data at 0x"):
        quantize(x, out=out)


# ----------------------------------------------------------------------------------- repeated calls


MODULE = sys.modules["cpgemm.quantize"]
TASK = MODULE._Task((1, 128), "float32", "numpy", None)


@pytest.fixture
def out() -> ScaledTensor:
    return quantize(X)


@pytest.fixture
def launched(out: ScaledTensor, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """``quantize(X, out=out)`` has a launch, which appends to this; addresses are signatures."""

    def signed(array: Any) -> Any:
        if isinstance(array, ScaledTensor):
            return signed(array.data), signed(array.scales), array.granularity
        return pointer(array), array.shape, array.strides

    monkeypatch.setattr(MODULE, "signature", signed)
    calls: list[str] = []
    MODULE._ready.put(MODULE._key(TASK._replace(subject=signed(X)), out), lambda: calls.append("X"))
    yield calls
    MODULE._ready.forget()
    MODULE._seen.clear()


def test_a_repeated_call_is_its_launch(launched: list[str], out: ScaledTensor) -> None:
    assert quantize(X, out=out) is out and launched == ["X"]
    assert quantize(X, [1, 128], scale_format="float32", out=out) is out  # type: ignore[arg-type]
    assert launched == ["X", "X"]
    forget_launches()
    assert quantize(X, out=out) is out and launched == ["X", "X"]


def test_another_call_is_not_taken_for_it(launched: list[str], out: ScaledTensor) -> None:
    other = quantize(X)
    quantize(X, out=other)
    quantize(X.copy(), out=out)
    quantize(X, scale_format="pow2")
    quantize(X, (128, 128))
    relabelled = ScaledTensor(out.data, out.scales, out.granularity, "pow2")
    quantize(X, scale_format="pow2", out=relabelled)
    for scale_format, into in (("float32", relabelled), ("pow2", out)):
        with pytest.raises(ArgumentError, match="out: must have the shape"):
            quantize(X, scale_format=scale_format, out=into)  # type: ignore[arg-type]
    assert not launched


def test_room_for_a_result_is_made_first(
    launched: list[str], out: ScaledTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODULE._seen.add(TASK._replace(subject=MODULE._signed(X)))
    rooms = [out, quantize(np.zeros_like(X))]
    monkeypatch.setattr(MODULE, "empty_scaled", lambda *_: rooms.pop(0))
    assert quantize(X) is out and launched == ["X"]
    made = quantize(X)  # in memory without a launch
    assert np.array_equal(codes_of(made), codes_of(out)) and launched == ["X"] and not rooms


def test_what_torch_refuses_has_no_signature(
    out: ScaledTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(array: Any) -> Any:
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    monkeypatch.setattr(MODULE, "signature", refuse)
    assert np.array_equal(codes_of(quantize(X)), codes_of(out))


# ------------------------------------------------------------------------------ kernels without GPU

CONFIGS = [
    QuantizeConfig(granularity, dtype, scale_format)
    for granularity in GRANULARITIES
    for dtype in INPUT_DTYPES
    for scale_format in FORMATS
]


def test_the_set_of_kernels() -> None:
    sources = list(quantize_sources())
    assert [source.name for source in sources] == [config.name for config in CONFIGS]
    assert len({source.digest for source in sources}) == 12
    assert {source.entry for source in sources} == {"quantize_rows", "quantize_blocks"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_kernel_compiles_without_spills(
    config: QuantizeConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpgemm.compiler import compile_kernel

    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    report = compile_kernel(config.source()).report
    assert report.stack_bytes == 0
    assert report.spill_store_bytes == report.spill_load_bytes == 0
    assert report.registers * config.threads * config.blocks_per_sm <= 65536


@pytest.mark.parametrize("config", CONFIGS[::2], ids=lambda config: config.name)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (130, 272), (17, 4112)])
def test_kernel_indices_cover_each_chunk_once(
    config: QuantizeConfig, rows: int, columns: int
) -> None:
    """The index arithmetic of the two templates, thread by thread."""
    elements = 16 // config.element_bytes
    lanes = 128 // elements
    taken = np.zeros((rows, columns), np.int32)
    tiles_x, tiles_y, _ = config.grid(1, rows, columns)
    thread = np.arange(config.threads)
    row_chunks = lanes if config.by_blocks else config.tile_columns // elements
    loads = config.tile_rows * row_chunks // config.threads
    for x in range(tiles_x):
        column = x * config.tile_columns + thread % row_chunks * elements
        for y in range(tiles_y):
            for i in range(loads):
                slot = thread // row_chunks
                rows_per_load = config.threads // row_chunks
                step = slot + i * rows_per_load if config.by_blocks else slot * loads + i
                row = y * config.tile_rows + step
                for r, c in zip(row, column, strict=True):
                    if r < rows and c < columns:
                        taken[r, c : c + elements] += 1
    assert (taken == 1).all()


@pytest.mark.parametrize("lanes", [16, 32])
def test_kernel_reduction_of_four_rows(rng: np.random.Generator, lanes: int) -> None:
    """reduce_four of quantize.cuh, step for step: lane i ends with the maximum of row i % 4."""
    peak = rng.random((4, 32)).astype(np.float32)
    lane = np.arange(32)
    odd, upper = (lane & 1) == 1, (lane & 2) == 2

    def exchange(value: np.ndarray, step: int) -> np.ndarray:
        return value[lane ^ step]

    even_row = np.maximum(
        np.where(odd, peak[1], peak[0]), exchange(np.where(odd, peak[0], peak[1]), 1)
    )
    odd_row = np.maximum(
        np.where(odd, peak[3], peak[2]), exchange(np.where(odd, peak[2], peak[3]), 1)
    )
    mine = np.maximum(
        np.where(upper, odd_row, even_row), exchange(np.where(upper, even_row, odd_row), 2)
    )
    step = 4
    while step < lanes:
        mine = np.maximum(mine, exchange(mine, step))
        step *= 2
    wanted = peak.reshape(4, -1, lanes).max(axis=2)
    np.testing.assert_array_equal(mine, wanted[lane % 4, lane // lanes])


# -------------------------------------------------------------------------------- kernels on a GPU

GUARD = 0xA5


def on_device(x: np.ndarray) -> Any:
    """A CuPy array with the bits of ``x`` (bfloat16 goes as uint16)."""
    import cupy

    unsigned = np.uint16 if x.dtype.itemsize == 2 else np.uint32
    return cupy.asarray(x.view(unsigned)).view(x.dtype)


def same_bits(device: ScaledTensor, host: ScaledTensor) -> None:
    np.testing.assert_array_equal(device.data.view(np.uint8).get(), codes_of(host))
    got = device.scales.get()
    np.testing.assert_array_equal(got.view(np.uint32), np.asarray(host.scales).view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [16, 144, 128, 7168, 7296])
@pytest.mark.parametrize("rows", [1, 7, 128, 129, 1000])
def test_gpu_equals_numpy(
    rng: np.random.Generator,
    rows: int,
    k: int,
    dtype: np.dtype,
    granularity: tuple[int, int],
    scale_format: Any,
) -> None:
    x = hard_values(rng, (rows, k), dtype)
    device = quantize(on_device(x), granularity, scale_format=scale_format)
    assert device.device.startswith("cuda") and device.is_k_major
    same_bits(device, quantize(x, granularity, scale_format=scale_format))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_clean_values_equal_numpy(
    rng: np.random.Generator, dtype: np.dtype, granularity: tuple[int, int]
) -> None:
    """Without NaN and infinity, which is the way that normal data take."""
    x = (rng.standard_normal((517, 2064)) * np.exp2(rng.uniform(-9, 9, (517, 1)))).astype(dtype)
    same_bits(quantize(on_device(x), granularity), quantize(x, granularity))


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", FORMATS)
def test_gpu_cast_near_all_midpoints(scale_format: Any) -> None:
    magnitudes = np.arange(0x7F, dtype=np.uint8).view(FP8).astype(np.float32)
    centres = np.concatenate([magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2])
    bits = centres.view(np.int32)[:, None] + np.arange(-64, 65, dtype=np.int32)
    values = np.unique(bits[bits >= 0]).astype(np.int32).view(np.float32)
    x = np.zeros((len(values), 16), np.float32)
    x[:, 0] = 448
    x[:, 1], x[:, 2] = np.minimum(values, 448), -np.minimum(values, 448)
    same_bits(
        quantize(on_device(x), scale_format=scale_format), quantize(x, scale_format=scale_format)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_gpu_divides_as_ieee_asks(
    rng: np.random.Generator, granularity: tuple[int, int], scale_format: Any
) -> None:
    """Random significands over all exponents: scales equal to the last bit."""
    rows = 4096 if granularity == (1, 128) else 128 * 32
    bits = rng.integers(0, 0x7F800000, (rows, 256), dtype=np.int64).astype(np.uint32)
    x = bits.view(np.float32).copy()
    x *= (rng.random((rows, 1)) < 0.9).astype(np.float32)
    x = (x * np.exp2(rng.integers(-120, 1, (rows, 1)))).astype(np.float32)
    same_bits(
        quantize(on_device(x), granularity, scale_format=scale_format),
        quantize(x, granularity, scale_format=scale_format),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 130, 272), (5, 7, 16), (1, 128, 1040)])
def test_gpu_groups(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    granularity: tuple[int, int],
) -> None:
    x = hard_values(rng, shape, dtype)
    same_bits(quantize(on_device(x), granularity), quantize(x, granularity))


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_columns(rng: np.random.Generator, dtype: np.dtype, scale_format: Any) -> None:
    x = hard_values(rng, (144, 300), dtype)
    device = quantize(on_device(x), (128, 1), scale_format=scale_format)
    same_bits(device.T, quantize(x, (128, 1), scale_format=scale_format).T)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 144), (129, 528), (1000, 7296), (2, 130, 272)])
def test_gpu_guard_bands_stay(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: np.dtype,
    granularity: tuple[int, int],
) -> None:
    """Memory before, behind and between the rows of data and scales is not touched."""
    import cupy

    *outer, rows, k = shape
    x = hard_values(rng, shape, dtype)
    padded_x = np.full((*outer, rows + 2, k + 32), 7, dtype)
    padded_x[..., 1 : rows + 1, 16 : k + 16] = x
    window = on_device(padded_x)[..., 1 : rows + 1, 16 : k + 16]
    memory = cupy.asarray(np.full((*outer, rows + 4, k + 64), GUARD, np.uint8))
    data = np.s_[..., 2 : rows + 2, 32 : k + 32]
    scale_rows, kblocks = scale_shape(shape, granularity)[-2:]
    if granularity == (1, 128):
        pitch = -(-scale_rows // 4) * 4 + 8
        store = cupy.asarray(np.full((*outer, kblocks + 2, pitch), -7.0, np.float32))
        inner: Any = np.s_[..., 1 : kblocks + 1, 4 : 4 + scale_rows]
        scales = store[inner].swapaxes(-1, -2)
    else:
        count = int(np.prod([*outer, scale_rows, kblocks]))
        store = cupy.asarray(np.full(count + 8, -7.0, np.float32))
        inner = np.s_[4 : 4 + count]
        scales = store[inner].reshape(*outer, scale_rows, kblocks)
    out = ScaledTensor(memory[data].view(FP8), scales, granularity)
    assert quantize(window, granularity, out=out) is out
    same_bits(out, quantize(x, granularity))
    codes_now, scales_now = memory.get(), store.get()
    codes_now[data] = GUARD
    scales_now[inner] = -7.0
    assert (codes_now == GUARD).all() and (scales_now == -7.0).all()


@pytest.mark.gpu
def test_gpu_many_rows_go_round_the_grid(rng: np.random.Generator) -> None:
    """More row tiles than a grid has: 65535 x 16 rows and a few more."""
    x = rng.standard_normal((65535 * 16 + 37, 16), np.float32)
    same_bits(quantize(on_device(x)), quantize(x))


@pytest.mark.gpu
def test_gpu_allocates_data_and_scales_only(rng: np.random.Generator) -> None:
    import cupy

    x = cupy.zeros((512, 1024), np.float32)
    out = quantize(x)  # loads the kernel
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    result = quantize(x)
    assert pool.used_bytes() - before == result.data.nbytes + result.scales.nbytes
    taken = pool.used_bytes()
    quantize(x, out=out)
    assert pool.used_bytes() == taken


@pytest.mark.gpu
def test_gpu_runs_on_the_current_stream(rng: np.random.Generator) -> None:
    import cupy

    x = hard_values(rng, (256, 1024), np.dtype(np.float32))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        device = quantize(on_device(x))
        stream.synchronize()
        same_bits(device, quantize(x))


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_gpu_a_repeated_call_is_ready_and_right(rng: np.random.Generator, library: str) -> None:
    x: Any = on_device(np.zeros((37, 272), np.float32))
    if library == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        if not torch.cuda.is_available():
            pytest.skip("torch has no CUDA device")
        x = torch.zeros((37, 272), device="cuda")
    for scale_format in FORMATS:
        out = quantize(x, scale_format=scale_format)
        quantize(x, scale_format=scale_format, out=out)
        before = len(MODULE._ready)
        for reused in (True, True, True, False, False, False):
            values = hard_values(rng, (37, 272), np.dtype(np.float32))
            as_native("x", x).set(values)
            out.data.view(np.uint8)[...] = 0
            if reused:
                assert quantize(x, scale_format=scale_format, out=out) is out
            else:
                del out  # whose memory the next result may get
                out = quantize(x, scale_format=scale_format)
            assert out.framework == library and out.scale_format == scale_format
            same_bits(out, quantize(values, scale_format=scale_format))
            if reused:
                assert len(MODULE._ready) == before
        relabelled = ScaledTensor(out.data, out.scales, (1, 128), "float32", out.framework)
        if scale_format == "pow2":
            with pytest.raises(ArgumentError, match="out: must have the shape"):
                quantize(x, scale_format="pow2", out=relabelled)


@pytest.mark.gpu
def test_gpu_a_tensor_without_memory_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    with pytest.raises(ArgumentError, match=r"^x: must be a tensor with strides"):
        quantize(torch.eye(16, device="cuda").to_sparse())


@pytest.mark.gpu
def test_gpu_rule_alignment() -> None:
    import cupy

    x = cupy.ones((8, 160), np.float32)
    with pytest.raises(ArgumentError, match="x: its address and its row and group pitches must"):
        quantize(x[:, 1:145])
    odd = cupy.ones((8, 146), np.float32)
    assert pointer(odd) % 16 == 0
    with pytest.raises(ArgumentError, match="x: its address and its row and group pitches must"):
        quantize(odd[:, :144])


@pytest.mark.gpu
def test_gpu_rule_out_device() -> None:
    import cupy

    with pytest.raises(ArgumentError, match=r"out: must have the shape .* device 'cuda:0'"):
        quantize(cupy.ones((16, 128), np.float32), out=quantize(X))
