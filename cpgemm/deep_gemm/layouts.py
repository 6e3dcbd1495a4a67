"""DeepGEMM's layout helpers: where the scaling factors of an operand must lie on Hopper.

The factors of A, float32 (M, ceil(K / 128)), are read by TMA: MN-major, that is with stride
(1, pitch), the pitch being M rounded up to 16 bytes.  That is the rows-fastest layout of
``cpgemm.scaled``.  The factors of B, (ceil(N / 128), ceil(K / 128)), are row-major.  Both may have
a leading axis of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpgemm.deep_gemm.arrays import on_device, torch_of
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.group_index import contiguous_alignment
from cpgemm.layout import ALIGNMENT, BLOCK, array_module, pointer, relaid

__all__ = [
    "align",
    "ceil_div",
    "get_col_major_tma_aligned_tensor",
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "set_mk_alignment_for_contiguous_layout",
    "transform_sf_into_required_layout",
]


def ceil_div(x: int, y: int) -> int:
    """The quotient ``x / y`` of two non-negative integers, rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """``x`` rounded up to a multiple of ``y``."""
    return -(-x // y) * y


# -------------------------------------------------------------------- alignment of groups of rows


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows (128) at whose multiples groups start in the contiguous layouts."""
    return contiguous_alignment()


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """128, whatever ``expected_m``, as DeepGEMM answers on Hopper."""
    del expected_m
    return contiguous_alignment()


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Take ``new_value`` 128, which the kernels need; raises ``ArgumentError`` for another."""
    if new_value != contiguous_alignment():
        reject(
            "new_value",
            f"must be {contiguous_alignment()}, the alignment of the kernels for Hopper",
            new_value,
            "Ask get_theoretical_mk_alignment_for_contiguous_layout; groups of any size go into "
            "cpgemm.grouped_gemm_contiguous(..., offsets=...).",
        )


# ------------------------------------------------------------------------------- scaling factors


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """``x`` elements of ``element_size`` bytes (1, 2, 4, 8 or 16) rounded up to 16 bytes.

    Raises ``ArgumentError`` for another size.
    """
    if element_size < 1 or ALIGNMENT % element_size:
        reject("element_size", "must divide 16", element_size, "Give the bytes of one element.")
    return align(x, ALIGNMENT // element_size)


def get_mn_major_tma_aligned_tensor(sf: Any) -> Any:
    """``sf`` with stride 1 along its rows and a pitch of 16-byte multiples between its columns.

    sf: float32 (M, C) or (groups, M, C), torch, CuPy or NumPy, any strides.  Returns ``sf`` itself
    when it is so already, else a copy of the same kind and shape with strides (1, pitch) or
    (pitch * C, 1, pitch) in elements, made by one strided copy of its framework.  Raises
    ``ArgumentError`` for other axes, ``ArgumentTypeError`` for another dtype.
    """
    torch = torch_of("sf", sf)
    if len(sf.shape) not in (2, 3):
        reject("sf", "must have 2 or 3 axes", f"shape {tuple(sf.shape)}", "Reshape it.")
    if sf.dtype != (np.float32 if torch is None else torch.float32):
        reject("sf", "must be float32", sf.dtype, "Convert it.", kind=ArgumentTypeError)
    *outer, rows, columns = sf.shape
    pitch = get_tma_aligned_size(rows, 4)
    strides = (*([pitch * columns] if outer else []), 1, pitch)
    if torch is not None:
        if tuple(sf.stride()) == strides and sf.data_ptr() % ALIGNMENT == 0:
            return sf
        return torch.empty_strided(sf.shape, strides, dtype=sf.dtype, device=sf.device).copy_(sf)
    if sf.strides == tuple(4 * stride for stride in strides) and pointer(sf) % ALIGNMENT == 0:
        return sf
    with on_device(sf):
        return relaid(sf, (1, BLOCK), array_module(sf))


get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor


def transform_sf_into_required_layout(
    sf: Any,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Any = None,
) -> Any:
    """Scaling factors in the layout that the products read on Hopper.

    sf: float32 (ceil(mn / gran_mn), ceil(k / gran_k)), with a leading axis of ``num_groups`` unless
    that is None.  recipe: (gran_mn, gran_k), or (gran_m, gran_n, gran_k), of which ``is_sfa`` picks
    the first or (also when None) the second.  (1, 128) gives what
    ``get_mn_major_tma_aligned_tensor`` gives, (128, 128) gives ``sf`` after checking it; others
    raise ``NotImplementedError``.  ``disable_ue8m0_cast`` and ``psum_layout`` change nothing here:
    Hopper reads float32.
    """
    del disable_ue8m0_cast, psum_layout
    torch_of("sf", sf)
    granularity = tuple(recipe)
    if len(granularity) == 3:
        granularity = (granularity[0 if is_sfa else 1], granularity[2])
    if granularity not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise NotImplementedError(
            f"cpgemm.deep_gemm.transform_sf_into_required_layout: recipe {tuple(recipe)} is not "
            "there; use one factor for 1 x 128 or 128 x 128 values, recipe (1, 128, 128)"
        )
    if "int" in str(sf.dtype):
        raise NotImplementedError(
            "cpgemm.deep_gemm.transform_sf_into_required_layout: packed UE8M0 factors belong to "
            "Blackwell; use float32 factors, powers of two if you like"
        )
    outer = () if num_groups is None else (num_groups,)
    wanted = (*outer, ceil_div(mn, granularity[0]), ceil_div(k, BLOCK))
    if tuple(sf.shape) != wanted:
        reject(
            "sf",
            f"must have shape {wanted} for mn {mn}, k {k}, {granularity} and {num_groups} groups",
            f"shape {tuple(sf.shape)}",
            "Give one factor for each block, short last blocks included.",
        )
    if granularity == (1, BLOCK):
        return get_mn_major_tma_aligned_tensor(sf)
    return sf
