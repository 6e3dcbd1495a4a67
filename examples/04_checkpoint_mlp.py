"""A feed-forward layer from a checkpoint, run by NumPy, CuPy, torch and JAX on the same memory.

    python examples/04_checkpoint_mlp.py [--tokens 48] [--folder FOLDER]

Writes a small checkpoint as DeepSeek-V3 stores its own (two safetensors files and their index; FP8
weights with a scale for 128 x 128 values), loads the layer, and computes, in each library:

    h = x @ [gate; up].T        FP8 product of quantised activations and stored weights
    s = silu(gate) * up         quantised again on the way
    y = s @ down.T              FP8 product

The table shows at which addresses each library sees its operands.  On a GPU these must be the same
for all; on a CPU JAX copies what does not start at a multiple of 64 bytes.  Results on one device
must be equal bit for bit; the error is that against float64 on the weights before quantisation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cpgemm
from cpgemm import checkpoint, dlpack, moe
from cpgemm.layout import pointer
from cpgemm.machine import why_no_hopper

LAYER = "model.layers.0.mlp"
LIBRARIES = ("numpy", "cupy", "torch", "jax")
# Rounding to e4m3 costs 0.026 in the 2-norm; 02_moe_layer.py adds up where it happens: 0.068.
TOLERANCE = 0.08


@dataclass(frozen=True)
class Memory:
    """What lies on one device: activations, and the weights as they were loaded."""

    device: str
    x: Any
    up: cpgemm.ScaledTensor
    down: cpgemm.ScaledTensor


@dataclass(frozen=True)
class Run:
    """One library's result, and where it saw x and the codes of both weights."""

    y: Any
    addresses: tuple[int, int, int]


def write_checkpoint(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Two weights in each file, and an index, as large checkpoints have it."""
    quantized = {name: cpgemm.quantize(w, (128, 128)) for name, w in weights.items()}
    names = list(quantized)
    shards = [names[start : start + 2] for start in range(0, len(names), 2)]
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        checkpoint.save_safetensors({name: quantized[name] for name in shard}, folder / file)
        weight_map |= {f"{name}.weight{end}": file for name in shard for end in ("", "_scale_inv")}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def load(folder: Path, x: np.ndarray, device: str) -> Memory:
    """The layer on a device, and the activations beside it."""
    if device != "cpu":
        import cupy

        x = cupy.asarray(x)
    return Memory(
        device=device,
        x=x,
        # Two layers of the file, whose rows one product computes: gate first, as SwiGLU wants it.
        up=checkpoint.load_safetensors(
            folder, LAYER, parts=("gate_proj", "up_proj"), device=device
        ),
        down=checkpoint.load_safetensors(folder, f"{LAYER}.down_proj", device=device),
    )


def mlp(x: Any, up: cpgemm.ScaledTensor, down: cpgemm.ScaledTensor) -> Any:
    """bfloat16 (tokens, hidden), an array of the library that ``x`` is of."""
    h = cpgemm.gemm(cpgemm.quantize(x), up)
    return cpgemm.gemm(moe.swiglu_quantize(h), down)


def run(library: str, memory: Memory) -> Run:
    """The layer on arrays of a library, which share the given memory."""
    x = dlpack.as_framework(library, memory.x)
    up, down = (seen_by(library, w) for w in (memory.up, memory.down))
    arrays = (x, up.data, down.data)
    addresses = tuple(pointer(dlpack.as_native("array", array)) for array in arrays)
    return Run(mlp(x, up, down), addresses)


def seen_by(library: str, w: cpgemm.ScaledTensor) -> cpgemm.ScaledTensor:
    """The weights made of a library's own arrays, as if it had loaded them."""
    if library not in ("torch", "jax"):
        return w
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so of the mapped file; nobody writes to it here.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        codes, scales = w.to_torch() if library == "torch" else w.to_jax()
    return cpgemm.ScaledTensor.from_arrays(codes, scales, w.granularity)


def devices(has_hopper: bool) -> Iterator[tuple[str, str]]:
    """Each library that is installed and the device that it can run on here."""
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            print(f"{library}: not installed")
        elif library == "numpy":
            yield library, "cpu"
        elif has_hopper and sees_gpu(library):
            yield library, "cuda"
        elif library != "cupy":
            yield library, "cpu"


def sees_gpu(library: str) -> bool:
    """Whether a library was built for this machine's GPU."""
    if library == "torch":
        import torch

        return bool(torch.cuda.is_available())
    if library == "jax":
        import jax

        try:
            return bool(jax.devices("cuda"))
        except RuntimeError:
            return False
    return True


def host_bits(y: Any) -> np.ndarray:
    """The bits of a bfloat16 array of any library."""
    bits = dlpack.as_native("y", y).view(np.uint16)
    return np.asarray(bits.get() if hasattr(bits, "get") else bits)


def float_mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The layer in float64 on plain arrays."""
    x, gate, up, down = (array.astype(np.float64) for array in (x, gate, up, down))
    g = x @ gate.T
    return g / (1 + np.exp(-g)) * (x @ up.T) @ down.T


def report(folder: Path, tokens: int, hidden: int, inner: int) -> bool:
    """Write, load, run, print; whether all is as it must be."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, hidden), np.float32)
    shapes = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    weights = {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
        for name, shape in shapes.items()
    }
    write_checkpoint(folder, {f"{LAYER}.{name}": w for name, w in weights.items()})
    files = sorted(folder.glob("*.safetensors"))
    print(f"checkpoint: {len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")

    refusal = why_no_hopper()
    if refusal is not None:
        print(f"no Hopper GPU ({refusal}): everything runs on the CPU")
    wanted = float_mlp(x, *weights.values())
    memories: dict[str, Memory] = {}
    first: dict[str, Run] = {}
    fine = True
    chosen = list(devices(refusal is None))
    print(f"{'library':8}{'device':8}{'x':>16}{'gate and up':>16}{'down':>16}  result")
    for library, device in chosen:
        if device not in memories:
            memories[device] = load(folder, x, device)
        done = run(library, memories[device])
        reference = first.setdefault(device, done)
        bits = host_bits(done.y)
        got = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        error = np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-300)
        equal = np.array_equal(bits, host_bits(reference.y))
        kind = dlpack.framework_of(done.y)
        fine = fine and equal and error <= TOLERANCE and kind == library
        shared = done.addresses == reference.addresses
        fine = fine and (shared or device == "cpu")
        notes = [f"error {error:.4f}"]
        if done is not reference:
            notes.append("equal bits" if equal else "OTHER BITS")
        if not shared:
            notes.append("copied where addresses differ")
        seen = "".join(f"{address:#16x}" for address in done.addresses)
        print(f"{library:8}{device:8}{seen}  {kind}, {', '.join(notes)}")
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when results agree between libraries and with float64, 2 without safetensors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=1536, help="a multiple of 128")
    parser.add_argument("--folder", type=Path, help="where to leave the checkpoint")
    chosen = parser.parse_args(arguments)
    # JAX would take most of the GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sizes = (chosen.tokens, chosen.hidden, chosen.inner)
    try:
        if chosen.folder is not None:
            chosen.folder.mkdir(parents=True, exist_ok=True)
            return 0 if report(chosen.folder, *sizes) else 1
        with tempfile.TemporaryDirectory() as folder:
            return 0 if report(Path(folder), *sizes) else 1
    except cpgemm.MissingDependencyError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
