"""Pictures of a benchmark: what is on them, that no text is cut off or covered, and their files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from picture_checks import boxes, drawn_texts, overlap

from cpgemm.bench.cases import LAYERS, suite
from cpgemm.bench.plot_data import (
    Bar,
    Panel,
    bandwidths,
    floor_panels,
    roofline_points,
    roofs,
    spaced,
    speedup_panels,
)
from cpgemm.bench.plots import figures, write_plots
from cpgemm.bench.result import Case, Report, Row, report_of
from cpgemm.errors import ArgumentError, MissingDependencyError
from cpgemm.plot_style import THEMES, Theme, drawing, style_of
from cpgemm.timing import summarize

# Microseconds on one H200 by layer, in the order of LAYERS.  At M below 64 cpgemm's are made up.
ROWS = (1, 8, 16, 32, 64, 128, 4096)
OURS = (
    (9.9, 9.2, 9.3, 9.5, 9.4, 10.1, 106.42),
    (12.6, 12.7, 12.8, 13.0, 13.32, 15.03, 263.35),
    (7.4, 7.5, 7.6, 8.0, 8.51, 9.81, 141.77),
    (32.9, 33.0, 33.1, 33.2, 33.59, 37.68, 770.83),
    (11.5, 11.0, 11.1, 11.3, 11.4, 12.3, 195.09),
    (6.6, 6.7, 6.8, 6.9, 7.16, 7.9, 101.93),
)
DEEP_GEMM = (
    (12.4, 10.25, 10.19, 10.21, 9.62, 10.46, 105.65),
    (14.6, 14.62, 14.72, 14.85, 14.29, 15.1, 259.68),
    (7.92, 7.98, 8.0, 8.26, 8.67, 10.48, 135.58),
    (37.41, 35.42, 35.76, 36.17, 35.59, 47.15, 782.29),
    (14.26, 11.75, 11.8, 12.24, 11.6, 12.59, 186.98),
    (7.31, 7.15, 7.2, 7.32, 7.04, 8.58, 102.03),
)
BLOCK = (  # None: refused
    (None,) * 7,
    (None, 15.79, 15.89, 16.06, 16.19, 15.87, 323.23),
    (None, 10.14, 10.3, 9.97, 9.8, 10.24, 195.84),
    (None, 39.85, 38.86, 46.84, 47.31, 57.77, 840.61),
    (None, 15.41, 15.52, 22.49, 22.34, 22.71, 217.39),
    (None, 9.35, 9.37, 9.45, 9.54, 9.78, 121.06),
)
TENSOR = (
    (8.73, 8.71, 8.84, 9.02, 8.76, 9.26, 95.89),
    (11.99, 12.33, 12.48, 12.94, 13.2, 14.46, 273.67),
    (7.16, 7.37, 7.55, 7.87, 8.52, 9.96, 157.96),
    (33.08, 33.32, 33.46, 31.46, 32.76, 33.76, 726.48),
    (11.99, 11.91, 12.18, 10.82, 10.8, 12.29, 186.31),
    (6.75, 6.74, 6.89, 7.01, 7.27, 7.23, 100.85),
)
STREAM = ((5.54, 4.25), (11.01, 9.54), (5.96, 4.49), (30.05, 29.12), (9.08, 7.6), (6.4, 4.9))
# Contiguous, then masked: cpgemm and DeepGEMM in the order of the suites.
GROUPED = (
    (1557.7, 1538.8), (820.6, 843.7), (1578.0, 1545.5), (831.0, 801.5),
    (47.4, 52.86), (29.1, 34.43), (48.5, 50.88), (31.7, 37.49), (53.3, 57.31), (33.4, 39.09),
    (137.1, 139.4), (119.7, 129.04), (187.7, 216.45), (70.6, 73.08), (59.5, 62.68),
)  # fmt: skip
MACHINE = {
    "gpu": "NVIDIA H200", "sms": 132, "driver": "580.159.04", "commit": "16a2a81",
    "date": "2026-11-22 16:45 UTC", "cpu": "Intel(R) Xeon(R) Processor", "cores": 16,
}  # fmt: skip


def size_of(case: Case) -> float:
    """Bytes of operands, scales and D."""
    groups = max(case.groups, 1)
    a = case.m * case.k + 4 * case.m * case.k / 128
    return groups * (a + case.n * case.k * (1 + 4 / 128**2) + 2 * case.m * case.n)


def row(
    case: Case, contender: str, role: Any, us: float | None, rng: random.Random, **more: Any
) -> Row:
    pdl = contender.endswith(" pdl")
    if us is None:
        return Row(case, contender, role, status=more.pop("status", "absent"), pdl=pdl, **more)
    wobble = 0.06 if case.m >= 256 else 0.004
    windows = [us, *(us * (1 + sign * rng.uniform(0, wobble)) for sign in (-1, 1, -1, 1, -1, 1))]
    rng.shuffle(windows)
    return timed(case, contender, role, windows, bytes=size_of(case), pdl=pdl, **more)


def timed(case: Case, contender: str, role: Any, windows: Sequence[float], **more: Any) -> Row:
    found = summarize(windows)
    return Row(
        case, contender, role, us=found.median_us, spread_pct=found.spread_pct,
        windows_us=found.windows, **more,
    )  # fmt: skip


def case_rows(
    case: Case, ours: float, peers: dict[str, float | None], stream: tuple[float, float]
) -> Iterator[Row]:
    rng = random.Random(case.name)
    gain = 0.97 if size_of(case) < 2e7 else 0.995
    yield row(case, "cpgemm", "ours", ours, rng)
    yield row(case, "cpgemm pdl", "ours", ours * gain, rng)
    for name, us in peers.items():
        yield row(case, name, "peer", us, rng)
    yield row(case, "memory floor", "memory floor", stream[0], rng)
    yield row(case, "memory floor pdl", "memory floor", stream[1], rng)
    tiles = math.ceil(case.m / 256) * math.ceil(case.n / 128) * max(case.groups, 1)
    waves = math.ceil(tiles / 132) * 132 / max(tiles, 132)
    yield row(case, "compute floor", "compute floor", case.flops / 1.6e9 * waves, rng)


def full_report() -> Report:
    """All suites as on one H200."""
    report = Report(dict(MACHINE), seed=1, method={"windows": 7}, complete=True)
    for layer, (n, k) in enumerate(LAYERS):
        for at, m in enumerate(ROWS):
            case = Case("dense", m, n, k)
            block, deep = BLOCK[layer][at], DEEP_GEMM[layer][at]
            more = (size_of(case) - n * k) / 4.1e6
            peers = {
                "cublaslt block": block,
                "cublaslt tensor": TENSOR[layer][at],
                "cutlass": 1.04 * (block or 1.1 * deep),
                "deep_gemm": deep,
                "deep_gemm pdl": deep * (0.96 if m < 512 else 1.0),
            }
            floor = (STREAM[layer][0] + more, STREAM[layer][1] + more)
            report.rows += case_rows(case, OURS[layer][at], peers, floor)
    grouped = (*suite("contiguous"), *suite("masked"))
    for case, (ours, deep) in zip(grouped, GROUPED, strict=True):
        floor = 1.2 + size_of(case) / 4.2e6
        others = {"cublaslt block": None, "cublaslt tensor": None, "cutlass": None}
        peers = {**others, "deep_gemm": deep, "deep_gemm pdl": 0.98 * deep}
        report.rows += case_rows(case, ours, peers, (floor, floor - 0.9))
    rng = random.Random(0)
    for case in (*suite("quantize"), *suite("host"), *suite("jit")):
        report.rows.append(timed(case, "cpgemm", "ours", [20.0 + rng.random()]))
    return report


def only(report: Report, keep: Callable[[Row], bool], **more: Any) -> Report:
    return dataclasses.replace(report, rows=[row for row in report.rows if keep(row)], **more)


def own_list() -> Report:
    """A user's list: sizes all over, ratios all over, an unknown peer, rows that failed."""
    rng = random.Random(3)
    rows: list[Row] = []
    heights = (1, 3, 7, 17, 30, 31, 33, 100, 500, 511, 512, 777, 2048, 100_000)
    for _ in range(60):
        case = Case(
            "dense", rng.choice(heights), 8 * rng.randint(1, 9000), 16 * rng.randint(1, 2000)
        )
        us = 3 + case.flops / 1.1e9 + size_of(case) / 3e6
        peers = {"cublaslt block": us * rng.uniform(0.3, 9), "some_lib": 1.2 * us}
        rows += case_rows(case, us, {**peers, "deep_gemm pdl": 0.9 * us}, (0.9 * us, 0.8 * us))
    case = Case("masked", 20, 1024, 1024, 4, "three kinds of rows")
    rows.append(row(case, "cpgemm", "ours", None, rng, status="wrong"))
    rows.append(row(case, "cutlass", "peer", 30.0, rng))
    case = Case("masked", 21, 1024, 1024, 4)
    rows.append(row(case, "cpgemm", "ours", 20.0, rng))
    rows.append(row(case, "deep_gemm", "peer", None, rng, status="wrong"))
    rows.append(row(case, "cublaslt block", "peer", None, rng, status="failed"))
    rows.append(row(case, "cutlass", "peer", 22.0, rng))
    rows.append(row(case, "memory floor", "memory floor", 16.0, rng))
    return Report(dict(MACHINE), seed=2, method={"windows": 7}, rows=rows)


def on_cpu() -> Report:
    """Ours alone, without floors, as slow as NumPy, on a machine with a long name."""
    name = "AMD EPYC 9654 96-Core Processor" + ", with a name that goes on and on" * 4
    machine = {"gpu": None, "cpu": name, "cores": 2, "date": "2026-11-22 10:00 UTC"}
    ours = only(full_report(), lambda r: r.role == "ours" and not r.pdl and 0 < r.case.m <= 16)
    slow = [
        timed(r.case, r.contender, r.role, [3e4 * us for us in r.windows_us], bytes=r.bytes)
        for r in ours.rows
    ]
    return dataclasses.replace(ours, machine=machine, rows=slow)


def one_case() -> Report:
    return only(full_report(), lambda r: r.case == Case("dense", 64, 2112, 7168), complete=False)


REPORTS = {"full": full_report, "own list": own_list, "cpu": on_cpu, "one case": one_case}
PICTURES = {
    "full": ["speedup_large", "speedup_decode", "roofline", "decode_bandwidth", "grouped_floor"],
    "own list": ["speedup_large", "speedup_decode", "roofline", "grouped_floor"],
    "cpu": ["roofline", "decode_bandwidth"],
    "one case": ["speedup_decode", "roofline"],
}


def groups_of(panels: Sequence[Panel]) -> dict[str, dict[str, Bar]]:
    """Bars by panel, case and legend."""
    return {
        f"{panel.title} | {group.label}": {bar.label: bar for bar in group.bars}
        for panel in panels
        for group in panel.groups
    }


# -------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("name", REPORTS)
def test_the_reports_here_are_valid_ones(name: str) -> None:
    report = REPORTS[name]()
    assert report_of(json.loads(json.dumps(report.as_dict())), name) == report


def test_speedups_are_the_peers_time_over_ours_at_the_same_pdl() -> None:
    large = groups_of(speedup_panels(full_report(), large=True))
    bars = large["dense, M = 4096: N x K | 24576 x 1536"]
    assert list(bars) == [
        "over cublaslt block",
        "over cutlass",
        "over deep_gemm",
        "over deep_gemm pdl",
        "over cublaslt tensor (less work)",
    ]
    assert bars["over cublaslt block"].value == pytest.approx(323.23 / 263.35)
    assert bars["over deep_gemm"].value == pytest.approx(259.68 / 263.35)
    assert bars["over deep_gemm pdl"].value == pytest.approx(259.68 / (263.35 * 0.995))
    assert all(bar.low < bar.value < bar.high for bar in bars.values() if bar.value)
    assert len(large) == 6 + 4 + 4
    small = groups_of(speedup_panels(full_report(), large=False))
    assert len(small) == 36 + 7
    assert small["dense, N x K = 2112 x 7168 | M = 64"]["over deep_gemm"].value == pytest.approx(
        9.62 / 9.4
    )
    assert set(small["masked: groups x rows, N x K | 9 x 64\n4096 x 7168"]) == {
        "over deep_gemm",
        "over deep_gemm pdl",
    }, "a peer that takes no grouped product needs no place there"


def test_a_refused_case_keeps_its_place_and_says_so() -> None:
    bars = groups_of(speedup_panels(full_report(), large=True))
    bar = bars["dense, M = 4096: N x K | 2112 x 7168"]["over cublaslt block"]
    assert (bar.value, bar.note) == (None, "cublaslt block n/a")


def test_wrong_and_failed_rows_have_a_word_instead_of_a_bar() -> None:
    bars = groups_of(speedup_panels(own_list(), large=False))
    wrong = bars["masked: groups x rows, N x K | 4 x 20\n1024 x 1024\nthree kinds of rows"]
    assert [(bar.value, bar.note) for bar in wrong.values()] == [(None, "cpgemm wrong")]
    mixed = bars["masked: groups x rows, N x K | 4 x 21\n1024 x 1024"]
    assert {bar.contender: bar.note for bar in mixed.values()} == {
        "cublaslt block": "cublaslt block failed",
        "cutlass": "",
        "deep_gemm": "deep_gemm wrong",
    }


def test_a_pair_of_different_pdl_settings_is_named() -> None:
    report = only(full_report(), lambda r: r.pdl or r.role == "peer")
    bars = groups_of(speedup_panels(report, large=True))
    assert "over deep_gemm (cpgemm with PDL)" in bars["dense, M = 4096: N x K | 7168 x 2048"]
    report = only(full_report(), lambda r: not r.pdl or r.role == "peer")
    bars = groups_of(speedup_panels(report, large=True))
    assert "over deep_gemm pdl (cpgemm without PDL)" in bars["dense, M = 4096: N x K | 7168 x 2048"]


def test_roofs_are_measured_else_a_model_of_an_h200_else_unknown() -> None:
    report = full_report()
    measured = roofs(report)
    timed = [row for row in report.rows if row.us]
    assert measured.gbs == max(r.gbs for r in timed if r.role == "memory floor" and r.gbs)
    assert measured.tflops == max(r.tflops for r in timed if r.role == "compute floor" and r.tflops)
    assert (measured.gbs_source, measured.tflops_source) == ("measured", "measured")
    bare = only(report, lambda r: r.role == "ours")
    model = roofs(bare)
    assert model.gbs == pytest.approx(4300) and model.tflops == pytest.approx(1500, rel=0.01)
    assert (model.gbs_source, model.tflops_source) == ("model", "model")
    other = roofs(dataclasses.replace(bare, machine={"gpu": "NVIDIA H100", "sms": 132}))
    assert (other.gbs, other.tflops) == (None, None)


def test_every_timed_product_is_on_the_roofline_and_nothing_else() -> None:
    report = full_report()
    points = roofline_points(report)
    products = ("dense", "contiguous", "masked")
    timed = [r for r in report.rows if r.us and r.role in ("ours", "peer")]
    assert [p.row for p in points] == [r for r in timed if r.case.suite in products]
    for point in points:
        assert point.intensity == pytest.approx(point.row.case.flops / size_of(point.row.case))
        assert point.tflops == point.row.tflops
    row_64 = next(p for p in points if p.row.case == Case("dense", 64, 4096, 7168))
    floor = next(
        r for r in report.rows if r.case == row_64.row.case and r.contender == "memory floor"
    )
    assert row_64.limit == pytest.approx(row_64.row.case.flops / floor.us / 1e6)


def test_bandwidth_counts_the_weights_for_contenders_and_floors_alike() -> None:
    sweeps = bandwidths(full_report())
    assert [sweep.title for sweep in sweeps] == [f"N x K = {n} x {k}" for n, k in LAYERS]
    first = sweeps[0]
    assert [m for m, _ in first.lines["cpgemm"]] == [1, 8, 16, 32, 64, 128]
    assert dict(first.lines["cpgemm"])[64] == pytest.approx(2112 * 7168 / 9.4 / 1e3)
    assert first.floors == {"memory floor", "memory floor pdl"}
    assert "cublaslt block" not in first.lines and "cublaslt block" in sweeps[1].lines
    assert bandwidths(one_case()) == [], "one M is no curve"


def test_grouped_shares_name_the_larger_floor() -> None:
    report = full_report()
    groups = groups_of(floor_panels(report))
    assert len(groups) == 15
    bars = groups["masked: groups x rows, N x K | 32 x 20\n4096 x 4096\n(memory floor)"]
    floor = 1.2 + size_of(Case("masked", 20, 4096, 4096, 32)) / 4.2e6
    assert bars["cpgemm"].value == pytest.approx(100 * floor / 137.1)
    assert bars["deep_gemm pdl"].value == pytest.approx(100 * (floor - 0.9) / (0.98 * 139.4))
    assert any("4 x 8192" in name and "(compute floor)" in name for name in groups)


def test_nothing_to_show_is_no_panel() -> None:
    empty = Report(dict(MACHINE), 1, {})
    wrong = only(full_report(), lambda r: False)
    wrong.rows = [
        dataclasses.replace(r, us=None, windows_us=(), status="wrong") for r in full_report().rows
    ]
    others = only(full_report(), lambda r: r.case.suite in ("quantize", "host", "jit"))
    for report in (empty, wrong, others):
        assert speedup_panels(report, large=True) == speedup_panels(report, large=False) == []
        assert roofline_points(report) == bandwidths(report) == floor_panels(report) == []
    alone = only(full_report(), lambda r: r.role != "peer")
    assert speedup_panels(alone, large=True) == []
    absent = full_report()
    absent.rows = [
        dataclasses.replace(r, us=None, windows_us=(), status="absent") if r.role == "peer" else r
        for r in absent.rows
    ]
    assert speedup_panels(absent, large=False) == []
    assert floor_panels(only(full_report(), lambda r: "floor" not in r.role)) == []


def test_spaced_keeps_the_last_and_the_gap() -> None:
    assert spaced([0.0, 3.0, 4.0, 5.0, 6.0], 1.5) == [0, 2, 4]
    assert spaced([1.0], 5.0) == [0] and spaced([], 1.0) == []


# ------------------------------------------------------------------------------------ the colours


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]
    ),
    "deuteranopia": np.array(
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]
    ),
    "tritanopia": np.array(
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]
    ),
}


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_contenders_differ_for_every_eye(theme: Theme, sight: str) -> None:
    seen = {name: lab(SIGHT[sight] @ linear(color)) for name, color in theme.colors.items()}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 28, (one, other)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_colours_stand_out_from_the_background(theme: Theme) -> None:
    def luminance(color: str) -> float:
        return float(np.dot([0.2126, 0.7152, 0.0722], linear(color))) + 0.05

    for color in (*theme.colors.values(), *theme.spare, theme.ink, theme.muted):
        light, dark = sorted((luminance(color), luminance(theme.paper)), reverse=True)
        assert light / dark >= (4.5 if color in (theme.ink, theme.muted) else 3.0), color


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_a_contender_looks_the_same_everywhere(theme: Theme) -> None:
    plain, pdl = style_of(theme, "deep_gemm"), style_of(theme, "deep_gemm pdl")
    assert plain.color == theme.colors["deep_gemm"] and not plain.pdl
    assert pdl.marker == plain.marker and pdl.pdl and pdl.color != plain.color
    assert style_of(theme, "some_lib") == style_of(theme, "some_lib")
    assert style_of(theme, "some_lib").color in theme.spare


# ----------------------------------------------------------------------------------- the pictures


def drawn(report: Report, theme: Theme) -> dict[str, tuple[Any, list[Any]]]:
    """Each figure, drawn, with every text that was put on it."""
    with drawing(theme):
        return {name: (figure, drawn_texts(figure)) for name, figure in figures(report, theme)}


@pytest.fixture(scope="module")
def pictures() -> dict[str, dict[str, tuple[Any, list[Any]]]]:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    return {name: drawn(make(), THEMES[0]) for name, make in REPORTS.items()}


def each(pictures: dict[str, Any]) -> Iterator[tuple[str, Any, list[Any]]]:
    for report, of_report in pictures.items():
        for name, (figure, texts) in of_report.items():
            yield f"{report}: {name}", figure, texts


@pytest.mark.parametrize("report", REPORTS)
def test_the_pictures_of_a_report(pictures: dict[str, Any], report: str) -> None:
    assert list(pictures[report]) == PICTURES[report]


def test_no_text_is_cut_off(pictures: dict[str, Any]) -> None:
    for where, figure, texts in each(pictures):
        assert len(texts) > 10, where
        for text, box in boxes(figure, texts):
            inside = (
                box.x0 >= 4
                and box.y0 >= 4
                and box.x1 <= figure.bbox.width - 4
                and box.y1 <= figure.bbox.height - 4
            )
            assert inside, (where, text, box)


def test_no_text_lies_on_another_or_on_a_bar(pictures: dict[str, Any]) -> None:
    for where, figure, texts in each(pictures):
        level = [text for text in texts if text.get_rotation() in (0.0, 90.0)]
        for (one, box), (other, second) in itertools.combinations(boxes(figure, level), 2):
            assert not overlap(box, second), (where, one, other)
        for axes in figure.axes:
            for text, box in boxes(figure, [text for text in level if text in axes.texts]):
                for patch in axes.patches:
                    assert not overlap(box, patch.get_window_extent()), (where, text)


def test_no_axes_reach_into_each_other(pictures: dict[str, Any]) -> None:
    for where, figure, _ in each(pictures):
        renderer = figure.canvas.get_renderer()
        outer = [axes.get_tightbbox(renderer) for axes in figure.axes]
        for one, other in itertools.combinations(outer, 2):
            assert not overlap(one, other), where


def test_no_value_is_crossed_by_the_line(pictures: dict[str, Any]) -> None:
    checked = 0
    for where, figure, _ in each(pictures):
        for axes in figure.axes:
            if not axes.patches:
                continue
            line = axes.transData.transform((100.0 if "floor" in where else 1.0, 0))[0]
            for text, box in boxes(figure, axes.texts):
                assert box.x1 < line or box.x0 > line, (where, text)
                checked += 1
    assert checked > 200


def test_no_axes_are_empty_and_all_name_their_units(pictures: dict[str, Any]) -> None:
    units = ("speedup", "(%)", "FLOP per byte", "rows of A", "TFLOPS", "GB/s")
    for where, figure, _ in each(pictures):
        assert figure.axes, where
        for axes in figure.axes:
            points = [line for line in axes.lines if line.get_marker() not in ("None", "")]
            assert axes.patches or points, (where, axes.get_title())
            assert any(unit in axes.get_xlabel() for unit in units), where
            assert axes.patches or any(unit in axes.get_ylabel() for unit in units), where


def test_the_header_says_machine_and_date(pictures: dict[str, Any]) -> None:
    for where, figure, _ in each(pictures):
        header = " ".join(text.get_text() for text in figure.texts)
        full = not where.startswith("cpu")
        assert ("NVIDIA H200" if full else "AMD EPYC 9654") in header, where
        assert ("2026-11-22 16:45 UTC" if full else "2026-11-22 10:00 UTC") in header, where
        assert ("interrupted run" in header) == where.startswith(("own", "one")), where


def test_bars_are_as_long_as_their_numbers(pictures: dict[str, Any]) -> None:
    for name in ("speedup_large", "speedup_decode", "grouped_floor"):
        figure, _ = pictures["full"][name]
        for axes in figure.axes:
            words = [text.get_text().removesuffix(" %") for text in axes.texts]
            numbers = [word for word in words if not word.endswith("n/a")]
            lengths = [patch.get_width() for patch in axes.patches]
            step = 0.5 if name == "grouped_floor" else 0.005
            assert [float(number) for number in numbers] == pytest.approx(lengths, abs=1.01 * step)
            assert axes.get_xlim()[0] == 0.0


def test_bars_of_one_picture_share_a_scale(pictures: dict[str, Any]) -> None:
    for name in ("speedup_large", "speedup_decode", "grouped_floor"):
        axes = pictures["full"][name][0].axes
        assert len({each.get_xlim() for each in axes}) == 1
        assert len({round(each.bbox.width, 3) for each in axes}) == 1
    decode = pictures["full"]["decode_bandwidth"][0].axes
    assert len({(each.get_xlim(), each.get_ylim()) for each in decode}) == 1


def test_the_roofline_holds_every_point_within_its_axes(pictures: dict[str, Any]) -> None:
    for report in REPORTS:
        figure, _ = pictures[report]["roofline"]
        axes = figure.axes[0]
        shown = [
            tuple(point)
            for line in axes.lines
            if line.get_marker() not in ("None", "", "_")
            for point in line.get_xydata()
        ]
        points = roofline_points(REPORTS[report]())
        assert sorted(shown) == sorted((p.intensity, p.tflops) for p in points)
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert all(left < x < right and bottom < y < top for x, y in shown)
        hollow = {line.get_markerfacecolor() for line in axes.lines if line.get_marker() in "sDv^"}
        assert hollow <= {"none"}, "peers are hollow"


def test_files_in_both_themes(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    report = one_case()
    written = write_plots(report, tmp_path / "new" / "folder")
    names = {
        f"{name}_{theme.name}{suffix}"
        for name in PICTURES["one case"]
        for theme in THEMES
        for suffix in (".png", ".svg")
    }
    assert {path.name for path in written} == names
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names
    for path in written:
        theme = THEMES[0] if "_light" in path.name else THEMES[1]
        if path.suffix == ".png":
            pixels = np.rint(255 * image.imread(path)[..., :3]).astype(int)
            assert pixels.shape[0] > 250 and pixels.shape[1] > 900
            paper = [int(theme.paper[at : at + 2], 16) for at in (1, 3, 5)]
            assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == paper).all()
            assert 0.005 < (pixels != paper).any(axis=-1).mean() < 0.5
        else:
            root = ElementTree.parse(path).getroot()
            assert root.tag.endswith("svg") and theme.paper in path.read_text()
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_plots(report, written[0].parent)] == before


def test_a_long_list_takes_several_pages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    rows: list[Row] = []
    for at in range(200):
        case = Case("dense", 1 + at % 40, 8 * (1 + at // 40) * 128, 1024)
        rows += case_rows(case, 10.0 + at, {"cutlass": 11.0 + at, "deep_gemm": 12.0}, (8.0, 7.0))
    with drawing(THEMES[0]):
        made = dict(figures(Report(dict(MACHINE), 1, {}, rows, True), THEMES[0]))
    names = [name for name in made if name.startswith("speedup_decode")]
    assert names[:2] == ["speedup_decode", "speedup_decode_2"]
    assert sum(len(made[name].axes) for name in names) == 20
    assert all(figure.bbox.height < 4000 for figure in made.values())


def test_nothing_to_draw_makes_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    assert write_plots(Report(dict(MACHINE), 1, {}), tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ArgumentError, match=r"^folder: .*taken"):
        write_plots(one_case(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"


def test_without_matplotlib_the_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install .*"cpgemm\[plot\]"'):
        write_plots(one_case(), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_the_users_style_neither_shows_nor_changes(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plain = [path.read_bytes() for path in write_plots(one_case(), tmp_path / "plain")]
    style = {
        "axes.facecolor": "pink", "font.size": 22, "axes.grid": False, "text.usetex": True,
        "figure.constrained_layout.use": True, "savefig.bbox": "tight", "figure.dpi": 30,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        before = dict(matplotlib.rcParams)
        styled = [path.read_bytes() for path in write_plots(one_case(), tmp_path / "styled")]
        assert dict(matplotlib.rcParams) == before
    assert styled == plain


def test_no_global_state_of_pyplot_and_no_early_import(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import cpgemm.bench.plots
assert "matplotlib" not in sys.modules
from test_bench_plots import one_case
from pathlib import Path
assert cpgemm.bench.plots.write_plots(one_case(), Path({str(tmp_path)!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "tkagg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
