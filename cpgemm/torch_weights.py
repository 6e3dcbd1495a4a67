"""Quantised copies of float weights, and transposed copies of quantised ones, for ``Linear``.

A copy belongs to a weight's storage and dies with it.  It is made at the first use, and made again
in the same memory when torch has counted a change of the weight (``Tensor._version``), when its
memory has moved, and after a step of any optimizer: fused ones change weights uncounted, and where
weights are sharded it is other tensors that they change.  Copies are never handed to torch's
graphs, so that nothing there can write to them.

Memory: NumPy's or CuPy's, because what ``torch.compile`` allocates while it warms up for a CUDA
graph must not outlive that.  Streams: a copy made on one stream is waited for on another.

CUDA graphs: Python does not run in a replay, so that nothing would be made again there.  A graph
that is captured for training therefore quantises the weight itself at each replay.  From then on
replays may change the weight without torch counting it, and calls outside of the graph quantise
anew each time.  A graph captured while the weight counts as constant reads the copy there is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from cpgemm.dlpack import as_native, current_stream
from cpgemm.dlpack_abi import imported
from cpgemm.layout import ALIGNMENT, BLOCK, is_cupy
from cpgemm.quantize import quantize
from cpgemm.scaled import ScaledTensor
from cpgemm.streams import working_stream

__all__ = ["quantized", "refresh", "rows_of", "transposed"]

_GRANULARITY = (BLOCK, BLOCK)


@dataclass
class _Copy:
    """A tensor that was made on ``stream`` of what the weight held at ``version``."""

    tensor: ScaledTensor
    version: Hashable
    stream: int = 0
    event: Any = None


@dataclass
class _Copies:
    straight: _Copy | None = None
    transposed: _Copy | None = None
    replayed: bool = False  # a graph may change the weight, which torch does not count

    def forget(self) -> None:
        """Take the copies for out of date."""
        for copy in (self.straight, self.transposed):
            if copy is not None:
                copy.version = None


# Storage -> view of it (offset, shape, strides, dtype) -> copies.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=WeakIdRef)
_lock = threading.RLock()
_steps = 0  # of all optimizers


def rows_of(x: Tensor) -> Tensor:
    """``x`` as a matrix of its last axis that the quantiser takes, copied only when it must be."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows


def quantized(weight: Tensor, constant: bool) -> ScaledTensor:
    """The float ``weight`` (N, K) in blocks of 128 x 128.

    ``constant``: the weight changes in no graph that is being captured.
    """
    if not _is_captured(weight):
        return _straight(weight)
    copies = _copies_of(weight)
    if not constant:
        copies.replayed = True
    elif _is_current(copies, copies.straight, _version(weight, None)):
        assert copies.straight is not None
        return copies.straight.tensor
    return quantize(rows_of(weight), _GRANULARITY)


def transposed(weight: Tensor, scales: Tensor | None, constant: bool) -> ScaledTensor:
    """The transpose (K, N), stored along N, of a float ``weight`` or of one given with scales."""
    if not _is_captured(weight):
        return _transposed(weight, scales)
    copies = _copies_of(weight)
    if constant and _is_current(copies, copies.transposed, _version(weight, scales)):
        assert copies.transposed is not None
        return copies.transposed.tensor
    source = quantized(weight, constant) if scales is None else _wrapped(weight, scales)
    return source.T.k_major()


def refresh(weight: Tensor, scales: Tensor | None) -> None:
    """Make the copies there are again, whatever torch has counted."""
    with _lock:
        copies = _copies_of(weight)
        copies.forget()
        if copies.straight is not None:
            _straight(weight)
        if copies.transposed is not None:
            _transposed(weight, scales)


# --------------------------------------------------------------------------- copies, out of graphs


def _straight(weight: Tensor) -> ScaledTensor:
    copies, version = _copies_of(weight), _version(weight, None)
    if not _is_current(copies, copies.straight, version):
        with _lock, _working(weight):
            copy = copies.straight
            if not _is_current(copies, copy, version):  # or another thread was quicker
                out = None if copy is None else copy.tensor
                made = quantize(as_native("weight", rows_of(weight)), _GRANULARITY, out=out)
                copies.straight = _made(weight, made, version)
    return _ready(weight, copies.straight)


def _transposed(weight: Tensor, scales: Tensor | None) -> ScaledTensor:
    copies, version = _copies_of(weight), _version(weight, scales)
    if not _is_current(copies, copies.transposed, version):
        with _lock, _working(weight):
            copy = copies.transposed
            if not _is_current(copies, copy, version):
                source = _straight(weight) if scales is None else _wrapped(weight, scales)
                made = _turned(source, None if copy is None else copy.tensor)
                copies.transposed = _made(weight, made, version)
    return _ready(weight, copies.transposed)


def _turned(source: ScaledTensor, into: ScaledTensor | None) -> ScaledTensor:
    """The transpose in memory of its own, or where the old one is: captured graphs may read it."""
    turned = replace(source, framework="cupy" if is_cupy(source.data) else "numpy").T
    if into is None:
        into = turned.k_major()
        if into.scales is turned.scales:  # which may lie in the storage that keeps the copy
            into = replace(into, scales=into.scales.copy())
    else:
        into.data.view(np.uint8)[...] = turned.data.view(np.uint8)
        into.scales[...] = turned.scales
    return into


def _made(weight: Tensor, tensor: ScaledTensor, version: Hashable) -> _Copy:
    if not weight.is_cuda:
        return _Copy(tensor, version)
    stream = torch.cuda.current_stream(weight.device)
    return _Copy(tensor, version, stream.cuda_stream, stream.record_event())


def _ready(weight: Tensor, copy: _Copy | None) -> ScaledTensor:
    """The copy, for which the current stream waits when another one made it."""
    assert copy is not None
    if copy.event is not None and current_stream("torch", weight.get_device()) != copy.stream:
        torch.cuda.current_stream(weight.device).wait_event(copy.event)
    return copy.tensor


# ---------------------------------------------------------------------------------- what is known


def _copies_of(weight: Tensor) -> _Copies:
    storage = weight.untyped_storage()
    view = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    found = _known.get(storage, {}).get(view)
    if found is None:
        with _lock:
            found = _known.setdefault(storage, {}).setdefault(view, _Copies())
    return found


@torch._disable_dynamo  # as torch.compiler.disable, which takes a second to import
def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_after_step)


def _version(weight: Tensor, scales: Tensor | None) -> Hashable:
    """What changes whenever torch changes a weight; None when torch does not count."""
    tensors = (weight,) if scales is None else (weight, scales)
    if any([tensor.is_inference() for tensor in tensors]):
        return None
    counted = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    return (*counted, _steps if scales is None else None)


def _is_current(copies: _Copies, copy: _Copy | None, version: Hashable) -> bool:
    return (
        copy is not None and version is not None and copy.version == version and not copies.replayed
    )


def _is_captured(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _wrapped(weight: Tensor, scales: Tensor) -> ScaledTensor:
    return ScaledTensor.from_arrays(weight.detach(), scales.detach(), _GRANULARITY)


def _working(weight: Tensor) -> contextlib.AbstractContextManager[None]:
    """The weight's device and torch's current stream of it, for CuPy."""
    if not weight.is_cuda:
        return contextlib.nullcontext()
    imported("cupy")
    return working_stream("torch", weight.get_device())
