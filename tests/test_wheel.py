"""A wheel built from the tree works elsewhere: templates and headers travel with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_kernels import ROOT

SHIPPED = ("cpgemm", "cuda_src", "templates", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")

CODE = """
import pathlib, sys
import numpy as np
import cpgemm
from cpgemm import env
from cpgemm.kernels import all_sources

target = pathlib.Path(sys.argv[1]).resolve()
for found in (pathlib.Path(cpgemm.__file__), env.template_dir(), env.header_dir()):
    assert target in found.resolve().parents, found
sources = all_sources()
assert sources and all(source.text for source in sources)
rng = np.random.default_rng()
a, b = (rng.standard_normal((rows, 256), dtype=np.float32) for rows in (16, 24))
qa, qb = cpgemm.quantize(a), cpgemm.quantize(b, (128, 128))
got = np.asarray(cpgemm.gemm(qa, qb), dtype=np.float32)
want = qa.dequantize() @ qb.dequantize().T
assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
print("kernels", len(sources))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that the repository gets no build folder."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, check=False, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True)
    return folder


def _run(target: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Outside the repository; PYTHONPATH comes before an editable install of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(target), "CPGEMM_CACHE_DIR": str(target / "c")}
    return subprocess.run(
        [sys.executable, *args],
        check=False,
        cwd=target.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, pattern in (("cuda_src", "*.cuh"), ("templates", "*.j2")):
        files = {f"cpgemm/{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)}
        assert files and files <= names
    modules = {f"cpgemm/{path.name}" for path in (ROOT / "cpgemm").glob("*.py")}
    assert modules | {"cpgemm/py.typed"} <= names
    assert not [name for name in names if not name.startswith(("cpgemm/", "cpgemm-"))]
    assert wheel.name.endswith("-py3-none-any.whl"), "no compiled code, any machine"


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        entry = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        metadata, scripts = archive.read(name).decode(), archive.read(entry).decode()
    assert "cpgemm = cpgemm.__main__:main" in scripts
    assert "Requires-Python: >=3.10" in metadata and "License: MIT" in metadata
    core = [
        line.split(": ")[1].partition(">")[0].replace("-", "_")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert sorted(core) == ["jinja2", "ml_dtypes", "numpy"]
    for extra in ("cuda12", "cuda13", "cli", "test"):
        assert f"Provides-Extra: {extra}" in metadata


def test_it_works_outside_the_repository(target: Path) -> None:
    done = _run(target, "-c", CODE, str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("kernels ")


def test_its_command_line_works(target: Path) -> None:
    done = _run(target, "-m", "cpgemm", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(target) in done.stdout
    done = _run(target, "-m", "cpgemm", "render", "--list")
    assert done.returncode == 0 and done.stdout.strip()
