"""What a cubin's machine code consists of: instructions, their counts, and the loops they form.

No toolkit is needed: the code is read from the ELF file's ``.text`` sections.  A Hopper instruction
is 16 bytes, two little-endian words; the low nine bits of the first are the opcode (bits 9-11 say
where the operands come from, bits 12-15 hold the guard predicate, 7: none).  Tables and fields were
found by compiling one small kernel per PTX instruction and all kernels of this package with NVRTC
12.9 and nvcc 13.0 for sm_90a and reading ``nvdisasm -hex`` beside it; nine bits kept every mnemonic
of the table apart, and tests/test_machine_code.py compares all of it again with nvdisasm.

Loops are the natural loops of the control-flow graph: a branch back to an instruction through which
every way to the branch leads.  What the compiler moved out of line (waiting on a barrier that is
seldom awaited long) belongs to its loop, wherever it stands.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cpgemm.errors import CompileError

__all__ = [
    "INSTRUCTION_BYTES",
    "MNEMONICS",
    "Loop",
    "count_instructions",
    "find_loops",
    "sections",
    "text_sections",
    "threads_of",
]

# opcode -> mnemonic of nvdisasm, sm_90a only.
MNEMONICS = {
    0x020: "FMUL",
    0x021: "FADD",
    0x023: "FFMA",
    0x03B: "LDSM",  # ldmatrix
    0x03C: "HMMA",  # mma.sync
    0x044: "STSM",  # stmatrix
    0x11D: "BAR",  # barriers of a block, named ones too
    0x181: "LDG",
    0x183: "LDL",  # load from local memory
    0x184: "LDS",
    0x186: "STG",
    0x187: "STL",  # store to local memory
    0x188: "STS",
    0x189: "SHFL",
    0x1A7: "SYNCS",  # mbarrier: arrive, try_wait
    0x1AE: "LDGSTS",  # cp.async
    0x1B0: "ARRIVES",  # cp.async.mbarrier.arrive
    0x1B2: "SYNCS",  # mbarrier: init, arrive on another block's
    0x1B4: "UTMALDG",  # cp.async.bulk.tensor global -> shared, multicast or not
    0x1B5: "UTMASTG",  # cp.async.bulk.tensor shared -> global
    0x1B6: "UTMAREDG",  # cp.reduce.async.bulk.tensor
    0x1B8: "UTMAPF",  # cp.async.bulk.prefetch.tensor
    0x1BA: "UBLKCP",  # cp.async.bulk, either direction
    0x1BB: "UBLKRED",  # cp.reduce.async.bulk
    0x1C5: "WARPGROUP",  # wgmma.fence, wgmma.wait_group
    0x1C7: "UCGABAR",  # barrier of a cluster: arrive, wait
    0x1F0: "HGMMA",  # wgmma f16, bf16, tf32
    0x1F1: "IGMMA",  # wgmma s8, u8
    0x1F2: "BGMMA",  # wgmma b1
    0x1F3: "QGMMA",  # wgmma e4m3, e5m2
}
INSTRUCTION_BYTES = 16
_OPCODE_MASK = 0x1FF

_BSYNC, _BSSY, _BRA, _BRX, _JMP, _JMX, _EXIT, _RET = (
    0x141, 0x145, 0x147, 0x149, 0x14A, 0x14C, 0x14D, 0x150,
)  # fmt: skip
_NO_GUARD = 7
_MAX_THREADS = 0x05  # EIATTR_MAX_THREADS of .nv.info.<entry>: __launch_bounds__, three u32
_ATTRIBUTE_WITH_BYTES = 4  # its format: a 16-bit size and as many bytes follow


@dataclass(frozen=True)
class Loop:
    """A natural loop: byte offsets in its function, instructions by mnemonic.

    ``start`` is the offset of its first instruction (the target of the branch back), ``stop`` the
    offset behind its last branch back.  ``total`` counts its instructions, ``counts`` those of the
    table above by mnemonic; loops inside count too.  ``depth`` is 1 for a loop in no other.
    ``body``: offsets of the first instructions of its basic blocks.
    """

    start: int
    stop: int
    depth: int
    total: int
    counts: Mapping[str, int] = field(hash=False)
    body: frozenset[int] = field(repr=False)


# ------------------------------------------------------------------------------ the file's sections


def sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each section of a 64-bit little-endian ELF file.

    Offsets follow the ELF-64 file header (section table at 0x28, its entry size, count and string
    section at 0x3A) and section header (name, type, flags, address, offset, size).  Raises
    ``CompileError`` for anything else.
    """
    try:
        if cubin[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        (table,) = struct.unpack_from("<Q", cubin, 0x28)
        size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
        headers = [
            struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)
        ]
        names_at, names_size = headers[names_index][4:6]
        names = cubin[names_at : names_at + names_size]
        found = []
        for name_at, kind, _, _, offset, length in headers:
            name = names[name_at : names.index(b"\0", name_at)].decode("ascii", "replace")
            # SHT_NOBITS: a section with a size and no bytes (shared memory).
            if kind != 8 and offset + length > len(cubin):
                raise ValueError(f"section {name} is cut off")
            found.append((name, b"" if kind == 8 else cubin[offset : offset + length]))
    except (struct.error, ValueError, IndexError) as error:
        raise CompileError(f"the cubin ({len(cubin)} bytes) is damaged: {error}") from error
    yield from found


def text_sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each ``.text.*`` section: a kernel with its device functions."""
    return ((name, code) for name, code in sections(cubin) if name.startswith(".text."))


def threads_of(cubin: bytes, entry: str) -> int | None:
    """Threads of a block by the kernel's ``__launch_bounds__``; None without them."""
    info = dict(sections(cubin)).get(f".nv.info.{entry}", b"")
    at = 0
    while at + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _ATTRIBUTE_WITH_BYTES:
            if attribute == _MAX_THREADS and value == 12:
                x, y, z = struct.unpack_from("<III", info, at)
                return int(x * y * z)
            at += value
    return None


# ------------------------------------------------------------------------------------------- counts


def count_instructions(cubin: bytes) -> tuple[Counter[str], int]:
    """Counts of the mnemonics in the table above, and of all instructions, over the whole cubin."""
    counts: Counter[str] = Counter()
    total = 0
    for _, code in text_sections(cubin):
        instructions = _instructions(code)
        total += len(instructions)
        counts += _counted(instructions)
    return counts, total


def _instructions(code: bytes) -> list[tuple[int, int]]:
    whole = len(code) // INSTRUCTION_BYTES * INSTRUCTION_BYTES
    return list(struct.iter_unpack("<QQ", code[:whole]))


def _counted(instructions: list[tuple[int, int]]) -> Counter[str]:
    opcodes = Counter(low & _OPCODE_MASK for low, _ in instructions)
    counts: Counter[str] = Counter()
    for opcode, number in opcodes.items():
        if mnemonic := MNEMONICS.get(opcode):
            counts[mnemonic] += number
    return counts


# -------------------------------------------------------------------------------------------- loops


def find_loops(code: bytes) -> tuple[Loop, ...]:
    """The loops of one ``.text`` section's kernel, in the order in which they start.

    Loops with one head count as one.  Branches to addresses that are only known at run time end
    their way; this package's kernels have none.
    """
    instructions = _instructions(code)
    if not instructions:
        return ()
    starts, edges = _basic_blocks(instructions)
    bodies = _natural_loops(edges)
    spans = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))
    loops = []
    for head, (body, tails) in bodies.items():
        inside = [
            instruction
            for block in body
            for instruction in instructions[starts[block] : spans[starts[block]]]
        ]
        depth = sum(1 for other, _ in bodies.values() if body <= other)
        loops.append(
            Loop(
                starts[head] * INSTRUCTION_BYTES,
                max(spans[starts[tail]] for tail in tails) * INSTRUCTION_BYTES,
                depth,
                len(inside),
                dict(_counted(inside)),
                frozenset(starts[block] * INSTRUCTION_BYTES for block in body),
            )
        )
    return tuple(sorted(loops, key=lambda loop: (loop.start, loop.depth)))


def _basic_blocks(instructions: list[tuple[int, int]]) -> tuple[list[int], list[list[int]]]:
    """Indices of the first instructions of all blocks, and the successors of each block."""
    ways: dict[int, list[int]] = {}  # by the index of an instruction that does not just go on
    meetings: dict[int, set[int]] = {}  # where the threads of a BSSY meet, by its register
    for at, (low, _) in enumerate(instructions):
        if low & _OPCODE_MASK == _BSSY:
            target = at + 1 + (low >> 32) // INSTRUCTION_BYTES
            meetings.setdefault(low >> 16 & 0xF, set()).add(target)
    for at, (low, high) in enumerate(instructions):
        opcode = low & _OPCODE_MASK
        always = low >> 12 & 0xF == _NO_GUARD
        if opcode == _BRA:
            # A second predicate and a form for diverged warps stand in bits 87 to 91.
            always = always and high >> 23 & 0x1F == _NO_GUARD
            ways[at] = [_target(at, low, high)]
        elif opcode == _BSYNC:
            targets = meetings.get(low >> 16 & 0xF, set())
            ways[at] = [at + 1] if at + 1 in targets else sorted(targets)
        elif opcode in (_EXIT, _RET, _BRX, _JMP, _JMX):
            ways[at] = []
        else:
            continue
        if not always:
            ways[at].append(at + 1)
    count = len(instructions)
    starts = {0}
    for at, targets_of in ways.items():
        starts.update(target for target in (*targets_of, at + 1) if 0 <= target < count)
    ordered = sorted(starts)
    number = {start: block for block, start in enumerate(ordered)}
    edges = []
    for block, _ in enumerate(ordered):
        last = (ordered[block + 1] if block + 1 < len(ordered) else count) - 1
        following = ways.get(last, [last + 1])
        edges.append([number[target] for target in following if target in number])
    return ordered, edges


def _target(at: int, low: int, high: int) -> int:
    """Where a BRA goes: an offset in units of 4 bytes, bits 16-23 below bits 34-81, signed."""
    offset = ((low >> 34 | (high & 0x3FFFF) << 30) << 8) | (low >> 16 & 0xFF)
    if offset >> 55:
        offset -= 1 << 56
    return at + 1 + offset * 4 // INSTRUCTION_BYTES


def _natural_loops(edges: list[list[int]]) -> dict[int, tuple[set[int], list[int]]]:
    """Head -> (blocks of the loop, blocks that branch back to the head)."""
    order = _reverse_postorder(edges)
    dominators = _dominators(edges, order)
    sources: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in edges[block]:
            sources[target].append(block)
    loops: dict[int, tuple[set[int], list[int]]] = {}
    for tail in order:
        for head in edges[tail]:
            if not _dominates(head, tail, dominators):
                continue
            body, tails = loops.setdefault(head, ({head}, []))
            tails.append(tail)
            reached = [tail]
            while reached:
                block = reached.pop()
                if block not in body:
                    body.add(block)
                    reached += sources[block]
    return loops


def _reverse_postorder(edges: list[list[int]]) -> list[int]:
    seen, order = {0}, []
    walk = [(0, iter(edges[0]))]
    while walk:
        block, rest = walk[-1]
        following = next((target for target in rest if target not in seen), None)
        if following is None:
            order.append(block)
            walk.pop()
        else:
            seen.add(following)
            walk.append((following, iter(edges[following])))
    return order[::-1]


def _dominators(edges: list[list[int]], order: list[int]) -> dict[int, int]:
    """Immediate dominators by Cooper, Harvey and Kennedy's iteration; the first block is its own.

    K. D. Cooper, T. J. Harvey, K. Kennedy, "A Simple, Fast Dominance Algorithm", 2001.
    """
    rank = {block: at for at, block in enumerate(order)}
    sources: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in edges[block]:
            sources[target].append(block)
    found = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [source for source in sources[block] if source in found]
            nearest = known[0]
            for other in known[1:]:
                while nearest != other:
                    if rank[nearest] > rank[other]:
                        nearest = found[nearest]
                    else:
                        other = found[other]
            if found.get(block) != nearest:
                found[block] = nearest
                changed = True
    return found


def _dominates(head: int, block: int, dominators: Mapping[int, int]) -> bool:
    while block != head and dominators[block] != block:
        block = dominators[block]
    return block == head
