"""From a user's template to a ``KernelSource``; its folder is searched before the package's own.

The text is rendered twice: once as it is, and once with marks at the start of every line of every
template that takes part, which say where the line stands.  Jinja's own numbers cover errors while
it renders; the compiler's are those of the rendered text, and the marks lead back from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpgemm import env
from cpgemm.errors import reject
from cpgemm.headers import digest, find_headers
from cpgemm.jinja import new_environment, render_text
from cpgemm.render import KernelSource, check_names, with_banner
from cpgemm.source_map import Place, SourceMap, match_lines

if TYPE_CHECKING:
    import jinja2
    from jinja2.lexer import Token, TokenStream

__all__ = ["render_file"]

# Characters of Unicode's private use area around the number of a place.
_MARK = re.compile("\ue000(\\d+)\ue001")


def render_file(
    path: Path,
    *,
    name: str,
    entry: str,
    values: Mapping[str, object],
    shared_bytes: int = 0,
    strict: bool = False,
) -> KernelSource:
    """Render the template at ``path``.

    Templates that it imports or includes and headers are looked for in its folder first, then in
    the package's; a header there takes the place of the package's one of the same name everywhere.
    Headers are read now: what is compiled is what was there when this was called.

    ``name``, ``entry``, ``values`` and ``shared_bytes`` as for ``render``.  Raises ``CompileError``
    with the line of the template for whatever Jinja refuses; ``ArgumentError`` for a path that is
    no file of text.
    """
    check_names(name, entry, shared_bytes)
    if not path.is_file():
        reject("path", "must be a template's file", str(path), "Give the path of a file.")
    folder = path.parent
    templates = (folder, env.template_dir())
    marker = _Marker()
    try:
        body = render_text(new_environment(templates), path.name, values)
        marked = render_text(marker.install(new_environment(templates)), path.name, values)
    except UnicodeDecodeError as error:
        reject("path", "must be text in UTF-8", f"{path} ({error})", "Save the file as UTF-8.")
    text = with_banner(body, path.name, name, values)
    places = marker.places_of(body.split("\n"), marked)
    banner = [None] * (text.count("\n") - body.count("\n"))
    lines = (*banner, *places)

    def place(includer: str, line: int) -> str:
        found = lines[line - 1] if not includer else (includer, line)
        return f"{path}" if found is None else f"{found[0]}:{found[1]}"

    headers = find_headers(text, (folder, env.header_dir()), place)
    return KernelSource(
        name,
        text,
        entry,
        path.name,
        digest(text, headers),
        shared_bytes,
        SourceMap(lines, marker.files, headers),
        strict,
    )


class _Marker:
    """Marks the lines of templates, and reads the marks in what they render to."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.files: dict[str, str] = {}

    def install(self, environment: jinja2.Environment) -> jinja2.Environment:
        """Have ``environment`` mark all that it compiles from now on."""
        from jinja2.ext import Extension

        marker = self

        class Marks(Extension):
            def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
                return marker._marked(stream)

            def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
                marker.files[filename or ""] = source
                return source

        environment.add_extension(Marks)
        return environment

    def _mark(self, file: str, line: int) -> str:
        self.places.append((file, line))
        return f"\ue000{len(self.places) - 1}\ue001"

    def _marked(self, stream: TokenStream) -> Iterator[Token]:
        from jinja2.lexer import TOKEN_DATA, TOKEN_VARIABLE_BEGIN, Token

        file = stream.filename or ""
        for token in stream:
            if token.type == TOKEN_DATA:
                pieces = token.value.split("\n")
                text = "\n".join(
                    self._mark(file, token.lineno + at) + piece for at, piece in enumerate(pieces)
                )
                yield Token(token.lineno, TOKEN_DATA, text)
                continue
            if token.type == TOKEN_VARIABLE_BEGIN:
                yield Token(token.lineno, TOKEN_DATA, self._mark(file, token.lineno))
            yield token

    def places_of(self, lines: list[str], marked: str) -> list[Place | None]:
        """The place of each of ``lines``, from the text ``marked`` that has the same lines.

        A line made of several counts as the one that its first visible character stands in.
        """
        plain: list[str] = []
        places: list[Place | None] = []
        last: Place | None = None
        for line in marked.split("\n"):
            parts: list[Any] = _MARK.split(line)  # text, number, text, number, text ...
            chosen = None
            for at in range(0, len(parts), 2):
                if at:
                    last = self.places[int(parts[at - 1])]
                if chosen is None and parts[at].strip():
                    chosen = last
            places.append(chosen or last)
            plain.append("".join(parts[::2]))
        # Marks can change what a filter or a test in a template sees of a captured text.
        return places if plain == lines else match_lines(lines, plain, places)
