"""Files that several processes read and write at once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cpgemm.errors import MissingDependencyError

__all__ = ["locked", "write_atomically"]


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock file ``path``, which is made where it is missing, its folder too.

    A new lock object each time: threads exclude each other too.  Raises ``TimeoutError`` when
    another one holds it for more than ``seconds``, ``OSError`` where nothing can be written,
    ``MissingDependencyError`` without filelock.
    """
    try:
        import filelock
    except ImportError as error:
        raise MissingDependencyError(
            "filelock: writing into the shared cache needs it; it is not installed. "
            'Run: pip install "cpgemm[cuda12]" (or cuda13).'
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(path), timeout=seconds):
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: readers find the old file or the new one, whole."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from other users
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
