"""The kernels of the ladder as ``cpgemm.TemplateKernel``: one for each step, for any problem.

All compute D = A @ B.T in bfloat16 from e4m3 codes with scales of 1 x 128 (A) and 128 x 128 (B).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cpgemm
from cpgemm import env
from cpgemm.layout import pointer
from cpgemm.tma import matrix_map, tensor_map

FOLDER = Path(__file__).resolve().parent
BLOCK_N = BLOCK_K = 128

Problem = tuple[int, int, int]


def naive(problem: Problem) -> Any:
    """Step 0: plain loads, one wgmma at a time."""

    def arguments(a: Any, b: Any, out: Any) -> tuple[Any, ...]:
        pitches = np.int64(a.data.strides[0]), np.int64(b.data.strides[0])
        return a.data, a.scales, b.data, b.scales, out, *pitches, a.scales_pitch, *_sizes(a, b)

    return _step("step0_naive", problem, 64, 128, arguments)


def tma(problem: Problem) -> Any:
    """Step 1: TMA loads, four wgmma in one batch."""
    return _step("step1_tma", problem, 64, 128, _two_maps)


def ring(problem: Problem, stages: int = 4) -> Any:
    """Step 2: a ring of ``stages`` and a producer warp."""
    stage = (64 + BLOCK_N) * BLOCK_K
    return _step("step2_ring", problem, 64, 160, _two_maps, stages, stage)


def two_consumers(problem: Problem, stages: int = 6) -> Any:
    """Step 3: two consumers of 64 rows, scales of A in the ring."""

    def arguments(a: Any, b: Any, out: Any) -> tuple[Any, ...]:
        return *_maps(a, b, 128), _scale_map(a, 128), b.scales, out, *_sizes(a, b)

    stage = (128 + BLOCK_N) * BLOCK_K + 128 * 4
    return _step("step3_two_consumers", problem, 128, 288, arguments, stages, stage)


def persistent(problem: Problem, stages: int = 3) -> Any:
    """Step 4: one block for each multiprocessor, 256 rows, TMA stores."""

    def arguments(a: Any, b: Any, out: Any) -> tuple[Any, ...]:
        map_d = matrix_map(out, (128, 64), 128)
        return *_maps(a, b, 256), _scale_map(a, 256), map_d, b.scales, *_sizes(a, b)

    def grid(problem: Any) -> int:
        return min(_multiprocessors(), _tiles(problem.m, 256) * _tiles(problem.n, BLOCK_N))

    stage = (256 + BLOCK_N) * BLOCK_K + 256 * 4
    staging = 256 * BLOCK_N * 2
    return _step(
        "step4_persistent", problem, 256, 384, arguments, stages, stage, staging=staging, grid=grid
    )


def package(problem: Problem) -> Any:
    """Step 5: cpgemm's own template; pairs of blocks share the rows of A (multicast)."""
    config = cpgemm.KernelConfig(256, 128, 3, 2, cluster_n=2, unroll=8)
    path = env.template_dir() / config.template
    return cpgemm.kernel_from_template(path, problem, config, name="step5_package", strict=True)


STEPS: tuple[Callable[[Problem], Any], ...] = (naive, tma, ring, two_consumers, persistent, package)


def _step(
    name: str,
    problem: Problem,
    block_m: int,
    threads: int,
    arguments: Callable[..., tuple[Any, ...]],
    stages: int = 0,
    stage_bytes: int = 0,
    *,
    staging: int = 0,
    grid: Any = None,
) -> Any:
    # The barriers of the ring, 16 bytes for each stage, and what aligns the whole to 1024.
    shared = -(-(stages * (stage_bytes + 16) + staging) // 1024) * 1024
    return cpgemm.kernel_from_template(
        FOLDER / f"{name}.cu.j2",
        problem,
        values={"stages": stages, "shared_bytes": shared} if stages else None,
        name=name,
        entry=f"ladder_{name.partition('_')[2]}",
        grid=grid or (lambda p: (_tiles(p.n, BLOCK_N), _tiles(p.m, block_m))),
        threads=threads,
        shared_bytes=shared,
        arguments=arguments,
        strict=True,  # a kernel that spills or serialises its wgmma teaches nothing
    )


def _two_maps(a: Any, b: Any, out: Any) -> tuple[Any, ...]:
    return *_maps(a, b, 64), a.scales, b.scales, out, a.scales_pitch, *_sizes(a, b)


def _maps(a: Any, b: Any, block_m: int) -> tuple[bytes, bytes]:
    """Tensor maps of both operands: boxes of whole tiles, 128 bytes wide, swizzled."""
    box_a, box_b = (block_m, BLOCK_K), (BLOCK_N, BLOCK_K)
    return matrix_map(a.data, box_a, 128), matrix_map(b.data, box_b, 128)


def _scale_map(a: Any, block_m: int) -> bytes:
    """Scales of A, which lie rows-fastest: a matrix of k-blocks by rows, boxes of one k-block."""
    rows, k_blocks = a.scales.shape
    return tensor_map(pointer(a.scales), k_blocks, rows, 4 * a.scales_pitch, 4, (1, block_m), 0)


def _sizes(a: Any, b: Any) -> Problem:
    return a.shape[0], b.shape[0], a.shape[1]


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _multiprocessors() -> int:
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])
