"""Grouped products for mixture-of-experts: each group of rows has a matrix B of its own.

    out[rows of g] = a[rows of g] @ b[g].T

The sizes of the groups are data on the device: no call reads them on the host or waits, so that
calls can be captured in a CUDA graph and replayed with other sizes.  CuPy operands run one kernel
on CuPy's current stream; NumPy operands take the reference path.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm import env, launch
from cpgemm.compiler import load_kernel
from cpgemm.config import AdaptiveKernelConfig, GroupedKernelConfig
from cpgemm.errors import reject
from cpgemm.group_index import GROUP_LAYOUTS, select_layout
from cpgemm.grouped_heuristics import choose_grouped
from cpgemm.grouped_problem import GroupedProblem, contiguous_alignment
from cpgemm.grouped_reference import grouped_reference
from cpgemm.heuristics import Machine
from cpgemm.kernels import gemm_source
from cpgemm.problem import empty_result, infer_out_dtype
from cpgemm.scaled import BLOCK, ScaledTensor, is_cupy, pointer
from cpgemm.tma import matrix_map, row_pitch, tensor_map

__all__ = ["contiguous_alignment", "grouped_gemm_contiguous", "grouped_gemm_masked"]

# cuda_src/group_scheduler.cuh: enum GroupLayout.
_LAYOUT_NUMBERS = {"offsets": 0, "ends": 1, "masked": 2, "m_indices": 3}
assert set(_LAYOUT_NUMBERS) == set(GROUP_LAYOUTS)
# cuda_src/group_scheduler.cuh: enum GroupForm.
BY_SIZES, TALL, FLAT = 0, 1, 2


def grouped_gemm_contiguous(
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any = None,
    *,
    m_indices: Any = None,
    offsets: Any = None,
    ends: Any = None,
    out_dtype: Any = None,
    fill_padding: bool = False,
) -> Any:
    """out[rows of g] = a[rows of g] @ b[g].T, the groups one behind the other in the rows of ``a``.

    a: ScaledTensor (M_total, K), granularity (1, 128).  b: ScaledTensor (groups, N, K), granularity
    (128, 128), 1024 groups at most.  out: (M_total, N), bfloat16 or float32 (``out_dtype``, by
    default that of ``out``, else bfloat16).  K is a multiple of 16 and not 0, N a multiple of 8.
    Exactly one int32 array, where ``a`` is, says which rows belong to which group:

    - ``offsets`` (groups + 1,): group g has rows offsets[g] to offsets[g + 1]; any sizes, 0 too,
      and no padding between them;
    - ``m_indices`` (M_total,): the group of each row, constant within each aligned block of 128
      rows; -1 marks padding rows, which stand behind the block's group;
    - ``ends`` (groups,): group g ends before row ends[g] and starts at ends[g - 1] rounded up to
      128.

    Rows outside every group (padding) are never read into a result, whatever they and their scales
    hold, NaN included; their rows of ``out`` stay as they are, or become zero with
    ``fill_padding``.  When ``out`` is made here, they hold anything without it.

    One launch on CuPy's current stream; sizes are read on the device.  For sizes that break the
    rules nothing outside ``out`` is written: ranges are clamped to the rows there are, reversed
    ones are empty, an aligned block whose first index names no group is padding.
    ``CPGEMM_CHECK=1`` checks them first, and waits for the stream; NumPy arrays are always checked.

    Returns ``out``.  Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before
    anything is launched or written.
    """
    problem = GroupedProblem.of_contiguous(
        a,
        b,
        out,
        m_indices=m_indices,
        offsets=offsets,
        ends=ends,
        out_dtype=infer_out_dtype(out_dtype, out),
        fill_padding=fill_padding,
    )
    _, index = select_layout(m_indices=m_indices, offsets=offsets, ends=ends)
    return _run(problem, a, b, out, index)


def grouped_gemm_masked(
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any = None,
    *,
    masked_m: Any,
    expected_m: int | None = None,
    out_dtype: Any = None,
) -> Any:
    """out[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T for each group g.

    a: ScaledTensor (groups, M_max, K), granularity (1, 128).  b: ScaledTensor (groups, N, K),
    granularity (128, 128), 1024 groups at most.  out: (groups, M_max, N), bfloat16 or float32
    (``out_dtype``, by default that of ``out``, else bfloat16).  masked_m: int32 (groups,), where
    ``a`` is, each between 0 and M_max.  Only the first masked_m[g] rows of each group are read into
    a result and written; the others stay as they are (anything, when ``out`` is made here).
    ``expected_m``, about how many rows a group has, is DeepGEMM's hint; it is checked but not
    needed: the kernel looks at the counts and chooses its tiles itself.

    One launch on CuPy's current stream; counts are read on the device.  Counts below 0 are taken as
    0, counts above M_max as M_max; ``CPGEMM_CHECK=1`` checks them first, and waits for the stream.

    Returns ``out``.  Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before
    anything is launched or written.
    """
    problem = GroupedProblem.of_masked(
        a,
        b,
        out,
        masked_m=masked_m,
        expected_m=expected_m,
        out_dtype=infer_out_dtype(out_dtype, out),
    )
    return _run(problem, a, b, out, masked_m)


def _run(
    problem: GroupedProblem,
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    index: Any,
) -> Any:
    if not is_cupy(a.data):
        return grouped_reference(problem, a, b, out, index)
    with a.data.device:
        if out is None:
            out = empty_result(problem.shape, problem.out_dtype)
        if out.size:
            machine = Machine.of_device(a.data.device.id)
            config = choose_grouped(problem, machine)
            launch_grouped(problem, config, a, b, out, index)
    return out


def launch_grouped(
    problem: GroupedProblem,
    config: GroupedKernelConfig,
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    index: Any,
    form: int | None = None,
) -> None:
    """Launch a chosen kernel on operands that obey every rule and lie on CuPy's current device.

    ``form`` makes an adaptive kernel take ``TALL`` or ``FLAT`` tiles whatever the sizes.
    """
    refusal = config.why_not_layout(problem.layout, problem.n)
    if refusal:
        reject("config", f"must suit {problem}", f"{config.name}: {refusal}", "Leave it out.")
    source = gemm_source(config)
    # No more blocks than tiles when every group ends in a short one, whichever form is taken.
    least = config.flat if isinstance(config, AdaptiveKernelConfig) else config
    row_tiles = -(-problem.rows // least.block_m) + problem.groups
    tiles = row_tiles * least.column_tiles(problem.n)
    sms = Machine.of_device(a.data.device.id).sms
    prepared = launch.launch_config(
        config.blocks(tiles, sms), config.threads, config.shared_bytes, env.pdl()
    )
    launch.run(load_kernel(source), prepared, _arguments(problem, config, a, b, out, index, form))


def _arguments(
    problem: GroupedProblem,
    config: GroupedKernelConfig,
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    index: Any,
    form: int | None,
) -> tuple[Any, ...]:
    """The kernel's parameters in their order, in the units of its signature."""
    groups = problem.groups if problem.layout == "masked" else 1
    map_scale_a = tensor_map(
        pointer(a.scales), groups * problem.k_blocks, problem.m, 4 * a.scales_pitch, 4,
        (1, config.scale_box), 0, a.data.device.id,
    )  # fmt: skip
    map_a = matrix_map(a.data, (config.row_box // config.cluster_n, BLOCK), 128)
    map_few = matrix_map(a.data, (config.few_box // config.cluster_n, BLOCK), 128)
    more: tuple[Any, ...] = ()
    last: tuple[Any, ...] = ()
    if isinstance(config, AdaptiveKernelConfig):
        more = _weights_and_result(config.flat, b, out)
        last = (np.int32(_form(problem) if form is None else form),)
    return (
        map_a,
        map_few,
        map_scale_a,
        *_weights_and_result(config, b, out),
        *more,
        np.uint64(pointer(b.scales)),
        np.uint64(pointer(index)),
        np.uint64(pointer(out)),
        np.int64(row_pitch(out) // out.itemsize),
        np.int32(_LAYOUT_NUMBERS[problem.layout]),
        np.int32(problem.groups),
        np.int32(problem.m),
        np.int32(problem.n),
        np.int32(problem.k),
        np.int32(problem.fill_padding),
        *last,
    )


def _weights_and_result(config: GroupedKernelConfig, b: ScaledTensor, out: Any) -> tuple[Any, Any]:
    """Maps of B and D for one form of tile."""
    map_b = matrix_map(b.data, (config.block_n, BLOCK), 128)
    # The float32 kernels store from registers and never look at their map of D.
    map_d = matrix_map(out, config.store_box, config.store_box[1] * 2) if config.staged else map_b
    return map_b, map_d


def _form(problem: GroupedProblem) -> int:
    """How an adaptive kernel finds its form: by the sizes, unless they stand in m_indices."""
    if problem.layout != "m_indices":
        return BY_SIZES
    return FLAT if problem.m <= contiguous_alignment() * problem.groups else TALL
