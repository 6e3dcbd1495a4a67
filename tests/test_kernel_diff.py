"""Differences between two kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_kernels import needs_nvrtc
from user_kernels import dense_copy

import cpgemm
from cpgemm.errors import ArgumentTypeError

SHAPE = (4096, 7168, 2048)


def test_half_the_columns() -> None:
    a = cpgemm.kernel("dense_64x64_s8_w1_bfloat16")
    b = cpgemm.kernel("dense_64x32_s16_w1_bfloat16")
    text = cpgemm.diff(a, b).source
    assert text.startswith(f"--- {a.name}\n+++ {b.name}\n@@")
    assert "-constexpr int kBlockN = 64;" in text and "+constexpr int kBlockN = 32;" in text


@needs_nvrtc
def test_resources_and_counts() -> None:
    a = cpgemm.kernel("dense_64x64_s8_w1_bfloat16")
    b = cpgemm.kernel("dense_64x32_s16_w1_bfloat16")
    found = cpgemm.diff(a, b)
    names = {row[0] for row in found.resources}
    assert {"registers per thread", "dynamic shared memory"} <= names
    assert "threads per block" not in names, "equal in both"
    counts = {row[0]: row[1:] for row in found.main_loop}
    assert counts["FFMA"] == (str(a.counts.main_loop["FFMA"]), str(b.counts.main_loop["FFMA"]))
    text = str(found)
    assert re.search(r"^FFMA +\d+ +\d+ +-\d+$", text, re.MULTILINE)
    assert max(map(len, text[text.index("\nresource") :].splitlines())) <= 100
    shown = found._repr_html_()
    assert "<td>FFMA</td>" in shown and "&quot;memory&quot;" in shown


@needs_nvrtc
def test_a_kernel_and_its_changed_copy(tmp_path: Path) -> None:
    """What the copy changes is all that differs, apart from the banner."""
    theirs = cpgemm.plan_gemm(*SHAPE).kernel
    unroll = cpgemm.plan_gemm(*SHAPE).config.unroll
    path = dense_copy(tmp_path, ("kUnroll = {{ config.unroll }}", "kUnroll = 1"))
    mine = cpgemm.kernel_from_template(path, SHAPE)
    found = cpgemm.diff(theirs, mine)
    changed = [line for line in found.source.splitlines() if re.match(r"[+-](?!//|\+|-)", line)]
    assert changed == [f"-constexpr int kUnroll = {unroll};", "+constexpr int kUnroll = 1;"]
    counts = {row[0]: row[1:] for row in found.main_loop}
    assert counts["wgmma"] == (str(8 * unroll), "8")


@needs_nvrtc
def test_equal_kernels() -> None:
    kernel = cpgemm.kernel("moe_offsets")
    found = cpgemm.diff(kernel, kernel)
    assert found.source == "" and found.resources == found.counts == found.main_loop == ()
    assert "The rendered sources are equal." in str(found)
    assert str(found).count("no difference") == 3 == found._repr_html_().count("no difference")


@needs_nvrtc
def test_a_kernel_with_a_main_loop_and_one_without() -> None:
    found = cpgemm.diff(cpgemm.kernel("dense_64x32_s16_w1_bfloat16"), cpgemm.kernel("moe_gather"))
    assert ("wgmma", "12", "no loop") in found.main_loop
    assert "no loop" in str(found)


def test_anything_but_kernels() -> None:
    with pytest.raises(ArgumentTypeError, match="b: must be a Kernel; got str"):
        cpgemm.diff(cpgemm.kernel("moe_offsets"), "moe_route")  # type: ignore[arg-type]
