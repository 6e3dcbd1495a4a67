"""nvdisasm: where it is found, and what is said where it is not or does not work."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from cpgemm.disassembler import disassemble, nvdisasm_path
from cpgemm.errors import DeviceError, MissingDependencyError


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No wheel, no toolkit, an empty PATH; the folder stands for ``CUDA_HOME``."""
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", types.ModuleType("cuda.pathfinder"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(folder: Path, text: str) -> Path:
    path = folder / "nvdisasm"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_absent(nowhere: Path) -> None:
    assert nvdisasm_path() is None
    with pytest.raises(MissingDependencyError, match=r'pip install "cpgemm\[inspect\]"'):
        disassemble(nowhere / "kernel.cubin")


def test_in_a_toolkit_and_on_path(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = program(nowhere / "bin", 'echo "code of $2"')
    assert nvdisasm_path() == str(there)
    assert disassemble(nowhere / "kernel.cubin") == f"code of {nowhere / 'kernel.cubin'}\n"
    (nowhere / "other").mkdir()
    first = program(nowhere / "other", "exit 0")
    monkeypatch.setenv("PATH", str(nowhere / "other"))
    assert nvdisasm_path() == str(first), "PATH comes before CUDA_HOME, as for nvcc"


def test_one_that_fails(nowhere: Path) -> None:
    program(nowhere / "bin", "echo 'unknown architecture' >&2; exit 3")
    with pytest.raises(DeviceError, match=r"exit code 3: unknown architecture.*may be older"):
        disassemble(nowhere / "kernel.cubin")


def test_one_that_cannot_be_run(nowhere: Path) -> None:
    path = nowhere / "bin" / "nvdisasm"
    path.write_text("no program")
    with pytest.raises(DeviceError, match="cannot be run"):
        disassemble(nowhere / "kernel.cubin")
