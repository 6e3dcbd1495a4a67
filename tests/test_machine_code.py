"""Machine code: opcodes and branches against nvdisasm, loops of made-up and of real kernels."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from tiny_kernels import WGMMA, kernel_named, needs_nvrtc, source

from cpgemm.compiler import compile_kernel
from cpgemm.config import KernelConfig
from cpgemm.disassembler import nvdisasm_path
from cpgemm.kernels import gemm_source
from cpgemm.machine_code import (
    MNEMONICS,
    _target,
    count_instructions,
    find_loops,
    text_sections,
    threads_of,
)

needs_nvdisasm = pytest.mark.skipif(
    nvdisasm_path() is None, reason="needs nvdisasm: pip install 'cpgemm[inspect]'"
)

KERNELS = (
    "dense_256x128_s3_w2_multicast_a_bfloat16",
    "dense_split_64x64_k4_s5_w1_bfloat16",
    "grouped_adaptive_256x128_s3_w2_or_64x96_s10_bfloat16",
    "quantize_rows_float32_float32",
    "moe_route",
)

# One instruction for each mnemonic of the table that no kernel of the package has.
OTHERS = """
extern "C" __global__ void others(unsigned* p, float* f) {
    __shared__ __align__(16) unsigned s[1024];
    unsigned a = (unsigned)__cvta_generic_to_shared(s), r0, r1, r2, r3;
    s[threadIdx.x] = p[threadIdx.x];
    __syncthreads();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(a + 16 * threadIdx.x) : "memory");
    float d0 = f[0], d1 = f[1], d2 = f[2], d3 = f[3];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%4, %5}, {%0, %1, %2, %3};"
                 : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3) : "r"(r0), "r"(r1), "r"(r2), "r"(r3));
    f[threadIdx.x] = d0 + d1 + d2 + d3;
}
"""


def instruction(opcode: int, guard: int = 7, more: int = 0, high: int = 7 << 23) -> bytes:
    return struct.pack("<QQ", opcode | guard << 12 | more, high)


def branch(at: int, to: int, guard: int = 7) -> bytes:
    """BRA at instruction ``at`` to ``to``, encoded as nvdisasm confirms below."""
    offset = (to - at - 1) * 4 & (1 << 56) - 1
    low = 0x947 | guard << 12 | (offset & 0xFF) << 16 | (offset >> 8 & (1 << 30) - 1) << 34
    return struct.pack("<QQ", low, offset >> 38 & 0x3FFFF | 7 << 23)


FFMA, NOP, EXIT, QGMMA = (instruction(op) for op in (0x223, 0x918, 0x94D, 0x1F3))


def test_a_loop_and_what_is_around_it() -> None:
    (loop,) = find_loops(FFMA + QGMMA + FFMA + branch(3, 1, guard=0) + EXIT)
    assert (loop.start, loop.stop, loop.depth, loop.total) == (16, 64, 1, 3)
    assert loop.counts == {"QGMMA": 1, "FFMA": 1}


def test_nested_loops() -> None:
    outer, inner = find_loops(
        NOP + FFMA + QGMMA + branch(3, 2, guard=1) + branch(4, 1, guard=0) + EXIT
    )
    assert (outer.start, outer.depth, outer.counts) == (16, 1, {"FFMA": 1, "QGMMA": 1})
    assert (inner.start, inner.depth, inner.total) == (32, 2, 2)
    assert inner.body < outer.body


def test_what_stands_out_of_line_belongs_to_its_loop() -> None:
    """0: loop head, leaves to 4 to wait; 4-5 wait in a circle and go back to 1."""
    code = branch(0, 4, guard=0) + FFMA + branch(2, 0, guard=1) + EXIT
    code += NOP + branch(5, 4, guard=2) + branch(6, 1)
    loops = {loop.start: loop for loop in find_loops(code)}
    assert set(loops) == {0, 64}
    assert loops[0].total == 6 and loops[0].counts == {"FFMA": 1} and loops[64].depth == 2
    assert loops[0].stop == 48


def test_a_jump_back_into_code_that_has_other_ways_in_is_no_loop() -> None:
    """1 is entered from 0 by two ways: neither 1 nor 2 is on every way to the other."""
    code = branch(0, 2, guard=0) + NOP + NOP + branch(3, 1, guard=1) + EXIT
    assert find_loops(code) == ()


def test_code_without_loops() -> None:
    assert find_loops(b"") == ()
    assert find_loops(FFMA + EXIT) == ()
    assert find_loops(FFMA + EXIT + branch(2, 2)) == (), "what follows the end is padding"


def test_code_that_runs_past_its_end() -> None:
    assert find_loops(FFMA + branch(1, 9, guard=0)) == ()


def _lines(cubin: Path) -> list[tuple[int, str, str, int, int]]:
    """(offset, mnemonic, label that it branches to or "", first word, second word) by nvdisasm."""
    program = nvdisasm_path()
    assert program is not None
    text = subprocess.run(
        [program, "--print-code", "--print-instruction-encoding", str(cubin)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    pattern = re.compile(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)([^;]*);\s*"
        r"/\* 0x([0-9a-f]{16}) \*/\s*/\* 0x([0-9a-f]{16}) \*/"
    )
    found = []
    for match in pattern.finditer(text):
        label = re.search(r"`\((\.L_x_\d+)\)", match[3])
        words = int(match[4], 16), int(match[5], 16)
        found.append((int(match[1], 16), match[2], label[1] if label else "", *words))
    labels = dict(re.findall(r"(\.L_x_\d+):\s+(?:\.byte[^\n]*\n\s*)*/\*([0-9a-f]{4,})\*/", text))
    return [(at, name, labels.get(label, ""), low, high) for at, name, label, low, high in found]


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("name", [*KERNELS, "others", "wgmma"])
def test_opcodes_and_branches_are_nvdisasms(name: str) -> None:
    own = {"others": OTHERS, "wgmma": WGMMA}
    kernel = source(own[name], name) if name in own else kernel_named(name)
    cubin = compile_kernel(kernel).cubin
    lines = _lines(cubin)
    counts, total = count_instructions(cubin.read_bytes())
    assert len(lines) == total > 30
    branches = 0
    for at, mnemonic, label, low, high in lines:
        known = MNEMONICS.get(low & 0x1FF)
        if known is not None or mnemonic in MNEMONICS.values():
            assert mnemonic.startswith(known or "nothing"), (hex(at), mnemonic)
        if mnemonic == "BRA" and label:
            branches += 1
            assert _target(at // 16, low, high) * 16 == int(label, 16), hex(at)
    assert branches or name in own
    if name == "others":
        assert counts["HMMA"] == 1 and counts["LDSM"] == 1
    if name == "wgmma":
        assert (counts["QGMMA"], counts["UTMALDG"], counts["UBLKCP"]) == (3, 2, 1)


@needs_nvrtc
def test_the_main_loop_of_the_dense_kernel() -> None:
    """Each k-block is two waves with four wgmma and 64 FFMA each; no copies inside."""
    config = KernelConfig(256, 128, 3)
    kernel = gemm_source(config)
    code = dict(text_sections(compile_kernel(kernel).cubin.read_bytes()))[f".text.{kernel.entry}"]
    loops = [loop for loop in find_loops(code) if loop.counts.get("QGMMA")]
    innermost = [one for one in loops if not any(other.body < one.body for other in loops)]
    turns = sorted(loop.counts["QGMMA"] for loop in innermost)
    assert turns == [8, 8 * config.unroll], "the unrolled loop, and the rest one at a time"
    for loop in innermost:
        assert loop.counts["FFMA"] == 16 * loop.counts["QGMMA"] and loop.depth == 2
        assert "UTMALDG" not in loop.counts and "UTMASTG" not in loop.counts


@needs_nvrtc
def test_threads_of_a_block() -> None:
    kernel = kernel_named("dense_256x128_s3_w2_bfloat16")
    cubin = compile_kernel(kernel).cubin.read_bytes()
    assert threads_of(cubin, kernel.entry) == 384
    assert threads_of(cubin, "absent") is None
    unbounded = source(
        'extern "C" __global__ void unbounded(float* p) { p[threadIdx.x] = 1; }', "unbounded"
    )
    assert threads_of(compile_kernel(unbounded).cubin.read_bytes(), "unbounded") is None
