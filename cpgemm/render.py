"""From a Jinja template and plain values to the source of one CUDA kernel.

A template is a page of decisions over the headers in ``cuda_src``.  Values go in as numbers, names
and frozen dataclasses, never as fragments of C++.  An undefined name is an error: silence would
turn a typing mistake into ``constexpr int kStages = ;`` or, worse, into something that compiles.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpgemm import env
from cpgemm.errors import reject
from cpgemm.headers import digest, find_headers
from cpgemm.jinja import new_environment, render_text
from cpgemm.source_map import SourceMap

if TYPE_CHECKING:
    import jinja2

__all__ = [
    "KernelSource",
    "check_names",
    "find_source",
    "render",
    "with_banner",
]

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
    - ``origin``: of a user's template: where its lines come from, and its headers; None for the
      package's own kernels
    - ``strict``: whether a build that spills, or is slow in another such way, is refused;
      otherwise it warns
    """

    name: str
    text: str
    entry: str
    template: str
    digest: str
    shared_bytes: int = 0
    origin: SourceMap | None = dataclasses.field(default=None, compare=False, repr=False)
    strict: bool = True


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

    Raises ``CompileError`` with the template's line for a template that is missing, malformed or
    that uses an undefined name, and for a header that is missing; ``ArgumentError`` for a name that
    is no file name or an entry that is no C identifier.
    """
    check_names(name, entry, shared_bytes)
    body = render_text(_environment(env.template_dir()), template, values)
    text = with_banner(body, f"templates/{template}", name, values)
    headers = find_headers(text, (env.header_dir(),))
    return KernelSource(name, text, entry, template, digest(text, headers), shared_bytes)


def check_names(name: str, entry: str, shared_bytes: int) -> None:
    """The rules of ``render`` for what is not a value of the template."""
    if not _FILE_SAFE.fullmatch(name):
        reject("name", "letters, digits, _ . - only, 120 at most", repr(name), "Shorten or clean.")
    if not _IDENTIFIER.fullmatch(entry):
        reject("entry", "must be a C identifier", repr(entry), "Use letters, digits and _.")
    if shared_bytes < 0:
        reject("shared_bytes", "must not be negative", shared_bytes, "Use 0 for none.")


def with_banner(body: str, template: str, name: str, values: Mapping[str, object]) -> str:
    """A rendered text behind the comment that says what it was rendered from."""
    return "\n".join(_banner(template, name, values)) + "\n\n" + body


def _banner(template: str, name: str, values: Mapping[str, object]) -> Iterator[str]:
    yield f"// {name}"
    yield f"// Rendered by cpgemm from {template}; edit the template, not this file."
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
def _environment(folder: Path) -> jinja2.Environment:
    return new_environment((folder,))


def find_source(name: str, sources: Sequence[KernelSource], *, argument: str) -> KernelSource:
    """The kernel called ``name``; ``ArgumentError``, which calls it by ``argument``, for none."""
    for source in sources:
        if source.name == name:
            return source
    names = [source.name for source in sources]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    mend = f"Did you mean {', '.join(near)}?" if near else "Names: python -m cpgemm render --list."
    reject(argument, f"must be one of the {len(names)} kernels", repr(name), mend)
