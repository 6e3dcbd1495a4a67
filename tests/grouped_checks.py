"""Shared by the grouped tests: operands, group layouts, poisoned memory, comparison by rows.

``Case`` holds one product with known group sizes in one layout.  Everything outside the groups is
poison: NaN codes and NaN scales in A, all-ones bits (a NaN too) in ``out``.  Results are compared
with the exact product and the bound of ``gemm_checks``, all groups at once.
"""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
from gemm_checks import (
    FEW_ELEMENTS,
    NORM_BFLOAT16,
    NORM_FLOAT32,
    assert_guards_intact,
    exact_and_bound,
    guarded,
    normal,
    to_numpy,
    widen,
)

import cpgemm
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.grouped_reference import row_ranges
from cpgemm.scaled import ScaledTensor, array_module, pointer, scale_pitch

BF16 = np.dtype(ml_dtypes.bfloat16)
CONTIGUOUS = ("offsets", "m_indices", "ends")
LAYOUTS = (*CONTIGUOUS, "masked")
NAN_CODE = 0x7F


def contiguous(*args, **options):
    from cpgemm.grouped import grouped_gemm_contiguous

    return grouped_gemm_contiguous(*args, **options)


def masked(*args, **options):
    from cpgemm.grouped import grouped_gemm_masked

    return grouped_gemm_masked(*args, **options)


def tokens(rng, m, k, xp=np):
    """Quantised A (m, k), rows of very different magnitude."""
    x = normal(rng, m, k, xp)
    if m:
        x *= xp.asarray(2.0 ** rng.integers(-6, 7, (m, 1)), dtype=np.float32)
    return cpgemm.quantize(x, (1, 128))


def experts(rng, groups, n, k, xp=np):
    """Quantised B (groups, n, k), each group of its own magnitude, so that a mix-up shows."""
    w = normal(rng, groups * n, k, xp).reshape(groups, n, k)
    w *= xp.asarray(2.0 ** rng.integers(-3, 4, (groups, 1, 1)), dtype=np.float32)
    return cpgemm.quantize(w, (128, 128))


def index_of(layout, sizes, first=0, m_max=None):
    """(index array, rows of A) for groups of these sizes; NumPy int32.

    ``first`` is where the first group of the ragged layout starts.  For ``masked`` the rows are
    groups * ``m_max`` (the largest size by default).
    """
    sizes = np.asarray(sizes, np.int64)
    if layout == "masked":
        rows = sizes.size * int(m_max if m_max is not None else sizes.max())
        index = sizes
    elif layout == "offsets":
        index = first + np.concatenate(([0], np.cumsum(sizes)))
        rows = int(index[-1])
    else:
        padded = -(-sizes // 128) * 128
        starts = np.concatenate(([0], np.cumsum(padded)))
        rows = int(starts[-1])
        index = starts[:-1] + sizes
        if layout == "m_indices":
            index = np.full(rows, -1)
            for group, (start, size) in enumerate(zip(starts, sizes, strict=False)):
                index[start : start + size] = group
    return index.astype(np.int32), rows


def poisoned(a, owned, slabs=None):
    """A copy of ``a`` (2-D) whose rows outside ``owned``, and all memory around it, hold NaN.

    ``owned``: bool (rows,), NumPy.  ``slabs``: (groups, M_max) to give the copy three axes.
    """
    xp = array_module(a.data)
    rows, k = a.shape
    kb = a.scales.shape[1]
    groups, height = slabs or (1, rows)
    mask = xp.asarray(owned)
    codes = xp.full((rows + 300, k + 128), NAN_CODE, np.uint8)
    codes[:rows, :k] = xp.where(mask[:, None], a.data.view(np.uint8), xp.uint8(NAN_CODE))
    pitch = scale_pitch(height) + (256 if kb > 1 else 0)
    scales = xp.full((groups + 1, kb, pitch), np.nan, np.float32)
    valid = xp.where(mask[:, None], a.scales, xp.float32(np.nan))
    scales[:groups, :, :height] = valid.reshape(groups, height, kb).swapaxes(1, 2)
    data = codes[:rows].reshape(groups, height, k + 128)[..., :k]
    view = scales[:groups, :, :height].swapaxes(1, 2)
    if slabs is None:
        data, view = data[0], view[0]
    result = ScaledTensor.from_arrays(data, view, (1, 128))
    if rows:  # a copy would have left the poison behind
        assert (pointer(result.data), pointer(result.scales)) == (pointer(codes), pointer(scales))
    return result


def random_index(rng, layout, groups, m):
    """A valid index array for ``m`` rows (M_max for ``masked``); NumPy int32.

    Group sizes are random, some 0; ``m_indices`` takes the groups in any order, more than once.
    """
    if layout == "masked":
        return rng.integers(0, m + 1, groups).astype(np.int32)
    if layout == "offsets":
        return np.sort(rng.integers(0, m + 1, groups + 1)).astype(np.int32)
    blocks = m // 128
    if layout == "m_indices":
        index = np.full(m, -1, np.int32)
        for start in range(0, blocks * 128, 128):
            index[start : start + rng.integers(0, 129)] = rng.integers(0, groups)
        return index
    starts = 128 * np.sort(rng.integers(0, blocks + 1, groups - 1))
    next_starts = np.concatenate((starts, [blocks * 128]))
    short = rng.integers(0, 128, groups)  # the last block of a group is short, but never empty
    empty = np.diff(next_starts, prepend=0) == 0
    return np.where(empty, next_starts, next_starts - short).astype(np.int32)


class Case:
    """One grouped product with poison around every group.

    ``sizes`` are the groups' sizes; ``spare`` rows behind (and ``first`` rows before) the groups of
    a contiguous layout belong to none.  ``set_index`` divides the same rows in another way.
    """

    def __init__(
        self, rng, layout, sizes, n, k, xp=np, *, out_dtype="bfloat16", first=0, spare=0,
        m_max=None, fill_padding=False, b=None,
    ):  # fmt: skip
        self.layout, self.xp, self.fill_padding = layout, xp, fill_padding
        self.dtype = BF16 if out_dtype == "bfloat16" else np.dtype(np.float32)
        index, rows = index_of(layout, sizes, first, m_max)
        if layout == "m_indices":
            index = np.concatenate((index, np.full(spare, -1, np.int32)))
        rows += 0 if layout == "masked" else spare
        m = rows // len(sizes) if layout == "masked" else rows
        self.problem = GroupedProblem(layout, len(sizes), m, n, k, out_dtype, fill_padding)
        self.plain_a = tokens(rng, rows, k, xp)
        self.b = experts(rng, len(sizes), n, k, xp) if b is None else b
        self.set_index(index)

    def set_index(self, index):
        """Other groups over the same rows: poison moves with them; memory that calls see stays."""
        self.ranges = row_ranges(self.problem, np.asarray(index))
        p = self.problem
        a = poisoned(
            self.plain_a, self.cover() > 0, p.shape[:2] if self.layout == "masked" else None
        )
        if not hasattr(self, "a"):
            self.index, self.a = self.xp.asarray(index), a
            self.poison, self.flat_out = guarded(p.rows, p.n, self.dtype, self.xp)
            self.out = self.flat_out.reshape(p.shape)
            assert not self.out.size or pointer(self.out) == pointer(self.flat_out)
            return
        self.index[...] = self.xp.asarray(index)
        self.a.data.view(np.uint8)[...] = a.data.view(np.uint8)
        self.a.scales[...] = a.scales
        self.poison[...] = np.iinfo(self.poison.dtype).max

    def cover(self):
        """How many groups claim each row of ``out``; NumPy."""
        count = np.zeros(self.problem.rows, np.int64)
        for _, begin, end in self.ranges:
            count[begin:end] += 1
        return count

    def call(self, **options):
        """The public call, into ``out`` unless ``options`` say otherwise."""
        if self.layout == "masked":
            arguments = {"masked_m": self.index}
        else:
            arguments = {self.layout: self.index, "fill_padding": self.fill_padding}
        arguments["out"] = self.out
        arguments["out_dtype"] = self.problem.out_dtype
        function = masked if self.layout == "masked" else contiguous
        return function(self.a, self.b, **{**arguments, **options})

    def check(self, norm=True):
        """Guard bands, rows of no group, rows of one group; rows that two groups claim are free."""
        p, xp = self.problem, self.xp
        count = self.cover()
        assert_guards_intact(self.poison, p.rows, p.n)
        outside = bits(self.flat_out)[xp.asarray(np.flatnonzero(count == 0))]
        wanted = 0 if self.fill_padding else np.iinfo(self.poison.dtype).max
        assert bool((outside == wanted).all()), "a row outside every group has changed"
        self.check_rows(self.flat_out, count == 1, norm)

    def check_rows(self, flat, owned, norm=True):
        """The rows ``owned`` (bool, NumPy) of a (rows, N) result within the bound of rounding."""
        xp, p = self.xp, self.problem
        exact = xp.zeros((p.rows, p.n), np.float64)
        bound = xp.ones((p.rows, p.n), np.float64)
        for group, begin, end in self.ranges:
            part = ScaledTensor.from_arrays(
                self.plain_a.data[begin:end], self.plain_a.scales[begin:end], (1, 128)
            )
            exact[begin:end], bound[begin:end] = exact_and_bound(
                part, self.group_of_b(group), None, p.out_dtype
            )
        rows = xp.asarray(np.flatnonzero(owned))
        got = widen(flat.view(bit_type(flat))[rows].view(self.dtype)).astype(np.float64)
        exact, bound = exact[rows], bound[rows]
        assert bool(xp.isfinite(got).all()), "a valid row holds NaN or infinity"
        difference = abs(got - exact)
        worst = float((difference / bound).max()) if difference.size else 0.0
        assert worst <= 1.0, f"off by {worst:.3g} times the bound that rounding gives"
        # As in gemm_checks: of fewer elements, too few rule the norm for a limit this close.
        if norm and difference.size >= FEW_ELEMENTS:
            limit = NORM_BFLOAT16 if p.out_dtype == "bfloat16" else NORM_FLOAT32
            relative = float((difference**2).sum() / (exact**2).sum()) ** 0.5
            assert relative <= limit, f"relative error {relative:.2e} in the 2-norm, not {limit}"

    def group_of_b(self, group):
        return ScaledTensor.from_arrays(self.b.data[group], self.b.scales[group], (128, 128))

    def on_cpu(self):
        """Operands, index and a poisoned ``out`` as NumPy arrays, for the reference."""
        p = self.problem
        out = np.full(p.shape, np.iinfo(self.poison.dtype).max, self.poison.dtype)
        return SimpleNamespace(
            a=to_numpy(self.a), b=to_numpy(self.b), out=out.view(self.dtype),
            index=to_numpy(self.index),
        )  # fmt: skip


def bit_type(x):
    return {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize]


def bits(x):
    """The array as unsigned integers: CuPy has no bfloat16 kernels, and NaN equals nothing."""
    return x.view(bit_type(x))


def assert_same_bits(left, right):
    left, right = (x if array_module(x) is np else x.get() for x in (bits(left), bits(right)))
    np.testing.assert_array_equal(left, right)


def take_rows(tensor, rows):
    """Some rows of a 2-D (1, 128) tensor, copied; ``rows`` is a NumPy array of indices."""
    xp = array_module(tensor.data)
    where = xp.asarray(rows)
    codes = tensor.data.view(np.uint8)[where]
    return ScaledTensor.from_arrays(codes, tensor.scales[where], (1, 128))
