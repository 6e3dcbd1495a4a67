"""The ladder of kernels (examples/notebooks/ladder): short, clean builds, right on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_kernels import ROOT, needs_nvrtc

import cpgemm

NOTEBOOKS = ROOT / "examples" / "notebooks"
LADDER = NOTEBOOKS / "ladder"
NAMES = ("naive", "tma", "ring", "two_consumers", "persistent", "package")
# Whole tiles; tiles that hang over every edge; fewer rows and columns than a tile; K of one block.
SHAPES = ((512, 512, 1024), (712, 1032, 1168), (40, 24, 272), (257, 136, 128), (1, 8, 16))

every_step = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def steps() -> Iterator[Any]:
    sys.path.insert(0, str(NOTEBOOKS))
    try:
        from ladder import steps

        yield steps
    finally:
        sys.path.remove(str(NOTEBOOKS))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "ladder"))


def test_every_step_is_there_and_short(steps: Any) -> None:
    assert tuple(step.__name__ for step in steps.STEPS) == NAMES
    files = sorted(path.name for path in LADDER.glob("*.j2"))
    assert files == [f"step{at}_{name}.cu.j2" for at, name in enumerate(NAMES[:-1])]
    for name in files:
        lines = (LADDER / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 140 and max(map(len, lines)) <= 120, name


@needs_nvrtc
@every_step
def test_builds_are_clean(steps: Any, name: str) -> None:
    """Refused otherwise: the steps are rendered with ``strict``."""
    kernel = getattr(steps, name)((4096, 4096, 4096))
    found, main = kernel.resources, kernel.counts.main_loop
    assert found.spill_bytes == 0 and not found.report.faults()
    # One FFMA of each thread promotes 128 products: 64 x 128 sums for each four wgmma.
    assert main["wgmma"] and main["FFMA"] == 16 * main["wgmma"]
    assert found.threads == {"ring": 160, "two_consumers": 288}.get(
        name, 128 if name in ("naive", "tma") else 384
    )


@needs_nvrtc
def test_each_step_does_what_its_text_says(steps: Any) -> None:
    naive, tma, ring, two, persistent = (
        getattr(steps, name)((4096, 4096, 4096)) for name in NAMES[:-1]
    )
    assert naive.counts.whole["TMA loads"] == 0 and naive.counts.main_loop["block barriers"] == 2
    # A fence and a wait for each batch: four of one wgmma, then one of four.
    assert naive.counts.main_loop["wgmma fences and waits"] == 8
    assert tma.counts.main_loop["wgmma fences and waits"] == 2
    assert tma.counts.main_loop["TMA loads"] == 2 and tma.counts.main_loop["block barriers"] == 1
    assert ring.counts.main_loop["TMA loads"] == ring.counts.main_loop["block barriers"] == 0
    assert ring.counts.load_loop["TMA loads"] == 2 and ring.resources.occupancy.blocks_per_sm == 2
    assert two.counts.load_loop["TMA loads"] == 3 and two.counts.whole["TMA stores"] == 0
    assert persistent.counts.whole["TMA stores"] and persistent.counts.whole["global stores"] == 0


@needs_nvrtc
@pytest.mark.parametrize("stages", [2, 3, 8])
def test_rings_of_other_depths_build(steps: Any, stages: int) -> None:
    kernel = steps.ring((4096, 4096, 4096), stages=stages)
    assert kernel.resources.spill_bytes == 0
    assert kernel.resources.shared_bytes == -(-stages * (24576 + 16) // 1024) * 1024


@pytest.mark.gpu
@every_step
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_products_are_right(steps: Any, name: str, shape: tuple[int, int, int]) -> None:
    result = getattr(steps, name)(shape).check()
    assert result.fraction <= 1


@pytest.mark.gpu
def test_all_steps_agree_in_every_bit(steps: Any, rng: np.random.Generator) -> None:
    """They add in the same order: within a wgmma by 32 of K, then the blocks of 128 in turn."""
    import cupy

    a = cpgemm.quantize(cupy.asarray(rng.standard_normal((640, 1280), dtype=np.float32)))
    w = cupy.asarray(rng.standard_normal((512, 1280), dtype=np.float32))
    b = cpgemm.quantize(w, (128, 128))
    wanted = steps.package((640, 512, 1280))(a, b).view(np.uint16)
    for step in steps.STEPS:
        got = step((640, 512, 1280))(a, b).view(np.uint16)
        assert bool((got == wanted).all()), step.__name__


def test_paths_are_found_from_anywhere(
    steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert steps.naive((64, 128, 128)).source.count("ladder_naive") == 1
