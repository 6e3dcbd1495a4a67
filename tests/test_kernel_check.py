"""The check of a user's kernel, on results that are right and on results that are not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import operands

import cpgemm
from cpgemm.errors import WrongResultError
from cpgemm.kernel_check import compare, seeded_operands

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_the_reference_is_right(rng, out_dtype) -> None:
    a, b = operands(rng, 70, 136, 400)
    found = compare("mine", cpgemm.gemm(a, b, out_dtype=out_dtype), a, b)
    assert 0 < found.error <= found.tolerance and 0 < found.fraction <= 1
    assert "right: largest error" in str(found)


def test_with_c(rng) -> None:
    a, b = operands(rng, 33, 40, 256)
    c = rng.standard_normal((33, 40)).astype(BF16)
    out = cpgemm.gemm(a, b, c=c)
    assert compare("mine", out, a, b, c).fraction <= 1
    with pytest.raises(WrongResultError, match="mine: the result must agree"):
        compare("mine", out, a, b)


def test_tolerance_is_not_wide(rng) -> None:
    """The error of one k-block left out, or of a scale of a neighbour, is seen."""
    a, b = operands(rng, 64, 64, 512)
    short = cpgemm.ScaledTensor.from_arrays(a.data[:, :384], a.scales[:, :3], a.granularity)
    short_b = cpgemm.ScaledTensor.from_arrays(b.data[:, :384], b.scales[:, :3], b.granularity)
    with pytest.raises(WrongResultError):
        compare("mine", cpgemm.gemm(short, short_b), a, b)
    rolled = cpgemm.ScaledTensor.from_arrays(a.data, np.roll(a.scales, 1, 0), a.granularity)
    with pytest.raises(WrongResultError):
        compare("mine", cpgemm.gemm(rolled, b), a, b)


def test_the_message_says_where(rng) -> None:
    a, b = operands(rng, 64, 64, 256)
    out = cpgemm.gemm(a, b, out_dtype="float32")
    out[10:12, 5] += 1e6
    out[40, 7] = np.nan
    with pytest.raises(WrongResultError) as caught:
        compare("mine", out, a, b)
    said = str(caught.value)
    assert "3 of 4096 elements do not, in rows 10 to 40 and columns 5 to 7" in said
    assert "at row 40 and column 7: got nan" in said and "1 elements are NaN: not written" in said


def test_infinity_is_wrong(rng) -> None:
    a, b = operands(rng, 8, 8, 128)
    out = cpgemm.gemm(a, b, out_dtype="float32")
    out[0, 0] = np.inf
    with pytest.raises(WrongResultError, match="got inf"):
        compare("mine", out, a, b)


def test_operands_of_a_seed() -> None:
    x, w = seeded_operands(40, 24, 144, 7, np)
    assert x.shape == (40, 144) and w.shape == (24, 144) and x.dtype == np.float32
    again = seeded_operands(40, 24, 144, 7, np)
    assert (x == again[0]).all() and (w == again[1]).all()
    assert not (x[:24] == w).all() and not (x == seeded_operands(40, 24, 144, 8, np)[0]).all()
    sizes = np.sqrt((x**2).mean(axis=1))
    assert sizes.max() > 8 * sizes.min(), "rows differ in size"
