"""From lines of a rendered kernel back to the lines of the template that someone wrote."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cpgemm.headers import Header

__all__ = ["Place", "SourceMap", "excerpt", "match_lines"]

_CONTEXT = 3

Place = tuple[str, int]
"""Path of a file, and the number of a line."""


@dataclass(frozen=True)
class SourceMap:
    """Where the text of a user's kernel comes from.

    - ``lines``: (path, line) of each line of the rendered text; None for those of the banner
    - ``files``: contents of the template, and of the macros and parts that it took in, by path
    - ``headers``: every header that the text includes, directly or not
    """

    lines: tuple[Place | None, ...]
    files: Mapping[str, str] = field(repr=False)
    headers: tuple[Header, ...] = field(repr=False)

    def locate(self, line: int) -> Place | None:
        """(path, line) that rendered line number ``line`` comes from; None where nobody knows."""
        return self.lines[line - 1] if 1 <= line <= len(self.lines) else None

    def translate(self, log: str, name: str) -> str:
        """A compiler's log with places in templates and headers instead of the rendered file.

        ``name`` is what the compiler was told that the rendered file is called.
        """

        def template_place(match: re.Match[str]) -> str:
            place = self.locate(int(match[1]))
            return match[0] if place is None else f"{place[0]}({place[1]})"

        def place_in_words(match: re.Match[str]) -> str:
            place = self.locate(int(match[1]))
            return match[0] if place is None else f"at line {place[1]} of {place[0]}"

        log = re.sub(rf"(?<![^\s\"']){re.escape(name)}\((\d+)\)", template_place, log)
        log = re.sub(rf"at line (\d+) of {re.escape(name)}", place_in_words, log)
        paths = {header.name: header.path for header in self.headers}
        if paths:
            names = "|".join(map(re.escape, paths))
            log = re.sub(rf"(?<![^\s\"'])({names})(?=\(\d+\))", lambda match: paths[match[1]], log)
        return log

    def text_of(self, path: str) -> str | None:
        """Contents of a template or header when the kernel was rendered; None for other files."""
        for header in self.headers:
            if header.path == path:
                return header.content.decode("utf-8", "replace")
        return self.files.get(path)


def match_lines(
    text: Sequence[str], marked: Sequence[str], places: Sequence[Place | None]
) -> list[Place | None]:
    """``places`` of the lines ``marked``, for the lines ``text``, which are nearly the same.

    A line that differs gets the place of the one that stands for it there, one that is missing
    there the place of the line before it.
    """
    found: list[Place | None] = [None] * len(text)
    matcher = difflib.SequenceMatcher(None, text, marked, autojunk=False)
    for _, at, end, other, other_end in matcher.get_opcodes():
        size = min(end - at, other_end - other)
        found[at : at + size] = places[other : other + size]
    last: Place | None = None
    for at, place in enumerate(found):
        last = place if place is not None else last
        found[at] = last
    return found


def excerpt(text: str, line: int) -> str:
    """The lines around number ``line`` of ``text``, numbered, that one marked."""
    lines = text.splitlines()
    first, last = max(1, line - _CONTEXT), min(len(lines), line + _CONTEXT)
    return "\n".join(
        f"{'>' if at == line else ' '} {at:5d} | {lines[at - 1]}" for at in range(first, last + 1)
    )
