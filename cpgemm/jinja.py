"""How templates are rendered; what Jinja refuses is said with the template's file and lines."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpgemm.errors import CompileError, MissingDependencyError
from cpgemm.source_map import Place, excerpt

if TYPE_CHECKING:
    import jinja2

__all__ = ["new_environment", "render_text"]


def new_environment(folders: Sequence[Path]) -> jinja2.Environment:
    """How all templates are rendered; they are looked for in ``folders``, in their order.

    An undefined name is an error.  Raises ``MissingDependencyError`` without Jinja.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "jinja2: rendering a kernel needs it; it is not installed. Run: pip install jinja2"
        ) from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in folders]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render_text(
    environment: jinja2.Environment, template: str, values: Mapping[str, object]
) -> str:
    """The template of this name, rendered with ``values`` as its top-level names.

    Raises ``CompileError`` for whatever Jinja refuses and for what a template's own computing
    raises; ``UnicodeDecodeError`` for a file that is not in UTF-8.
    """
    import jinja2

    try:
        return environment.get_template(template).render(**values)
    except UnicodeDecodeError:
        raise
    except jinja2.TemplateNotFound as error:
        missing = str(error.name)
        near = difflib.get_close_matches(missing, environment.list_templates(), n=3)
        loader = environment.loader
        assert isinstance(loader, jinja2.FileSystemLoader), "new_environment's"
        folders = f"Templates are looked for in {' and '.join(map(str, loader.searchpath))}."
        known = f"Did you mean {', '.join(near)}?" if near else folders
        raise _refusal(
            _place(error) or (template, 0), f"{missing!r} is not there. {known}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        where = (error.filename or template, error.lineno)
        raise _refusal(where, error.message or "syntax error") from error
    except jinja2.UndefinedError as error:
        known = ", ".join(sorted(values)) or "(none)"
        message = f"{error.message}; got the names {known}. Pass the value or correct the name."
        raise _refusal(_place(error) or (template, 0), message) from error
    except Exception as error:  # a template computes: whatever Python raises there
        where = _place(error) or (template, 0)
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
    """``place``: line 0 where only the file is known."""
    file, line = place
    head = f"template {file}:{line}: {message}" if line else f"template {file}: {message}"
    path = Path(file)
    if not line or not path.is_file():
        return CompileError(head)
    return CompileError(f"{head}\n\n{excerpt(path.read_text('utf-8', 'replace'), line)}")
