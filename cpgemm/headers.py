"""Which headers a kernel includes, and the digest of a kernel with all of them."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cpgemm.errors import CompileError

__all__ = ["Header", "digest", "find_headers"]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


@dataclass(frozen=True)
class Header:
    """A header as it was when the kernel was rendered: name in an include, path, contents."""

    name: str
    path: str
    content: bytes


def _in_words(includer: str, _line: int) -> str:
    return f"the header {includer!r}" if includer else "the kernel"


def find_headers(
    text: str, folders: Sequence[Path], place: Callable[[str, int], str] = _in_words
) -> tuple[Header, ...]:
    """The headers that ``text`` includes, directly or not, each read once.

    ``folders`` are searched in their order, as if all of them were one, so that a header in an
    earlier one takes the place of its namesake for other headers too.  In the order of their first
    inclusion.  Includes behind ``#if`` count as included: a key that covers one header too many is
    safe, one too few is not.  ``<...>`` names that no folder has belong to the compiler and are
    left out.  Raises ``CompileError`` for a missing ``"..."`` name; ``place`` says what includes
    it, from the includer's name ("" for ``text``) and the line in it.
    """
    found: dict[str, Header] = {}

    def visit(source: str, includer: str) -> None:
        folder = PurePosixPath(includer).parent
        for match in _INCLUDE.finditer(source):
            header = _resolve(folders, folder, match[1] or match[2])
            if header is None:
                if match[2]:
                    continue
                line = source.count("\n", 0, match.start()) + 1
                raise CompileError(_missing_header(folders, match[1], place(includer, line)))
            name, path = header
            if name not in found:
                content = path.read_bytes()
                found[name] = Header(name, str(path), content)
                visit(content.decode("utf-8", "replace"), name)

    visit(text, "")
    return tuple(found.values())


def digest(text: str, headers: Iterable[Header]) -> str:
    """sha256 (hex) of a kernel's text and of its headers, by name and contents."""
    found = hashlib.sha256(text.encode())
    for header in sorted(headers, key=lambda header: header.name):
        # Lengths keep two different splits of the same bytes apart.
        found.update(f"\0{header.name}\0{len(header.content)}\0".encode())
        found.update(header.content)
    return found.hexdigest()


def _resolve(
    folders: Sequence[Path], folder: PurePosixPath, include: str
) -> tuple[str, Path] | None:
    """Name and file of an include: beside the includer first, as the compiler looks it up."""
    for candidate in (folder / include, PurePosixPath(include)):
        parts: list[str] = []
        for part in candidate.parts:
            if part == ".." and parts:
                parts.pop()
            elif part not in (".", ""):
                parts.append(part)
        relative = PurePosixPath(*parts)
        if relative.is_absolute() or ".." in parts:
            continue
        for root in folders:
            if (root / relative).is_file():
                return str(relative), root / relative
    return None


def _missing_header(folders: Sequence[Path], header: str, where: str) -> str:
    known = sorted(
        {p.relative_to(root).as_posix() for root in folders for p in root.rglob("*.cuh")}
    )
    near = difflib.get_close_matches(header, known, n=3)
    places = ", ".join(map(str, folders))
    mend = f"Did you mean {', '.join(near)}?" if near else f"Headers live in {places}."
    return f"{where} includes {header!r}, which is not among cpgemm's headers. {mend}"
