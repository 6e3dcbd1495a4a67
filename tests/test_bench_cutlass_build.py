"""CUTLASS's libraries: what they are named after, and compilers that work, fail or are absent."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from cpgemm.bench import cutlass_build
from cpgemm.bench.contenders import Absent
from cpgemm.bench.cutlass_build import VARIANTS, Builder, header_folder, library_path

NVCC = """#!{python}
import pathlib, sys, time
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if "--version" in sys.argv:
    print("Cuda compilation tools, release 13.9, V13.9.99")
    sys.exit()
{body}
"""
WORKS = 'pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"library")'
FAILS = 'print("dense.cu(7): error: no instance of anything"); sys.exit(2)'
HANGS = "time.sleep(600)"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUTLASS's headers where the wheel has them, and an empty cache."""
    package = tmp_path / "site" / "cutlass_library"
    headers = package / "source" / "include" / "cutlass"
    headers.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it is never imported')")
    (headers / "cutlass.h").touch()
    (headers / "version.h").write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "cache"))
    return headers.parent


def use_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """An nvcc that does ``body``; the file with a line for each of its runs."""
    log = tmp_path / "runs.txt"
    log.touch()
    nvcc = tmp_path / f"nvcc{time.time_ns()}"
    nvcc.write_text(NVCC.format(python=sys.executable, log=str(log), body=body))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CPGEMM_NVCC", str(nvcc))
    return log


def compilations(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "--version" not in line]


def test_names_and_digests() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert len({variant.digest for variant in VARIANTS}) == len(VARIANTS)
    one = VARIANTS[0]
    assert one.digest == dataclasses.replace(one).digest
    assert one.digest != dataclasses.replace(one, cluster=(4, 1)).digest
    assert "-DCPGEMM_STREAM_K=0" in one.macros
    assert {variant.source for variant in VARIANTS} == {"dense", "grouped"}
    for variant in VARIANTS:
        text = variant.path.read_text()
        for macro in variant.macros:  # none is mistyped: an unknown one would do nothing
            assert macro.removeprefix("-D").partition("=")[0] in text


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = VARIANTS[0].digest
    changed = tmp_path / "dense.cu"
    changed.write_text(VARIANTS[0].path.read_text() + "// changed\n")
    monkeypatch.setattr(cutlass_build, "_SOURCES", tmp_path)
    assert VARIANTS[0].digest != before


def test_headers_of_the_wheel(wheel: Path) -> None:
    assert header_folder() == wheel
    assert cutlass_build.cutlass_version(wheel) == "4.2.1"


def test_built_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_nvcc(tmp_path, monkeypatch, WORKS)
    chosen = VARIANTS[:3]
    with Builder(chosen) as builder:
        paths = [builder.library(variant) for variant in chosen]
        assert not builder.busy
    assert paths == [library_path(variant, "4.2.1", "13.9.99") for variant in chosen]
    assert all(path.read_bytes() == b"library" for path in paths)
    commands = compilations(log)
    assert len(commands) == 3 and all(f"-I{wheel}" in command for command in commands)
    assert any("-DCPGEMM_STREAM_K=1" in command for command in commands)
    with Builder(chosen) as builder:
        assert not builder.busy
        assert [builder.library(variant) for variant in chosen] == paths
    assert len(compilations(log)) == 3
    assert not list(paths[0].parent.glob(".build-*"))


def test_a_library_needs_no_compiler_later(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvcc(tmp_path, monkeypatch, WORKS)
    with Builder(VARIANTS[:1]) as builder:
        path = builder.library(VARIANTS[0])
    monkeypatch.setattr(cutlass_build, "header_folder", lambda: None)
    with Builder(VARIANTS[:2]) as builder:
        assert builder.library(VARIANTS[0]) == path
        with pytest.raises(Absent, match=r'pip install "cpgemm\[cutlass\]"'):
            builder.library(VARIANTS[1])


def test_no_nvcc(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass_build.env, "nvcc_path", lambda: None)
    with Builder(VARIANTS[:1]) as builder, pytest.raises(Absent, match="needs nvcc"):
        builder.library(VARIANTS[0])


def test_nvcc_that_does_not_run(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPGEMM_NVCC", str(tmp_path / "none"))
    with Builder(VARIANTS[:1]) as builder, pytest.raises(Absent, match="cannot be compiled"):
        builder.library(VARIANTS[0])


def test_a_failure_is_told_with_its_first_error(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvcc(tmp_path, monkeypatch, FAILS)
    with Builder(VARIANTS[:1]) as builder, pytest.raises(Absent) as error:
        builder.library(VARIANTS[0])
    assert "dense.cu(7): error: no instance of anything" in str(error.value)
    log = Path(str(error.value).rpartition("(")[2].rstrip(")"))
    assert "no instance" in log.read_text()
    assert not list(log.parent.glob("*.so")) and not list(log.parent.glob(".build-*"))


def test_leaving_ends_compilers(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_nvcc(tmp_path, monkeypatch, HANGS)
    start = time.monotonic()
    with Builder(VARIANTS) as builder:
        assert builder.busy
        while not compilations(log) and time.monotonic() < start + 30:
            time.sleep(0.02)
    assert compilations(log) and time.monotonic() < start + 60
    assert len(compilations(log)) <= (os.cpu_count() or 1), "no more at once than there are CPUs"
    assert not builder.busy
    assert not list((tmp_path / "cache" / "cutlass").glob("*.so"))


def test_what_was_not_asked_for() -> None:
    with Builder([]) as builder, pytest.raises(Absent, match="not asked for"):
        builder.library(VARIANTS[0])
