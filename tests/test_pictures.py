"""Static pictures: what they show agrees with the kernels and the model, and no text is cut off."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bench_reports import report
from picture_checks import boxes, drawn_texts, overlap

import cpgemm
from cpgemm import pictures
from cpgemm.config import KernelConfig
from cpgemm.cost_model import H200, predict, tile_times
from cpgemm.errors import ArgumentError, ArgumentTypeError, MissingDependencyError
from cpgemm.heuristics import configurations
from cpgemm.pictures import error as error_picture
from cpgemm.pictures.error import measured
from cpgemm.pictures.schedule import grid, places
from cpgemm.pictures.timeline import play
from cpgemm.problem import GemmProblem

ROOT = Path(__file__).resolve().parent.parent
LARGE = (4096, 7168, 2048)
SHAPES = ((64, 2112, 7168), (1, 7168, 2048), (1000, 2112, 7168), LARGE, (12345, 24576, 1536))
CONFIGS = (
    KernelConfig(256, 128, 3),
    KernelConfig(256, 128, 3, cluster_n=2),
    KernelConfig(128, 192, 3, cluster_m=2),
    KernelConfig(64, 128, 5, column_parts=2, raster_group=3),
)


def plan_of(shape: tuple[int, int, int], **options: Any) -> cpgemm.GemmPlan:
    return cpgemm.plan_gemm(*shape, **options)


# --------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_has_one_place_and_every_place_one_tile(shape: tuple[int, int, int]) -> None:
    problem = GemmProblem(*shape)
    for config in configurations("bfloat16"):
        if config.tiles(problem) > 20_000:
            continue
        found = list(places(problem, config, 132))
        rows, columns = grid(problem, config)
        splits = getattr(config, "splits", 1)
        assert len(found) == config.tiles(problem) * splits
        assert len({(place.turn, place.block) for place in found}) == len(found)
        tiles = [(place.row, place.column) for place in found]
        assert len(set(tiles)) * splits == len(tiles)
        inside = {(row, column) for row, column in tiles if row < rows and column < columns}
        assert inside == set(itertools.product(range(rows), range(columns)))
        blocks = config.blocks(config.tiles(problem), 132)
        assert max(place.block for place in found) == blocks - 1
        waves = predict(problem, config, H200).waves
        assert max(place.turn for place in found) == waves - 1, config.name


_PROGRAM = """
#include <algorithm>
#include <cstdio>
#include <cstdlib>
using u32 = unsigned;
using std::min;
#define __device__
#define __forceinline__ inline
struct { u32 x; } blockIdx, gridDim;
%s
int main(int, char** arguments) {
    const u32 m = atoi(arguments[1]), n = atoi(arguments[2]);
    gridDim.x = atoi(arguments[3]);
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        TileScheduler<%d, %d, %d, %d, %d> tiles(m, n, blockIdx.x %% %d);
        for (int turn = 0; tiles.advance(); ++turn)
            std::printf("%%d %%u %%d %%d\\n", turn, blockIdx.x, tiles.block_m, tiles.block_n);
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run scheduler.cuh on the CPU")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_order_is_that_of_the_kernels_scheduler(config: KernelConfig, tmp_path: Path) -> None:
    header = (ROOT / "cuda_src" / "scheduler.cuh").read_text(encoding="utf-8")
    header = header.replace('#include "ptx.cuh"', "").replace("#pragma once", "")
    numbers = (config.block_m, config.block_n, config.cluster_m, config.cluster_n)
    text = _PROGRAM % (header, *numbers, config.raster_group, config.cluster)
    (tmp_path / "order.cpp").write_text(text)
    command = ["g++", "-std=c++17", "-o", str(tmp_path / "order"), str(tmp_path / "order.cpp")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for m, n, k in SHAPES:
        problem = GemmProblem(m, n, k)
        blocks = config.blocks(config.tiles(problem), 132)
        done = subprocess.run(
            [str(tmp_path / "order"), str(m), str(n), str(blocks)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        real = {tuple(map(int, line.split())) for line in done.stdout.splitlines()}
        ours = {
            (place.turn, place.block, place.row, place.column)
            for place in places(problem, config, 132)
        }
        assert ours == real


# --------------------------------------------------------------------------------- the timeline


@pytest.mark.parametrize("shape", SHAPES)
def test_tile_times_add_up_to_the_models_compute_time(shape: tuple[int, int, int]) -> None:
    problem = GemmProblem(*shape)
    for config in configurations("bfloat16"):
        times = tile_times(problem, config, H200)
        whole = predict(problem, config, H200)
        main = times.k_blocks * times.multiply_us
        if hasattr(config, "splits"):
            assert main == pytest.approx(whole.compute_us)
        else:
            # The last tile's epilogue overlaps nothing: it is not part of the compute term.
            turns = whole.waves * (main + times.epilogue_us) - times.epilogue_us
            assert turns == pytest.approx(whole.compute_us)
        slower = max(whole.l2_us, whole.dram_us)
        assert times.load_us * times.k_blocks * whole.waves == pytest.approx(slower)
        assert 0 < times.tensor_us <= times.multiply_us


@pytest.mark.parametrize("shape", SHAPES)
def test_the_timeline_obeys_the_ring(shape: tuple[int, int, int]) -> None:
    problem = GemmProblem(*shape)
    for config in configurations("bfloat16"):
        times = tile_times(problem, config, H200)
        stages, consumers, waves = config.stages, config.consumers, config.waves
        line = play(times, stages=stages, consumers=consumers, waves=waves, ahead=True)
        loads = [span for span in line.spans if span.what == "load"]
        assert [span.k_block for span in loads] == list(range(times.k_blocks + stages))
        for one, other in itertools.pairwise(loads):
            assert other.start >= one.end, "one load after another"
        for span in loads:
            if span.k_block >= stages:
                read = [
                    part.end for part in line.spans
                    if part.what == "multiply" and part.k_block == span.k_block - stages
                ]  # fmt: skip
                assert len(read) == consumers * waves and span.start >= max(read)
        for consumer in range(consumers):
            own = [
                s for s in line.spans if s.lane == consumer and s.what in ("multiply", "promote")
            ]
            assert len(own) == 2 * waves * times.k_blocks
            for one, other in itertools.pairwise(own):
                assert other.start >= one.end - 1e-9
            for span in own:
                assert span.start >= line.landed[span.k_block] - 1e-9, "nothing before it landed"
            busy = sum(span.end - span.start for span in own)
            assert busy == pytest.approx(times.k_blocks * times.multiply_us)
        # The slower of loading and multiplying sets the pace; filling and draining add to it.
        pace = times.k_blocks * max(times.load_us, times.multiply_us)
        fill = times.load_us + 2 * times.multiply_us + times.epilogue_us
        assert pace <= line.end <= pace + fill


# ------------------------------------------------------------------------------------- the error


def test_errors_of_blocks_and_elements(rng: np.random.Generator) -> None:
    x = rng.standard_normal((80, 304), dtype=np.float32)
    x[3] *= 1e4
    x[5, 128:256] = 0
    for granularity in ((1, 128), (128, 128), (128, 1)):
        tensor = cpgemm.quantize(x, granularity)
        error = tensor.dequantize(np.float64) - x.astype(np.float64)
        found = measured(x, tensor)
        height, width = granularity
        assert found.values.shape == (math.ceil(80 / height), math.ceil(304 / width))
        for row, column in np.ndindex(*found.values.shape):
            block = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
            norm = np.linalg.norm(x[block].astype(np.float64))
            wanted = 100 * np.linalg.norm(error[block]) / norm if norm else 0.0
            assert found.values[row, column] == pytest.approx(wanted)
        whole = 100 * np.linalg.norm(error) / np.linalg.norm(x.astype(np.float64))
        assert found.whole == pytest.approx(whole)
        each = measured(x, tensor, "element")
        assert each.values.shape == (80, 304)
        filled = x != 0
        wanted = 100 * np.abs(error[filled]) / np.abs(x[filled].astype(np.float64))
        np.testing.assert_allclose(each.values[filled], wanted)
        assert (each.values[~filled] == 0).all()


def test_rounding_of_normal_codes_stays_below_half_a_unit(rng: np.random.Generator) -> None:
    x = rng.uniform(1, 400, (64, 256)).astype(np.float32)
    found = measured(x, cpgemm.quantize(x), "element")
    # The scale and the division are float32's: 2**-23 each beside 2**-4.
    assert 3 < found.values.max() <= 100 * 2**-4 * (1 + 2**-16)


def test_large_tensors_are_sampled(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.standard_normal((600, 640), dtype=np.float32)
    tensor = cpgemm.quantize(x)
    whole = measured(x, tensor)
    assert whole.step == (2, 1), "600 rows of blocks are more than CELLS"
    monkeypatch.setattr(error_picture, "CELLS", 1000)
    every = measured(x, tensor)
    assert every.step == (1, 1)
    np.testing.assert_array_equal(whole.values, every.values[::2])
    monkeypatch.setattr(error_picture, "ELEMENTS", 640 * 100)
    few = measured(x, tensor)
    assert few.step == (6, 1)
    np.testing.assert_array_equal(few.values, every.values[::6])


def test_other_floats_and_wrong_operands() -> None:
    x = np.ones((8, 256), ml_dtypes.bfloat16)
    # One scale, 1 / 448 in float32: 2**-24 relatively, and as much for the code's product.
    assert measured(x, cpgemm.quantize(x)).whole < 100 * 2**-23
    tensor = cpgemm.quantize(np.ones((8, 256), np.float32))
    with pytest.raises(ArgumentError, match=r"^x: must have the tensor's shape \(8, 256\)"):
        pictures.quantization_error(np.ones((8, 128), np.float32), tensor)
    with pytest.raises(ArgumentTypeError, match=r"^tensor: must be a ScaledTensor"):
        pictures.quantization_error(x, x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"^x: must hold floats; got int32"):
        pictures.quantization_error(np.ones((8, 256), np.int32), tensor)
    with pytest.raises(ArgumentError, match=r"^per: must be 'block' or 'element'"):
        pictures.quantization_error(x, tensor, per="row")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^limit: .* above 0"):
        pictures.quantization_error(x, tensor, limit=0.0)
    groups = cpgemm.quantize(np.ones((2, 8, 256), np.float32))
    with pytest.raises(ArgumentError, match=r"^tensor: must have 2 axes"):
        pictures.quantization_error(np.ones((2, 8, 256), np.float32), groups)


def test_wrong_themes_and_sources() -> None:
    with pytest.raises(ArgumentError, match=r"^theme: must be 'light' or 'dark'; got 'blue'"):
        pictures.tile_schedule(plan_of(LARGE), theme="blue")
    with pytest.raises(ArgumentTypeError, match=r"^source: must be a Report or plans"):
        pictures.roofline(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^source: "):
        pictures.roofline([])


def test_without_matplotlib_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install .*"cpgemm\[plot\]"'):
        pictures.tile_schedule(plan_of(LARGE))


# ---------------------------------------------------------------------------------- the pictures


def _floats() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((300, 1040)).astype(np.float32)
    x[:, 300] *= 100
    return x


PICTURES: dict[str, Any] = {
    **{f"tiles {shape}": (pictures.tile_schedule, plan_of(shape)) for shape in SHAPES},
    "tiles float32": (pictures.tile_schedule, plan_of((4096, 7168, 16384), out_dtype="float32")),
    **{f"pipeline {shape}": (pictures.pipeline, plan_of(shape)) for shape in SHAPES},
    "pipeline 13 stages": (pictures.pipeline, plan_of((64, 7168, 512))),
    "roofline": (pictures.roofline, [plan_of(shape) for shape in SHAPES]),
    "roofline of a report": (pictures.roofline, report()),
    "roofline of one": (pictures.roofline, plan_of(LARGE)),
    "error": (lambda x, **more: pictures.quantization_error(x, cpgemm.quantize(x), **more),
              _floats()),
    "error of elements": (
        lambda x, **more: pictures.quantization_error(
            x, cpgemm.quantize(x, (128, 128)), per="element", **more
        ),
        _floats(),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple[Any, list[Any]]]:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    figures = {name: make(what) for name, (make, what) in PICTURES.items()}
    return {name: (figure, drawn_texts(figure)) for name, figure in figures.items()}


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_is_cut_off_or_covered(drawn: dict[str, Any], name: str) -> None:
    figure, texts = drawn[name]
    assert len(texts) > 10
    found = boxes(figure, texts)
    for text, box in found:
        assert box.x0 >= 4 and box.x1 <= figure.bbox.width - 4, text
        assert box.y0 >= 4 and box.y1 <= figure.bbox.height - 4, text
    level = boxes(figure, [text for text in texts if text.get_rotation() in (0.0, 90.0)])
    for (one, box), (other, second) in itertools.combinations(level, 2):
        assert not overlap(box, second), (one, other)
    header = [box for text, box in found if text in {t.get_text() for t in figure.texts}]
    for axes in figure.axes:
        inside = axes.get_window_extent()
        assert not any(overlap(inside, box) for box in header)
        assert not any(overlap(inside, legend.get_window_extent()) for legend in figure.legends)
    renderer = figure.canvas.get_renderer()
    outer = [axes.get_tightbbox(renderer) for axes in figure.axes]
    for one, other in itertools.combinations(outer, 2):
        assert not overlap(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tile_schedule_holds_every_tile(drawn: dict[str, Any], shape: Any) -> None:
    figure, _ = drawn[f"tiles {shape}"]
    left, right = figure.axes
    plan = plan_of(shape)
    found = predict(plan.problem, plan.config, plan.machine)
    assert left.get_xlim() == pytest.approx((0, found.predicted_us))
    busy = left.collections[0].get_array()
    tiles = right.collections[0].get_array()
    rows, columns = grid(plan.problem, plan.config)
    assert tiles.shape == (rows, columns) and not np.isnan(np.ma.filled(tiles, np.nan)).any()
    assert tiles.min() == 0 and tiles.max() == found.waves - 1 == np.nanmax(busy)
    splits = getattr(plan.config, "splits", 1)
    working = np.isfinite(np.ma.filled(busy, np.nan))
    assert working.sum() == plan.config.tiles(plan.problem) * splits
    assert (np.ma.filled(busy, np.nan)[working] >= 0).sum() == rows * columns * splits
    share = rows * columns * splits / busy.size
    header = " ".join(text.get_text() for text in figure.texts)
    assert plan.config.name in header
    assert f"{share:.0%}" in header or splits > 1


def test_long_pipelines_show_both_ends(drawn: dict[str, Any]) -> None:
    figure, _ = drawn[f"pipeline {(1000, 2112, 7168)}"]
    first, last = figure.axes
    plan = plan_of((1000, 2112, 7168))
    spans = [axes.get_xlim()[1] - axes.get_xlim()[0] for axes in (first, last)]
    widths = [axes.bbox.width for axes in (first, last)]
    assert spans[0] / widths[0] == pytest.approx(spans[1] / widths[1]), "one scale"
    assert first.get_xlim()[1] < last.get_xlim()[0]
    assert last.get_xlim()[1] >= play(
        tile_times(plan.problem, plan.config, plan.machine), stages=plan.config.stages,
        consumers=plan.config.consumers, waves=plan.config.waves,
    ).end  # fmt: skip
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert len(labels) == 1 + plan.config.stages + plan.config.consumers
    short, _ = drawn[f"pipeline {LARGE}"]
    assert len(short.axes) == 1
    numbers = {int(text.get_text()) for text in short.axes[0].texts}
    assert numbers == set(range(16)), "2048 of K are 16 k-blocks"


def test_the_roofline_of_plans_is_the_models(drawn: dict[str, Any]) -> None:
    figure, _ = drawn["roofline"]
    lines = figure.axes[0].lines
    points = next(line for line in lines if line.get_label() and line.get_marker() == "o")
    wanted = []
    for shape in SHAPES:
        explained = plan_of(shape).explain()
        problem = explained.problem
        tflops = problem.flops / explained.choice.predicted_us / 1e6
        wanted.append((problem.flops / problem.bytes, tflops))
    np.testing.assert_allclose(sorted(map(tuple, points.get_xydata())), sorted(wanted))
    header = " ".join(text.get_text() for text in figure.texts)
    assert "predicted, not run" in header
    roof = f"{plan_of(LARGE).machine.dram_tbs:.2f} TB/s (model)"
    assert any(roof in text.get_text() for text in figure.axes[0].texts)


def test_the_roofline_of_a_report_is_what_was_measured(drawn: dict[str, Any]) -> None:
    figure, _ = drawn["roofline of a report"]
    shown = [
        tuple(point)
        for line in figure.axes[0].lines
        if line.get_marker() not in ("None", "", "_")
        for point in line.get_xydata()
    ]
    timed = [row for row in report().rows if row.tflops and row.role in ("ours", "peer")]
    wanted = [(row.case.flops / row.bytes, row.tflops) for row in timed]
    np.testing.assert_allclose(sorted(shown), sorted(wanted))


def test_the_scale_of_the_error_is_the_readers(drawn: dict[str, Any]) -> None:
    figure, _ = drawn["error of elements"]
    assert figure.axes[0].images[0].get_clim() == (0.0, 6.25)
    x = _floats()
    chosen = pictures.quantization_error(x, cpgemm.quantize(x), limit=2.0)
    assert chosen.axes[0].images[0].get_clim() == (0.0, 2.0)
    figure, _ = drawn["error"]
    values = measured(x, cpgemm.quantize(x)).values
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0.0, values.max()))
    assert figure.axes[0].get_xlim() == (0, 1040) and figure.axes[0].get_ylim() == (300, 0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_notebook_gets_a_picture_in_the_themes_colours(theme: str) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import io

    from cpgemm.plot_style import theme_named

    with matplotlib.rc_context({"figure.facecolor": "pink", "xtick.labelcolor": "pink"}):
        before = dict(matplotlib.rcParams)
        for name in (f"tiles {LARGE}", f"pipeline {LARGE}", "roofline", "error"):
            make, what = PICTURES[name]
            png = make(what, theme=theme)._repr_png_()
            pixels = np.rint(255 * matplotlib.image.imread(io.BytesIO(png))[..., :3]).astype(int)
            paper = [int(theme_named(theme).paper[at : at + 2], 16) for at in (1, 3, 5)]
            assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == paper).all()
            assert 0.005 < (pixels != paper).any(axis=-1).mean() < 0.9
            pink = (pixels == [255, 192, 203]).all(axis=-1)
            assert not pink.any(), "the caller's style shows"
        assert dict(matplotlib.rcParams) == before
