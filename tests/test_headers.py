"""Headers of several folders, and the digest over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpgemm.errors import CompileError
from cpgemm.headers import Header, digest, find_headers


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A user's folder with ``b.cuh``, and a package's with ``a.cuh``, which includes ``b.cuh``."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    (theirs / "sub").mkdir(parents=True)
    (mine / "b.cuh").write_text("// mine\n")
    (theirs / "a.cuh").write_text('#include "b.cuh"\n#include "sub/c.cuh"\n')
    (theirs / "b.cuh").write_text("// theirs\n")
    (theirs / "sub" / "c.cuh").write_text('#include "d.cuh"\n')
    (theirs / "sub" / "d.cuh").write_text("// beside its includer\n")
    return mine, theirs


def test_earlier_folders_come_first_for_headers_of_later_ones(folders: tuple[Path, Path]) -> None:
    mine, theirs = folders
    files = {
        "a.cuh": theirs / "a.cuh",
        "b.cuh": mine / "b.cuh",
        "sub/c.cuh": theirs / "sub" / "c.cuh",
        "sub/d.cuh": theirs / "sub" / "d.cuh",
    }
    assert find_headers('#include "a.cuh"\n', folders) == tuple(
        Header(name, str(path), path.read_bytes()) for name, path in files.items()
    )
    assert find_headers('#include "a.cuh"\n', [theirs])[1].path == str(theirs / "b.cuh")


def test_a_header_in_another_encoding(folders: tuple[Path, Path]) -> None:
    """The compiler takes any bytes in a comment; only lines that include matter here."""
    mine, _ = folders
    content = b'// caf\xe9\n#include "sub/c.cuh"\n'
    (mine / "b.cuh").write_bytes(content)
    first, *others = find_headers('#include "b.cuh"\n', folders)
    assert first.content == content and "sub/d.cuh" in [header.name for header in others]


def test_a_missing_header_is_placed(folders: tuple[Path, Path]) -> None:
    mine, _ = folders
    (mine / "b.cuh").write_text('\n#include "aa.cuh"\n')

    def place(includer: str, line: int) -> str:
        return f"{includer or 'text'}:{line}"

    with pytest.raises(CompileError, match=r"^b\.cuh:2 includes 'aa\.cuh'.*Did you mean a\.cuh"):
        find_headers('#include "a.cuh"\n', folders, place)
    with pytest.raises(CompileError, match=r"^text:3 includes 'zzz'.*Headers live in .*, .*theirs"):
        find_headers('//\n//\n#include "zzz"\n', folders, place)
    with pytest.raises(CompileError, match=r"^the header 'b\.cuh' includes"):
        find_headers('#include "a.cuh"\n', folders)


def test_digest() -> None:
    def hashed(text: str, **contents: bytes) -> str:
        return digest(text, [Header(name, f"/{text}", held) for name, held in contents.items()])

    one = hashed("text", a=b"1", b=b"2")
    assert one == hashed("text", b=b"2", a=b"1"), "the order does not count"
    others = [
        hashed("text2", a=b"1", b=b"2"),
        hashed("text", a=b"1"),
        hashed("text", a=b"1", c=b"2"),
        hashed("text", a=b"1", b=b"3"),
    ]
    assert one not in others and len(set(others)) == len(others)
