"""Grouped GEMMs on DeepSeek-V3's mixture-of-experts rows, each beside a live yardstick.

Contiguous rows are compared with the dense kernel at M = 4096 on the same (N, K), ragged sizes with
aligned ones of equal total, decode rows with a kernel that only streams the weights by TMA, 512
groups of which 8 have rows with those 8 alone. Masked rows are run with the right hint, no hint and
wrong ones. All contenders of a row are interleaved in one run on operands that exceed L2, and
checked first.

    python examples/03_grouped_benchmark.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cpgemm
from cpgemm import machine
from cpgemm.floor import stream
from cpgemm.random_data import POOL, repeated, seed_or_fresh
from cpgemm.scaled import ScaledTensor
from cpgemm.timing import rotations, time_interleaved

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LAYERS = ((4096, 7168), (7168, 2048))
CONTIGUOUS = ((4, 8192), (8, 4096))
MASKED = (
    (1, 1024, 4096, 7168), (1, 1024, 7168, 2048),
    (2, 512, 4096, 7168), (2, 512, 7168, 2048),
    (4, 256, 4096, 7168), (4, 256, 7168, 2048),
    (32, 20, 4096, 4096), (32, 20, 7168, 2048), (32, 192, 4096, 4096),
    (9, 64, 4096, 7168), (8, 4, 4096, 7168),
)  # fmt: skip
TOLERANCE = 0.002  # 2-norm, of one bfloat16 rounding (docs/numerics.md)


@dataclasses.dataclass
class Row:
    """One contender of one row of the table."""

    row: str
    contender: str
    us: float
    spread_pct: float
    tflops: float
    gbs: float
    against: str
    ratio: float  # rate over the yardstick's


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a wrong result, 2 a machine that cannot run this."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 windows of 4 ms, not 7 of 10 ms")
    parser.add_argument("--seed", type=int, help="of the random data (default: a fresh one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table here")
    args = parser.parse_args(argv)
    if why := machine.why_no_hopper():
        print(f"This benchmark needs a Hopper GPU: {why}.", file=sys.stderr)
        return 2
    seed = seed_or_fresh(args.seed)
    windows, window_ms = (3, 4.0) if args.quick else (7, 10.0)
    timed = functools.partial(time_interleaved, windows=windows, window_ms=window_ms)
    record = machine.describe()
    print(f"{record}\nseed {seed}\n", flush=True)
    rows: list[Row] = []
    try:
        for row in measure(np.random.default_rng(seed), timed):
            rows.append(row)
            print(line(row), flush=True)
    except WrongResult as error:
        print(f"WRONG {error}")
        return 1
    finally:  # whatever ends the run early, what was measured is kept
        write_reports(rows, record, seed, windows, window_ms, args.json, args.markdown)
    return 0


class WrongResult(Exception):
    """A contender's result is off by more than rounding allows."""


def measure(rng: np.random.Generator, timed: Callable[..., Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    import cupy

    pool = cupy.asarray(rng.standard_normal(POOL, dtype=np.float32))

    def scaled(*shape: int, granularity: tuple[int, int]) -> ScaledTensor:
        # From anywhere in the pool: a row of A that is a row of B too would rule the norm.
        start = 4 * int(rng.integers(POOL // 4))  # aligned
        values = repeated(pool, math.prod(shape), start).reshape(shape)
        return cpgemm.quantize(values, granularity)

    def result(*shape: int) -> Any:
        return cupy.full(shape, 0xFFFF, np.uint16).view(BFLOAT16)

    for n, k in LAYERS:
        for groups, m in CONTIGUOUS:
            yield from _contiguous(scaled, result, rng, timed, groups, m, n, k)
        yield from _ragged(scaled, result, rng, timed, 32, 768, n, k)
    for groups, m, n, k in MASKED:
        yield from _masked(scaled, result, timed, groups, m, n, k)
        cupy.get_default_memory_pool().free_all_blocks()
    for m in (16, 256):
        yield from _empty(scaled, result, rng, timed, m, 4096, 2048)


def _contiguous(
    scaled: Any, result: Any, rng: Any, timed: Any, groups: int, m: int, n: int, k: int
) -> Iterator[Row]:
    import cupy

    a = scaled(groups * m, k, granularity=(1, 128))
    b = scaled(groups, n, k, granularity=(128, 128))
    first = ScaledTensor.from_arrays(b.data[0], b.scales[0], b.granularity)
    dense_a = ScaledTensor.from_arrays(a.data[:4096], a.scales[:4096], a.granularity)
    out, dense_out = result(groups * m, n), result(4096, n)
    even = np.arange(groups + 1) * m
    uneven = even.copy()
    uneven[1:-1] += rng.integers(-m // 4, m // 4, groups - 1)
    call = functools.partial(cpgemm.grouped_gemm_contiguous, a, b, out)
    offsets, ragged = _device(even), _device(uneven)
    indices = cupy.asarray(np.repeat(np.arange(groups, dtype=np.int32), m))
    contenders = {
        "offsets": functools.partial(call, offsets=offsets),
        "m_indices": functools.partial(call, m_indices=indices),
        "ragged": functools.partial(call, offsets=ragged),
        "dense M=4096": functools.partial(cpgemm.gemm, dense_a, first, dense_out),
    }
    for name, bounds in (("offsets", even), ("m_indices", even), ("ragged", uneven)):
        contenders[name]()
        _check(name, a, b, out, [(g, bounds[g], bounds[g + 1]) for g in range(groups)])
    flops = {name: 2.0 * groups * m * n * k for name in contenders}
    flops["dense M=4096"] = 2.0 * 4096 * n * k
    moved = float(groups * m * k + groups * n * k + 2 * groups * m * n)
    yield from _rows(
        f"contiguous {groups}x{m} {n}x{k}", timed({c: [f] for c, f in contenders.items()}),
        flops, moved, "dense M=4096",
    )  # fmt: skip


def _ragged(
    scaled: Any, result: Any, rng: Any, timed: Any, groups: int, mean: int, n: int, k: int
) -> Iterator[Row]:
    """Groups of 512 to 1024 rows: multiples of 128 against any size, equal in total."""
    aligned = rng.integers(4, 2 * mean // 128 - 3, groups) * 128
    sizes = np.maximum(aligned + rng.integers(-127, 128, groups), 512)
    while excess := int(sizes.sum() - aligned.sum()):
        group = int(rng.integers(groups))
        sizes[group] = max(sizes[group] - excess, 512)
    a = scaled(int(aligned.sum()), k, granularity=(1, 128))
    b = scaled(groups, n, k, granularity=(128, 128))
    out = result(a.shape[0], n)
    contenders = {}
    for name, counts in (("aligned sizes", aligned), ("ragged sizes", sizes)):
        bounds = np.concatenate([[0], np.cumsum(counts)])
        contenders[name] = functools.partial(
            cpgemm.grouped_gemm_contiguous, a, b, out, offsets=_device(bounds)
        )
        contenders[name]()
        _check(name, a, b, out, [(g, bounds[g], bounds[g + 1]) for g in range(groups)])
    flops = dict.fromkeys(contenders, 2.0 * a.shape[0] * n * k)
    moved = float(a.shape[0] * k + groups * n * k + 2 * a.shape[0] * n)
    yield from _rows(
        f"{groups} groups of about {mean} {n}x{k}", timed({c: [f] for c, f in contenders.items()}),
        flops, moved, "aligned sizes",
    )  # fmt: skip


def _masked(
    scaled: Any, result: Any, timed: Any, groups: int, m: int, n: int, k: int
) -> Iterator[Row]:
    rows = max(512, m)
    counts = _device(np.full(groups, m))
    sets = []
    for _ in range(min(rotations(groups * n * k), 4)):
        a = scaled(groups, rows, k, granularity=(1, 128))
        b = scaled(groups, n, k, granularity=(128, 128))
        sets.append((a, b, result(groups, rows, n)))
    hints = {"right hint": m, "no hint": None, "hint 16": 16, "hint 4096": 4096}
    contenders: dict[str, list[Callable[[], object]]] = {
        name: [
            functools.partial(cpgemm.grouped_gemm_masked, *one, masked_m=counts, expected_m=hint)
            for one in sets
        ]
        for name, hint in hints.items()
    }
    for name, calls in contenders.items():
        calls[0]()
        a, b, out = sets[0]
        _check(name, a, b, out, [(g, 0, m) for g in range(groups)])
    contenders["stream floor"] = [functools.partial(stream, one[1].data) for one in sets]
    flops = dict.fromkeys(contenders, 2.0 * groups * m * n * k)
    moved = float(groups * (m * k + n * k + 2 * m * n))
    for row in _rows(
        f"masked {groups}x{m} {n}x{k}", timed(contenders), flops, moved, "stream floor"
    ):
        floor = row.contender == "stream floor"  # it moves the weights alone and computes nothing
        yield (
            dataclasses.replace(row, tflops=0.0, gbs=groups * n * k / row.us / 1e3)
            if floor
            else row
        )


def _empty(scaled: Any, result: Any, rng: Any, timed: Any, m: int, n: int, k: int) -> Iterator[Row]:
    """What empty groups cost: 8 of 512 groups with ``m`` rows each against copies of those 8."""
    groups, live, passes = 512, 8, 8
    b = scaled(groups, n, k, granularity=(128, 128))
    a, out = scaled(live * m, k, granularity=(1, 128)), result(live * m, n)
    contenders: dict[str, list[Callable[[], object]]] = {"8 groups": [], "8 of 512 groups": []}
    for _ in range(passes):
        chosen = np.sort(rng.choice(groups, live, replace=False))
        few = ScaledTensor.from_arrays(
            b.data.view(np.uint8)[chosen], b.scales[chosen], b.granularity
        )
        counts = np.zeros(groups, int)
        counts[chosen] = m
        for name, matrices, sizes in (
            ("8 groups", few, np.full(live, m)), ("8 of 512 groups", b, counts),
        ):  # fmt: skip
            bounds = np.concatenate([[0], np.cumsum(sizes)])
            call = functools.partial(
                cpgemm.grouped_gemm_contiguous, a, matrices, out, offsets=_device(bounds)
            )
            call()
            spans = [(g, bounds[g], bounds[g + 1]) for g in range(len(sizes)) if sizes[g]]
            _check(name, a, matrices, out, spans)
            contenders[name].append(call)
    flops = dict.fromkeys(contenders, 2.0 * live * m * n * k)
    moved = float(live * (m * k + n * k + 2 * m * n))
    yield from _rows(f"8 groups of {m} {n}x{k}", timed(contenders), flops, moved, "8 groups")


def _rows(
    name: str, timings: Any, flops: dict[str, float], moved: float, against: str
) -> Iterator[Row]:
    yardstick = flops[against] / timings[against].median_us
    for contender, timing in timings.items():
        us = timing.median_us
        yield Row(
            name, contender, us, timing.spread_pct, flops[contender] / us / 1e6, moved / us / 1e3,
            against, flops[contender] / us / yardstick,
        )  # fmt: skip


def _device(values: Any) -> Any:
    import cupy

    return cupy.asarray(np.asarray(values), dtype=np.int32)


def _check(name: str, a: Any, b: Any, out: Any, groups: list[tuple[int, int, int]]) -> None:
    """A sample of rows of every group, all columns, against float64 products on the host."""
    from cpgemm.kernel_check import on_host
    from cpgemm.sampled_check import relative_error

    for group, begin, end in groups[:: max(1, len(groups) // 4)]:
        rows = np.unique(np.linspace(begin, end - 1, 8).astype(int))
        codes, scales, got = (
            (a.data[group], a.scales[group], out[group]) if a.ndim == 3 else (a.data, a.scales, out)
        )
        part = on_host(
            ScaledTensor.from_arrays(codes.view(np.uint8)[rows], scales[rows], a.granularity)
        )
        matrix = on_host(ScaledTensor.from_arrays(b.data[group], b.scales[group], b.granularity))
        wanted = part.dequantize(np.float32) @ matrix.dequantize(np.float32).T
        sample = got.view(np.uint16)[rows].get().view(BFLOAT16).astype(np.float64)
        error = relative_error(sample, wanted.astype(np.float64))
        if not error <= TOLERANCE:
            raise WrongResult(f"{name}: group {group} is off by {error:.5f}")


def line(row: Row) -> str:
    """One line of the table on the terminal."""
    return (
        f"{row.row:34} {row.contender:14} {row.us:9.1f} us  {row.tflops:6.0f} TFLOPS "
        f"{row.gbs:6.0f} GB/s  {row.ratio:6.3f} of {row.against} (spread {row.spread_pct:.0f} %)"
    )


def write_reports(
    rows: Sequence[Row], record: Any, seed: int, windows: int, window_ms: float,
    json_path: Path | None, markdown_path: Path | None,
) -> None:  # fmt: skip
    """Write the files that were asked for."""
    method = (
        "CUDA graphs, contenders of a row interleaved round by round in random order in one "
        f"process, median of {windows} windows of at least {window_ms:g} ms, rotating operand "
        "sets. Ratio: rate over that of the contender named, within one row only. The stream "
        "floor reads the weights by TMA, 128 KiB in flight per multiprocessor, and nothing else."
    )
    if json_path is not None:
        report = {
            "machine": record.as_dict(),
            "seed": seed,
            "method": method,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if markdown_path is not None:
        table = "\n".join(
            f"| {r.row} | {r.contender} | {r.us:.1f} | {r.tflops:.0f} | {r.gbs:.0f} | "
            f"{r.ratio:.3f} | {r.against} | {r.spread_pct:.0f} |"
            for r in rows
        )
        markdown_path.write_text(
            "# Grouped products\n\n| row | contender | us | TFLOPS | GB/s | ratio | of | spread % |"
            f"\n|---|---|---:|---:|---:|---:|---|---:|\n{table}\n\nMachine: {record.hardware}.  \n"
            f"Software: {record.software}.  \nDate: {record.date}; seed {seed}.\n\n"
            f"Method: {method}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    sys.exit(main())
