"""ScaledTensor: layouts, views, zero-copy wrapping, dequantisation and every validation rule."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.scaled import (
    FP8,
    ScaledTensor,
    array_module,
    byte_range,
    device_of,
    empty_codes,
    empty_scales,
    fp8_view,
    is_array,
    is_cupy,
    pointer,
    scale_pitch,
    scale_shape,
)

SHAPES = [(1, 16), (7, 128), (128, 144), (130, 384), (3, 5, 256), (2, 129, 272)]
GRANULARITIES = [(1, 128), (128, 128), (128, 1)]


def finite_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38
    return codes


def make(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> ScaledTensor:
    scales = rng.uniform(0.01, 2, scale_shape(shape, granularity)).astype(np.float32)
    return ScaledTensor.from_arrays(finite_codes(rng, shape), scales, granularity)


def expanded_scales(tensor: ScaledTensor) -> np.ndarray:
    """One scale for each element, the slow and obvious way."""
    rows, columns = tensor.shape[-2:]
    by_row = np.repeat(tensor.scales, tensor.granularity[0], axis=-2)[..., :rows, :]
    return np.repeat(by_row, tensor.granularity[1], axis=-1)[..., :columns]


# -------------------------------------------------------------------------------- array helpers


def test_helpers_on_numpy() -> None:
    x = np.zeros((4, 6), np.float32)
    assert not is_cupy(x) and is_array(x) and not is_array([1.0])
    assert array_module(x) is np and device_of(x) == "cpu"
    assert pointer(x) == x.ctypes.data
    assert byte_range(x) == (pointer(x), pointer(x) + 96)
    assert byte_range(x[::-1, 1:3]) == (pointer(x) + 4, pointer(x) + 84)
    assert byte_range(x[:0]) == (0, 0)


def test_fp8_view_shares_memory() -> None:
    codes = np.array([[0x38, 0xB8, 0x7E]], np.uint8)
    assert np.shares_memory(fp8_view(codes), codes)
    np.testing.assert_array_equal(fp8_view(codes).astype(np.float32), [[1.0, -1.0, 448.0]])
    assert fp8_view(codes.T).strides == codes.T.strides


@pytest.mark.parametrize(("rows", "pitch"), [(0, 0), (1, 4), (4, 4), (5, 8), (1000, 1000)])
def test_scale_pitch(rows: int, pitch: int) -> None:
    assert scale_pitch(rows) == pitch


def test_scale_shape() -> None:
    assert scale_shape((130, 272), (1, 128)) == (130, 3)
    assert scale_shape((130, 272), (128, 128)) == (2, 3)
    assert scale_shape((5, 130, 272), (128, 1)) == (5, 2, 272)
    assert scale_shape((0, 16), (128, 128)) == (0, 1)


@pytest.mark.parametrize("groups", [None, 3])
def test_empty_scales_layouts(groups: int | None) -> None:
    outer = () if groups is None else (groups,)
    rows_fastest = empty_scales(5, 3, (1, 128), groups=groups)
    assert rows_fastest.shape == (*outer, 5, 3) and rows_fastest.dtype == np.float32
    assert rows_fastest.strides[-2:] == (4, 8 * 4) and pointer(rows_fastest) % 16 == 0
    transposed = empty_scales(3, 5, (128, 1), groups=groups)
    assert transposed.shape == (*outer, 3, 5) and transposed.strides[-2:] == (8 * 4, 4)
    blocks = empty_scales(5, 3, (128, 128), groups=groups)
    assert blocks.shape == (*outer, 5, 3) and blocks.flags.c_contiguous
    if groups:
        assert rows_fastest.strides[0] == 3 * 8 * 4


def test_empty_codes_pads_rows_to_16_bytes() -> None:
    codes = empty_codes((3, 20))
    assert codes.shape == (3, 20) and codes.dtype == FP8
    assert codes.strides == (32, 1) and pointer(codes) % 16 == 0


# ----------------------------------------------------------------------------- from_arrays, views


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_in_layout_are_shared(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> None:
    codes = finite_codes(rng, shape)
    groups = shape[0] if len(shape) == 3 else None
    scales = empty_scales(*scale_shape(shape, granularity)[-2:], granularity, groups=groups)
    scales[...] = 1.0
    tensor = ScaledTensor.from_arrays(codes, scales, granularity)
    assert tensor.scales is scales
    assert np.shares_memory(tensor.data, codes) and tensor.data.dtype == FP8
    assert tensor.shape == shape and tensor.ndim == len(shape) and tensor.device == "cpu"
    assert tensor.nbytes == codes.nbytes + scales.nbytes
    assert tensor.is_k_major and tensor.k_major() is tensor


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_other_scale_layouts_are_copied(
    rng: np.random.Generator, granularity: tuple[int, int]
) -> None:
    shape = (2, 261, 400)
    codes = finite_codes(rng, shape)
    wanted = rng.uniform(1, 2, scale_shape(shape, granularity)).astype(np.float32)
    storage = np.zeros((*wanted.shape[:-1], wanted.shape[-1] * 2), np.float32)
    storage[..., ::2] = wanted
    tensor = ScaledTensor.from_arrays(codes, storage[..., ::2], granularity)
    assert np.shares_memory(tensor.data, codes)
    assert not np.shares_memory(tensor.scales, storage)
    np.testing.assert_array_equal(tensor.scales, wanted)
    assert tensor.is_k_major


def test_misaligned_scale_base_is_copied(rng: np.random.Generator) -> None:
    storage = empty_scales(9, 2, (1, 128))
    storage[...] = 1.0
    tensor = ScaledTensor.from_arrays(finite_codes(rng, (8, 256)), storage[1:], (1, 128))
    assert not np.shares_memory(tensor.scales, storage)


def test_fp8_data_is_accepted_as_it_is(rng: np.random.Generator) -> None:
    data = fp8_view(finite_codes(rng, (8, 128)))
    assert ScaledTensor.from_arrays(data, np.ones((8, 1), np.float32), (1, 128)).data is data


def test_padded_rows_need_no_copy(rng: np.random.Generator) -> None:
    storage = empty_codes((8, 256))
    storage.view(np.uint8)[...] = 0x38
    tensor = ScaledTensor.from_arrays(storage[:, :144], np.ones((8, 2), np.float32), (1, 128))
    assert tensor.k_major() is tensor


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transpose_shares_memory_and_returns(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> None:
    tensor = make(rng, shape, granularity)
    turned = tensor.T
    assert turned.shape == (*shape[:-2], shape[-1], shape[-2])
    assert turned.granularity == granularity[::-1]
    assert turned.scale_format == tensor.scale_format
    assert np.shares_memory(turned.data, tensor.data)
    assert np.shares_memory(turned.scales, tensor.scales)
    np.testing.assert_array_equal(
        turned.dequantize(), np.swapaxes(tensor.dequantize(), -1, -2), strict=True
    )
    assert turned.T.data.strides == tensor.data.strides
    assert turned.T.scales.strides == tensor.scales.strides


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(48, 144), (130, 384), (2, 20, 272)])
def test_k_major_copies_a_transpose(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> None:
    turned = make(rng, shape, granularity).T
    copy = turned.k_major()
    assert not turned.is_k_major and copy.is_k_major
    assert copy.data.strides[-1] == 1
    assert all(stride % 16 == 0 for stride in copy.data.strides[:-1])
    assert pointer(copy.data) % 16 == 0
    assert copy.granularity == turned.granularity
    np.testing.assert_array_equal(copy.data.view(np.uint8), turned.data.view(np.uint8))
    np.testing.assert_array_equal(copy.scales, turned.scales)


def test_k_major_mends_an_unaligned_row_pitch(rng: np.random.Generator) -> None:
    tensor = make(rng, (5, 24), (1, 128))
    copy = tensor.k_major()
    assert copy is not tensor and copy.data.strides == (32, 1)
    np.testing.assert_array_equal(copy.dequantize(), tensor.dequantize())


def test_scales_pitch(rng: np.random.Generator) -> None:
    assert make(rng, (5, 256), (1, 128)).scales_pitch == 8
    assert make(rng, (5, 128), (1, 128)).scales_pitch == 8  # one k-block: nothing to measure
    assert make(rng, (256, 5), (128, 1)).scales_pitch == 8
    blocks = make(rng, (256, 384), (128, 128))
    assert blocks.scales_pitch == 3 and blocks.T.scales_pitch == 3
    wide = empty_scales(12, 2, (1, 128))[:5]
    wide[...] = 1.0
    tensor = ScaledTensor.from_arrays(finite_codes(rng, (5, 256)), wide, (1, 128))
    assert tensor.scales_pitch == 12


# --------------------------------------------------------------------------------- dequantisation


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_code_times_scale(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> None:
    tensor = make(rng, shape, granularity)
    codes, scales = tensor.data.astype(np.float32), expanded_scales(tensor)
    got = tensor.dequantize()
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, codes * scales, strict=True)
    exact = codes.astype(np.float64) * scales.astype(np.float64)
    np.testing.assert_array_equal(tensor.dequantize(np.float64), exact, strict=True)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        got = tensor.dequantize(dtype)
        np.testing.assert_array_equal(got, (codes * scales).astype(dtype), strict=True)


@pytest.mark.parametrize("shape", [(0, 128), (8, 0), (0, 8, 128), (2, 0, 16)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_empty_tensors(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> None:
    tensor = make(rng, shape, granularity)
    assert tensor.dequantize().shape == shape
    assert tensor.T.k_major().shape == tensor.T.shape
    assert tensor.data.size == 0


def test_nan_codes_dequantize_to_nan() -> None:
    codes = np.full((1, 16), 0x7F, np.uint8)
    tensor = ScaledTensor.from_arrays(codes, np.ones((1, 1), np.float32), (1, 128))
    assert np.isnan(tensor.dequantize()).all()


def test_repr_names_what_matters(rng: np.random.Generator) -> None:
    text = repr(make(rng, (130, 256), (1, 128)))
    assert "(130, 256)" in text and "(1, 128)" in text and "cpu" in text and "K-major" in text


def test_tensors_compare_by_identity_and_are_frozen(rng: np.random.Generator) -> None:
    tensor = make(rng, (1, 16), (1, 128))
    assert tensor == tensor and tensor != make(rng, (1, 16), (1, 128))
    with pytest.raises(AttributeError):
        tensor.data = None  # type: ignore[misc]


# ------------------------------------------------------------------------------- rules, one by one

ONE = np.ones((8, 2), np.float32)
CODES = np.zeros((8, 256), np.uint8)


def test_rule_data_must_be_an_array() -> None:
    with pytest.raises(
        ArgumentTypeError, match=r"data: must be a NumPy, CuPy, torch or JAX .*; got list"
    ):
        ScaledTensor.from_arrays([[1]], ONE, (1, 128))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.float8_e5m2, np.int8])
def test_rule_data_dtype(dtype: type) -> None:
    with pytest.raises(ArgumentTypeError, match=r"data: must have dtype float8_e4m3fn; got"):
        ScaledTensor.from_arrays(CODES.astype(dtype), ONE, (1, 128))


def test_rule_constructor_takes_no_uint8() -> None:
    with pytest.raises(ArgumentTypeError, match=r"got uint8.*from_arrays"):
        ScaledTensor(CODES, ONE, (1, 128))


@pytest.mark.parametrize("shape", [(256,), (1, 1, 8, 256)])
def test_rule_data_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"data: must have 2 axes .* or 3 axes"):
        ScaledTensor.from_arrays(np.zeros(shape, np.uint8), ONE, (1, 128))


@pytest.mark.parametrize(
    "view",
    [
        lambda codes: codes[:, ::2],
        lambda codes: codes[::-1, :128],
        lambda codes: np.broadcast_to(codes[:1, :128], (8, 128)),
        lambda codes: np.broadcast_to(codes[None, :, :128], (2, 8, 128)),
        lambda codes: codes.reshape(8, 2, 128).transpose(1, 0, 2)[::-1],
    ],
    ids=["strided", "reversed", "rows overlap", "groups overlap", "groups interleaved"],
)
def test_rule_data_contiguity(view: object) -> None:
    data = view(CODES)  # type: ignore[operator]
    scales = np.ones(scale_shape(data.shape, (1, 128)), np.float32)
    with pytest.raises(ArgumentError, match=r"data: must be contiguous along one of its last two"):
        ScaledTensor.from_arrays(data, scales, (1, 128))


@pytest.mark.parametrize("granularity", [(1, 64), (128, 2), (1, 128, 1), "1x128", None, 128])
def test_rule_granularity(granularity: object) -> None:
    with pytest.raises(ArgumentError, match=r"granularity: must be \(1, 128\), \(128, 128\) or"):
        ScaledTensor.from_arrays(CODES, ONE, granularity)  # type: ignore[arg-type]


def test_granularity_may_be_a_list() -> None:
    assert ScaledTensor.from_arrays(CODES, ONE, [1, 128]).granularity == (1, 128)  # type: ignore[arg-type]


def test_rule_scale_format() -> None:
    with pytest.raises(ArgumentError, match=r"scale_format: must be 'float32' or 'pow2'; got 'e8"):
        ScaledTensor.from_arrays(CODES, ONE, (1, 128), scale_format="e8m0")  # type: ignore[arg-type]


def test_rule_scales_must_be_an_array() -> None:
    with pytest.raises(
        ArgumentTypeError, match=r"scales: must be a NumPy, CuPy, torch or JAX .*; got float"
    ):
        ScaledTensor.from_arrays(CODES, 1.0, (1, 128))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, ">f4"])
def test_rule_scales_dtype(dtype: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"scales: must have dtype float32; got"):
        ScaledTensor.from_arrays(CODES, ONE.astype(dtype), (1, 128))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 1), (2, 8), (8, 2, 1), (16,)])
def test_rule_scales_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"scales: must have shape \(8, 2\) for data of shape"):
        ScaledTensor.from_arrays(CODES, np.ones(shape, np.float32), (1, 128))


def test_rule_scales_layout_rows() -> None:
    with pytest.raises(ArgumentError, match=r"scales: must be rows-fastest.*from_arrays copies"):
        ScaledTensor(fp8_view(CODES), ONE, (1, 128))


def test_rule_scales_layout_columns() -> None:
    scales = np.asfortranarray(np.ones((1, 256), np.float32).repeat(2, 0))
    with pytest.raises(ArgumentError, match=r"scales: must be the transpose of rows-fastest"):
        ScaledTensor(fp8_view(np.zeros((256, 256), np.uint8)), scales, (128, 1))


def test_rule_scales_layout_blocks() -> None:
    scales = np.ones((4, 6), np.float32)[::2, ::3]
    with pytest.raises(ArgumentError, match=r"scales: must be row-major and contiguous"):
        ScaledTensor(fp8_view(np.zeros((256, 256), np.uint8)), scales, (128, 128))


@pytest.mark.parametrize("dtype", [np.int32, "no such dtype", FP8])
def test_rule_dequantize_dtype(rng: np.random.Generator, dtype: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"dtype: must be float32, float64, float16 or"):
        make(rng, (1, 16), (1, 128)).dequantize(dtype)


# --------------------------------------------------------------------------------------- with CuPy


@pytest.mark.gpu
def test_rule_one_device(rng: np.random.Generator) -> None:
    import cupy

    codes = cupy.asarray(finite_codes(rng, (8, 256)))
    with pytest.raises(ArgumentError, match=r"scales: must be where data is \(cuda:0\); got cpu"):
        ScaledTensor.from_arrays(codes, ONE, (1, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cupy_agrees_with_numpy(
    rng: np.random.Generator, shape: tuple[int, ...], granularity: tuple[int, int]
) -> None:
    import cupy

    host = make(rng, shape, granularity)
    codes = cupy.asarray(host.data.view(np.uint8))
    device = ScaledTensor.from_arrays(codes, cupy.asarray(host.scales), granularity)
    assert device.device == f"cuda:{codes.device.id}" and device.is_k_major
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        got = device.dequantize(dtype)
        np.testing.assert_array_equal(got.get(), host.dequantize(dtype), strict=True)
    copy = device.T.k_major()
    np.testing.assert_array_equal(copy.data.view(np.uint8).get(), host.T.data.view(np.uint8))
    np.testing.assert_array_equal(copy.scales.get(), host.T.scales)
