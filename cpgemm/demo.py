"""``python -m cpgemm demo``: real-sized layers, quantised, multiplied, compared, timed.

Activations have outlier channels as those of language models do.  Each result is compared with two
products in float64: the exact product of the quantised operands, which shows the kernel's own
error, and the product of the float operands, which shows what quantising costs.  Both are computed
on the host from a sample of rows and columns that meets every tile of any kernel.  Only results
that pass are timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpgemm import machine
from cpgemm.console import positive
from cpgemm.kernel_check import on_host
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.random_data import seed_or_fresh
from cpgemm.sampled_check import NAN_BITS, largest_errors, relative_error, select_rows, stratified
from cpgemm.scaled import BLOCK, ScaledTensor
from cpgemm.timing import Timing, rotations, summarize, time_host, time_interleaved

__all__ = ["LAYERS", "Row", "add_arguments", "main"]

LAYERS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(N, K) of the linear layers of DeepSeek-V3."""

_GPU_ROWS = (64, 128, 4096)
_HOST_ROWS = (64,)
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 256, 512  # more than M / 64 and N / 64 of any layer above
_LONG_CALL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times and what follows from them are None for a wrong result."""

    m: int
    n: int
    k: int
    kernel: str
    error_exact: float
    error_float: float
    passed: bool
    time_us: float | None = None
    spread_pct: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    floor_fraction: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand; each may be left out."""
    rows = "rows of the activations (default: 64 128 4096; on a CPU 64)"
    layers = "layers, such as 4096x7168 (default: those of DeepSeek-V3)"
    several: Any = {"nargs": "+", "action": "extend"}
    parser.add_argument("--m", type=positive, metavar="M", help=rows, **several)
    parser.add_argument("--shape", type=_layer, metavar="NxK", help=layers, **several)
    parser.add_argument("--seed", type=int, help="of the random data (default: a fresh one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")


def main(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every result is right, 1 when one is not.

    ``args`` has ``m``, ``shape`` (pairs N, K), ``seed`` and ``json``, all optional.
    """
    from cpgemm.console import progress

    why = machine.why_no_hopper()
    asked = getattr(args, "m", None)
    heights = tuple(asked or (_HOST_ROWS if why else _GPU_ROWS))
    layers = tuple(getattr(args, "shape", None) or LAYERS)
    seed = seed_or_fresh(getattr(args, "seed", None))
    # Every size is checked before the first is computed.
    problems = [[GemmProblem(m, n, k) for m in heights] for n, k in layers]
    record = machine.describe()

    print(f"cpgemm {record.cpgemm} demo, seed {seed}")
    if why:
        only = "" if asked else f", M = {_HOST_ROWS[0]} only"
        print(f"No Hopper GPU ({why}): NumPy path{only}; times are this CPU's.")
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    width = shutil.get_terminal_size((120, 24)).columns
    count = sum(map(len, problems))
    try:
        with machine.device_peak() as peak, progress("multiplying", count) as done:
            for row in _run(problems, rng, on_gpu=why is None):
                rows.append(row)
                done(f"{row.m}x{row.n}x{row.k}")
    finally:  # whatever ends the run early, what was measured is shown
        print_rows(rows, width)
    failed = [row for row in rows if not row.passed]
    for row in failed:
        exact, floats = largest_errors(row.m, row.n)
        print(
            f"FAILED {row.m}x{row.n}x{row.k}: {row.kernel} is off by {row.error_exact:.5f} from "
            f"the exact product (at most {exact}), by {row.error_float:.4f} from the float "
            f"product (at most {floats}); seed {seed}"
        )
    if peak.used_bytes is not None:
        used, held = machine.format_bytes(peak.used_bytes), machine.format_bytes(peak.held_bytes)
        print(f"device memory peak: {used} in arrays, {held} held by CuPy's pool")
    host_peak = machine.host_peak_bytes()
    print(f"host memory peak: {machine.format_bytes(host_peak)}")
    print(textwrap.fill(str(record), width))
    path = getattr(args, "json", None)
    if path is not None:
        memory = {**dataclasses.asdict(peak), "host_peak_bytes": host_peak}
        report = {
            "seed": seed,
            "machine": record.as_dict(),
            "memory": memory,
            "rows": [without_nan(dataclasses.asdict(row)) for row in rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"figures: {path}")
    return 1 if failed else 0


def without_nan(value: Any) -> Any:
    """A copy with None for every NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


# ------------------------------------------------------------------------------------- the work


def _run(
    problems: Sequence[Sequence[GemmProblem]], rng: np.random.Generator, *, on_gpu: bool
) -> Iterator[Row]:
    """One row for each problem; ``problems`` holds those of one layer together."""
    import cpgemm

    for layer in problems:
        weights = make_weights(layer[0].n, layer[0].k, rng)
        for problem in layer:
            activations = make_activations(problem.m, problem.k, rng)
            sample = tuple(
                stratified(extent, count, rng)
                for extent, count in ((problem.m, _SAMPLE_ROWS), (problem.n, _SAMPLE_COLUMNS))
            )
            if on_gpu:
                yield _on_gpu(problem, activations, weights, sample)
                continue
            a, b = cpgemm.quantize(activations), cpgemm.quantize(weights, (BLOCK, BLOCK))
            multiply = functools.partial(cpgemm.gemm, a, b)
            start = time.perf_counter()
            result = multiply()
            first = time.perf_counter() - start
            errors = relative_errors(result, activations, weights, a, b, sample)
            # A call of seconds on a slow or busy machine is warm enough, and not made again.
            timed = functools.partial(time_host, multiply)
            if first > _LONG_CALL_S:
                timed = functools.partial(summarize, [first * 1e6])
            yield _row(problem, "NumPy", errors, result, timed)


def _on_gpu(problem: GemmProblem, activations: Any, weights: Any, sample: tuple[Any, ...]) -> Row:
    import cupy

    import cpgemm

    plan = cpgemm.plan_gemm(problem.m, problem.n, problem.k)
    x, w = cupy.asarray(activations), cupy.asarray(weights)

    def fresh() -> tuple[ScaledTensor, ScaledTensor, Any]:
        bits = cupy.full((problem.m, problem.n), NAN_BITS, dtype=np.uint16)
        return cpgemm.quantize(x), cpgemm.quantize(w, (BLOCK, BLOCK)), bits

    def launch(a: ScaledTensor, b: ScaledTensor, bits: Any) -> Callable[[], object]:
        return functools.partial(plan, a, b, bits.view(OUT_DTYPES[problem.out_dtype]))

    first = fresh()
    launch(*first)()
    result = cupy.asnumpy(first[2]).view(OUT_DTYPES[problem.out_dtype])
    a, b = (on_host(operand) for operand in first[:2])
    errors = relative_errors(result, activations, weights, a, b, sample)

    def timed() -> Timing:
        sets = [first, *(fresh() for _ in range(rotations(problem.bytes) - 1))]
        calls = [launch(*operands) for operands in sets]
        return time_interleaved({"gemm": calls}, windows=5)["gemm"]

    return _row(problem, plan.config.name, errors, result, timed, plan.explain().floor_us)


def _row(
    problem: GemmProblem,
    kernel: str,
    errors: tuple[float, float],
    result: Any,
    timed: Callable[[], Timing],
    floor_us: float | None = None,
) -> Row:
    """Judge a result; time it only when it is right."""
    # Written so that NaN fails.  An element outside the sample that was never written is NaN too.
    finite = bool(np.all(result.view(np.uint16) & 0x7F80 != 0x7F80))
    limits = largest_errors(problem.m, problem.n)
    passed = finite and errors[0] <= limits[0] and errors[1] <= limits[1]
    row = Row(problem.m, problem.n, problem.k, kernel, *errors, passed)
    if not passed:
        return row
    timing = timed()
    seconds = timing.median_us * 1e-6
    return dataclasses.replace(
        row,
        time_us=timing.median_us,
        spread_pct=timing.spread_pct,
        tflops=problem.flops / seconds / 1e12,
        gb_per_s=problem.bytes / seconds / 1e9,
        floor_fraction=None if floor_us is None else floor_us / timing.median_us,
    )


def make_activations(m: int, k: int, rng: np.random.Generator) -> Any:
    """float32 (m, k): normal noise; about 0.8 % of the channels, at least one, 20 to 60 times as
    large, as in the layers of language models.
    """
    gain = np.ones(k, np.float32)
    outliers = rng.choice(k, size=max(1, round(0.008 * k)), replace=False)
    gain[outliers] = rng.uniform(20.0, 60.0, outliers.size)
    values = rng.standard_normal((m, k), dtype=np.float32)
    values *= gain
    return values


def make_weights(n: int, k: int, rng: np.random.Generator) -> Any:
    """float32 (n, k): normal with standard deviation 1 / sqrt(k)."""
    values = rng.standard_normal((n, k), dtype=np.float32)
    values *= np.float32(k**-0.5)
    return values


# -------------------------------------------------------------------------------- the comparison


def relative_errors(
    result: Any,
    activations: Any,
    weights: Any,
    a: ScaledTensor,
    b: ScaledTensor,
    sample: tuple[Any, ...],
) -> tuple[float, float]:
    """Relative errors of ``result`` (M, N) against the exact and against the float product.

    ``a`` (1, 128) and ``b`` (128, 128) are the quantised ``activations`` (M, K) and ``weights``
    (N, K); all on the host.  ``sample``: row and column indices of ``result``.  An error is the
    Frobenius norm of the difference over that of the product, in float64; NaN for a result that
    holds NaN.
    """
    from cpgemm.reference import exact_product

    rows, columns = sample
    exact = exact_product(select_rows(a, rows), select_rows(b, columns))
    floats = activations[rows].astype(np.float64) @ weights[columns].astype(np.float64).T
    got = result[np.ix_(rows, columns)].astype(np.float64)
    return relative_error(got, exact), relative_error(got, floats)


# -------------------------------------------------------------------------------------- the table


def print_rows(rows: Sequence[Row], width: int) -> None:
    """The table, fitted to ``width`` columns: kernels get letters where names do not fit."""
    from cpgemm.console import print_table

    columns = ("M x N x K", "kernel", "exact", "float", "time", "TFLOPS", "GB/s", "floor")
    names = list(dict.fromkeys(row.kernel for row in rows))
    full = {name: name for name in names}
    letters = {name: f"[{at + 1}]" for at, name in enumerate(names)}
    for shown, digits in ((full, 5), (full, 4), (letters, 4)):
        cells = [_cells(row, shown[row.kernel], digits) for row in rows]
        if _table_width(columns, cells) <= width:
            break
    print_table(columns, cells, numbers=columns[2:])
    if shown is letters:
        print("\n".join(f"{letter} {name}" for name, letter in letters.items()))
    legend = (
        "exact, float: relative error against the exact product of the quantised operands and "
        "against the product of the float operands."
    )
    if any(row.floor_fraction is not None for row in rows):
        legend += (
            " floor: the least time that this machine's memory bandwidth or arithmetic allow, over "
            "the time taken."
        )
    print(f"\n{textwrap.fill(legend, min(width, 100))}\n")


def _cells(row: Row, kernel: str, digits: int) -> tuple[str, ...]:
    shape = f"{row.m}x{row.n}x{row.k}"
    errors = (f"{row.error_exact:.{digits}f}", f"{row.error_float:.4f}")
    if row.time_us is None or row.tflops is None or row.gb_per_s is None:
        return (shape, kernel, *errors, "FAILED", "", "", "")
    floor = "" if row.floor_fraction is None else f"{row.floor_fraction:.0%}"
    rates = (_short(row.tflops), _short(row.gb_per_s))
    return (shape, kernel, *errors, format_us(row.time_us), *rates, floor)


def _table_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters that the table takes with its frame: the wider of both ways to print it."""
    widest = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return sum(widest) + 3 * (len(widest) - 1) + 2


def format_us(microseconds: float) -> str:
    """Four digits and a unit: ``231.9us``, ``10.8ms``, ``1.2s``."""
    for unit, factor in (("us", 1.0), ("ms", 1e3)):
        if microseconds < 999.95 * factor:
            return f"{microseconds / factor:.1f}{unit}"
    return f"{microseconds / 1e6:.1f}s"


def _short(value: float) -> str:
    """Two significant digits at least, and no exponent in the range that occurs."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def _layer(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be NxK, such as 4096x7168; got {text!r}")
    return positive(parts[0]), positive(parts[1])
