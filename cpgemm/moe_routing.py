"""From the experts of tokens to rows sorted by expert: ``route``, ``offsets_from_counts``.

A token t with its j-th expert is one row of the sorted order.  Rows of one expert are neighbours,
in the order of ``t * top_k + j`` (the sort is stable), experts ascend, and a group starts at a
multiple of ``alignment``.  What lies between two groups and behind the last is padding.

Ids on a GPU are not read by the host.  Ids that name no expert are safe there: they count as
dropped.  ``CPGEMM_CHECK=1`` downloads and checks them; NumPy arrays are always checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpgemm.bridged import bridged
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.moe_kernels import MAX_GROUPS, launch_offsets, launch_route
from cpgemm.moe_rules import (
    MAX_EXTENT,
    check_like,
    check_numbers,
    check_size,
    readable_contents,
)
from cpgemm.problem import check_free
from cpgemm.scaled import BLOCK, Array, array_module, device_of, is_cupy, pointer

__all__ = ["Routing", "offsets_from_counts", "route", "routed_rows"]

_LARGEST = 2**31 - 1
_MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """Where each token's row for each of its experts went.  All arrays int32, contiguous.

    - ``offsets``: (groups + 1,): group g starts at row ``offsets[g]``; the last is the end of all
    - ``ends``: (groups,): the end of each group's rows, padding not counted
    - ``order``: (rows,): the index ``t * top_k + j`` that each row holds, -1 for padding
    - ``position``: (tokens, top_k): the row of each, -1 for what was dropped
    - ``m_indices``: (rows,): the group of each row, -1 for padding; or None
    - ``alignment``: groups start at multiples of it

    ``offsets`` feeds the ragged layout of ``grouped_gemm_contiguous`` (with an alignment it
    multiplies the padding too, whose rows are zeros); with an alignment of 128 ``ends`` and
    ``m_indices`` feed its other layouts.  ``route`` makes one, ``Routing.empty`` one to be filled.
    Raises ``ArgumentError`` and ``ArgumentTypeError``; contents are not looked at.
    """

    offsets: Array
    ends: Array
    order: Array
    position: Array
    m_indices: Array | None = None
    alignment: int = 1

    def __post_init__(self) -> None:
        check_numbers("position", self.position, 2)
        check_numbers("offsets", self.offsets, 1)
        if self.offsets.size < 2:
            reject("offsets", "must have groups + 1 elements", self.offsets.size, "Use route.")
        check_size("alignment", self.alignment, 1, _MAX_ALIGNMENT)
        _check_m_indices_wanted(self.m_indices is not None, self.alignment)
        groups = self.offsets.size - 1
        rows = routed_rows(self.tokens, self.top_k, groups, alignment=self.alignment)
        wanted = {"offsets": (groups + 1,), "ends": (groups,), "order": (rows,)}
        if self.m_indices is not None:
            wanted["m_indices"] = (rows,)
        for name, shape in wanted.items():
            array = getattr(self, name)
            check_numbers(name, array, 1)
            check_like(name, array, "position", self.position)
            if tuple(array.shape) != shape:
                reject(
                    name,
                    f"must have shape {shape} for {groups} groups, positions of shape "
                    f"{tuple(self.position.shape)} and alignment {self.alignment}",
                    f"shape {tuple(array.shape)}",
                    "Routing.empty makes arrays that fit.",
                )

    @classmethod
    def empty(
        cls,
        tokens: int,
        top_k: int,
        groups: int,
        *,
        alignment: int = 1,
        m_indices: bool = False,
        xp: Any = np,
    ) -> Routing:
        """Uninitialised arrays for ``route(..., out=)``; ``xp`` is ``numpy`` or ``cupy``.

        Inside of a graph capture nothing should be allocated: make it before.
        """
        rows = routed_rows(tokens, top_k, groups, alignment=alignment)
        _check_m_indices_wanted(m_indices, alignment)
        return cls(
            xp.empty(groups + 1, np.int32),
            xp.empty(groups, np.int32),
            xp.empty(rows, np.int32),
            xp.empty((tokens, top_k), np.int32),
            xp.empty(rows, np.int32) if m_indices else None,
            alignment,
        )

    @property
    def tokens(self) -> int:
        """Tokens that were routed."""
        return int(self.position.shape[0])

    @property
    def top_k(self) -> int:
        """Experts of each token."""
        return int(self.position.shape[1])

    @property
    def groups(self) -> int:
        """Experts there are."""
        return int(self.ends.size)

    @property
    def rows(self) -> int:
        """Rows of the sorted order, padding counted."""
        return int(self.order.size)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:<ordinal>"``."""
        return device_of(self.position)

    def __repr__(self) -> str:
        return (
            f"Routing(tokens={self.tokens}, top_k={self.top_k}, groups={self.groups}, "
            f"rows={self.rows}, alignment={self.alignment}, device={self.device!r})"
        )


def routed_rows(tokens: int, top_k: int, groups: int, *, alignment: int = 1) -> int:
    """Rows that ``route`` needs whatever the ids are: the size of ``order``.

    ``tokens * top_k`` without padding.  With it, at most ``min(groups, tokens * top_k)`` groups
    have rows, each with ``alignment - 1`` rows of padding at most, and each takes a multiple of
    ``alignment``.  Raises ``ArgumentError`` for sizes out of range.
    """
    check_size("tokens", tokens, 0, MAX_EXTENT)
    check_size("top_k", top_k, 1, MAX_EXTENT)
    check_size("groups", groups, 1, MAX_GROUPS)
    check_size("alignment", alignment, 1, _MAX_ALIGNMENT)
    count = tokens * top_k
    rows = (count + min(groups, count) * (alignment - 1)) // alignment * alignment
    if rows > MAX_EXTENT:
        reject("tokens", f"at most {MAX_EXTENT} rows with padding", rows, "Route by parts.")
    return rows


@bridged
def offsets_from_counts(counts: Array, *, alignment: int = 1, out: Array | None = None) -> Array:
    """Where groups start: exclusive sums of ``counts``, each rounded up to ``alignment``.

    ``counts``: int32 (G,), NumPy or CuPy, contiguous.  Returns int32 (G + 1,), which is ``out``
    when that is given: ``offsets[g]`` is the start of group g, ``offsets[G]`` the end of the last.
    CuPy arrays take one launch on CuPy's current stream.

    Negative counts, and sums of 2**31 and more, are rejected for NumPy (and with ``CPGEMM_CHECK``);
    on a GPU a negative count counts as 0 and such a sum becomes 2**31 - 1.

    Raises ``ArgumentError`` and ``ArgumentTypeError`` before anything is written.
    """
    check_numbers("counts", counts, 1)
    check_size("alignment", alignment, 1, _MAX_ALIGNMENT)
    if counts.size > MAX_EXTENT:
        reject("counts", f"at most {MAX_EXTENT} groups", counts.size, "Split them.")
    if out is not None:
        _check_out("out", out, (counts.size + 1,), "counts", counts)
    values = readable_contents(counts)
    sums = None
    if values is not None:
        if (values < 0).any():
            at = int(np.argmax(values < 0))
            reject(
                "counts",
                "must not be negative",
                f"counts[{at}] = {values[at]}",
                "Count the rows of each group.",
            )
        sums = np.concatenate(([0], np.cumsum(-(-values // alignment) * alignment)))
        if sums[-1] > _LARGEST:
            reject(
                "counts", f"must sum up to at most {_LARGEST}", sums[-1], "Split the groups."
            )  # fmt: skip
    if is_cupy(counts):
        with counts.device:
            if out is None:
                out = array_module(counts).empty(counts.size + 1, np.int32)
            launch_offsets(counts, out, alignment)
        return out
    assert sums is not None
    if out is None:
        out = np.empty(counts.size + 1, np.int32)
    out[...] = sums
    return out


@bridged
def route(
    expert_ids: Array,
    groups: int,
    *,
    alignment: int = 1,
    m_indices: bool = False,
    out: Routing | None = None,
) -> Routing:
    """Sort the rows of all tokens by expert.

    ``expert_ids``: int32 (tokens, top_k), NumPy or CuPy, contiguous (on a GPU its address is a
    multiple of 16 bytes), values from 0 to ``groups - 1``, or -1 for what is dropped and gets no
    row.  ``groups``: 1 to 4096 experts.  ``alignment``: groups start at its multiples.
    ``m_indices``: whether to make that array too, for which ``alignment`` must be a multiple of
    128.  ``out``: a ``Routing`` of the same sizes, alignment and kind, to be filled and returned.

    Returns a ``Routing`` where ``expert_ids`` is.  The order is stable and the same on every run.
    ``order`` has ``routed_rows(tokens, top_k, groups, alignment=alignment)`` rows, which does not
    depend on the ids; those without a row are -1.  CuPy arrays take one launch on CuPy's current
    stream, which reads nothing on the host and can be captured in a graph (with ``out``).

    Ids out of range are rejected for NumPy (and with ``CPGEMM_CHECK``); on a GPU they are dropped.

    Raises ``ArgumentError`` and ``ArgumentTypeError`` before anything is written.
    """
    check_numbers("expert_ids", expert_ids, 2)
    tokens, top_k = expert_ids.shape
    check_size("groups", groups, 1, MAX_GROUPS)
    if top_k < 1:
        reject(
            "expert_ids",
            "must have at least one expert for each token",
            f"shape {tuple(expert_ids.shape)}",
            "Give it as (tokens, top_k).",
        )
    if is_cupy(expert_ids) and expert_ids.size and pointer(expert_ids) % 16:
        reject(
            "expert_ids",
            "must start at a 16-byte aligned address on a GPU",
            f"address {pointer(expert_ids):#x}",
            "Give a copy.",
        )
    routed_rows(tokens, top_k, groups, alignment=alignment)
    _check_m_indices_wanted(m_indices, alignment)
    if out is not None:
        _check_out_routing(expert_ids, groups, alignment, m_indices, out)
    values = readable_contents(expert_ids)
    if values is not None:
        wrong = (values < -1) | (values >= groups)
        if wrong.any():
            t, j = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
            reject(
                "expert_ids",
                f"must be an expert, 0 to {groups - 1}, or -1 for a dropped one",
                f"expert_ids[{t}, {j}] = {values[t, j]}",
                "Mark what is to be dropped with -1.",
            )
    if is_cupy(expert_ids):
        with expert_ids.device:
            if out is None:
                out = _empty_like(expert_ids, groups, alignment, m_indices)
            launch_route(
                expert_ids,
                out.offsets,
                out.ends,
                out.order,
                out.position,
                out.m_indices,
                alignment,
            )
        return out
    if out is None:
        out = _empty_like(expert_ids, groups, alignment, m_indices)
    _route_on_host(expert_ids, out)
    return out


def _route_on_host(expert_ids: Array, out: Routing) -> None:
    ids = expert_ids.reshape(-1)
    kept = ids >= 0
    counts = np.bincount(ids[kept], minlength=out.groups)
    offsets_from_counts(counts.astype(np.int32), alignment=out.alignment, out=out.offsets)
    out.ends[...] = out.offsets[:-1] + counts
    by_expert = np.argsort(np.where(kept, ids, out.groups), kind="stable")[: counts.sum()]
    experts = ids[by_expert]
    first = np.cumsum(counts) - counts  # of each group, were there no padding
    rows = out.offsets[experts] + np.arange(experts.size) - first[experts]
    out.order[...] = -1
    out.order[rows] = by_expert
    out.position[...] = -1
    out.position.reshape(-1)[by_expert] = rows
    if out.m_indices is not None:
        out.m_indices[...] = -1
        out.m_indices[rows] = experts


def _empty_like(expert_ids: Array, groups: int, alignment: int, m_indices: bool) -> Routing:
    xp = array_module(expert_ids)
    tokens, top_k = expert_ids.shape
    return Routing.empty(tokens, top_k, groups, alignment=alignment, m_indices=m_indices, xp=xp)


# -------------------------------------------------------------------------------------------- rules


def _check_m_indices_wanted(m_indices: bool, alignment: int) -> None:
    if m_indices and alignment % BLOCK:
        reject(
            "m_indices",
            f"needs an alignment that is a multiple of {BLOCK}: it is constant within such blocks",
            f"alignment {alignment}",
            f"Give alignment={BLOCK}, or feed offsets.",
        )


def _check_out(name: str, out: Array, shape: tuple[int, ...], like_name: str, like: Array) -> None:
    check_numbers(name, out, len(shape))
    check_like(name, out, like_name, like)
    if tuple(out.shape) != shape:
        reject(name, f"must have shape {shape}", f"shape {tuple(out.shape)}", "Leave it out.")
    check_free(out, {like_name: like})


def _check_out_routing(
    expert_ids: Array, groups: int, alignment: int, m_indices: bool, out: Routing
) -> None:
    if not isinstance(out, Routing):
        reject(
            "out",
            "must be a Routing",
            type(out).__qualname__,
            "Make one with Routing.empty, or leave it out.",
            kind=ArgumentTypeError,
        )
    wanted = (tuple(expert_ids.shape), groups, alignment, m_indices)
    got = (tuple(out.position.shape), out.groups, out.alignment, out.m_indices is not None)
    if wanted != got:
        reject(
            "out",
            "must have positions of shape {}, {} groups, alignment {} and m_indices: {}".format(
                *wanted
            ),
            "{}, {}, {}, {}".format(*got),
            "Make one with Routing.empty, or leave it out.",
        )
    for array in (out.offsets, out.ends, out.order, out.position, out.m_indices):
        if array is not None:
            _check_out("out", array, tuple(array.shape), "expert_ids", expert_ids)
