"""Reading ptxas reports and machine code."""

from __future__ import annotations

import struct

import pytest

from cpgemm.errors import CompileError
from cpgemm.machine_code import count_instructions, text_sections
from cpgemm.resources import ResourceReport, parse_report

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compiling entry function 'mine' for 'sm_90a'
ptxas info    : Function properties for mine
ptxas         .     {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, {stack} bytes cumulative stack size, 1024 bytes smem
"""  # noqa: E501


def elf(code: bytes, name: bytes = b".text.mine") -> bytes:
    """The smallest ELF-64 file with one code section."""
    names = b"\0" + name + b"\0.shstrtab\0"
    code_at, names_at = 64, 64 + len(code)
    table = names_at + len(names)

    def section(name_at: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, offset, size, 0, 0, 0, 0)

    header = b"\x7fELF\x02\x01" + bytes(10)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = section(0, 0, 0) + section(1, code_at, len(code))
    sections += section(1 + len(name) + 1, names_at, len(names))
    return header + code + names + sections


def words(*low: int) -> bytes:
    return b"".join(struct.pack("<QQ", word, 0xFC00000000000) for word in low)


# First words with the opcodes that nvdisasm shows; operands and predicates are arbitrary.
QGMMA, QGMMA_REGISTERS, HGMMA = 0x00000000141C79F3, 0x0000000004181DF3, 0x000000000C1C79F0
UTMALDG, UTMALDG_MULTICAST, UTMASTG, UTMAREDG = 0x8060075B4, 0x8060073B4, 0x8060073B5, 0x8060073B6
LDL, STL, NOP = 0x000000000C0C7983, 0x0000100801007387, 0x0000000000007918


def report(
    stack: int = 0, stores: int = 0, loads: int = 0, extra: str = "", code: bytes = words(NOP)
) -> ResourceReport:
    log = LOG.format(stack=stack, stores=stores, loads=loads) + extra
    return parse_report(log, elf(code), "mine")


def test_numbers_belong_to_the_entry() -> None:
    found = report()
    assert (found.registers, found.static_shared_bytes) == (168, 1024)
    assert found.faults() == ()


def test_instruction_counts() -> None:
    code = words(QGMMA, QGMMA_REGISTERS, HGMMA, UTMALDG, UTMALDG_MULTICAST, UTMASTG, UTMAREDG, NOP)
    found = report(code=code)
    assert (found.wgmma, found.tma_loads, found.tma_stores) == (3, 2, 2)
    assert (found.instructions, found.local_instructions) == (8, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stack": 256}, "local memory is used .256 bytes"),
        ({"stores": 8}, "spilled .8 bytes stored"),
        ({"loads": 4}, "spilled .0 bytes stored, 4 bytes loaded"),
        ({"code": words(LDL, STL)}, "0 bytes per thread, 2 instructions"),
        (
            {
                "extra": "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async "
                "instructions are serialized due to non wgmma instructions defining accumulator "
                "registers of a wgmma between start and end of the pipeline stage\n"
            },
            "wgmma instructions are serialized",
        ),
        (
            {
                "extra": "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; "
                "unable to determine register count at entry.\n"
            },
            "setmaxnreg is ignored",
        ),
    ],
)
def test_faults(changes: dict, says: str) -> None:
    faults = report(**changes).faults()
    assert len(faults) == 1
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(faults[0])


def test_an_entry_that_was_not_compiled() -> None:
    with pytest.raises(CompileError, match=r"no kernel 'absent'; it reports other, mine"):
        parse_report(LOG.format(stack=0, stores=0, loads=0), elf(b""), "absent")


def test_sections() -> None:
    assert list(text_sections(elf(words(NOP)))) == [(".text.mine", words(NOP))]
    assert list(text_sections(elf(words(NOP), b".nv.info"))) == []
    assert count_instructions(elf(b""))[1] == 0


@pytest.mark.parametrize("cut", [0, 3, 40, 70, 200])
def test_a_damaged_cubin_is_an_error(cut: int) -> None:
    with pytest.raises(CompileError, match=f"the cubin .{cut} bytes. is damaged"):
        count_instructions(elf(words(NOP, NOP, NOP, NOP))[:cut])
