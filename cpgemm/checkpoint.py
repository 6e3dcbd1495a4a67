"""Block-scaled FP8 layers in safetensors files, as DeepSeek-V3 and R1 checkpoints store them.

===========================  =======  ==========================================================
tensor in the file           dtype    shape and meaning
===========================  =======  ==========================================================
``<name>.weight``            F8_E4M3  (N, K): codes, row-major
``<name>.weight_scale_inv``  F32      (ceil(N/128), ceil(K/128)): what the codes of a 128 x 128
                                      block are multiplied by to get real values
===========================  =======  ==========================================================

Despite its name, ``weight_scale_inv`` is what ``ScaledTensor`` calls ``scales``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpgemm.checkpoint_files import DTYPES, SCALE, WEIGHT, Checkpoint, Paths, library
from cpgemm.checkpoint_layers import (
    GRANULARITY,
    assembled,
    check_alike,
    copy_to,
    device_ordinal,
    layer_of,
    on_device,
    sliced,
)
from cpgemm.dlpack import as_native
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import FP8, Array, ScaleFormat, is_cupy
from cpgemm.scaled import ScaledTensor, check_scale_format

__all__ = ["load_array", "load_safetensors", "save_safetensors"]


def load_safetensors(
    path: Paths,
    name: str | Sequence[str],
    *,
    parts: Sequence[str] = (),
    rows: slice | None = None,
    columns: slice | None = None,
    device: str = "cpu",
    scale_format: ScaleFormat = "float32",
) -> ScaledTensor:
    """A layer, or a stack of layers, as a ``ScaledTensor`` of granularity (128, 128).

    ``path``: a file; a folder with ``model.safetensors.index.json``, or else all ``*.safetensors``
    in it; such an index; or a sequence of files.  ``name``: the layer, with or without ``.weight``.
    A sequence of names gives the stack of these layers, (groups, N, K), in the order of the names:
    the experts of a grouped product.

    ``parts``: names below ``name`` whose rows follow one another in the result, for example
    ("gate_proj", "up_proj"); all but the last must have a multiple of 128 rows.  ``rows`` and
    ``columns``: slices of each layer (of each part), for tensor parallelism; they begin at a
    multiple of 128 and end at one or at the layer's end.

    ``device``: "cpu" gives NumPy arrays.  For one layer they are read-only views of the mapped
    file: nothing is read before it is used and nothing is copied, except scales that are not
    contiguous, aligned float32.  Stacks and parts are copied, into writable arrays.  "cuda" (CuPy's
    current device) and "cuda:<ordinal>" give CuPy arrays: codes are copied once, from the mapped
    file to their place on the GPU, and the call returns when they are there.

    A mapped file must not be changed in place while arrays of it live; deleting it or replacing it,
    as ``save_safetensors`` does, is fine.  Scales in BF16, F16 or F8_E8M0 are widened to float32.
    ``scale_format`` is taken over unchecked; "float32" is right for any scales.

    Raises ``ArgumentError`` or ``ArgumentTypeError`` for what is missing, damaged or of another
    format, ``MissingDependencyError`` without safetensors or CuPy, ``DeviceError`` for a GPU that
    is not there.
    """
    check_scale_format(scale_format)
    ordinal = device_ordinal(device)
    names = _names("name", [name] if isinstance(name, str) else name)
    below = _names("parts", parts) if parts else ()
    wanted = [[f"{one}.{part}" for part in below] or [one] for one in names]
    checkpoint = Checkpoint(path)
    groups = [
        [sliced(full, layer_of(checkpoint, full), rows, columns) for full in group]
        for group in wanted
    ]
    codes, scales = groups[0][0]
    stacked = not isinstance(name, str)
    if stacked or below or ordinal is not None:
        if codes.ndim == 3 and not (stacked or below):  # stored as a stack
            groups, stacked = [[layer] for layer in zip(codes, scales, strict=True)], True
        else:
            check_alike(wanted, groups)
        with on_device(ordinal):
            codes, scales = assembled(groups, on_gpu=ordinal is not None)
        if not stacked:
            codes, scales = codes[0], scales[0]
    if scales.dtype != np.float32:
        scales = scales.astype(np.float32)
    return ScaledTensor.from_arrays(codes.view(FP8), scales, GRANULARITY, scale_format=scale_format)


def load_array(path: Paths, name: str, *, device: str = "cpu") -> Array:
    """A tensor as it is stored: a norm, a bias, a layer that is not quantised.

    ``path``, ``name`` and ``device`` as for ``load_safetensors``.  Returns a NumPy array, a
    read-only view of the mapped file, or a CuPy array, of the stored shape and dtype (that of
    ml_dtypes for FP8 and bfloat16).

    Raises what ``load_safetensors`` raises.
    """
    ordinal = device_ordinal(device)
    full, file = Checkpoint(path).resolve(*_names("name", [name]))
    array = file.array(full)
    if ordinal is None:
        return array
    with on_device(ordinal):
        import cupy

        target = cupy.empty(array.nbytes, np.uint8)
        copy_to(target.reshape(1, -1), array.reshape(-1).view(np.uint8).reshape(1, -1))
        cupy.cuda.get_current_stream().synchronize()
        return target.view(array.dtype).reshape(array.shape)


def save_safetensors(
    tensors: Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into one safetensors file, ``path``, as DeepSeek-V3's checkpoints hold them.

    ``tensors``: by name.  A ``ScaledTensor`` of granularity (128, 128) becomes ``<name>.weight``
    (``name`` may end with ``.weight``) and ``<name>.weight_scale_inv``, bit for bit.  An array of
    NumPy, CuPy, torch, JAX or another DLPack producer is stored as it is under its own name.
    ``metadata``: strings by name for the header; when left out it is {"format": "pt"}, which
    transformers asks for.

    The file appears whole or not at all, and may replace one that is mapped.  Tensors on a GPU are
    first copied to the host, all of them.

    Raises ``ArgumentError`` or ``ArgumentTypeError`` before anything is written,
    ``MissingDependencyError`` without safetensors, and ``OSError`` or the library's
    ``SafetensorError`` when the disk refuses.
    """
    package = library()
    if not isinstance(tensors, Mapping):
        reject(
            "tensors",
            "must be a mapping from names to tensors",
            type(tensors).__qualname__,
            'Give {"model.layers.0.mlp.down_proj": w}.',
            kind=ArgumentTypeError,
        )
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        for full, array in _stored(name, tensor):
            if full in arrays:
                reject("tensors", "names must differ", f"{full!r} twice", "Rename one of them.")
            arrays[full] = array
    header = _metadata(metadata)
    target = _target(path)
    # In the same folder, because a rename is atomic on one file system only.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    host = {name: _on_host(array) for name, array in arrays.items()}
    try:
        # Some versions of the library make files that nobody else may read.
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        package.numpy.save_file(host, str(temporary), metadata=header)
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


# ---------------------------------------------------------------------------------------- helpers


def _names(argument: str, names: object) -> tuple[str, ...]:
    given = tuple(names) if isinstance(names, (list, tuple)) else ()
    if not given or not all(isinstance(one, str) for one in given):
        one = "a string or " if argument == "name" else ""
        reject(
            argument,
            f"must be {one}a list of strings with at least one",
            repr(names),
            "Give names as the checkpoint's index has them.",
            kind=ArgumentTypeError,
        )
    return given


def _stored(name: object, tensor: object) -> Iterator[tuple[str, Array]]:
    """Names and arrays that a tensor is stored as."""
    if not isinstance(name, str) or name == "__metadata__":
        reject(
            "tensors",
            "names must be strings, and not '__metadata__'",
            repr(name),
            "Rename it.",
            kind=ArgumentTypeError,
        )
    if isinstance(tensor, ScaledTensor):
        if tensor.granularity != GRANULARITY:
            reject(
                "tensors",
                "a ScaledTensor must have granularity (128, 128)",
                f"{name} with {tensor.granularity}",
                "Quantise weights with cpgemm.quantize(w, (128, 128)).",
            )
        full = name.removesuffix(WEIGHT) + WEIGHT
        yield full, tensor.data
        yield full + SCALE, tensor.scales
        return
    argument = f"tensors[{name!r}]"
    array = as_native(argument, tensor)
    if array.dtype not in DTYPES.values():
        reject(
            argument,
            f"must have one of the dtypes {', '.join(map(str, DTYPES.values()))}",
            array.dtype,
            "Convert it.",
            kind=ArgumentTypeError,
        )
    yield name, array


def _metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {"format": "pt"}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for pair in metadata.items() for text in pair
    ):
        reject(
            "metadata",
            "must be a mapping from strings to strings",
            repr(metadata),
            "Convert what it holds with str or json.dumps.",
            kind=ArgumentTypeError,
        )
    return dict(metadata)


def _target(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        reject(
            "path",
            "must be the name of a file",
            repr(path),
            "Tensors come first, then the path.",
            kind=ArgumentTypeError,
        )
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        reject(
            "path", "must be a file in a folder that exists", repr(str(path)), "Make the folder."
        )
    return target


def _on_host(array: Array) -> Array:
    """A C-contiguous NumPy array; the library writes memory as it lies."""
    if is_cupy(array):
        with array.device:
            # Whoever made it, on whatever stream, is done then.
            sys.modules["cupy"].cuda.runtime.deviceSynchronize()
            # As integers, because CuPy does not copy every dtype.
            array = array.view(np.dtype(f"u{array.itemsize}")).get().view(array.dtype)
    return np.asarray(array, order="C")
