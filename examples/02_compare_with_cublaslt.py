"""cpgemm beside cuBLASLt's FP8 products (``torch._scaled_mm``), interleaved in one run.

    python examples/02_compare_with_cublaslt.py [--quick] [--json FILE] [--markdown FILE]

For M in 64, 128, 4096 and the six layers of DeepSeek-V3 it times

    cpgemm      activations with 1 x 128 scales, weights with 128 x 128 scales
    block       torch._scaled_mm with the same scales (it needs N % 128 == 0)
    tensor      torch._scaled_mm with one scale for each operand and fast accumulation: less work,
                and less accurate, so a reference rather than a rival

All three multiply the same memory: normally distributed values, quantised by cpgemm.  Each output
is checked against a float64 product before anything is timed.  Needs a Hopper GPU and torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cpgemm
from cpgemm import machine
from cpgemm.demo import (
    LAYERS,
    make_weights,
    on_host,
    relative_error,
    select_rows,
    stratified,
    without_nan,
)
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.reference import exact_product
from cpgemm.scaled import BLOCK, ScaledTensor
from cpgemm.timing import Timing, rotations, time_interleaved

ROWS = (64, 128, 4096)
BFLOAT16 = OUT_DTYPES["bfloat16"]
# Rounding to bfloat16 costs 0.0017 in this norm; fast accumulation drops bits of long sums besides.
TOLERANCES = {"cpgemm": 0.002, "block": 0.002, "tensor": 0.02}
METHOD = (
    "CUDA graphs of calls over rotating operand sets (at least 3 x 60 MB in play, so that L2 is "
    "cold), contenders interleaved round by round in random order in one process, median of "
    "{windows} windows of at least {window_ms:g} ms; microseconds per call, gaps between launches "
    "included. Operands: normally distributed, quantised by cpgemm, the same memory for all. Each "
    "output was checked against a float64 product of sampled rows and columns first. block = "
    "torch._scaled_mm with 1x128 and 128x128 scales, tensor = torch._scaled_mm with scalar scales "
    "and fast accumulation (less work). Compare ratios within a row only."
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One problem: microseconds, spreads and relative errors by contender.

    ``refused`` says why a contender did not run; it has no figures then.
    """

    m: int
    n: int
    k: int
    kernel: str
    us: dict[str, float]
    spread_pct: dict[str, float]
    error: dict[str, float]
    refused: dict[str, str]
    tflops: float
    floor_fraction: float

    def over(self, rival: str) -> float | None:
        """How many times as fast as ``rival`` cpgemm is; None where the rival cannot run."""
        return self.us[rival] / self.us["cpgemm"] if rival in self.us else None


@dataclasses.dataclass(frozen=True)
class OperandSet:
    """Operands of one call, in CuPy's memory, and the result that all contenders write."""

    a: ScaledTensor
    b: ScaledTensor
    out: Any


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a wrong result, 2 a machine that cannot run this."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 windows of 5 ms, not 7 of 12 ms")
    parser.add_argument("--seed", type=int, help="of the random data (default: a fresh one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table here")
    args = parser.parse_args(argv)
    missing = why_not_here()
    if missing:
        print(f"This comparison needs a Hopper GPU and torch with CUDA: {missing}", file=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    windows, window_ms = (3, 5.0) if args.quick else (7, 12.0)
    record = machine.describe()
    print(f"{record}\nseed {seed}\n\n{header()}", flush=True)
    method = METHOD.format(windows=windows, window_ms=window_ms)
    results: list[Result] = []
    try:
        for result in compare(np.random.default_rng(seed), windows, window_ms):
            results.append(result)
            print(line(result), flush=True)
    finally:  # whatever ends the run early, what was measured is kept
        write_reports(results, record, seed, method, args.json, args.markdown)
    for reason in dict.fromkeys(
        f"{name}: {why}" for r in results for name, why in r.refused.items()
    ):
        print(f"not run: {reason}")
    wrong = [result for result in results if failures(result)]
    for result in wrong:
        print(f"WRONG {result.m}x{result.n}x{result.k}: {', '.join(failures(result))}")
    return 1 if wrong else 0


def why_not_here() -> str | None:
    """What this machine lacks, or None."""
    if why := machine.why_no_hopper():
        return f"{why}."
    try:
        import torch
    except ImportError:
        return "torch is not installed. Run: pip install torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; install a build with CUDA."
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm; install 2.9 or newer."
    return None


def compare(rng: np.random.Generator, windows: int, window_ms: float) -> Any:
    """Yield the ``Result`` of each problem."""
    import cupy
    import torch

    stream = cupy.cuda.Stream(non_blocking=True)

    def on_stream(chosen: Any) -> Any:
        return torch.cuda.stream(torch.cuda.ExternalStream(chosen.ptr))

    for n, k in LAYERS:
        weights = make_weights(n, k, rng)
        for m in ROWS:
            activations = rng.standard_normal((m, k), dtype=np.float32)
            yield _compare_one(
                GemmProblem(m, n, k), activations, weights, rng,
                functools.partial(
                    time_interleaved, windows=windows, window_ms=window_ms,
                    seed=int(rng.integers(2**32)), stream=stream, context=on_stream,
                ),
            )  # fmt: skip


def _compare_one(
    problem: GemmProblem,
    activations: Any,
    weights: Any,
    rng: np.random.Generator,
    timed: Callable[[dict[str, list[Callable[[], object]]]], dict[str, Timing]],
) -> Result:
    import cupy

    m, n, k = problem.m, problem.n, problem.k
    plan = cpgemm.plan_gemm(m, n, k)
    x, w = cupy.asarray(activations), cupy.asarray(weights)
    sets = [
        OperandSet(
            cpgemm.quantize(x),
            cpgemm.quantize(w, (BLOCK, BLOCK)),
            cupy.empty((m, n), dtype=np.uint16).view(BFLOAT16),
        )
        for _ in range(rotations(problem.bytes))
    ]
    del x, w
    contenders: dict[str, list[Callable[[], object]]] = {
        "cpgemm": [functools.partial(plan, one.a, one.b, one.out) for one in sets],
        "block": [torch_call(one, by_blocks=True) for one in sets],
        "tensor": [torch_call(one, by_blocks=False) for one in sets],
    }
    first_calls = {name: calls[0] for name, calls in contenders.items()}
    error, refused = _check(sets[0], first_calls, rng)
    right = all(error[name] <= TOLERANCES[name] for name in error)  # NaN is not
    timings = timed({name: contenders[name] for name in error}) if right else {}
    us = {name: timing.median_us for name, timing in timings.items()}
    ours = us.get("cpgemm", float("nan"))
    return Result(
        m, n, k, plan.config.name, us,
        {name: timing.spread_pct for name, timing in timings.items()},
        error,
        refused,
        tflops=problem.flops / ours / 1e6,
        floor_fraction=plan.explain().floor_us / ours,
    )  # fmt: skip


def torch_call(one: OperandSet, *, by_blocks: bool) -> Callable[[], object]:
    """``torch._scaled_mm`` on the memory of ``one``."""
    import torch

    a = shared(one.a.data).view(torch.float8_e4m3fn)
    b = shared(one.b.data).view(torch.float8_e4m3fn)
    out = shared(one.out).view(torch.bfloat16)
    if by_blocks:
        # (M, K / 128) with strides (1, pitch), which is how cpgemm stores it; (K / 128, N / 128).
        scale_a, scale_b = shared(one.a.scales), shared(one.b.scales).t()
    else:
        scale_a = scale_b = torch.ones((), dtype=torch.float32, device="cuda")
    return functools.partial(
        torch._scaled_mm, a, b.t(), scale_a=scale_a, scale_b=scale_b,
        out_dtype=torch.bfloat16, use_fast_accum=not by_blocks, out=out,
    )  # fmt: skip


def shared(array: Any) -> Any:
    """A CuPy array as a torch tensor on the same memory; anything but float32 as bytes."""
    import torch

    return torch.from_dlpack(array if array.dtype == np.float32 else array.view(np.uint8))


def _check(
    one: OperandSet, calls: dict[str, Callable[[], object]], rng: np.random.Generator
) -> tuple[dict[str, float], dict[str, str]]:
    """Relative error of each contender on a sample that meets every tile; why others do not run."""
    import cupy

    m, n = one.out.shape
    rows, columns = stratified(m, 256, rng), stratified(n, 512, rng)
    a, b = select_rows(on_host(one.a), rows), select_rows(on_host(one.b), columns)
    by_blocks = exact_product(a, b)
    by_tensor = exact_product(without_scales(a), without_scales(b))
    errors, refused = {}, {}
    for name, call in calls.items():
        if name == "block" and n % BLOCK:
            refused[name] = "block scales need N % 128 == 0"
            continue
        one.out.view(np.uint16)[...] = 0xFFFF  # NaN, so that what is not written shows
        cupy.cuda.runtime.deviceSynchronize()  # torch may work on another stream
        try:
            call()
        except RuntimeError as error:
            if name == "cpgemm":
                raise
            refused[name] = str(error).partition("\n")[0]
            continue
        cupy.cuda.runtime.deviceSynchronize()
        got = cupy.asnumpy(one.out.view(np.uint16)).view(BFLOAT16)
        sample = got[np.ix_(rows, columns)].astype(np.float64)
        errors[name] = relative_error(sample, by_tensor if name == "tensor" else by_blocks)
    return errors, refused


def without_scales(tensor: ScaledTensor) -> ScaledTensor:
    """The codes with scales of one."""
    return ScaledTensor.from_arrays(
        tensor.data, np.ones_like(tensor.scales), tensor.granularity
    )  # fmt: skip


# ----------------------------------------------------------------------------------- the reports

_COLUMNS = (
    "M x N x K", "cpgemm us", "block us", "tensor us", "block/cpgemm", "tensor/cpgemm", "TFLOPS",
    "floor", "kernel",
)  # fmt: skip
_WIDTHS = (15, 9, 9, 9, 12, 13, 6, 5, 0)


def cells(result: Result) -> list[str]:
    """The texts of one row, in the order of the table's columns."""

    def number(value: float | None, digits: int) -> str:
        return "n/a" if value is None else f"{value:.{digits}f}"

    shape = f"{result.m}x{result.n}x{result.k}"
    if not result.us:
        return [shape, "WRONG", *[""] * 6, result.kernel]
    return [
        shape,
        *(number(result.us.get(name), 2) for name in ("cpgemm", "block", "tensor")),
        number(result.over("block"), 3),
        number(result.over("tensor"), 3),
        f"{result.tflops:.0f}",
        f"{result.floor_fraction:.0%}",
        result.kernel,
    ]


def failures(result: Result) -> list[str]:
    """Contenders whose error is above their tolerance."""
    return [
        f"{name} is off by {error:.5f} (at most {TOLERANCES[name]})"
        for name, error in result.error.items()
        if not error <= TOLERANCES[name]
    ]


def header() -> str:
    """First line of the table on the terminal."""
    return _aligned(_COLUMNS)


def line(result: Result) -> str:
    """One line of the table on the terminal."""
    return _aligned(cells(result))


def _aligned(texts: Sequence[str]) -> str:
    first, *middle, last = zip(texts, _WIDTHS, strict=True)
    aligned = (text.rjust(width) for text, width in middle)
    return "  ".join((first[0].ljust(first[1]), *aligned, last[0])).rstrip()


def markdown(results: Sequence[Result], record: Any, seed: int, method: str) -> str:
    """The table with machine, versions, date and method."""
    rule = ["---", *["---:"] * (len(_COLUMNS) - 2), "---"]
    rows = [_COLUMNS, rule, *(cells(result) for result in results)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"# cpgemm beside cuBLASLt\n\n{table}\n\n"
        f"Machine: {record.hardware}.  \nSoftware: {record.software}, torch {record.torch}.  \n"
        f"Date: {record.date}; seed {seed}.\n\nMethod: {method}\n"
    )


def write_reports(
    results: Sequence[Result],
    record: Any,
    seed: int,
    method: str,
    json_path: Path | None,
    markdown_path: Path | None,
) -> None:
    """Write the files that were asked for."""
    if json_path is not None:
        report = {
            "machine": record.as_dict(),
            "seed": seed,
            "method": method,
            "rows": [without_nan(dataclasses.asdict(result)) for result in results],
        }
        _write(json_path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if markdown_path is not None:
        _write(markdown_path, markdown(results, record, seed, method))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
