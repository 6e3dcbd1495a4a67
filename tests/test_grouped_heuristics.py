"""Grouped kernels are chosen by what the host knows: layout, extents, number of groups."""

import pytest

from cpgemm.config import AdaptiveKernelConfig
from cpgemm.cost_model import H200
from cpgemm.grouped_heuristics import choose_grouped, grouped_configurations
from cpgemm.grouped_problem import GroupedProblem

DECODE = (
    # groups, N, K, width of the flat tiles that was faster on an H200 (docs/performance.md)
    (32, 4096, 4096, 128),
    (32, 7168, 2048, 128),
    (9, 4096, 7168, 96),
    (8, 4096, 7168, 128),
)


@pytest.mark.parametrize(("groups", "n", "k", "flat_n"), DECODE)
def test_masked_products_fill_the_machine(groups, n, k, flat_n):
    config = choose_grouped(GroupedProblem("masked", groups, 4096, n, k))
    assert isinstance(config, AdaptiveKernelConfig)
    assert (config.block_m, config.flat_n) == (256, flat_n)
    tiles = groups * config.flat.column_tiles(n)
    for other in grouped_configurations("bfloat16"):
        if isinstance(other, AdaptiveKernelConfig):
            turns = -(-groups * other.flat.column_tiles(n) // H200.sms)
            assert -(-tiles // H200.sms) * config.flat_n <= turns * other.flat_n


@pytest.mark.parametrize("layout", ["offsets", "ends", "m_indices"])
def test_large_contiguous_groups_take_multicast(layout):
    assert choose_grouped(GroupedProblem(layout, 8, 8 * 4096, 4096, 7168)).cluster == 2
    assert choose_grouped(GroupedProblem(layout, 8, 8 * 64, 4096, 7168)).cluster == 1
    odd = GroupedProblem(layout, 8, 8 * 4096, 4096 + 128, 7168)
    assert choose_grouped(odd).cluster == 1, "a pair would idle one of its blocks"


def test_m_indices_never_get_straddling_tiles(rng):
    for m, n, k in rng.integers(1, (40000, 1000, 500), (200, 3)):
        config = choose_grouped(GroupedProblem("m_indices", 8, int(m), int(n) * 8, int(k) * 16))
        assert config.block_m in (64, 128, 256)
        assert -(-int(n) * 8 // config.block_n) % config.cluster_n == 0


def test_every_output_dtype_has_a_kernel_for_every_layout():
    for out_dtype in ("bfloat16", "float32"):
        for layout in ("offsets", "ends", "m_indices", "masked"):
            problem = GroupedProblem(layout, 3, 700, 264, 400, out_dtype)
            assert choose_grouped(problem).why_not_layout(layout, 264) is None


def test_the_choice_is_remembered():
    """It stands on the path of every call."""
    problem = GroupedProblem("offsets", 7, 1234, 4096, 7168)
    before = choose_grouped.cache_info().hits
    assert choose_grouped(problem) is choose_grouped(GroupedProblem("offsets", 7, 1234, 4096, 7168))
    assert choose_grouped.cache_info().hits > before
