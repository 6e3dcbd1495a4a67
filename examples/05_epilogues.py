"""Epilogues inside the product's kernel against kernels behind it, with the memory traffic saved.

    python examples/05_epilogues.py [FILE.json] [--shapes 8192x7168x2048 ...]

For each shape and epilogue three contenders take turns in one run: the product with the epilogue,
the product followed by a CuPy kernel (``cpgemm.quantize`` or ``cpgemm.moe.swiglu_quantize`` where D
is quantised), and the product alone.  The second kernel reads D back that the first has written:
``saved`` is what these bytes take at the speed of a device copy that is timed beside them,
``gained`` what the fused form gains.  A D that stays in L2 costs less than that.

Operands rotate, so that L2 is cold for them; both results are compared in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cpgemm
from cpgemm import epilogues, machine, moe
from cpgemm.timing import rotations, time_interleaved

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = ("64x7168x2048", "4096x4096x7168", "8192x7168x2048", "8192x24576x1536", "16384x14336x512")
COPY_BYTES = 1 << 28

# CuPy's kernels know little of bfloat16: it travels as its bits.
PREAMBLE = """
__device__ float wide(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
__device__ unsigned short narrow(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ float silu(float x) { return x / (1.0f + __expf(-x)); }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 results differ, 2 a machine that cannot run this."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="where rows go as JSON")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="M x N x K")
    parser.add_argument("--windows", type=int, default=5)
    chosen = parser.parse_args(arguments)
    if why := machine.why_no_hopper():
        print(f"This benchmark needs a Hopper GPU: {why}.", file=sys.stderr)
        return 2
    rows = []
    print(
        f"{'shape':18} {'epilogue':16} {'fused':>9} {'unfused':>9} {'product':>9} {'gained':>8} "
        f"{'saved':>8}  (us)"
    )
    for shape in chosen.shapes:
        m, n, k = (int(size) for size in shape.split("x"))
        for name in EPILOGUES:
            rows.append(measure(name, m, n, k, chosen.windows))
            r = rows[-1]
            print(
                f"{shape:18} {name:16} {r['fused_us']:9.1f} {r['unfused_us']:9.1f} "
                f"{r['product_us']:9.1f} {r['gained_us']:8.1f} {r['saved_us']:8.1f}"
                f"{'' if r['agree'] else '  RESULTS DIFFER'}",
                flush=True,
            )
    if chosen.file:
        chosen.file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["agree"] for row in rows) else 1


class Set:
    """One set of operands, with both ways to D."""

    def __init__(self, rng: np.random.Generator, name: str, m: int, n: int, k: int) -> None:
        import cupy

        self.a = cpgemm.quantize(_normal(rng, m, k))
        w = _normal(rng, n, k) / np.float32(np.sqrt(k))
        # Scales that are powers of two round a weight alike in whichever block it lies: both orders
        # of the columns multiply the same numbers.
        self.b = cpgemm.quantize(w, (128, 128), scale_format="pow2")
        self.d = cupy.empty((m, n), np.uint16).view(BF16)
        self.bias = _normal(rng, 1, n)[0]
        self.residual = _bfloat16(_normal(rng, m, n)) if name == "Residual" else self.d
        if "SwiGLU" in name:  # the separate kernel wants gate and up in halves
            mixed = epilogues.interleave_gate_up(w)
            self.halves = self.b
            self.b = cpgemm.quantize(mixed, (128, 128), scale_format="pow2")
        self.fused, self.unfused = EPILOGUES[name](self, m, n)

    def product(self) -> None:
        """The product alone."""
        cpgemm.gemm(self.a, self.b, self.d)


Ways = tuple[Callable[[], Any], Callable[[], Any]]


def _pointwise(set_: Set, m: int, n: int, epilogue: Any, inputs: str, body: str) -> Ways:
    """An epilogue that keeps D's shape, against an ElementwiseKernel over D's bits."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        f"uint16 d, {inputs}".rstrip(", "), "uint16 out", body, "behind_gemm", preamble=PREAMBLE
    )
    out, other = (cupy.empty((m, n), np.uint16).view(BF16) for _ in range(2))
    given = {"float32 bias": set_.bias, "uint16 residual": set_.residual.view(np.uint16)}
    read = [given[one] for one in inputs.split(", ") if one]
    bits = set_.d.view(np.uint16)

    def unfused() -> Any:
        cpgemm.gemm(set_.a, set_.b, set_.d)
        kernel(bits, *read, other.view(np.uint16))
        return other

    return functools.partial(cpgemm.gemm, set_.a, set_.b, out, epilogue=epilogue), unfused


def _bias(s: Set, m: int, n: int) -> Ways:
    return _pointwise(
        s, m, n, epilogues.Bias(s.bias), "float32 bias", "out = narrow(wide(d) + bias)"
    )


def _bias_silu(s: Set, m: int, n: int) -> Ways:
    return _pointwise(
        s, m, n, epilogues.Bias(s.bias) | epilogues.SiLU(), "float32 bias",
        "out = narrow(silu(wide(d) + bias))",
    )  # fmt: skip


def _gelu(s: Set, m: int, n: int) -> Ways:
    body = "float x = wide(d); out = narrow(0.5f * x * (1.0f + erff(x * 0.70710678f)))"
    return _pointwise(s, m, n, epilogues.GELU(), "", body)


def _residual(s: Set, m: int, n: int) -> Ways:
    return _pointwise(
        s, m, n, epilogues.Residual(s.residual), "uint16 residual",
        "out = narrow(wide(d) + wide(residual))",
    )  # fmt: skip


def _swiglu(s: Set, m: int, n: int) -> Ways:
    import cupy

    kernel = cupy.ElementwiseKernel(
        "uint16 gate, uint16 up", "uint16 out", "out = narrow(silu(wide(gate)) * wide(up))",
        "swiglu_behind_gemm", preamble=PREAMBLE,
    )  # fmt: skip
    out, other = (cupy.empty((m, n // 2), np.uint16).view(BF16) for _ in range(2))
    bits = s.d.view(np.uint16)

    def unfused() -> Any:
        cpgemm.gemm(s.a, s.halves, s.d)
        kernel(bits[:, : n // 2], bits[:, n // 2 :], other.view(np.uint16))
        return other

    epilogue = epilogues.SwiGLU()
    return functools.partial(cpgemm.gemm, s.a, s.b, out, epilogue=epilogue), unfused


def _quantize(s: Set, m: int, n: int) -> Ways:
    epilogue = epilogues.Quantize()
    out, other = (cpgemm.gemm(s.a, s.b, epilogue=epilogue) for _ in range(2))

    def unfused() -> Any:
        cpgemm.gemm(s.a, s.b, s.d)
        return cpgemm.quantize(s.d, out=other)

    return functools.partial(cpgemm.gemm, s.a, s.b, out, epilogue=epilogue), unfused


def _swiglu_quantize(s: Set, m: int, n: int) -> Ways:
    epilogue = epilogues.SwiGLU() | epilogues.Quantize()
    out, other = (cpgemm.gemm(s.a, s.b, epilogue=epilogue) for _ in range(2))

    def unfused() -> Any:
        cpgemm.gemm(s.a, s.halves, s.d)
        return moe.swiglu_quantize(s.d, out=other)

    return functools.partial(cpgemm.gemm, s.a, s.b, out, epilogue=epilogue), unfused


EPILOGUES: dict[str, Callable[[Set, int, int], Ways]] = {
    "Bias": _bias,
    "Bias | SiLU": _bias_silu,
    "GELU": _gelu,
    "Residual": _residual,
    "SwiGLU": _swiglu,
    "Quantize": _quantize,
    "SwiGLU | Quantize": _swiglu_quantize,
}


def measure(name: str, m: int, n: int, k: int, windows: int) -> dict[str, Any]:
    """One row: the three contenders and a copy, interleaved."""
    import cupy

    rng = np.random.default_rng()
    moved = m * k + n * k + 6.0 * m * n
    sets = [Set(rng, name, m, n, k) for _ in range(rotations(moved) if moved < 2e8 else 2)]
    agree = _agree(sets[0].fused(), sets[0].unfused())
    source = [cupy.zeros(COPY_BYTES, np.uint8) for _ in range(2)]
    target = [cupy.empty(COPY_BYTES, np.uint8) for _ in range(2)]
    contenders = {
        "fused": [one.fused for one in sets],
        "unfused": [one.unfused for one in sets],
        "product": [one.product for one in sets],
        "copy": [functools.partial(_copy, to, one) for to, one in zip(target, source, strict=True)],
    }
    timings = time_interleaved(contenders, windows=windows, window_ms=5.0)
    us = {what: timing.median_us for what, timing in timings.items()}
    copy_gbs = 2 * COPY_BYTES / us["copy"] / 1e3
    saved_bytes = 2 * 2 * m * n  # D in bfloat16, written once and read once
    return {
        "epilogue": name, "m": m, "n": n, "k": k, "agree": agree, "copy_gbs": copy_gbs,
        **{f"{what}_us": us[what] for what in ("fused", "unfused", "product")},
        "gained_us": us["unfused"] - us["fused"],
        "saved_bytes": saved_bytes, "saved_us": saved_bytes / copy_gbs / 1e3,
    }  # fmt: skip


def _agree(fused: Any, unfused: Any) -> bool:
    """In the 2-norm.  The second kernel reads a D that is rounded to bfloat16 once more (0.0016);
    before quantising, that moves some 3 % of the codes by a step of up to 1 / 8 (0.02).
    """
    quantized = isinstance(fused, cpgemm.ScaledTensor)
    left, right = (one.dequantize() if quantized else _wide(one) for one in (fused, unfused))
    limit = 0.03 if quantized else 0.005
    return float(((left - right) ** 2).sum()) <= limit**2 * float((right**2).sum())


def _normal(rng: np.random.Generator, rows: int, columns: int) -> Any:
    import cupy

    return cupy.random.default_rng(int(rng.integers(2**31))).standard_normal(
        (rows, columns), dtype=np.float32
    )


def _bfloat16(x: Any) -> Any:
    import cupy

    high = (x.view(np.uint32) + cupy.uint32(0x8000)) >> cupy.uint32(16)
    return high.astype(np.uint16).view(BF16)


def _wide(x: Any) -> Any:
    import cupy

    return (x.view(np.uint16).astype(np.uint32) << cupy.uint32(16)).view(np.float32)


def _copy(to: Any, one: Any) -> None:
    import cupy

    runtime = cupy.cuda.runtime
    stream = cupy.cuda.get_current_stream().ptr
    runtime.memcpyAsync(to.data.ptr, one.data.ptr, one.nbytes, runtime.memcpyDeviceToDevice, stream)


if __name__ == "__main__":
    sys.exit(main())
