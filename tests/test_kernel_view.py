"""``Kernel``: what it shows, that it is lazy, and that it needs no GPU."""

from __future__ import annotations

import html
import re

import pytest
from tiny_kernels import needs_nvrtc
from user_kernels import NAIVE

import cpgemm
from cpgemm.compiler import compile_count
from cpgemm.disassembler import nvdisasm_path
from cpgemm.heuristics import configurations

needs_nvdisasm = pytest.mark.skipif(
    nvdisasm_path() is None, reason="needs nvdisasm: pip install 'cpgemm[inspect]'"
)


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPGEMM_COMPILER", raising=False)


def test_a_plan_has_its_kernel() -> None:
    plan = cpgemm.plan_gemm(64, 2112, 7168)
    assert plan.kernel is plan.kernel
    assert plan.kernel.source == plan.source.text and plan.kernel.name == plan.config.name
    assert plan.kernel.entry == plan.config.entry and plan.kernel.rendered == plan.source


@needs_nvrtc
def test_nothing_is_compiled_before_it_is_asked_for(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    kernel = cpgemm.kernel("moe_offsets")
    before = compile_count()
    assert "not compiled yet" in repr(kernel) and "moe_offsets" in repr(kernel)
    assert kernel.source and kernel._repr_html_() and compile_count() == before
    assert kernel.resources.threads == 1024 and compile_count() == before + 1
    assert kernel.counts.whole["global stores"] and "registers" in kernel.log
    assert compile_count() == before + 1
    assert f"{kernel.resources.registers} registers" in repr(kernel)
    assert "blocks per SM" in repr(kernel) or "block per SM" in repr(kernel)


@needs_nvrtc
def test_resources_of_the_dense_kernel() -> None:
    plan = cpgemm.plan_gemm(4096, 7168, 2048)
    found = plan.kernel.resources
    assert found.threads == plan.config.threads == 384
    assert found.registers * found.threads <= 65536
    assert found.shared_bytes == plan.config.shared_bytes and found.static_shared_bytes == 0
    assert found.spill_bytes == found.local_bytes == 0 and found.report.faults() == ()
    assert found.occupancy is not None and found.occupancy.blocks_per_sm == 1
    assert "shared memory" in found.occupancy.decided_by
    assert re.search(r"^blocks per SM +1$", str(found), re.MULTILINE)


@needs_nvrtc
@pytest.mark.parametrize(("stages", "blocks"), [(5, 2), (8, 1)])
def test_how_often_split_kernels_fit(stages: int, blocks: int) -> None:
    name = f"dense_split_64x64_k2_s{stages}_w1_bfloat16"
    config = next(c for c in configurations("bfloat16") if c.name == name)
    fits = cpgemm.kernel(config).resources.occupancy
    assert fits is not None and fits.blocks_per_sm == blocks == config.blocks_per_sm  # type: ignore[attr-defined]


@needs_nvrtc
def test_ptx() -> None:
    ptx = cpgemm.kernel("dense_64x32_s16_w1_bfloat16").ptx
    assert re.search(r"^\.target sm_90a", ptx, re.MULTILINE)
    assert ".visible .entry cpgemm_dense" in ptx and not ptx.endswith("\0")
    # The macro's four wgmma, in a loop that stands in the PTX as often as it is unrolled there.
    count = ptx.count("wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3")
    assert count and count % 4 == 0


@needs_nvrtc
@needs_nvdisasm
def test_sass_agrees_with_the_counts() -> None:
    kernel = cpgemm.kernel("dense_split_64x64_k4_s5_w1_bfloat16")
    whole = kernel.counts.whole
    for mnemonic, kind in (("QGMMA", "wgmma"), ("UTMALDG", "TMA loads"), ("FFMA", "FFMA")):
        assert len(re.findall(rf"\b{mnemonic}\b", kernel.sass)) == whole[kind] > 0


@needs_nvrtc
def test_sass_without_nvdisasm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpgemm.disassembler.nvdisasm_path", lambda: None)
    with pytest.raises(cpgemm.MissingDependencyError, match=r'pip install "cpgemm\[inspect\]"'):
        cpgemm.kernel("moe_offsets").sass  # noqa: B018


def test_html_is_escaped() -> None:
    kernel = cpgemm.kernel_from_template(NAIVE, config=configurations("bfloat16")[0],
                                         values={"block_n": 64})  # fmt: skip
    shown = kernel._repr_html_()
    assert html.escape("template <int kN>") in shown and "template <int kN>" not in shown
    assert not re.findall(r"<(?!/?(?:div|b|br|details|summary|pre)\b)", shown)
