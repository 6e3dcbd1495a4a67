"""The GEMMs on the sizes that matter: DeepSeek-V3's 18 dense rows, odd sizes, long K.

Runs as a script too: ``python tests/test_core.py`` takes the grouped products (test_grouped.py)
along.  Without a Hopper GPU the NumPy path runs on smaller sizes and the GPU rows are skipped,
visibly.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before cpgemm is imported: a script sees its own folder only
    import pytest

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    grouped = Path(__file__).with_name("test_grouped.py")
    raise SystemExit(pytest.main([__file__, str(grouped), "-q", "-ra", *sys.argv[1:]]))

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import (
    CUT,
    DENSE_SHAPES,
    assert_close,
    assert_guards_intact,
    guarded,
    operands,
    widen,
)

import cpgemm

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(("n", "k"), DENSE_SHAPES)
def test_dense_shapes_on_numpy(rng, n, k):
    n, k = n // 16 // 8 * 8, k // 4
    a, b = operands(rng, 16, n, k)
    assert_close(cpgemm.gemm(a, b), a, b)


def test_long_k_does_not_drift_on_numpy(rng):
    _check_drift(rng, np)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [64, 128, 4096])
@pytest.mark.parametrize(("n", "k"), DENSE_SHAPES)
def test_dense_shapes(rng, m, n, k):
    import cupy as cp

    a, b = operands(rng, m, n, k, cp)
    poison, out = guarded(m, n, BF16, cp)
    assert cpgemm.gemm(a, b, out) is out
    assert_close(out, a, b)
    assert_guards_intact(poison, m, n)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [16, 144, 7296])
@pytest.mark.parametrize("n", [8, 576, 2112, 129280])
@pytest.mark.parametrize("m", [1, 7, 129, 4097])
def test_odd_sizes(rng, m, n, k):
    import cupy as cp

    a, b = operands(rng, m, n, k, cp)
    poison, out = guarded(m, n, BF16, cp)
    cpgemm.gemm(a, b, out)
    assert_guards_intact(poison, m, n)
    rows = rng.permutation(m)[:64]  # the exact product of all of 4097 x 129280 takes minutes
    codes, bits = a.data.view(cp.uint8)[rows], out.view(cp.uint16)[rows]
    part = cpgemm.ScaledTensor.from_arrays(codes, a.scales[rows], (1, 128))
    assert_close(bits.view(BF16), part, b, norm=m * n > 1000)
    assert not bool((out.view(cp.uint16) == 0xFFFF).any()), "an element was never written"


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["float32", "pow2"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_float32_output(rng, accumulate, scale_format):
    import cupy as cp

    for m, n, k in ((64, 2112, 7168), (1000, 4096, 2048)):
        a, b = operands(rng, m, n, k, cp, scale_format)
        c = cp.asarray(rng.standard_normal((m, n), dtype=np.float32)) if accumulate else None
        poison, out = guarded(m, n, np.float32, cp)
        cpgemm.gemm(a, b, out, c=c)
        assert_close(out, a, b, c)
        assert_guards_intact(poison, m, n)


@pytest.mark.gpu
def test_poisoned_rows_do_not_leak(rng):
    """NaN codes and scales around the operands, where tiles and boxes hang over, stay outside."""
    import cupy as cp

    m, n, k = 77, 200, 272
    a, b = operands(rng, m, n, k, cp)
    codes_a = cp.full((m + 300, k + 128), 0x7F, cp.uint8)
    codes_b = cp.full((n + 300, k + 128), 0x7F, cp.uint8)
    codes_a[:m, :k] = a.data.view(cp.uint8)
    codes_b[:n, :k] = b.data.view(cp.uint8)
    scales = cp.full((8, 512), cp.nan, cp.float32)
    scales[: a.scales.shape[1], :m] = a.scales.T
    poisoned_a = cpgemm.ScaledTensor.from_arrays(
        codes_a[:m, :k], scales[: a.scales.shape[1], :m].T, (1, 128)
    )
    assert poisoned_a.scales.data.ptr == scales.data.ptr
    poisoned_b = cpgemm.ScaledTensor.from_arrays(codes_b[:n, :k], b.scales, (128, 128))
    got = cpgemm.gemm(poisoned_a, poisoned_b).view(cp.uint16)
    np.testing.assert_array_equal(got.get(), cpgemm.gemm(a, b).view(cp.uint16).get())


@pytest.mark.gpu
def test_nan_rows_stay_in_their_rows(rng):
    import cupy as cp

    a, b = operands(rng, 130, 256, 512, cp)
    a.data.view(cp.uint8)[5, 100] = 0x7F
    nan = cp.isnan(widen(cpgemm.gemm(a, b)))
    assert bool(nan[5].all()) and int(nan.sum()) == 256


@pytest.mark.gpu
def test_long_k_does_not_drift(rng):
    import cupy as cp

    _check_drift(rng, cp)


def _check_drift(rng, xp):
    """Positive operands: truncation in the accumulator would add up along K without promotion.

    A partial sum of 128 is cut by up to 2^-10 of itself (gemm_checks), always downwards; with
    promotion every 128 of K no error is larger than that of one k-block, whatever K.
    """
    errors = {}
    for k in (128, 2048, 32768):
        x = abs(xp.asarray(rng.standard_normal((64, k), dtype=np.float32))) + xp.float32(0.5)
        w = abs(xp.asarray(rng.standard_normal((128, k), dtype=np.float32))) + xp.float32(0.5)
        a, b = cpgemm.quantize(x, (1, 128)), cpgemm.quantize(w, (128, 128))
        got = cpgemm.gemm(a, b, out_dtype="float32").astype(np.float64)
        exact = a.dequantize(np.float64) @ b.dequantize(np.float64).T
        errors[k] = float(abs(got / exact - 1).max())
    print("largest relative error by K:", errors)
    assert max(errors.values()) <= CUT
    assert errors[32768] <= 1.1 * errors[128] + 2.0**-16
