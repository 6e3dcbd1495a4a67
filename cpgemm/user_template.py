"""From a user's template to a ``KernelSource``; its folder is searched before the package's own.

The text is rendered twice: once as it is, and once with marks at the start of every line of every
template that takes part, which say where the line stands.  Jinja's own numbers cover errors while
it renders; the compiler's are those of the rendered text, and the marks lead back from them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpgemm import env
from cpgemm.errors import CompileError, reject
from cpgemm.headers import digest, find_headers
from cpgemm.render import KernelSource, check_names, new_environment, with_banner
from cpgemm.source_map import Header, Place, SourceMap, excerpt, match_lines

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
    folder = path.parent
    templates = (folder, env.template_dir())
    body = _rendered(new_environment(templates), path, values)
    text = with_banner(body, path.name, name, values)
    marker = _Marker()
    marked = _rendered(marker.install(new_environment(templates)), path, values)
    places = marker.places_of(body.split("\n"), marked)
    banner = [None] * (text.count("\n") - body.count("\n"))
    lines = (*banner, *places)

    def place(includer: str, line: int) -> str:
        found = lines[line - 1] if not includer else (includer, line)
        return f"{path}" if found is None else f"{found[0]}:{found[1]}"

    headers = tuple(
        Header(found, str(file), file.read_bytes())
        for found, file in find_headers(text, (folder, env.header_dir()), place).items()
    )
    return KernelSource(
        name,
        text,
        entry,
        path.name,
        digest(text, {header.name: header.content for header in headers}),
        shared_bytes,
        SourceMap(str(path), lines, marker.files, headers),
        strict,
    )


def _rendered(environment: jinja2.Environment, path: Path, values: Mapping[str, object]) -> str:
    import jinja2

    try:
        return environment.get_template(path.name).render(**values)
    except jinja2.TemplateNotFound as error:
        if not path.is_file():
            reject("path", "must be a template's file", str(path), "Give the path of a file.")
        missing = str(error.name)
        near = difflib.get_close_matches(missing, environment.list_templates(), n=3)
        folders = f"Templates are looked for in {path.parent} and {env.template_dir()}."
        known = f"Did you mean {', '.join(near)}?" if near else folders
        where = _place(error) or (str(path), 0)
        raise _refusal(where, f"no template {missing!r} is there. {known}") from error
    except jinja2.TemplateSyntaxError as error:
        where = (error.filename or str(path), error.lineno)
        raise _refusal(where, error.message or "syntax error") from error
    except UnicodeDecodeError as error:
        reject("path", "must be text in UTF-8", f"{path} ({error})", "Save the file as UTF-8.")
    except jinja2.UndefinedError as error:
        known = ", ".join(sorted(values)) or "(none)"
        message = f"{error.message}; got the names {known}. Pass the value or correct the name."
        raise _refusal(_place(error) or (str(path), 0), message) from error
    except Exception as error:  # A template computes: anything that Python raises is its author's.
        where = _place(error) or (str(path), 0)
        raise _refusal(where, f"{type(error).__name__}: {error}") from error


def _place(error: BaseException) -> Place | None:
    """The innermost template line of a traceback, which Jinja has put in place of its own code."""
    found: Place | None = None
    trace = error.__traceback__
    while trace is not None:
        if "__jinja_exception__" in trace.tb_frame.f_globals:
            found = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    return found


def _refusal(place: Place, message: str) -> CompileError:
    file, line = place
    head = f"template {file}:{line}: {message}" if line else f"template {file}: {message}"
    path = Path(file)
    if not line or not path.is_file():
        return CompileError(head)
    return CompileError(f"{head}\n\n{excerpt(path.read_text('utf-8', 'replace'), line)}")


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
