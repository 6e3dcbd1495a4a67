"""From a Jinja template and plain values to the source of one CUDA kernel.

A template is a page of decisions over the headers in ``cuda_src``.  Values go in as numbers, names
and frozen dataclasses, never as fragments of C++.  An undefined name is an error: silence would
turn a typing mistake into ``constexpr int kStages = ;`` or, worse, into something that compiles.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cpgemm import env
from cpgemm.errors import CompileError, MissingDependencyError, reject

if TYPE_CHECKING:
    import jinja2

__all__ = ["KernelSource", "headers_of", "render"]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)
_FILE_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class KernelSource:
    """One rendered kernel, ready to be compiled.

    - ``name``: readable and file-name safe; the cache folder is named after it
    - ``text``: the CUDA C++ text, banner included
    - ``entry``: the ``extern "C"`` symbol
    - ``template``: the template's file name
    - ``digest``: sha256 (hex) of the text and of every header that it really includes
    - ``shared_bytes``: dynamic shared memory of a launch, in bytes
    """

    name: str
    text: str
    entry: str
    template: str
    digest: str
    shared_bytes: int = 0


def render(
    template: str,
    *,
    name: str,
    entry: str,
    values: Mapping[str, object],
    shared_bytes: int = 0,
) -> KernelSource:
    """Render ``template`` (a file of ``env.template_dir()``) into a ``KernelSource``.

    ``values`` are the top-level names that the template sees: ``{"config": config}`` makes
    ``{{ config.block_m }}`` work.  ``shared_bytes`` is carried along for the launch and the report.

    Raises ``CompileError`` for a template that is missing, malformed or that uses an undefined
    name, and for a header that is missing; ``ArgumentError`` for a name that is no file name or an
    entry that is no C identifier.
    """
    if not _FILE_SAFE.fullmatch(name):
        reject("name", "letters, digits, _ . - only, 120 at most", repr(name), "Shorten or clean.")
    if not _IDENTIFIER.fullmatch(entry):
        reject("entry", "must be a C identifier", repr(entry), "Use letters, digits and _.")
    if shared_bytes < 0:
        reject("shared_bytes", "must not be negative", shared_bytes, "Use 0 for none.")
    body = _render_text(template, values)
    text = "\n".join(_banner(template, name, values)) + "\n\n" + body
    return KernelSource(name, text, entry, template, _digest(text), shared_bytes)


def headers_of(text: str) -> tuple[str, ...]:
    """Names of the headers in ``env.header_dir()`` that ``text`` includes, directly or not.

    In the order of their first inclusion.  Includes behind ``#if`` count as included: a key that
    covers one header too many is safe, one too few is not.  ``<...>`` names that the folder lacks
    belong to the compiler and are left out.  Raises ``CompileError`` for a missing ``"..."`` name.
    """
    root = env.header_dir()
    found: dict[str, None] = {}

    def visit(source: str, includer: str) -> None:
        folder = PurePosixPath(includer).parent
        for quoted, angled in _INCLUDE.findall(source):
            header = _resolve(root, folder, quoted or angled)
            if header is None:
                if angled:
                    continue
                raise CompileError(_missing_header(root, quoted, includer))
            if header not in found:
                found[header] = None
                visit((root / header).read_text(encoding="utf-8"), header)

    visit(text, "")
    return tuple(found)


def _resolve(root: Path, folder: PurePosixPath, include: str) -> str | None:
    """The name relative to ``root``: beside the includer first, as the compiler looks it up."""
    for candidate in (folder / include, PurePosixPath(include)):
        parts: list[str] = []
        for part in candidate.parts:
            if part == ".." and parts:
                parts.pop()
            elif part not in (".", ""):
                parts.append(part)
        relative = PurePosixPath(*parts)
        if not relative.is_absolute() and ".." not in parts and (root / relative).is_file():
            return str(relative)
    return None


def _missing_header(root: Path, header: str, includer: str) -> str:
    where = f"the header {includer!r}" if includer else "the kernel"
    known = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.cuh"))
    near = difflib.get_close_matches(header, known, n=3)
    mend = f"Did you mean {', '.join(near)}?" if near else f"Headers live in {root}."
    return f"{where} includes {header!r}, which is not among cpgemm's headers. {mend}"


def _digest(text: str) -> str:
    root = env.header_dir()
    digest = hashlib.sha256(text.encode())
    for header in sorted(headers_of(text)):
        content = (root / header).read_bytes()
        # Lengths keep two different splits of the same bytes apart.
        digest.update(f"\0{header}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _banner(template: str, name: str, values: Mapping[str, object]) -> Iterator[str]:
    yield f"// {name}"
    yield f"// Rendered by cpgemm from templates/{template}; edit the template, not this file."
    for key in sorted(values):
        for label, value in _flatten(key, values[key]):
            if value is None:
                continue  # what a kernel has not
            # A newline or a trailing backslash would let a value escape from its comment.
            shown = " ".join(str(value).split()).rstrip("\\")
            yield f"//   {label} = {shown}"


def _flatten(label: str, value: object) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _flatten(f"{label}.{field.name}", getattr(value, field.name))
    elif isinstance(value, (str, int, float, bool, tuple, list)) or value is None:
        yield label, value
    else:
        # The default repr of an object holds its address, which would change the digest each run.
        yield label, type(value).__name__


@functools.lru_cache(maxsize=4)
def _environment(folder: str) -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "jinja2: rendering a kernel needs it; it is not installed. Run: pip install jinja2"
        ) from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _render_text(template: str, values: Mapping[str, object]) -> str:
    folder = env.template_dir()
    environment = _environment(str(folder))
    import jinja2

    try:
        return environment.get_template(template).render(**values)
    except jinja2.TemplateNotFound as error:
        near = difflib.get_close_matches(template, environment.list_templates(), n=3)
        mend = f"Did you mean {', '.join(near)}?" if near else f"Templates live in {folder}."
        raise CompileError(f"template {error.name!r} is not there. {mend}") from error
    except jinja2.TemplateSyntaxError as error:
        where = f"{error.name or template}:{error.lineno}"
        raise CompileError(f"template {where}: {error.message}") from error
    except jinja2.UndefinedError as error:
        where = _template_line(error, template)
        raise CompileError(
            f"template {where}: {error.message}; got the names "
            f"{', '.join(sorted(values)) or '(none)'}. Pass the value or correct the name."
        ) from error


def _template_line(error: Exception, template: str) -> str:
    """``name:line`` of the innermost template frame: Jinja maps tracebacks to templates."""
    where = template
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if filename.endswith(".j2"):
            where = f"{Path(filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where
