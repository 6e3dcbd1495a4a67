"""Counts by kind, of a kernel and of its loops."""

from __future__ import annotations

import pytest
from tiny_kernels import COPY, kernel_named, needs_nvrtc, source

from cpgemm.compiler import compile_kernel
from cpgemm.config import KernelConfig
from cpgemm.errors import CompileError
from cpgemm.instruction_counts import ALL, KINDS, InstructionCounts, count_by_loop
from cpgemm.kernels import gemm_source
from cpgemm.machine_code import MNEMONICS

pytestmark = needs_nvrtc


def counts(name: str) -> InstructionCounts:
    kernel = kernel_named(name)
    return count_by_loop(compile_kernel(kernel).cubin.read_bytes(), kernel.entry)


def test_every_mnemonic_is_counted_once() -> None:
    named = [name for names in KINDS.values() for name in names]
    assert sorted(named) == sorted(set(MNEMONICS.values()))


def test_the_dense_kernel() -> None:
    """Producer and consumers have a loop each: copies in the one, arithmetic in the other."""
    kernel = gemm_source(KernelConfig(256, 128, 3, unroll=3))
    found = count_by_loop(compile_kernel(kernel).cubin.read_bytes(), kernel.entry)
    main, load = found.main_loop, found.load_loop
    assert main is not None and load is not None
    assert main["wgmma"] == 24 and main["FFMA"] == 16 * 24 and main["TMA loads"] == 0
    assert load["TMA loads"] == 3 and load["asynchronous copies"] == 1 and load["wgmma"] == 0
    assert main["mbarrier operations"] > 0 and load["mbarrier operations"] > 0
    assert found.whole["TMA stores"] == 4 and main["TMA stores"] == 0
    assert found.whole["local memory"] == 0
    assert main[ALL] + load[ALL] < found.whole[ALL]


def test_split_and_grouped_kernels_have_both_loops() -> None:
    for name in (
        "dense_split_64x64_k4_s5_w1_bfloat16",
        "grouped_adaptive_256x128_s3_w2_or_64x96_s10_bfloat16",
    ):
        found = counts(name)
        assert found.main_loop is not None and found.load_loop is not None
        assert found.main_loop["wgmma"] and found.load_loop["TMA loads"] == 3


def test_without_wgmma_the_loop_with_most_ffma() -> None:
    found = counts("quantize_rows_float32_float32")
    assert found.main_loop is not None and found.main_loop["FFMA"] > 0
    assert found.load_loop is None
    assert "load loop" in str(found).splitlines()[0] and str(found).splitlines()[1].endswith("-")


def test_a_kernel_without_arithmetic() -> None:
    kernel = source(COPY, "copy")
    found = count_by_loop(compile_kernel(kernel).cubin.read_bytes(), "copy")
    assert found.main_loop is None and found.loops and found.whole["global loads"] > 0
    assert {row[0] for row in found.rows()} >= {"global loads", "global stores", ALL}


def test_an_entry_that_is_not_there() -> None:
    cubin = compile_kernel(source(COPY, "copy")).cubin.read_bytes()
    with pytest.raises(CompileError, match="no kernel 'absent'"):
        count_by_loop(cubin, "absent")
