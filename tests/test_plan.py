"""What a plan hands to its kernel, without a driver: the boxes that tensor maps are made of."""

from __future__ import annotations

import numpy as np
import pytest
from gemm_checks import operands

import cpgemm
from cpgemm import plan
from cpgemm.heuristics import configurations


@pytest.mark.parametrize(
    ("name", "m", "boxes"),
    [
        ("dense_128x64_s8_w2", 100, (104, 104)),  # one tile, which ends within 8 rows of A
        ("dense_128x64_s8_w2", 146, (128, 64)),
        ("dense_128x64_s8_w2", 256, (128, 64)),
        ("dense_split_128x64_k2_s7_w2", 146, (128, 64)),
        ("dense_64x64_s8_w1", 70, (64, 64)),
        ("dense_256x128_s3_w2_multicast_a", 100, (128, 128)),  # half of the rows for each block
        ("dense_256x128_s3_w2_multicast_a", 300, (128, 32)),
        ("dense_192x128_s4_w3_multicast_b", 9, (16, 16)),
    ],
)
def test_boxes_of_a(name, m, boxes, rng, monkeypatch):
    """(whole, tail) rows; where there is one tile of rows, one map of A serves for both."""
    monkeypatch.setattr(plan, "matrix_map", lambda _array, box, _swizzle: ("matrix", *box))
    monkeypatch.setattr(plan, "tensor_map", lambda *arguments: ("scales", *arguments[5]))
    config = next(c for c in configurations("bfloat16") if c.name == f"{name}_bfloat16")
    a, b = operands(rng, m, 136, 144)
    made = cpgemm.plan_gemm(m, 136, 144, config=config)
    whole, tail, of_b, scales = made._arguments(a, b, np.zeros((m, 136), np.uint16), None)[:4]
    assert (whole, tail) == tuple(("matrix", rows, 128) for rows in boxes)
    assert of_b == ("matrix", config.block_n // config.cluster_m, 128)
    assert scales == ("scales", 1, boxes[0] * config.cluster_n)
