"""``GroupedProblem``: many products that share N and K, and every rule their operands must obey.

Each group g multiplies its own rows of A by its own matrix ``b[g]`` (N, K).  Which rows those are
says an index array, in one of the four layouts of ``cpgemm.group_index``: ``offsets``,
``m_indices`` and ``ends`` divide the rows of a matrix A (M_total, K) (the contiguous layouts);
``masked`` takes the first rows of each matrix of A (groups, M_max, K).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.group_index import (
    GROUP_LAYOUTS,
    GroupLayout,
    check_contents,
    check_index,
    contiguous_alignment,
    index_length,
    index_name,
    select_layout,
)
from cpgemm.problem import (
    OUT_DTYPES,
    GemmProblem,
    OutDtype,
    check_alignment,
    check_device,
    check_matrix,
    check_no_overlap,
    check_operand,
    normalize_out_dtype,
)
from cpgemm.scaled import BLOCK, Array, ScaledTensor, is_array, is_cupy

__all__ = [
    "MAX_GROUPS",
    "GroupedProblem",
    "check_expected_m",
    "check_grouped_out",
    "check_groups_adjacent",
    "contiguous_alignment",
]

MAX_GROUPS = 1024  # the kernels keep a table of them in shared memory

_LIMIT = 2**31 - 1  # TMA coordinates and the kernels' sizes are int32


@dataclass(frozen=True)
class GroupedProblem:
    """out[rows of g] = a[rows of g] @ b[g].T for each group g.

    ``m`` is M_total for the contiguous layouts and M_max for ``masked``.  ``k`` is a multiple of 16
    and not 0, ``n`` a multiple of 8; ``m`` and ``n`` may be 0.  ``fill_padding`` (not for
    ``masked``) zeroes the output rows of no group, which are left alone otherwise.  How the rows
    are divided is data, not part of the problem.
    """

    layout: GroupLayout
    groups: int
    m: int
    n: int
    k: int
    out_dtype: OutDtype = "bfloat16"
    fill_padding: bool = False

    def __post_init__(self) -> None:
        if self.layout not in GROUP_LAYOUTS:
            reject(
                "layout",
                f"must be one of {', '.join(GROUP_LAYOUTS)}",
                repr(self.layout),
                "Name the array that says where the groups are.",
            )
        if isinstance(self.groups, bool) or not isinstance(self.groups, (int, np.integer)):
            reject(
                "groups",
                "must be an integer",
                repr(self.groups),
                "Give a number of groups.",
                kind=ArgumentTypeError,
            )
        if not 1 <= self.groups <= MAX_GROUPS:
            reject(
                "groups",
                f"must be between 1 and {MAX_GROUPS}",
                self.groups,
                "Split the call; an empty group is fine.",
            )
        sizes = GemmProblem(self.m, self.n, self.k, self.out_dtype)  # checks them
        if sizes.k == 0:
            reject("k", "must not be 0 in a grouped product", 0, "Zero the output yourself.")
        for name in ("m", "n", "k", "out_dtype"):
            object.__setattr__(self, name, getattr(sizes, name))
        object.__setattr__(self, "groups", int(self.groups))
        for name, count in (("m", self.rows), ("n", self.groups * self.n)):
            if count > _LIMIT:
                reject(
                    name,
                    f"all groups together must have {_LIMIT} rows at most",
                    count,
                    "Split the call.",
                )
        if not isinstance(self.fill_padding, (bool, np.bool_)):
            reject(
                "fill_padding",
                "must be True or False",
                repr(self.fill_padding),
                "Give a bool of the host: a value on a GPU would have to be waited for.",
                kind=ArgumentTypeError,
            )
        if self.fill_padding and self.layout == "masked":
            reject(
                "fill_padding",
                "must be False for the masked layout, which leaves padding alone",
                self.fill_padding,
                "Zero out before the call.",
            )
        object.__setattr__(self, "fill_padding", bool(self.fill_padding))

    @property
    def rows(self) -> int:
        """Rows of ``out``, padding included: M_total, or groups * M_max."""
        return self.m * self.groups if self.layout == "masked" else self.m

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``out``: (M_total, N), or (groups, M_max, N)."""
        return (self.groups, self.m, self.n) if self.layout == "masked" else (self.m, self.n)

    @property
    def index_length(self) -> int:
        """Elements of the index array."""
        return index_length(self.layout, self.groups, self.m)

    @property
    def k_blocks(self) -> int:
        """Blocks of 128 along K, the last one possibly short."""
        return -(-self.k // BLOCK)

    def flops(self, tokens: int) -> int:
        """Multiplications and additions when the groups have ``tokens`` rows together."""
        return 2 * tokens * self.n * self.k

    def bytes(self, tokens: int, active: int) -> int:
        """Traffic for ``tokens`` rows in ``active`` groups that are not empty.

        Each of those rows and matrices and its scales are read once, each output row written once.
        """
        row = self.k + 4 * self.k_blocks + self.n * OUT_DTYPES[self.out_dtype].itemsize
        matrix = self.n * self.k + 4 * self.k_blocks * -(-self.n // BLOCK)
        return tokens * row + active * matrix

    @classmethod
    def of_contiguous(
        cls,
        a: ScaledTensor,
        b: ScaledTensor,
        out: Array = None,
        *,
        m_indices: Array = None,
        offsets: Array = None,
        ends: Array = None,
        out_dtype: object = "bfloat16",
        fill_padding: bool = False,
    ) -> GroupedProblem:
        """The problem that these operands pose, after checking every rule that they must obey.

        a: (M_total, K), granularity (1, 128).  b: (groups, N, K), granularity (128, 128), its
        groups one after another without gaps.  out: None or (M_total, N) of ``out_dtype``.  Exactly
        one of ``m_indices``, ``offsets`` and ``ends``, as ``cpgemm.group_index`` describes them.
        Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError``.
        """
        layout, index = select_layout(m_indices=m_indices, offsets=offsets, ends=ends)
        dtype = normalize_out_dtype(out_dtype)
        check_operand("a", a, (1, BLOCK))
        _check_b(a, b)
        problem = cls(layout, b.shape[0], a.shape[0], b.shape[1], a.shape[1], dtype, fill_padding)
        if out is not None:
            check_matrix("out", out, (problem.m, problem.n), dtype, a)
        _check_common(problem, a, b, out, index)
        return problem

    @classmethod
    def of_masked(
        cls,
        a: ScaledTensor,
        b: ScaledTensor,
        out: Array = None,
        *,
        masked_m: Array,
        expected_m: int | None = None,
        out_dtype: object = "bfloat16",
    ) -> GroupedProblem:
        """The problem that these operands pose, after checking every rule that they must obey.

        a: (groups, M_max, K), granularity (1, 128).  b: (groups, N, K), granularity (128, 128).
        out: None or (groups, M_max, N) of ``out_dtype``.  masked_m: int32 (groups,).  expected_m:
        None or about how many rows a group has, a host integer that is only checked here.  The
        groups of a, its scales, b and out lie one after another without gaps; a row pitch is
        allowed.
        Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError``.
        """
        check_expected_m(expected_m)
        dtype = normalize_out_dtype(out_dtype)
        check_operand("a", a, (1, BLOCK), ndim=3)
        _check_b(a, b)
        if a.shape[0] != b.shape[0]:
            reject(
                "a",
                f"must have as many groups as b, {b.shape[0]}",
                f"shape {a.shape}",
                "Give it as (groups, M_max, K).",
            )
        problem = cls("masked", b.shape[0], a.shape[1], b.shape[1], a.shape[2], dtype)
        check_groups_adjacent("a", a.data)
        scales_pitch = 4 * problem.k_blocks * a.scales_pitch
        if problem.groups > 1 and a.scales.size and a.scales.strides[0] != scales_pitch:
            _reject_gap("a.scales", a.scales, scales_pitch)
        if out is not None:
            check_grouped_out(out, problem.shape, dtype, a)
        _check_common(problem, a, b, out, masked_m)
        return problem


# --------------------------------------------------------------------------------- single rules


def _check_b(a: ScaledTensor, b: ScaledTensor) -> None:
    check_operand("b", b, (BLOCK, BLOCK), ndim=3)
    if a.shape[-1] != b.shape[-1]:
        reject(
            "b",
            f"must have as many columns (K) as a, {a.shape[-1]}",
            f"shape {b.shape}",
            "Each group computes a @ b[g].T: give b as (groups, N, K).",
        )
    if b.device != a.device:
        reject("b", f"must be on a's device, {a.device}", b.device, "Move one of them.")
    check_groups_adjacent("b", b.data)


def check_groups_adjacent(name: str, array: Array) -> None:
    """The kernels see (groups, R, C) as one matrix of groups * R rows with a single pitch."""
    groups, rows, _ = array.shape
    if groups > 1 and rows > 1 and array.size:
        pitch = rows * array.strides[1]
        if array.strides[0] != pitch:
            _reject_gap(name, array, pitch)


def _reject_gap(name: str, array: Array, pitch: int) -> None:
    reject(
        name,
        f"must hold its groups one after another without gaps ({pitch} bytes apart)",
        f"{array.strides[0]} bytes, shape {tuple(array.shape)}",
        "Copy it into an array of its own.",
    )


def check_grouped_out(out: Array, shape: tuple[int, ...], dtype: OutDtype, a: ScaledTensor) -> None:
    """``out`` of a masked product: (groups, M_max, N), its groups one behind the other."""
    groups, m, n = shape
    same_kind = is_array(out) and is_cupy(out) == is_cupy(a.data)
    if not same_kind or out.dtype != OUT_DTYPES[dtype]:
        check_matrix("out", out, (m, n), dtype, a)  # rejects it: kind or dtype
    if tuple(out.shape) != shape:
        reject(
            "out",
            f"must have shape {shape} (groups, M_max, N)",
            f"shape {tuple(out.shape)}",
            "Allocate it with that shape.",
        )
    check_matrix("out", out[0], (m, n), dtype, a)
    check_groups_adjacent("out", out)
    if is_cupy(out):
        check_alignment("out", out)
    item = out.itemsize
    if groups > 1 and out.size and out.strides[0] < n * item:
        _reject_gap("out", out, m * n * item)


def _check_common(
    problem: GroupedProblem, a: ScaledTensor, b: ScaledTensor, out: Array, index: Array
) -> None:
    """The index array, overlaps with ``out``, the device; what may wait for a stream comes last."""
    check_index(problem.layout, problem.groups, problem.m, index, a)
    if out is not None:
        for other, array in (
            ("a", a.data), ("a.scales", a.scales), ("b", b.data), ("b.scales", b.scales),
            (index_name(problem.layout), index),
        ):  # fmt: skip
            check_no_overlap(out, other, array)
    check_device(a)
    check_contents(problem.layout, problem.groups, problem.m, index)


def check_expected_m(expected_m: object) -> None:
    """The hint: None, or an integer of the host that is not negative."""
    if expected_m is None:
        return
    if isinstance(expected_m, bool) or not isinstance(expected_m, (int, np.integer)):
        reject(
            "expected_m",
            "must be an integer of the host, or None",
            type(expected_m).__qualname__,
            "Estimate it, for example tokens * top_k // experts; it need not be right.",
            kind=ArgumentTypeError,
        )
    if expected_m < 0:
        reject("expected_m", "must not be negative", expected_m, "Leave it out if in doubt.")
