"""Launches the GEMM kernels once each on small sizes with tails, for compute-sanitizer.

    compute-sanitizer --report-api-errors no --tool racecheck python tests/sanitize.py [dense ...]

Dense kernels add C, grouped ones have empty groups and zero the padding.  Of the dense float32
kernels those of tiles from 128 x 128 up are taken: the others differ from their bfloat16 twins in
the store alone, which these cover.  No test module: pytest does not collect it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import cupy as cp
import numpy as np
from gemm_checks import operands

import cpgemm
from cpgemm import epilogues as e
from cpgemm import settings
from cpgemm.config import AdaptiveKernelConfig
from cpgemm.grouped import FLAT, TALL, prepare_grouped
from cpgemm.grouped_heuristics import grouped_configurations
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.heuristics import configurations
from cpgemm.problem import OUT_DTYPES, OutDtype
from cpgemm.scaled import ScaledTensor


def zeros(rows: int, columns: int, out_dtype: OutDtype):
    dtype = OUT_DTYPES[out_dtype]
    return cp.zeros((rows, columns), np.uint16 if dtype.itemsize == 2 else np.uint32).view(dtype)


def dense(rng: np.random.Generator, out_dtype: OutDtype) -> int:
    launches = 0
    for config in configurations(out_dtype):
        if out_dtype == "float32" and config.block_m * config.block_n < 128 * 128:
            continue
        m, n, k = (300 if config.block_m > 64 else 70), 200, 272
        a, b = operands(rng, m, n, k, cp)
        plan = cpgemm.plan_gemm(m, n, k, out_dtype=out_dtype, accumulate=True, config=config)
        plan(a, b, zeros(m, n, out_dtype), zeros(m, n, out_dtype))
        settings.set_pdl(True)
        early = cpgemm.plan_gemm(m, n, k, out_dtype=out_dtype, config=config, static_b=True)
        early(a, b, zeros(m, n, out_dtype))
        settings.set_pdl(None)
        cp.cuda.Device().synchronize()
        launches += 2
    return launches


def grouped(rng: np.random.Generator, out_dtype: OutDtype) -> int:
    offsets = np.cumsum([2, 0, 1, 130, 0, 420, 300, 7])  # tails of one to four waves
    groups, rows, n, k = len(offsets) - 1, int(offsets[-1]) + 3, 200, 272
    a, _ = operands(rng, rows, 8, k, cp)
    b = cpgemm.quantize(
        cp.asarray(rng.standard_normal((groups, n, k), dtype=np.float32)), (128, 128)
    )
    index = cp.asarray(offsets, dtype=np.int32)
    launches = 0
    for config in grouped_configurations(out_dtype):
        for form in (TALL, FLAT) if isinstance(config, AdaptiveKernelConfig) else (None,):
            out = zeros(rows, n, out_dtype)
            problem = GroupedProblem.of_contiguous(
                a, b, out, offsets=index, out_dtype=out_dtype, fill_padding=True
            )
            prepare_grouped(problem, config, a, b, out, index, form=form)()
            cp.cuda.Device().synchronize()
            launches += 1
    return launches


def fused(rng: np.random.Generator, out_dtype: OutDtype) -> int:
    """Products with epilogues, for few rows and for many, dense and grouped."""
    n, k, launches = 512, 272, 0
    bias = cp.asarray(rng.standard_normal(n, dtype=np.float32))
    steps = [e.Bias(bias) | e.SiLU(), e.GELU() | e.Scale(2.0), e.SwiGLU()]
    if out_dtype == "bfloat16":
        steps += [e.Quantize(), e.SwiGLU() | e.Quantize("pow2")]
    for m in (70, 300):
        a, b = operands(rng, m, n, k, cp)
        groups = ScaledTensor.from_arrays(b.data[None], b.scales[None], b.granularity)
        offsets = cp.asarray([0, m - 5], np.int32)
        for step in steps:
            ends_in_codes = "Quantize" in repr(step)
            dtype = None if ends_in_codes else out_dtype
            cpgemm.gemm(a, b, out_dtype=dtype, epilogue=step)
            cpgemm.grouped_gemm_contiguous(
                a, groups, offsets=offsets, out_dtype=dtype, epilogue=step
            )
            cp.cuda.Device().synchronize()
            launches += 2
    return launches


if __name__ == "__main__":
    rng = np.random.default_rng(1)
    runs = {"dense": dense, "grouped": grouped, "fused": fused}
    chosen = sys.argv[1:] or list(runs)
    print(sum(runs[run](rng, name) for run in chosen for name in OUT_DTYPES), "launches")
