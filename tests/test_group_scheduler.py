"""The device's tile schedule for groups, replayed in Python: every tile once, none astray.

``cuda_src/group_scheduler.cuh`` runs on the GPU only; this is its arithmetic, line by line, so that
an error in it shows without one. The GPU tests compare results.
"""

import numpy as np
import pytest

RASTER = 8
ALIGNMENT = 128


def ranges(layout, index, groups, m):
    rows = groups * m if layout == "masked" else m
    for g in range(groups):
        if layout == "masked":
            begin, end = g * m, g * m + min(index[g], m)
        elif layout == "offsets":
            begin, end = index[g], index[g + 1]
        else:
            before = 0 if g == 0 else max(min(index[g - 1], m), 0)
            begin, end = -(-before // ALIGNMENT) * ALIGNMENT, index[g]
        begin = max(min(begin, rows), 0)
        yield begin, max(min(end, rows), begin)


def block(index, m, groups, row):
    valid = int((index[row : min(row + ALIGNMENT, m)] >= 0).sum()) if row < m else 0
    group = int(index[row]) if row < m else -1
    return (group if 0 <= group < groups else -1), valid


def split(index, m, groups, row, column, block_m):
    """The tiles of kIndices' ``split``: (row, row_end, column, group)."""
    upper, upper_valid = block(index, m, groups, row // ALIGNMENT * ALIGNMENT)
    tile = (row, row - row % ALIGNMENT + upper_valid, column, upper)
    rest = None
    if block_m > ALIGNMENT:
        lower, lower_valid = block(index, m, groups, row + ALIGNMENT)
        second = (row + ALIGNMENT, row + ALIGNMENT + lower_valid, column, lower)
        if upper < 0:
            tile = second
        elif lower == upper and upper_valid == ALIGNMENT:
            tile = (tile[0], second[1], column, upper)
        elif lower >= 0:
            rest = second
    kept = [tile] if tile[3] >= 0 and tile[1] > tile[0] else []
    return kept + ([rest] if kept and rest else [])


def even_share(waves, tile, tiles):
    each, more = divmod(waves, tiles)
    return each * tile + min(tile, more)


def schedule(layout, index, groups, m, n, block_m, block_n, clusters):
    indices = layout == "m_indices"
    spans = [(0, m)] if indices else list(ranges(layout, index, groups, m))
    before = np.concatenate([[0], np.cumsum([-(-(e - b) // block_m) for b, e in spans])])
    columns = -(-n // block_n)
    for cluster in range(clusters):
        group, turn = 0, 0
        while True:
            following = turn * clusters + (cluster + turn) % clusters
            row_tile = following // columns
            while group < len(spans) and before[group + 1] <= row_tile:
                group += 1
            if group == len(spans):
                break
            first, tiles = before[group], before[group + 1] - before[group]
            in_group = following - first * columns
            raster = in_group // (RASTER * columns)
            raster_rows = min(tiles - raster * RASTER, RASTER)
            in_raster = in_group - raster * RASTER * columns
            column = in_raster // raster_rows
            row = raster * RASTER + in_raster - column * raster_rows
            turn += 1
            if indices:
                yield from split(index, m, groups, row * block_m, column * block_n, block_m)
            else:
                begin, end = spans[group]
                waves = -(-(end - begin) // 64)
                first_row = begin + 64 * even_share(waves, row, tiles)
                row_end = min(begin + 64 * even_share(waves, row + 1, tiles), end)
                assert 0 < row_end - first_row <= block_m
                yield first_row, row_end, column * block_n, group


def covered(layout, index, groups, m, n, block_m, block_n, clusters):
    """Which group each (row, column tile) is computed for; -1 for none. Fails on a double."""
    rows = groups * m if layout == "masked" else m
    owner = np.full((rows, -(-n // block_n)), -1)
    for row, row_end, column, group in schedule(
        layout, index, groups, m, n, block_m, block_n, clusters
    ):
        part = owner[row : min(row_end, row + block_m), column // block_n]
        assert (part == -1).all(), "computed twice"
        part[...] = group
    return owner


def expected(layout, index, groups, m):
    rows = groups * m if layout == "masked" else m
    owner = np.full(rows, -1)
    if layout == "m_indices":
        return np.where((index >= 0) & (index < groups), index, -1)
    for group, (begin, end) in enumerate(ranges(layout, index, groups, m)):
        owner[begin:end] = group
    return owner


@pytest.mark.parametrize("block_m", [64, 128, 256])
@pytest.mark.parametrize("clusters", [1, 7, 132])
def test_every_row_of_every_group_once(rng, block_m, clusters):
    for _ in range(6):
        groups = int(rng.integers(1, 40))
        counts = rng.integers(0, 400, groups) * (rng.random(groups) < 0.7)
        starts = np.concatenate([[0], np.cumsum(counts)])
        aligned = np.concatenate([[0], np.cumsum(-(-counts // ALIGNMENT) * ALIGNMENT)])
        total = int(aligned[-1]) + 128
        indices = np.full(total, -1)
        for group, count in enumerate(counts):
            indices[aligned[group] : aligned[group] + count] = group
        for layout, index, m in (
            ("offsets", starts + 3, int(starts[-1]) + 9),
            ("ends", aligned[:-1] + counts, total),
            ("m_indices", indices, total),
            ("masked", counts, 400),
        ):
            n = int(rng.integers(1, 6)) * 128
            owner = covered(layout, index, groups, m, n, block_m, 128, clusters)
            want = expected(layout, index, groups, m)
            np.testing.assert_array_equal(owner, np.broadcast_to(want[:, None], owner.shape))


def test_contents_that_break_the_rules_stay_inside(rng):
    for _ in range(20):
        groups, m = int(rng.integers(1, 20)), int(rng.integers(1, 900))
        for layout, size in (("offsets", groups + 1), ("ends", groups), ("masked", groups)):
            index = rng.integers(-1000, 2000, size)
            rows = groups * m if layout == "masked" else m
            for row, row_end, _, group in schedule(layout, index, groups, m, 256, 256, 128, 5):
                assert 0 <= row < row_end <= rows and 0 <= group < groups
