"""Places in templates and headers instead of places in rendered text."""

from __future__ import annotations

from cpgemm.headers import Header
from cpgemm.source_map import SourceMap, excerpt, match_lines

MAP = SourceMap(
    (None, ("/u/mine.cu.j2", 1), ("/u/part.j2", 7)),
    {"/u/mine.cu.j2": "one\n", "/u/part.j2": "part\n"},
    (Header("ptx.cuh", "/p/ptx.cuh", b"ptx\n"), Header("sub/a.cuh", "/u/sub/a.cuh", b"a\n")),
)


def test_locate() -> None:
    assert MAP.locate(1) is None and MAP.locate(3) == ("/u/part.j2", 7)
    assert MAP.locate(0) is None and MAP.locate(4) is None


def test_translate() -> None:
    log = (
        "mine.cu(3): error: x\n"
        "mine.cu(1): warning: the banner stays\n"
        "sub/a.cuh(12): error: y\n"
        "  detected during instantiation at line 2 of mine.cu\n"
        "ptx.cuh(4): error: z\n"
        "not_mine.cu(3): error\n"
        '2 errors detected in the compilation of "mine.cu".\n'
    )
    assert MAP.translate(log, "mine.cu") == (
        "/u/part.j2(7): error: x\n"
        "mine.cu(1): warning: the banner stays\n"
        "/u/sub/a.cuh(12): error: y\n"
        "  detected during instantiation at line 1 of /u/mine.cu.j2\n"
        "/p/ptx.cuh(4): error: z\n"
        "not_mine.cu(3): error\n"
        '2 errors detected in the compilation of "mine.cu".\n'
    )


def test_texts_are_those_of_the_rendering() -> None:
    assert MAP.text_of("/u/part.j2") == "part\n" and MAP.text_of("/p/ptx.cuh") == "ptx\n"
    assert MAP.text_of("/elsewhere") is None


def test_lines_that_differ_a_little() -> None:
    places = [("t", at) for at in range(1, 5)]
    text = ["a", "other", "c", "more", "d"]
    assert match_lines(text, ["a", "b", "c", "d"], places) == [
        ("t", 1), ("t", 2), ("t", 3), ("t", 3), ("t", 4),
    ]  # fmt: skip


def test_excerpt_at_both_ends() -> None:
    text = "\n".join("abcdefgh")
    assert excerpt(text, 1) == ">     1 | a\n      2 | b\n      3 | c\n      4 | d"
    assert excerpt(text, 8).splitlines()[-1] == ">     8 | h" and excerpt("", 3) == ""
