"""examples/04_checkpoint_mlp.py with every library, and docs/checkpoints.md."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from example_modules import load_example
from tiny_kernels import ROOT

from cpgemm import checkpoint, dlpack, machine

EXAMPLE = ROOT / "examples" / "04_checkpoint_mlp.py"
SMALL = ["--tokens=5", "--hidden=256", "--inner=128"]
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    module = load_example(EXAMPLE.name)
    # As the script itself does it: the other tests need some of the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return module


@needs_safetensors
def test_main_compares_what_is_installed(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(SMALL) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(\w+) +(cpu|cuda) .* error (0\.\d+)(.*)$", out, re.MULTILINE)
    on_gpu = machine.why_no_hopper() is None
    installed = [name for name in example.LIBRARIES if importlib.util.find_spec(name) is not None]
    assert [row[0] for row in rows] == [name for name in installed if name != "cupy" or on_gpu]
    assert all(0.02 < float(row[2]) <= example.TOLERANCE for row in rows)
    seen = set()
    for _, device, _, notes in rows:
        assert ("equal bits" in notes) == (device in seen)
        seen.add(device)
    assert ("no Hopper GPU" in out) == (not on_gpu)
    for name in set(example.LIBRARIES) - set(installed):
        assert f"{name}: not installed" in out


@needs_safetensors
def test_libraries_that_are_not_installed(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("cupy", "torch", "jax") else find(name, *rest),
    )
    assert example.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("cupy", "torch", "jax"):
        assert lines.count(f"{name}: not installed") == 1
    assert len([line for line in lines if "error 0." in line]) == 1


def test_without_safetensors(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert example.main(SMALL) == 2
    assert "pip install safetensors" in capsys.readouterr().err


@needs_safetensors
def test_the_script_runs_anywhere(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALL, "--folder", "made"],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    layer = "model.layers.0.mlp"
    assert index["weight_map"] == {
        f"{layer}.{name}_proj.weight{end}": f"model-0000{shard}-of-00002.safetensors"
        for name, shard in (("gate", 1), ("up", 1), ("down", 2))
        for end in ("", "_scale_inv")
    }
    assert checkpoint.load_safetensors(tmp_path / "made", f"{layer}.down_proj").shape == (256, 128)


@needs_safetensors
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_results_are_of_the_library_and_equal(
    library: str, example: ModuleType, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip(library)
    x, memory = small_memory(example, tmp_path, rng, "cpu")
    wanted = example.mlp(x, memory.up, memory.down)
    done = example.run(library, memory)
    assert isinstance(wanted, np.ndarray) and wanted.dtype == ml_dtypes.bfloat16
    assert dlpack.framework_of(done.y) == library and tuple(done.y.shape) == wanted.shape
    np.testing.assert_array_equal(example.host_bits(done.y), wanted.view(np.uint16))
    # The mapped file itself is what torch sees.
    if library == "torch":
        assert done.addresses[2] == memory.down.data.ctypes.data


@needs_safetensors
@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gpu_memory_is_shared(
    library: str, example: ModuleType, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip(library)
    if not example.sees_gpu(library):
        pytest.skip(f"this {library} was built for the CPU")
    _, memory = small_memory(example, tmp_path, rng, "cuda")
    wanted, done = example.run("cupy", memory), example.run(library, memory)
    assert done.addresses == wanted.addresses
    assert dlpack.framework_of(done.y) == library
    np.testing.assert_array_equal(example.host_bits(done.y), example.host_bits(wanted.y))


def small_memory(
    example: ModuleType, folder: Path, rng: np.random.Generator, device: str
) -> tuple[np.ndarray, Any]:
    x = rng.standard_normal((5, 256), np.float32)
    shapes = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    weights = {
        f"{example.LAYER}.{name}": rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    example.write_checkpoint(folder, weights)
    return x, example.load(folder, x, device)


def test_other_bits_are_a_failure(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    plain = example.run

    def run(library: str, memory: Any) -> Any:
        done = plain("numpy", memory)
        if library == "other":
            done.y.view(np.uint16)[0, 0] ^= 1
        return done

    monkeypatch.setattr(example, "run", run)
    monkeypatch.setattr(example, "devices", lambda has: [("numpy", "cpu"), ("other", "cpu")])
    assert example.main(SMALL) == 1
    assert "OTHER BITS" in capsys.readouterr().out


def test_float_layer(example: ModuleType) -> None:
    """One token, one value: silu(2 * 3) * (2 * 5) * 7."""
    arrays = [np.array([[value]], np.float32) for value in (2, 3, 5, 7)]
    wanted = 6 / (1 + np.exp(-6.0)) * 10 * 7
    np.testing.assert_allclose(example.float_mlp(*arrays), [[wanted]], rtol=1e-14)
