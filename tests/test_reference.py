"""The NumPy semantics against float64, with bounds that follow from float32 rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.reference import exact_product, gemm_reference
from cpgemm.scaled import ScaledTensor, scale_shape

BF16 = np.dtype(ml_dtypes.bfloat16)
U32 = 2.0**-24  # unit roundoff of float32
U16 = 2.0**-8  # unit roundoff of bfloat16: 8 significant bits, round to nearest


def make(rng: np.random.Generator, rows: int, k: int, granularity: tuple[int, int]) -> ScaledTensor:
    codes = rng.integers(0, 256, (rows, k), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38
    scales = np.exp2(rng.uniform(-12, 4, scale_shape((rows, k), granularity))).astype(np.float32)
    return ScaledTensor.from_arrays(codes, scales, granularity)


def magnitude(tensor: ScaledTensor) -> ScaledTensor:
    codes = tensor.data.view(np.uint8) & 0x7F
    return ScaledTensor.from_arrays(codes, tensor.scales, tensor.granularity)


def rounding_bound(a: ScaledTensor, b: ScaledTensor) -> np.ndarray:
    """Largest error that float32 rounding allows.

    A product of two e4m3 codes has 8 significant bits and is exact.  The sum of 128 of them rounds
    127 times, in whatever order; the product of the scales, its product with the partial sum and
    the sum over k-blocks round 1 + 1 + KB times.  Each rounding is at most one unit roundoff of a
    number that is at most sum |a||b|; second-order terms fit in the factor 1.01.
    """
    kblocks = -(-a.shape[1] // 128)
    return 1.01 * (127 + 2 + kblocks) * U32 * exact_product(magnitude(a), magnitude(b))


@pytest.mark.parametrize("b_granularity", [(128, 128), (1, 128)])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 16), (7, 136, 128), (129, 200, 144), (64, 576, 7296), (1100, 1096, 272)],
)
def test_float32_within_rounding_of_float64(
    rng: np.random.Generator, m: int, n: int, k: int, b_granularity: tuple[int, int]
) -> None:
    a, b = make(rng, m, k, (1, 128)), make(rng, n, k, b_granularity)
    exact = exact_product(a, b)
    got = gemm_reference(a, b, out_dtype="float32")
    assert got.shape == (m, n) and got.dtype == np.float32 and got.flags.c_contiguous
    assert (np.abs(got - exact) <= rounding_bound(a, b)).all()


def test_bfloat16_is_one_more_rounding(rng: np.random.Generator) -> None:
    a, b = make(rng, 65, 400, (1, 128)), make(rng, 136, 400, (128, 128))
    single = gemm_reference(a, b, out_dtype="float32")
    got = gemm_reference(a, b)
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, single.astype(BF16), strict=True)
    error = np.abs(got.astype(np.float64) - exact_product(a, b))
    assert (error <= U16 * np.abs(single) + rounding_bound(a, b)).all()


def test_formula_element_by_element(rng: np.random.Generator) -> None:
    """Powers of two and small integers leave nothing to round, so every path must agree exactly."""
    m, n, k = 5, 136, 272
    codes_a = rng.integers(-4, 5, (m, k)).astype(ml_dtypes.float8_e4m3fn)
    codes_b = rng.integers(-4, 5, (n, k)).astype(ml_dtypes.float8_e4m3fn)
    scales_a = np.exp2(rng.integers(-3, 4, (m, 3))).astype(np.float32)
    scales_b = np.exp2(rng.integers(-3, 4, (2, 3))).astype(np.float32)
    c = rng.integers(-8, 9, (m, n)).astype(np.float32)
    wanted = c.copy()
    for row in range(m):
        for column in range(n):
            for kb in range(3):
                ks = slice(kb * 128, (kb + 1) * 128)
                dot = codes_a[row, ks].astype(np.float32) @ codes_b[column, ks].astype(np.float32)
                wanted[row, column] += scales_a[row, kb] * scales_b[column // 128, kb] * dot
    a = ScaledTensor.from_arrays(codes_a, scales_a, (1, 128))
    b = ScaledTensor.from_arrays(codes_b, scales_b, (128, 128))
    np.testing.assert_array_equal(gemm_reference(a, b, c=c, out_dtype="float32"), wanted)
    np.testing.assert_array_equal(exact_product(a, b) + c, wanted)


@pytest.mark.parametrize("c_dtype", [np.float32, BF16])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_c_is_added_last_and_untouched(
    rng: np.random.Generator, c_dtype: np.dtype, out_dtype: str
) -> None:
    a, b = make(rng, 33, 144, (1, 128)), make(rng, 40, 144, (128, 128))
    c = rng.standard_normal((33, 40)).astype(c_dtype)
    kept = c.copy()
    wanted = gemm_reference(a, b, out_dtype="float32") + c.astype(np.float32)
    got = gemm_reference(a, b, c=c, out_dtype=out_dtype)
    np.testing.assert_array_equal(got, wanted.astype(got.dtype))
    np.testing.assert_array_equal(c, kept)


@pytest.mark.parametrize("shape", [(0, 8, 16), (8, 0, 16), (3, 8, 0), (0, 0, 0)])
def test_empty_extents(rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = make(rng, m, k, (1, 128)), make(rng, n, k, (128, 128))
    assert exact_product(a, b).shape == (m, n)
    np.testing.assert_array_equal(gemm_reference(a, b), np.zeros((m, n), BF16), strict=True)
    c = rng.standard_normal((m, n)).astype(np.float32)
    got = gemm_reference(a, b, c=c, out_dtype="float32")
    np.testing.assert_array_equal(got, c if k == 0 else c[:m, :n], strict=True)


def test_exact_product_is_the_dequantised_product(rng: np.random.Generator) -> None:
    a, b = make(rng, 130, 400, (1, 128)), make(rng, 264, 400, (128, 128))
    wanted = a.dequantize(np.float64) @ b.dequantize(np.float64).T
    bound = 400 * 2.0**-53 * exact_product(magnitude(a), magnitude(b))
    assert (np.abs(exact_product(a, b) - wanted) <= 2 * bound).all()


def test_transposed_data_needs_no_copy(rng: np.random.Generator) -> None:
    k_by_n = make(rng, 144, 40, (128, 128))
    a = make(rng, 5, 144, (1, 128))
    np.testing.assert_array_equal(
        gemm_reference(a, k_by_n.T), gemm_reference(a, k_by_n.T.k_major())
    )


def test_nan_reaches_its_row_only() -> None:
    codes = np.full((2, 16), 0x38, np.uint8)
    codes[1, 3] = 0x7F
    a = ScaledTensor.from_arrays(codes, np.ones((2, 1), np.float32), (1, 128))
    b = ScaledTensor.from_arrays(
        np.full((8, 16), 0x38, np.uint8), np.ones((1, 1), np.float32), (128, 128)
    )
    got = gemm_reference(a, b, out_dtype="float32")
    assert (got[0] == 16).all() and np.isnan(got[1]).all()


# ------------------------------------------------------------------------------- rules, one by one


@pytest.fixture
def operands(rng: np.random.Generator) -> tuple[ScaledTensor, ScaledTensor]:
    return make(rng, 4, 128, (1, 128)), make(rng, 8, 128, (128, 128))


def test_rule_operand_type(operands: tuple[ScaledTensor, ScaledTensor]) -> None:
    with pytest.raises(ArgumentTypeError, match="b: must be a ScaledTensor; got ndarray"):
        gemm_reference(operands[0], np.ones((8, 128)))  # type: ignore[arg-type]


def test_rule_two_axes(operands: tuple[ScaledTensor, ScaledTensor]) -> None:
    grouped = ScaledTensor.from_arrays(
        np.zeros((2, 4, 128), np.uint8), np.ones((2, 4, 1), np.float32), (1, 128)
    )
    with pytest.raises(ArgumentError, match="a: must have 2 axes; got shape"):
        gemm_reference(grouped, operands[1])


def test_rule_granularity(rng: np.random.Generator) -> None:
    with pytest.raises(ArgumentError, match=r"a: must have granularity \(1, 128\) or"):
        gemm_reference(make(rng, 128, 128, (128, 1)), make(rng, 8, 128, (128, 128)))


def test_rule_common_k(rng: np.random.Generator) -> None:
    with pytest.raises(ArgumentError, match=r"b: must have the K of a \(128\); got shape \(8, 144"):
        exact_product(make(rng, 4, 128, (1, 128)), make(rng, 8, 144, (128, 128)))


def test_rule_c_dtype(operands: tuple[ScaledTensor, ScaledTensor]) -> None:
    with pytest.raises(ArgumentTypeError, match="c: must be a bfloat16 or float32 NumPy array"):
        gemm_reference(*operands, c=np.zeros((4, 8)))


def test_rule_c_shape(operands: tuple[ScaledTensor, ScaledTensor]) -> None:
    with pytest.raises(ArgumentError, match=r"c: must have shape \(4, 8\); got shape \(8, 4\)"):
        gemm_reference(*operands, c=np.zeros((8, 4), np.float32))


@pytest.mark.parametrize("out_dtype", ["float16", np.float64, None, 3])
def test_rule_out_dtype(operands: tuple[ScaledTensor, ScaledTensor], out_dtype: object) -> None:
    with pytest.raises(ArgumentTypeError, match="out_dtype: must be 'bfloat16' or 'float32'"):
        gemm_reference(*operands, out_dtype=out_dtype)


@pytest.mark.parametrize("out_dtype", [np.float32, np.dtype(np.float32), BF16, ml_dtypes.bfloat16])
def test_out_dtype_objects(operands: tuple[ScaledTensor, ScaledTensor], out_dtype: object) -> None:
    assert gemm_reference(*operands, out_dtype=out_dtype).dtype == out_dtype


@pytest.mark.gpu
def test_rule_numpy_only(operands: tuple[ScaledTensor, ScaledTensor]) -> None:
    import cupy

    a = ScaledTensor.from_arrays(
        cupy.zeros((4, 128), np.uint8), cupy.ones((4, 1), np.float32), (1, 128)
    )
    with pytest.raises(ArgumentError, match="a: must hold NumPy arrays; got cuda:"):
        gemm_reference(a, operands[1])
