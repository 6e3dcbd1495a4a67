"""The suite ``quantize``: what a detail means, and a check that wants the very bits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpgemm.bench.cases import quantize_details, suite
from cpgemm.bench.operands import Pool
from cpgemm.bench.quantizers import how_of, quantizer, sampled_error, values
from cpgemm.bench.result import Case
from cpgemm.errors import ArgumentError


def case(detail: str, m: int = 700, k: int = 592) -> Case:
    return Case("quantize", m, 0, k, 0, detail)


def test_every_detail_of_the_suite_is_understood() -> None:
    found = {how_of(one) for one in suite("quantize")}
    assert len(found) == len(quantize_details()) == 12


@pytest.mark.parametrize("detail", ["", "float32", "float64 1x128 pow2", "float32 1x64 pow2",
                                    "float32 1x128 e8m0", "float32 1x128 pow2 more"])  # fmt: skip
def test_other_details_are_refused(detail: str) -> None:
    with pytest.raises(ArgumentError, match=r"detail: must be .*bfloat16 1x128 float32"):
        how_of(case(detail))


@pytest.mark.parametrize("detail", quantize_details())
def test_the_check(detail: str) -> None:
    how = how_of(case(detail))
    x = values(case(detail), Pool(0, np), how[0])
    assert x.dtype.name == how[0]
    out = quantizer(how)(x)
    assert sampled_error(x, out, how) == 0
    codes = out.data.view(np.uint8)
    kept = codes[0, 0]
    codes[0, 0] ^= 1
    assert sampled_error(x, out, how) > 0, "one bit of a code"
    codes[0, 0] = kept
    out.scales[0, 0] *= 2
    assert sampled_error(x, out, how) > 0, "one scale"
    codes[650, 5] = 0xFF
    assert math.isnan(sampled_error(x, out, how)), "a code of NaN anywhere"


def test_rounding_to_bfloat16_is_to_nearest() -> None:
    x = values(case("bfloat16 1x128 pow2"), Pool(0, np), "bfloat16")
    exact = values(case("float32 1x128 pow2"), Pool(0, np), "float32")
    assert (np.abs(x.astype(np.float32) - exact) <= 2.0**-8 * np.abs(exact)).all()
