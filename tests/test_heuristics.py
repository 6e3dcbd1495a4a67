"""The choice of a kernel: a finite set, sane picks, an explanation that adds up."""

import itertools

import pytest
from gemm_checks import DENSE_SHAPES

import cpgemm
from cpgemm import heuristics
from cpgemm.config import KernelConfig, SplitKernelConfig
from cpgemm.cost_model import H200, Machine
from cpgemm.errors import ArgumentError
from cpgemm.heuristics import Tile, choose, configurations, deepest, explain
from cpgemm.problem import GemmProblem


def test_the_set_is_finite_and_distinct():
    names = [c.name for d in ("bfloat16", "float32") for c in configurations(d)]
    assert len(names) == len(set(names)) <= 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_shape_maps_into_the_set(rng, dtype):
    allowed = set(configurations(dtype))
    for m, n, k in rng.integers(1, (9000, 5000, 1100), (300, 3)):
        assert choose(GemmProblem(m, 8 * n, 16 * k, dtype)) in allowed


def test_the_model_reproduces_the_measured_ranking():
    """Tiles that won on the H200 by 3 % or more (docs/performance.md)."""
    winners = {
        (2112, 7168): {"192x128"},
        (24576, 1536): {"192x128"},
        (7168, 16384): {"256x128"},
        (4096, 7168): {"256x128"},
        (7168, 2048): {"256x128"},
    }
    for (n, k), tiles in winners.items():
        config = explain(4096, n, k).choice.config
        assert f"{config.block_m}x{config.block_n}" in tiles, (n, k, config.name)


def test_small_m_takes_small_tiles():
    for (n, k), m in itertools.product(DENSE_SHAPES, (1, 16, 64)):
        assert choose(GemmProblem(m, n, k)).block_m <= 128


def test_a_tile_has_the_stages_that_fit_or_that_it_wants():
    most = deepest(KernelConfig, Tile(64, 64, 1), "bfloat16")
    assert (
        deepest(KernelConfig, Tile(64, 64, 1, most_stages=8), "bfloat16").stages == 8 < most.stages
    )
    assert deepest(KernelConfig, Tile(256, 128, 2, most_stages=8), "bfloat16").stages == 3


def test_predictions_that_are_not_told_apart_go_by_the_set(rng):
    """The choice is the first of the set among those within 0.8 % of the fastest prediction."""
    ties = 0
    for m, n, k in rng.integers(1, (9000, 5000, 1100), (300, 3)):
        found = explain(m, 8 * n, 16 * k).candidates
        least = min(one.predicted_us for one in found)
        near = {one.config for one in found if one.predicted_us <= heuristics._TIE * least}
        assert found[0].config == next(c for c in configurations("bfloat16") if c in near)
        rest = [one.predicted_us for one in found[len(near) :]]
        assert rest == sorted(rest) and {one.config for one in found[: len(near)]} == near
        ties += len(near) > 1
    assert ties


def test_split_kernels_run_in_one_wave():
    """Clusters that do not all fit at once take a second wave (15.3 instead of 10.7 us)."""
    for config in configurations("bfloat16"):
        if isinstance(config, SplitKernelConfig):
            for m, n in ((64, 4096), (64, 2112), (1, 65536)):
                offered = {c.config for c in explain(m, n, 7168).candidates}
                clusters = H200.sms * config.blocks_per_sm // config.splits
                if config.tiles(GemmProblem(m, n, 7168)) > clusters:
                    assert config not in offered
    assert explain(64, 2112, 7168).choice.config.cluster == 4
    assert explain(64, 4096, 7168).choice.config.cluster == 2


@pytest.mark.parametrize("m", [1, 128, 4096])
def test_prediction_is_never_below_the_floor(m):
    for n, k in DENSE_SHAPES:
        explanation = explain(m, n, k)
        assert explanation.choice.predicted_us > explanation.floor_us > 0


def test_explanation_is_readable():
    text = str(cpgemm.explain(4096, 7168, 2048))
    assert "4096 x 7168 x 2048 -> bfloat16" in text and "floor" in text
    candidates = cpgemm.explain(4096, 7168, 2048).candidates
    assert len(text.splitlines()) == 3 + len(candidates) >= 3 + 12
    assert max(len(line) for line in text.splitlines()) <= 100


def test_floor_follows_the_notes():
    assert explain(64, 2112, 7168).floor_us == pytest.approx(3.69, rel=0.02)
    assert explain(4096, 7168, 16384).floor_us == pytest.approx(641.4, rel=0.01)


def test_fewer_multiprocessors_take_longer():
    half = Machine("half", H200.sms // 2, H200.clock_ghz, H200.dram_tbs, H200.l2_tbs)
    full = explain(4096, 7168, 2048).choice.predicted_us
    assert explain(4096, 7168, 2048, machine=half).choice.predicted_us > 1.7 * full


def test_empty_is_not_explained():
    with pytest.raises(ArgumentError, match="must not be 0"):
        explain(0, 128, 128)
