"""Bandwidth of the quantisers beside a device copy, interleaved in one run.

Bytes counted: the input read once, codes and scales written once; a copy reads and writes the
input.

    python examples/05_quantizer_bandwidth.py [FILE.json]
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cpgemm
from cpgemm import machine
from cpgemm.timing import rotations, time_interleaved

SHAPES = ((8192, 16384), (32768, 7168), (4096, 7168))


def main(path: str | None = None) -> int:
    """The exit code: 0 done, 2 a machine that cannot run this."""
    if why := machine.why_no_hopper():
        print(f"This benchmark needs a Hopper GPU: {why}.", file=sys.stderr)
        return 2
    import cupy

    rng = np.random.default_rng()
    rows = []
    for m, k in SHAPES:
        values = cupy.asarray(rng.standard_normal((m, k), dtype=np.float32))
        high = ((values.view(np.uint32) + cupy.uint32(0x8000)) >> cupy.uint32(16)).astype(np.uint16)
        for name, x in (
            ("float32", values),
            ("bfloat16", high.view(ml_dtypes.bfloat16)),
            ("float16", values.astype(np.float16)),
        ):
            rows += measure(name, x)
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(name: str, x: Any) -> list[dict[str, Any]]:
    """One row for the copy and each quantiser of ``x``."""
    m, k = x.shape
    # Inputs of a hundred megabytes and more exceed L2 by themselves: two sets of them will do.
    sets = rotations(x.nbytes) if x.nbytes < 2e8 else 2
    inputs = [x.view(np.uint8).copy().view(x.dtype) for _ in range(sets)]
    copies = [one.view(np.uint8).copy() for one in inputs]
    contenders = {
        "copy": [functools.partial(_copy, to, one) for to, one in zip(copies, inputs, strict=True)]
    }
    moved = {"copy": 2.0 * x.nbytes}
    for granularity in ((1, 128), (128, 128)):
        for scale_format in ("float32", "pow2"):
            what = f"{granularity[0]}x{granularity[1]} {scale_format}"
            quantise = functools.partial(cpgemm.quantize, scale_format=scale_format)
            outs = [quantise(one, granularity) for one in inputs]
            contenders[what] = [
                functools.partial(quantise, one, granularity, out=out)
                for one, out in zip(inputs, outs, strict=True)
            ]
            moved[what] = float(x.nbytes + outs[0].nbytes)
    timings = time_interleaved(contenders, windows=5, window_ms=5.0)
    rows = []
    copy_gbs = moved["copy"] / timings["copy"].median_us / 1e3
    for what, timing in timings.items():
        us = timing.median_us
        gbs = moved[what] / us / 1e3
        row = {"m": m, "k": k, "dtype": name, "what": what, "us": us, "gbs": gbs}
        rows.append({**row, "of_copy": gbs / copy_gbs})
        print(
            f"{m}x{k} {name:9} {what:16} {us:9.1f} us {gbs:7.0f} GB/s {gbs / copy_gbs:6.1%} of copy"
        )
    return rows


def _copy(to: Any, one: Any) -> None:
    import cupy

    runtime = cupy.cuda.runtime
    stream = cupy.cuda.get_current_stream().ptr
    runtime.memcpyAsync(to.data.ptr, one.data.ptr, one.nbytes, runtime.memcpyDeviceToDevice, stream)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
