"""Operands of a product: the same quantised data for all contenders, several sets, and the check.

Values are normally distributed and quantised by cpgemm: zeros and constants draw less power, which
flatters everyone.  A call of a graph works on another set each time, so that L2 is cold: there are
as many sets as hold three times 60 MB, with the same values in different memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from cpgemm.bench.result import Case
from cpgemm.kernel_check import on_host
from cpgemm.quantize import quantize
from cpgemm.random_data import POOL, repeated
from cpgemm.sampled_check import NAN_BITS, largest_errors, relative_error, stratified
from cpgemm.scaled import BLOCK, Array, ScaledTensor
from cpgemm.timing import rotations

__all__ = ["PRODUCTS", "Operands", "Pool", "Product", "bytes_of", "tolerance"]

PRODUCTS = ("dense", "contiguous", "masked")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_SAMPLED_ROWS = 64  # of a dense result; of a grouped one, those of some groups together
_SAMPLED_GROUPS = 4
_LEAST_MASKED_ROWS = 512  # room for rows in each group of a masked product
_FAST_ACCUMULATION = 0.02  # cuBLASLt drops bits of long sums when told to be fast


class Pool:
    """Normal float32 values on the host, or on the GPU, from which all matrices are cut.

    ``host``: the last weights that were dequantised on the host, for the checks of several cases.
    """

    def __init__(self, seed: int, xp: Any) -> None:
        self._seed = seed
        rng = np.random.default_rng(seed)
        self._values = xp.asarray(rng.standard_normal(POOL, dtype=np.float32))
        self.host: dict[Any, Any] = {}

    def matrix(self, *shape: int) -> Array:
        """float32 of this shape; the same values whenever the same shape is asked for."""
        place = np.random.default_rng([self._seed, *shape])
        start = 4 * int(place.integers(POOL // 4))  # a multiple of 16 bytes
        return repeated(self._values, math.prod(shape), start).reshape(shape)


@dataclass(frozen=True)
class Operands:
    """What one call works on.  ``out`` is bfloat16, written by every contender in turn.

    ``index``: int32, the group of each row of a contiguous product, the rows of each group of a
    masked one; None without groups.
    """

    a: ScaledTensor
    b: ScaledTensor
    out: Array
    index: Array | None = None


@dataclass
class Product:
    """A case with its operands, on the GPU or (one set) on the host."""

    case: Case
    sets: list[Operands]
    host: dict[Any, Any] = field(default_factory=dict)  # Pool.host of B
    rows: list[int] = field(init=False)  # of each group; of the one matrix without groups

    def __post_init__(self) -> None:
        self.rows = [self.case.m] * max(self.case.groups, 1)
        self._products: dict[tuple[int, bool], Any] = {}

    @property
    def row_room(self) -> int:
        """Rows from one group's first to the next one's, in A and in D."""
        masked = self.case.suite == "masked"
        return int(self.sets[0].a.shape[1]) if masked else self.case.m

    @classmethod
    def make(cls, case: Case, a: Pool, b: Pool, xp: Any, *, sets: int | None = None) -> Product:
        """The operands of ``case`` from pools of their own for A and B.

        ``xp``: numpy or cupy.  ``sets``: how many (None: as many as keep L2 cold).
        """
        groups, m, n, k = case.groups, case.m, case.n, case.k
        count = rotations(bytes_of(case)) if sets is None else sets
        room = max(m, _LEAST_MASKED_ROWS)
        index: Array | None = None
        shape: tuple[int, ...]
        if case.suite == "masked":
            x, w, shape = a.matrix(groups, room, k), b.matrix(groups, n, k), (groups, room, n)
            index = xp.full(groups, m, dtype=np.int32)
        elif case.suite == "contiguous":
            x, w, shape = a.matrix(groups * m, k), b.matrix(groups, n, k), (groups * m, n)
            index = xp.asarray(np.repeat(np.arange(groups, dtype=np.int32), m))
        else:
            x, w, shape = a.matrix(m, k), b.matrix(n, k), (m, n)
        made = [
            Operands(
                quantize(x),
                quantize(w, (BLOCK, BLOCK)),
                xp.empty(shape, dtype=np.uint16).view(BFLOAT16),
                None if index is None else index.copy(),
            )
            for _ in range(count)
        ]
        return cls(case, made, b.host)

    # ------------------------------------------------------------------------------- the check

    def poison(self) -> None:
        """Fill the first set's result with NaN."""
        self.sets[0].out.view(np.uint16)[...] = NAN_BITS

    def error(self, *, by_blocks: bool = True) -> float:
        """Relative 2-norm error of the first set's result, NaN where elements are not numbers.

        Sampled rows of up to four groups, all columns, against the product of the dequantised
        operands (``by_blocks``) or of the bare codes.  Elements outside the sample must be
        numbers.  On the GPU, waits for the device.
        """
        one = self.sets[0]
        if not self._all_written():
            return float("nan")
        got, wanted = [], []
        for group, rows in self.sample:
            bits = one.out.view(np.uint16)
            part = bits[group][rows] if bits.ndim == 3 else bits[rows]
            got.append(on_host(part).view(BFLOAT16).astype(np.float32))
            wanted.append(self._wanted(group, by_blocks))
        return relative_error(np.concatenate(got), np.concatenate(wanted))

    @functools.cached_property
    def sample(self) -> list[tuple[int, Any]]:
        """Groups and which rows of A and D (within a group where A has three axes) are compared."""
        groups = len(self.rows)
        chosen = sorted({round(at) for at in np.linspace(0, groups - 1, _SAMPLED_GROUPS)})
        rng = np.random.default_rng(0)
        count = max(_SAMPLED_ROWS // len(chosen), 1)
        first = 0 if self.sets[0].a.ndim == 3 else self.case.m
        return [(group, group * first + stratified(self.case.m, count, rng)) for group in chosen]

    def _all_written(self) -> bool:
        bits = self.sets[0].out.view(np.uint16)
        if bits.ndim == 3:
            bits = bits[:, : self.case.m]
        return not bool(((bits & 0x7FFF) >= 0x7F80).any())

    def _wanted(self, group: int, by_blocks: bool) -> Any:
        """The sampled rows of a group's product, all columns."""
        if (group, by_blocks) not in self._products:
            a = self.sets[0].a
            rows = dict(self.sample)[group]
            host = _host_tensor(a, group, rows, by_blocks).dequantize(np.float32)
            self._products[group, by_blocks] = host @ self._weights(group, by_blocks).T
        return self._products[group, by_blocks]

    def _weights(self, group: int, by_blocks: bool) -> Any:
        b = self.sets[0].b
        if self.host.get("of") != b.shape:
            self.host.clear()
            self.host["of"] = b.shape
        if (group, by_blocks) not in self.host:
            tensor = _host_tensor(b, group, slice(None), by_blocks)
            self.host[group, by_blocks] = tensor.dequantize(np.float32)
        return self.host[group, by_blocks]


def tolerance(product: Product, *, by_blocks: bool = True) -> float:
    """The largest relative error of a right result."""
    if not by_blocks:
        return _FAST_ACCUMULATION
    rows = sum(len(rows) for _, rows in product.sample)
    return largest_errors(rows, product.case.n)[0]


def bytes_of(case: Case) -> float:
    """What a product must move at least: operands and scales once, a bfloat16 result once."""
    m, n, k = case.m, case.n, case.k
    blocks = -(-k // BLOCK)
    group = (m + n) * k + 4 * blocks * (m + -(-n // BLOCK)) + 2 * m * n
    return float(max(case.groups, 1) * group)


def _host_tensor(tensor: ScaledTensor, group: int, rows: Any, by_blocks: bool) -> ScaledTensor:
    """Rows of one group's matrix on the host; with scales of one unless ``by_blocks``."""
    codes, scales = tensor.data.view(np.uint8), tensor.scales
    if tensor.ndim == 3:
        codes, scales = codes[group], scales[group]
    codes, scales = on_host(codes[rows]), on_host(scales[rows])
    if not by_blocks:
        scales = np.ones_like(scales)
    return ScaledTensor.from_arrays(codes, scales, tensor.granularity)
