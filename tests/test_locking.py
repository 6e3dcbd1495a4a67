"""Locks and files that are replaced whole."""

from __future__ import annotations

import stat
import sys
import threading
from pathlib import Path

import pytest

from cpgemm.errors import MissingDependencyError
from cpgemm.locking import locked, write_atomically


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    inside: list[int] = []

    def work() -> None:
        for _ in range(20):
            with locked(path, 30.0):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not inside


def test_waiting_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, 1.0), pytest.raises(TimeoutError), locked(path, 0.05):
        pass
    with locked(path, 0.05):
        pass


def test_without_filelock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with (
        pytest.raises(MissingDependencyError, match=r"filelock: .*cpgemm\[cuda12\]"),
        locked(tmp_path / "lock", 1.0),
    ):
        pass


def test_a_file_is_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")  # fails half-way
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["file.json"]
