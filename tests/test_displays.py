"""Notebook displays: well-formed HTML without scripts, and values that other code agrees with."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bench_reports import bad, report, row, rows
from tiny_kernels import ROOT

import cpgemm
from cpgemm.bench.report import tables
from cpgemm.bench.result import Case
from cpgemm.config import SHARED_LIMIT, AdaptiveKernelConfig, KernelConfig
from cpgemm.displays import tensor as tensor_display
from cpgemm.displays.config import CONSUMERS, wave_consumers
from cpgemm.displays.html import BLUE, GREEN, ORANGE, PURPLE, RED, element, facts, table
from cpgemm.displays.tensor import count_codes
from cpgemm.heuristics import configurations
from cpgemm.heuristics import explain as heuristics_explain
from cpgemm.tuned import TunedChoice, TunedExplanation

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
VOID = {"rect", "line"}


class Page(HTMLParser):
    """Elements with their attributes and texts; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost tag, text
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        cell = "td" in self.open or "th" in self.open
        if cell and "svg" not in self.open:
            self.tables[-1][-1][-1] += data

    def facts(self) -> dict[str, str]:
        """Names and values: pairs of neighbouring divs."""
        words = [text for tag, text in self.texts if tag == "div"]
        return dict(itertools.pairwise(words))

    def titles(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "title"]


def page(shown: Any) -> Page:
    found = Page(shown._repr_html_())
    for tag, attributes in found.elements:
        assert tag not in ("script", "style", "iframe", "link", "img"), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and "javascript:" not in str(value)
            # White or black of our own would vanish in one of the themes.
            assert not re.search(r"\b(white|black)(?![-\w])|#(000|fff)", str(value)), value
    return found


# ------------------------------------------------------------------------------------- the parts


def test_what_goes_in_is_escaped() -> None:
    evil = '<b onclick="x">&'
    made = element("p", evil, element("i", "in"), title=evil, data_x=1)
    assert str(made) == (
        '<p title="&lt;b onclick=&#34;x&#34;&gt;&amp;" data-x="1">'
        "&lt;b onclick=&#34;x&#34;&gt;&amp;<i>in</i></p>"
    )
    assert "<b" not in table(("a",), [(evil,)]) and "<b" not in facts([(evil, evil)])


def test_colours_show_on_light_and_on_dark() -> None:
    def luminance(color: str) -> float:
        values = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05

    for color in (BLUE, ORANGE, GREEN, PURPLE, RED):
        for paper in ("#ffffff", "#111111", "#1e1e1e"):
            low, high = sorted((luminance(color), luminance(paper)))
            assert high / low >= 3.0, (color, paper)


def test_nothing_is_imported_before_something_is_shown() -> None:
    code = (
        "import sys, cpgemm\n"
        "assert not [name for name in sys.modules if name.startswith('cpgemm.displays')]\n"
        "assert 'markupsafe' not in sys.modules and 'IPython' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("granularity", [(1, 128), (128, 128), (128, 1)])
def test_a_tensors_codes_are_counted(
    rng: np.random.Generator, granularity: tuple[int, int]
) -> None:
    x = rng.standard_normal((272, 400), dtype=np.float32)
    x[:, :50] = 0
    tensor = cpgemm.quantize(x, granularity)
    found = count_codes(tensor)
    values = np.abs(tensor.data.astype(np.float32))
    assert found.total == values.size == 272 * 400
    assert found.zero_share == pytest.approx((values == 0).mean())
    assert found.saturated_share == pytest.approx((values == 448).mean()) and found.nan_share == 0
    assert found.scale_low == tensor.scales.min() and found.scale_high == tensor.scales.max()
    exponents = found.exponents
    assert sum(exponents.values()) == values.size
    assert exponents["zero"] == (values == 0).sum()
    assert exponents["subnormal"] == ((values > 0) & (values < 2.0**-6)).sum()
    for exponent in range(-6, 9):
        inside = (values >= 2.0**exponent) & (values < 2.0 ** (exponent + 1))
        assert exponents[str(exponent)] == inside.sum()


def test_a_tensors_display(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 48, 256), dtype=np.float32)
    tensor = cpgemm.quantize(x)
    found = page(tensor)
    facts_ = found.facts()
    values = np.abs(tensor.data.astype(np.float32))
    assert facts_["granularity"] == "1 x 128" and facts_["scales"] == "2 x 48 x 2, float32"
    assert facts_["memory"].endswith(f"({tensor.nbytes:,} bytes)")
    assert facts_["where"] == "cpu, numpy" and facts_["layout"] == "K-major"
    assert facts_["at ±448"] == f"{(values == 448).mean():.2%}"
    assert facts_["zeros"] == f"{(values == 0).mean():.2%}" and "NaN" not in facts_
    low, high = tensor.scales.min(), tensor.scales.max()
    assert facts_["scale range"] == f"{low:.4g} to {high:.4g}"
    assert ("span", "2 x 48 x 256") in found.texts
    # The bars: their heights are in proportion to the counts, orange on top of the last.
    counts = list(count_codes(tensor).exponents.values())[:-1]
    bars = [each for tag, each in found.elements if tag == "rect" and each["fill"] == BLUE]
    orange = [each for tag, each in found.elements if tag == "rect" and each["fill"] == ORANGE]
    heights = [float(bar["height"]) for bar in bars]
    heights[-1] += float(orange[0]["height"])
    np.testing.assert_allclose(heights, 64 * np.array(counts) / max(counts), atol=0.02)
    assert float(orange[0]["height"]) == pytest.approx(
        64 * (values == 448).sum() / max(counts), abs=0.01
    )
    shown = [title for title in found.titles() if title.startswith("exponent 3:")]
    assert shown == [f"exponent 3: {counts[11]:,} codes, {counts[11] / values.size:.2%}"]


def test_nan_zeros_and_nothing() -> None:
    codes = np.zeros((4, 128), np.uint8)
    codes[0, :3] = (0x7F, 0xFF, 0x80)
    scales = np.ones((4, 1), np.float32)
    tensor = cpgemm.ScaledTensor.from_arrays(codes, scales, (1, 128))
    found = count_codes(tensor)
    assert found.exponents["NaN"] == 2 and found.zero_share == 510 / 512
    assert page(tensor).facts()["NaN"] == f"{2 / 512:.2%}"
    empty = cpgemm.quantize(np.zeros((0, 128), np.float32))
    assert any("No elements" in text for _, text in page(empty).texts)
    assert count_codes(empty).zero_share == 0


def test_a_large_tensor_is_sampled_by_rows(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = cpgemm.quantize(rng.standard_normal((100, 256), dtype=np.float32))
    monkeypatch.setattr(tensor_display, "SAMPLE", 256 * 15)
    found = count_codes(tensor)
    assert (found.row_step, found.column_step) == (7, 1) and found.total == 15 * 256
    wanted = np.bincount(tensor.data[::7].view(np.uint8).ravel(), minlength=256)
    np.testing.assert_array_equal(found.counts, wanted)
    assert found.scale_high == tensor.scales.max(), "scales are all looked at"
    note = " ".join(text for _, text in page(tensor).texts)
    assert "every 7th row, 3,840 codes" in note
    monkeypatch.setattr(tensor_display, "SAMPLE", 100)
    found = count_codes(tensor)
    assert (found.row_step, found.column_step) == (100, 3) and found.total == 86
    assert "every 100th row and every 3rd column" in tensor._repr_html_()


def test_a_transposed_tensor_says_so(rng: np.random.Generator) -> None:
    tensor = cpgemm.quantize(rng.standard_normal((128, 256), dtype=np.float32), (128, 128)).T
    assert page(tensor).facts()["layout"] == "not K-major"


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", [(1, 128), (128, 128)])
def test_the_device_counts_as_numpy_does(
    rng: np.random.Generator, granularity: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy as cp

    x = rng.standard_normal((300, 528), dtype=np.float32)
    tensor = cpgemm.quantize(cp.asarray(x), granularity)
    for limit in (1 << 22, 1000):
        monkeypatch.setattr(tensor_display, "SAMPLE", limit)
        found = count_codes(tensor)
        codes = tensor.data.view(cp.uint8).get()[:: found.row_step, :: found.column_step]
        np.testing.assert_array_equal(found.counts, np.bincount(codes.ravel(), minlength=256))
        assert found.scale_low == float(tensor.scales.min().get())
    assert page(tensor).facts()["where"].startswith("cuda:")


# ---------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_every_configuration_is_drawn(out_dtype: Any) -> None:
    for config in configurations(out_dtype):
        found = page(config)
        facts_ = found.facts()
        assert facts_["tile of D"] == f"{config.block_m} x {config.block_n}"
        assert facts_["stages"] == f"{config.stages} of 128 k"
        assert facts_["threads"] == str(config.threads) and facts_["output"] == out_dtype
        kib = float(facts_["shared memory"].split()[0])
        assert kib * 1024 == config.shared_bytes <= SHARED_LIMIT
        assert ("span", config.name) in found.texts
        waves = [title for title in found.titles() if "consumer warpgroup" in title]
        assert len(waves) == config.consumers * config.waves
        boxes = [each for tag, each in found.elements if tag == "rect"]
        assert sum(box["fill"] == ORANGE for box in boxes) == config.stages + 1, "and the legend"
        for consumer in range(config.consumers):
            drawn = sum(box["fill"] == CONSUMERS[consumer] for box in boxes)
            assert drawn == config.waves + 1


def test_waves_cover_the_tile_once_and_go_to_consumers_in_turn() -> None:
    for config in configurations("bfloat16"):
        owner = np.full((config.block_m, config.block_n), -1)
        for consumer, waves in enumerate(wave_consumers(config)):
            for _, row_, column, high, wide in waves:
                part = owner[row_ : row_ + high, column : column + wide]
                assert part.shape == (high, wide) and (part == -1).all()
                part[...] = consumer
        assert (owner >= 0).all()
    owner = wave_consumers(KernelConfig(256, 128, 3))
    assert [wave[1] for wave in owner[0]] == [0, 128], "docs/architecture.md: rows 0 and 128"


def test_kinds_of_configurations_say_what_is_their_own() -> None:
    split = cpgemm.plan_gemm(64, 2112, 7168).config
    assert page(split).facts()["cluster"] == f"{split.cluster} blocks share K of a tile"
    adaptive = AdaptiveKernelConfig(256, 128, 3)
    assert page(adaptive).facts()["flat tile"] == "64 x 96, 2 stages"
    assert page(KernelConfig(256, 128, 3)).facts()["cluster"] == "none"
    multicast = KernelConfig(256, 128, 3, cluster_n=2)
    assert page(multicast).facts()["cluster"] == "2 blocks, A is multicast"


def test_an_explanation_is_a_table_of_all_candidates() -> None:
    found = cpgemm.explain(4096, 7168, 2048)
    shown = page(found)
    (lines,) = shown.tables
    assert len(lines) == 1 + len(found.candidates)
    for cells, one in zip(lines[1:], found.candidates, strict=True):
        assert cells[0] == one.config.name
        numbers = [float(cell) for cell in (cells[1], *cells[3:])]
        tiles = one.config.tiles(found.problem)
        wanted = [one.predicted_us, tiles, one.waves, one.compute_us, one.l2_us, one.dram_us]
        assert numbers == pytest.approx(wanted, abs=0.051)
    facts_ = shown.facts()
    assert facts_["predicted"].startswith(f"{found.choice.predicted_us:.1f} us, bound by compute")
    share = found.floor_us / found.choice.predicted_us
    assert facts_["floor"] == f"{found.floor_us:.1f} us, {share:.0%} of it"


def test_a_measured_choice_is_the_bold_one_and_says_how_it_was_found() -> None:
    model = heuristics_explain(64, 2112, 7168)
    choice = TunedChoice(
        64, 2112, 7168, "bfloat16", False, model.candidates[2].config.name, 7.25,
        model.candidates[0].config.name, 9.5, 1.5, False, "0.1.0", "2026-11-22 12:00",
    )  # fmt: skip
    found = TunedExplanation(
        model.problem, model.machine, model.candidates, model.floor_us, tuned=choice
    )
    shown = page(found)
    bold = [text for tag, text in shown.texts if tag == "td" and text == choice.kernel]
    assert len(bold) == 1
    weights = re.findall(r'font-weight:600">([^<]*_bfloat16)<', found._repr_html_())
    assert weights == [choice.kernel]
    said = " ".join(text for _, text in shown.texts)
    assert "Choice measured at M = 64: 7.2 us" in said and choice.model in said


def test_a_plan_shows_its_own_kernel_even_if_another_was_chosen() -> None:
    config = KernelConfig(128, 128, 4)
    plan = cpgemm.plan_gemm(4096, 7168, 2048, config=config)
    shown = page(plan)
    assert shown.facts()["tile of D"] == "128 x 128"
    (mine,) = (one for one in plan.explain().candidates if one.config.block_n == 128
               and one.config.block_m == 128 and one.config.cluster == 1)  # fmt: skip
    tiles = config.tiles(plan.problem)
    assert shown.facts()["tiles"] == str(tiles) == str(mine.config.tiles(plan.problem))
    assert "GemmPlan" in repr(plan) and config.name in repr(plan)
    count = len(plan.explain().candidates)
    assert len(shown.tables) == 1 and ("summary", f"{count} candidates") in shown.texts


# ----------------------------------------------------------------------------------------- reports


def test_a_report_shows_the_tables_of_the_terminal() -> None:
    made = report()
    shown = page(made)
    wanted = tables(made)
    assert len(shown.tables) == len(wanted) == 2
    for lines, one in zip(shown.tables, wanted, strict=True):
        heads = [" ".join(column.head) for column in one.columns]
        cells = [list(each) for each in zip(*(c.cells for c in one.columns), strict=True)]
        assert lines == [heads, *cells]
    said = " ".join(text for _, text in shown.texts)
    assert "3 cases, 27 rows" in said and "interrupted" not in said
    assert "nvcc is not on PATH" in said and "NVIDIA H200" in said and "seed 5" in said


def test_what_went_wrong_is_red_and_an_interruption_is_said() -> None:
    case = Case("dense", 64, 4096, 7168)
    made = report(
        [bad(case, "cpgemm", "wrong", "off"), row(case, "deep_gemm", 9.0)], complete=False
    )
    text = made._repr_html_()
    assert re.search(rf'<span style="color:{RED};font-weight:600">WRONG</span>', text)
    assert "1 case, 2 rows, interrupted" in text
    slow = report(rows(case))._repr_html_()
    assert f'<span style="color:{RED}">0.90</span>' in slow, "deep_gemm with PDL is faster"
    assert f'<span style="color:{RED}">1.20</span>' not in slow
