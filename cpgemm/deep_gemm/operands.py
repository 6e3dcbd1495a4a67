"""From DeepGEMM's pairs (data, scaling factors) to ``ScaledTensor``, and calls made before."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from cpgemm import env
from cpgemm.calls import ReadyCalls, signature
from cpgemm.deep_gemm.arrays import on_device, torch_of
from cpgemm.deep_gemm.layouts import get_mn_major_tma_aligned_tensor
from cpgemm.errors import ArgumentError, ArgumentTypeError, reject
from cpgemm.launch import PreparedLaunch
from cpgemm.layout import ALIGNMENT, BLOCK, Granularity, pointer
from cpgemm.scaled import ScaledTensor

__all__ = ["BLOCKS", "ROWS", "Pair", "call_key", "operand", "remember", "repeated", "turned"]

Pair = tuple[Any, Any]

ROWS: Granularity = (1, BLOCK)
BLOCKS: Granularity = (BLOCK, BLOCK)

_ready = ReadyCalls()


def call_key(kind: Hashable, a: Any, b: Any, d: Any, last: Any) -> tuple[Hashable, ...] | None:
    """What a call on a GPU depends on; None for one that must be checked."""
    if type(a) is not tuple or type(b) is not tuple or len(a) != 2 or len(b) != 2:
        return None
    key = (
        kind, signature(a[0]), signature(a[1]), signature(b[0]), signature(b[1]), signature(d),
        False if last is None else signature(last),
    )  # fmt: skip
    return None if None in key else key


def repeated(key: tuple[Hashable, ...] | None) -> bool:
    """Whether this very call was made before; it is launched again then."""
    launch = _ready.get(key)
    if launch is None or (key is not None and key[0] != "dense" and env.check()):
        return False
    launch()
    return True


def remember(
    key: Hashable, pairs: tuple[Pair, Pair], operands: tuple[ScaledTensor, ScaledTensor],
    launch: PreparedLaunch | None,
) -> None:  # fmt: skip
    """Keep a launch, unless factors had to be copied, which every call must do again."""
    if key is None or launch is None:
        return
    for (_, factors), operand in zip(pairs, operands, strict=True):
        own = factors.data_ptr() if hasattr(factors, "data_ptr") else pointer(factors)
        if own != pointer(operand.scales):
            return
    _ready.put(key, launch)


def operand(name: str, pair: Pair, granularity: Granularity) -> ScaledTensor:
    """The pair as a ``ScaledTensor``; only factors that lie otherwise are copied."""
    data, factors = _unpacked(name, pair)
    try:
        if torch_of("scales", factors) is not None:
            factors = _laid_out(factors, granularity)
        elif granularity == ROWS and factors.ndim == 3:
            factors = get_mn_major_tma_aligned_tensor(factors)  # no gaps between groups
        return ScaledTensor.from_arrays(data, factors, granularity)
    except (ArgumentError, ArgumentTypeError) as error:
        raise type(error)(f"{name}, {error}") from None


def _laid_out(factors: Any, granularity: Granularity) -> Any:
    """A tensor of factors in the layout for ``granularity``: copies come from torch's allocator."""
    if granularity == BLOCKS:
        return factors.contiguous()
    if factors.dim() != 2:
        return get_mn_major_tma_aligned_tensor(factors)  # no gaps between groups
    row, column = factors.stride()
    wide = column % 4 == 0 and column >= factors.shape[0]
    if row == 1 and wide and factors.data_ptr() % ALIGNMENT == 0:
        return factors  # any pitch will do
    return get_mn_major_tma_aligned_tensor(factors)


def turned(name: str, pair: Pair, granularity: Granularity) -> ScaledTensor:
    """The transpose of the pair, contiguous along K; ``granularity`` is that of the transpose."""
    data, factors = _unpacked(name, pair)
    if len(data.shape) not in (2, 3) or len(factors.shape) != len(data.shape):
        return operand(name, pair, granularity)  # rejects it
    if torch_of(name, data) is None:
        flipped = data.swapaxes(-1, -2), factors.swapaxes(-1, -2)
        with on_device(data):
            return operand(name, flipped, granularity).k_major()
    data, factors = data.transpose(-1, -2), factors.transpose(-1, -2)
    if data.stride(-1) != 1:
        data = data.contiguous()
    return operand(name, (data, factors), granularity)


def _unpacked(name: str, pair: Pair) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        reject(
            name,
            "must be a pair (e4m3 data, float32 scaling factors)",
            type(pair).__qualname__,
            "Give both, for example what per_token_cast_to_fp8 returns.",
            kind=ArgumentTypeError,
        )
    return pair[0], pair[1]
