"""Layers of a checkpoint: their codes and scales, slices of them, and copies in one array.

Everything is checked before anything is copied.  ``cpgemm.checkpoint`` says what the format is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cpgemm.checkpoint_files import SCALE, WEIGHT, Checkpoint
from cpgemm.errors import ArgumentTypeError, DeviceError, MissingDependencyError, reject
from cpgemm.layout import (
    BLOCK,
    Array,
    empty_codes,
    empty_scales,
    is_cupy,
    pointer,
    scale_shape,
)

__all__ = [
    "GRANULARITY",
    "Layer",
    "assembled",
    "check_alike",
    "copy_to",
    "device_ordinal",
    "layer_of",
    "on_device",
    "sliced",
]

GRANULARITY = (BLOCK, BLOCK)
Layer = tuple[Array, Array]  # uint8 codes and scales, NumPy, (N, K) or (groups, N, K)

# Checkpoints of other makers store the multipliers in fewer bits; float32 holds them all exactly.
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_FLOATS = ("F16", "BF16", "F32", "F64")


# ------------------------------------------------------------------------------------- one layer


def layer_of(checkpoint: Checkpoint, name: str) -> Layer:
    """Codes and scales of a layer, views of its file."""
    full, file = checkpoint.resolve(name)
    dtype = file.entries[full].dtype
    if dtype != "F8_E4M3":
        mend = "The kernels multiply e4m3 only."
        if dtype in _FLOATS:
            mend = (
                "It is not quantised: give cpgemm.checkpoint.load_array(path, name) to "
                "cpgemm.quantize, with granularity (128, 128)."
            )
        reject(
            "name",
            "must name a layer of dtype F8_E4M3",
            f"{full} of dtype {dtype}",
            mend,
            kind=ArgumentTypeError,
        )
    holder = checkpoint.find(full + SCALE, beside=file)
    if holder is None:
        stem = full.removesuffix(WEIGHT) + "."
        near = [other for other in file.entries if other.startswith(stem) and other != full]
        reject(
            "name",
            f"must name a layer with scales, here {full + SCALE}",
            f"no such tensor, but {', '.join(near) or 'nothing else'} beside the weight",
            "Scales of another name but the same meaning can be read with "
            "cpgemm.checkpoint.load_array and joined with ScaledTensor.from_arrays.",
        )
    dtype = holder.entries[full + SCALE].dtype
    if dtype not in _SCALE_DTYPES:
        reject(
            "name",
            f"must name a layer with scales of dtype {', '.join(_SCALE_DTYPES)}",
            f"{full + SCALE} of dtype {dtype}",
            "Convert them to float32.",
            kind=ArgumentTypeError,
        )
    codes, scales = file.array(full), holder.array(full + SCALE)
    if codes.ndim not in (2, 3) or (codes.ndim == 3 and not len(codes)):
        reject(
            "name",
            "must name a layer of shape (N, K) or (groups, N, K)",
            f"{full} of shape {codes.shape}",
            "Read it with cpgemm.checkpoint.load_array.",
        )
    shape = scale_shape(codes.shape, GRANULARITY)
    if scales.shape != shape:
        reject(
            "name",
            f"must name a layer with a scale for each 128 x 128 values, here of shape {shape}",
            f"{full} of shape {codes.shape} with scales of shape {scales.shape}",
            "Values scaled by other blocks must be dequantised and quantised anew.",
        )
    return codes.view(np.uint8), scales


def sliced(full: str, layer: Layer, rows: slice | None, columns: slice | None) -> Layer:
    """Rows and columns of a layer, as views; ``None`` means all."""
    codes, scales = layer
    r0, r1 = _range("rows", rows, codes.shape[-2], full)
    c0, c1 = _range("columns", columns, codes.shape[-1], full)
    row_blocks = slice(r0 // BLOCK, -(-r1 // BLOCK))
    column_blocks = slice(c0 // BLOCK, -(-c1 // BLOCK))
    return codes[..., r0:r1, c0:c1], scales[..., row_blocks, column_blocks]


def _range(argument: str, chosen: slice | None, extent: int, full: str) -> tuple[int, int]:
    if chosen is None:
        return 0, extent
    if not isinstance(chosen, slice) or chosen.step not in (None, 1):
        reject(
            argument,
            "must be a slice without a step",
            repr(chosen),
            "Give slice(0, 1024), or None for all.",
            kind=ArgumentTypeError,
        )
    start = 0 if chosen.start is None else chosen.start
    stop = extent if chosen.stop is None else chosen.stop
    divides = start % BLOCK or (stop % BLOCK and stop != extent)
    if divides or not 0 <= start <= stop <= extent:
        reject(
            argument,
            f"must lie in 0 to {extent}, begin at a multiple of 128, and end at one or at {extent}",
            f"{start} to {stop} of {full}",
            "The 128 x 128 values of a block have one scale and cannot be divided.",
        )
    return start, stop


# ----------------------------------------------------------------------------------- many layers


def check_alike(names: Sequence[Sequence[str]], groups: Sequence[Sequence[Layer]]) -> None:
    """Rules of layers that are stacked (groups) or whose rows are joined (within a group)."""
    for full_names, group in zip(names, groups, strict=True):
        columns = group[0][0].shape[-1]
        for full, (codes, _), (like, _) in zip(full_names, group, groups[0], strict=True):
            got = f"{full} of shape {codes.shape}"
            if codes.ndim != 2:
                rule = "layers that are stacked or joined must have 2 axes"
                reject("name", rule, got, "Load it alone: it is a stack already.")
            if codes.shape != like.shape:
                rule = f"layers that are stacked must have one shape, {like.shape} as the first"
                reject("name", rule, got, "Load it alone.")
            if codes.shape[1] != columns:
                rule = f"must have as many columns as the first, {columns}"
                reject("parts", rule, got, "Load it alone.")
        for full, (codes, _) in zip(full_names[:-1], group[:-1], strict=True):
            if codes.shape[0] % BLOCK:
                got = f"{full} of shape {codes.shape}"
                rule = "all but the last must have a multiple of 128 rows"
                reject("parts", rule, got, "Name it last, or load it alone.")


def assembled(groups: Sequence[Sequence[Layer]], *, on_gpu: bool) -> Layer:
    """FP8 codes (groups, N, K) and float32 scales: copies, on the host or the current device."""
    xp: Any = np
    if on_gpu:
        import cupy

        xp = cupy
    rows = sum(codes.shape[0] for codes, _ in groups[0])
    shape = (len(groups), rows, groups[0][0][0].shape[1])
    data = empty_codes(shape, xp)
    # Scales are few: they are put together on the host and go to a GPU in one copy.
    row_blocks, column_blocks = scale_shape(shape[1:], GRANULARITY)
    scales = empty_scales(row_blocks, column_blocks, GRANULARITY, groups=len(groups))
    for g, group in enumerate(groups):
        row = 0
        for codes, values in group:
            block = row // BLOCK
            copy_to(data[g].view(np.uint8)[row : row + len(codes)], codes)
            scales[g, block : block + len(values)] = values
            row += len(codes)
    if on_gpu:
        scales = xp.asarray(scales)
        # The host's pages must not be let go before they have been read.
        xp.cuda.get_current_stream().synchronize()
    return data, scales


def copy_to(target: Array, source: Array) -> None:
    """Bytes (rows, columns) on the host into such an array there or, queued, on the current GPU.

    Both are uint8, contiguous along their rows.
    """
    if not is_cupy(target):
        target[...] = source
        return
    if not source.size:
        return
    import cupy

    runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
    to_gpu = runtime.memcpyHostToDevice
    if target.flags.c_contiguous and source.flags.c_contiguous:
        runtime.memcpyAsync(pointer(target), pointer(source), source.size, to_gpu, stream)
        return
    # Straight from the rows where they are, instead of through a contiguous copy on the host.
    height, width = source.shape
    runtime.memcpy2DAsync(
        pointer(target),
        target.strides[0],
        pointer(source),
        source.strides[0],
        width,
        height,
        to_gpu,
        stream,
    )


# --------------------------------------------------------------------------------------- devices


def device_ordinal(device: str) -> int | None:
    """None for the host, else the ordinal of a GPU that is there."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if found is None:
        reject(
            "device", "must be 'cpu', 'cuda' or 'cuda:<ordinal>'", repr(device), "Give 'cuda:0'."
        )
    if device == "cpu":
        return None
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            f"cupy: loading to {device!r} needs it; it is not installed. "
            'Run: pip install "cpgemm[cuda12]" (or cuda13).'
        ) from error
    runtime = cupy.cuda.runtime
    count, ordinal, reason = 0, 0, ""
    try:
        count = runtime.getDeviceCount()
        ordinal = int(found[1]) if found[1] else runtime.getDevice()
    except runtime.CUDARuntimeError as error:
        reason = f" ({error})"
    if ordinal >= count:
        reject(
            "device",
            f"must be a GPU that is there; there are {count}{reason}",
            repr(device),
            "Load to 'cpu', or to a lower ordinal.",
            kind=DeviceError,
        )
    return ordinal


@contextlib.contextmanager
def on_device(ordinal: int | None) -> Iterator[None]:
    """A GPU as CuPy's current device; nothing for the host."""
    if ordinal is None:
        yield
        return
    import cupy

    with cupy.cuda.Device(ordinal):
        yield
