"""A mixture-of-experts layer in FP8: on a Hopper GPU with CuPy, anywhere with NumPy.

    python examples/02_moe_layer.py [--tokens 512] [--layout offsets|m_indices|ends]

Each token goes through the ``top_k`` of ``experts`` feed-forward networks that its router logits
choose, and takes the weighted sum of what they make of it:

    route               rows (token, expert) sorted by expert
    gather              the quantised tokens in that order
    grouped product     up-projection: gate and up of each expert, (rows, 2 * inner)
    swiglu_quantize     silu(gate) * up, quantised again
    grouped product     down-projection, (rows, hidden)
    scatter_combine     back to the tokens, weighted

The arrays are CuPy's or NumPy's throughout; on a GPU each line above is one launch and nothing
waits.  The result is compared with the same layer in float64 on the weights before quantisation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import cpgemm
from cpgemm import moe
from cpgemm.machine import why_no_hopper

# Rounding to e4m3 costs 0.026 of a normally distributed array in the 2-norm (2^-4 / sqrt(3) * 0.72;
# small values, which are rounded to denormals, add little).  Tokens and first weights make
# 0.026 * sqrt(2) of gate and of up; their product has up to 0.026 * sqrt(2) * sqrt(2) * 1.1, silu
# being steeper than its secant; rounding it and the second weights adds 0.026 twice.  The root of
# the squares is 0.026 * sqrt(4.8 + 2) = 0.068.
TOLERANCE = 0.08


@dataclass(frozen=True)
class Layer:
    """Quantised experts: ``up`` (experts, 2 * inner, hidden), ``down`` (experts, hidden, inner)."""

    up: cpgemm.ScaledTensor
    down: cpgemm.ScaledTensor
    top_k: int

    def __call__(self, x: Any, logits: Any, layout: str = "offsets") -> Any:
        """bfloat16 (tokens, hidden) from float32 ``x`` (tokens, hidden) and router logits
        (tokens, experts)."""
        experts = self.up.shape[0]
        ids, weights = choose_experts(logits, self.top_k)
        # Ragged groups need no padding; the other layouts start groups at multiples of 128.
        aligned = layout != "offsets"
        routing = moe.route(
            ids,
            experts,
            alignment=cpgemm.contiguous_alignment() if aligned else 1,
            m_indices=layout == "m_indices",
        )
        groups = {layout: getattr(routing, layout)}

        rows = moe.gather(cpgemm.quantize(x), routing)
        h = cpgemm.grouped_gemm_contiguous(rows, self.up, **groups)
        activated = moe.swiglu_quantize(h, offsets=routing.offsets)
        y = cpgemm.grouped_gemm_contiguous(activated, self.down, **groups)
        return moe.scatter_combine(y, routing, weights)


def choose_experts(logits: Any, top_k: int) -> tuple[Any, Any]:
    """The ``top_k`` experts of each token, best first, and the softmax of their logits.

    int32 and float32 (tokens, top_k), where ``logits`` (tokens, experts) is.
    """
    xp = sys.modules[type(logits).__module__.partition(".")[0]]
    tokens, experts = logits.shape
    ids = xp.empty((tokens, top_k), np.int32)
    chosen = xp.empty((tokens, top_k), np.float32)
    columns = xp.arange(experts)
    for j in range(top_k):
        best = logits.argmax(axis=1)
        ids[:, j] = best
        chosen[:, j] = logits.max(axis=1)
        logits = xp.where(columns == best[:, None], np.float32(-np.inf), logits)
    powers = xp.exp(chosen - chosen[:, :1])
    return ids, powers / powers.sum(axis=1, keepdims=True)


def float_layer(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """The layer in float64 on plain arrays, one expert after the other."""
    out = np.zeros((len(x), down.shape[1]))
    for expert in range(len(up)):
        token, j = np.nonzero(ids == expert)
        h = x[token].astype(np.float64) @ up[expert].T.astype(np.float64)
        gate, linear = np.split(h, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * linear @ down[expert].T.astype(np.float64)
        out[token] += weights[token, j, None] * y  # a token chooses an expert once
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a layer, run it, report its error; 0 when that is within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--layout", choices=("offsets", "m_indices", "ends"), default="offsets")
    chosen = parser.parse_args(arguments)

    xp: Any = np
    refusal = why_no_hopper()
    if refusal is None:
        import cupy as xp
    else:
        print(f"NumPy reference path ({refusal})")

    # Drawn by NumPy and brought over, so that both give the same layer.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((chosen.tokens, chosen.hidden), np.float32)
    logits = rng.standard_normal((chosen.tokens, chosen.experts), np.float32)
    up = rng.standard_normal((chosen.experts, 2 * chosen.inner, chosen.hidden), np.float32)
    down = rng.standard_normal((chosen.experts, chosen.hidden, chosen.inner), np.float32)
    up /= np.float32(np.sqrt(chosen.hidden))  # gate and up are normally distributed then
    down /= np.float32(np.sqrt(chosen.inner))

    layer = Layer(
        cpgemm.quantize(xp.asarray(up), (128, 128)),
        cpgemm.quantize(xp.asarray(down), (128, 128)),
        chosen.top_k,
    )
    out = layer(xp.asarray(x), xp.asarray(logits), chosen.layout)

    # bfloat16 goes to the host as the bits it is.
    bits = out.view(np.uint16)
    got = np.asarray(bits if xp is np else bits.get()).view(out.dtype).astype(np.float64)
    ids, weights = choose_experts(logits, chosen.top_k)
    wanted = float_layer(x, ids, weights, up, down)
    counts = np.bincount(ids.reshape(-1), minlength=chosen.experts)
    error = np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-300)
    print(
        f"{type(out).__module__} {out.dtype} {out.shape}, {chosen.experts} experts with "
        f"{counts.min()} to {counts.max()} rows, layout {chosen.layout}"
    )
    print(
        f"relative error {error:.4f} against float64 (tolerance {TOLERANCE}), "
        f"largest {np.abs(got - wanted).max(initial=0.0):.4f} "
        f"of {np.abs(wanted).max(initial=0.0):.4f}"
    )
    return 0 if error <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
