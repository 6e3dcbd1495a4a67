"""Grouped products for mixture-of-experts: each group of rows has a matrix B of its own.

    out[rows of g] = a[rows of g] @ b[g].T

The sizes of the groups are data on the device: no call reads them on the host or waits, so that
calls can be captured in a CUDA graph and replayed with other sizes.  Streams, kinds of arrays and
the CPU are as in ``gemm``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from cpgemm import env, settings
from cpgemm.calls import ReadyCalls, signature, working_framework
from cpgemm.compiler import load_kernel
from cpgemm.config import AdaptiveKernelConfig, GroupedKernelConfig
from cpgemm.cost_model import Machine
from cpgemm.dlpack import Framework, as_framework, as_native, empty
from cpgemm.epilogue_spec import EpilogueSpec
from cpgemm.errors import reject
from cpgemm.fused import fused_grouped, ready_launch
from cpgemm.group_index import GROUP_LAYOUTS, index_name, select_layout
from cpgemm.grouped_heuristics import choose_grouped
from cpgemm.grouped_problem import GroupedProblem, check_expected_m, contiguous_alignment
from cpgemm.grouped_reference import grouped_reference
from cpgemm.kernels import gemm_source
from cpgemm.launch import PreparedLaunch
from cpgemm.problem import OUT_DTYPES, infer_out_dtype
from cpgemm.scaled import BLOCK, ScaledTensor, is_cupy, pointer
from cpgemm.streams import working_stream
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
    epilogue: Any = None,
) -> Any:
    """out[rows of g] = a[rows of g] @ b[g].T, the groups one behind the other in the rows of ``a``.

    a: ScaledTensor (M_total, K), granularity (1, 128).  b: ScaledTensor (groups, N, K), granularity
    (128, 128), 1024 groups at most.  out: (M_total, N), bfloat16 or float32 (``out_dtype``, by
    default that of ``out``, else bfloat16).  K is a multiple of 16 and not 0, N a multiple of 8.
    Exactly one int32 array of any library, where ``a`` is, says which rows belong to which group:

    - ``offsets`` (groups + 1,): group g has rows offsets[g] to offsets[g + 1]; any sizes, 0 too,
      and no padding between them;
    - ``m_indices`` (M_total,): the group of each row, constant within each aligned block of 128
      rows; -1 marks padding rows, which stand behind the block's group;
    - ``ends`` (groups,): group g ends before row ends[g] and starts at ends[g - 1] rounded up to
      128.

    Rows outside every group (padding) are never read into a result, whatever they and their scales
    hold, NaN included; their rows of ``out`` stay as they are, or become zero with
    ``fill_padding``.  When ``out`` is made here, they hold anything without it.

    One launch; sizes are read on the device.  For sizes that break the rules nothing outside of
    ``out`` is written: ranges are clamped to the rows there are, reversed ones are empty, an
    aligned block whose first index names no group is padding.  ``CPGEMM_CHECK=1`` checks them
    first, and waits for the stream; NumPy arrays are always checked.

    ``epilogue``: steps of ``cpgemm.epilogues`` within the kernel; D then has the shape and the kind
    that they leave.  Not with ``fill_padding`` when that is another than (M_total, N).

    Returns ``out``.  Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before
    anything is launched or written.
    """
    layout, index = select_layout(m_indices=m_indices, offsets=offsets, ends=ends)
    if epilogue is None:
        key = None if out_dtype is not None else _key(a, b, out, index, layout, fill_padding)
        launch = _ready.get(key)
    else:
        key, launch = ready_launch(a, b, out, index, (layout, fill_padding, out_dtype), epilogue)
    if launch is not None and not env.check():
        launch()
        return out
    native_out = _native_out(out, epilogue)
    native_index = as_native(index_name(layout), index)
    arrays: dict[str, Any] = dict.fromkeys(("m_indices", "offsets", "ends"))
    problem = GroupedProblem.of_contiguous(
        a,
        b,
        native_out if epilogue is None else None,
        **{**arrays, layout: native_index},
        out_dtype=infer_out_dtype(out_dtype, native_out),
        fill_padding=fill_padding,
    )
    if epilogue is not None:
        return fused_grouped(
            problem, a, b, out, index, native_index, epilogue, prepare_grouped, key
        )
    framework = working_framework(a, b, out, index)
    return _run(problem, a, b, out, native_out, native_index, framework, key)


def grouped_gemm_masked(
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any = None,
    *,
    masked_m: Any,
    expected_m: int | None = None,
    out_dtype: Any = None,
    epilogue: Any = None,
) -> Any:
    """out[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T for each group g.

    a: ScaledTensor (groups, M_max, K), granularity (1, 128).  b: ScaledTensor (groups, N, K),
    granularity (128, 128), 1024 groups at most.  out: (groups, M_max, N), bfloat16 or float32
    (``out_dtype``, by default that of ``out``, else bfloat16).  masked_m: int32 (groups,), where
    ``a`` is, each between 0 and M_max.  Only the first masked_m[g] rows of each group are read into
    a result and written; the others stay as they are (anything, when ``out`` is made here).
    ``expected_m``, about how many rows a group has, is DeepGEMM's hint; it is checked but not
    needed: the kernel looks at the counts and chooses its tiles itself.

    One launch; counts are read on the device.  Counts below 0 are taken as 0, counts above M_max as
    M_max; ``CPGEMM_CHECK=1`` checks them first, and waits for the stream.

    ``epilogue``: as for ``grouped_gemm_contiguous``.

    Returns ``out``.  Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before
    anything is launched or written.
    """
    if epilogue is None:
        key = None if out_dtype is not None else _key(a, b, out, masked_m, "masked", False)
        launch = _ready.get(key)
    else:
        key, launch = ready_launch(a, b, out, masked_m, ("masked", False, out_dtype), epilogue)
    if launch is not None and not env.check():
        check_expected_m(expected_m)
        launch()
        return out
    native_out = _native_out(out, epilogue)
    native_index = as_native("masked_m", masked_m)
    problem = GroupedProblem.of_masked(
        a,
        b,
        native_out if epilogue is None else None,
        masked_m=native_index,
        expected_m=expected_m,
        out_dtype=infer_out_dtype(out_dtype, native_out),
    )
    if epilogue is not None:
        return fused_grouped(
            problem, a, b, out, masked_m, native_index, epilogue, prepare_grouped, key
        )
    framework = working_framework(a, b, out, masked_m)
    return _run(problem, a, b, out, native_out, native_index, framework, key)


_ready = ReadyCalls()


def _native_out(out: Any, epilogue: Any) -> Any:
    """``out`` as a native array; of a quantising epilogue, its codes say nothing of a dtype."""
    if out is None or (epilogue is not None and isinstance(out, ScaledTensor)):
        return None
    return as_native("out", out, writable=True)


def _key(a: Any, b: Any, out: Any, index: Any, layout: str, fill: bool) -> Hashable:
    """What a launch depends on; None when it is not to be remembered."""
    key = signature(a), signature(b), signature(out), signature(index), layout, fill
    return None if None in key else key


def ready_grouped(
    a: ScaledTensor, b: ScaledTensor, out: Any, index: Any, layout: str, fill_padding: bool = False
) -> PreparedLaunch | None:
    """The launch of an earlier call on these very operands, if it is still known."""
    return _ready.get(_key(a, b, out, index, layout, fill_padding))


def _run(
    problem: GroupedProblem,
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    native_out: Any,
    index: Any,
    framework: Framework,
    key: Hashable,
) -> Any:
    """Compute on operands that obey every rule; ``native_out`` and ``index`` are as_native's."""
    if not is_cupy(a.data):
        result = grouped_reference(problem, a, b, native_out, index)
        return as_framework(a.framework, result) if out is None else out
    device = a.data.data.device_id
    with working_stream(framework, device):
        made = out is None
        if made:
            out = empty(a.framework, problem.shape, OUT_DTYPES[problem.out_dtype], a.data)
            native_out = as_native("out", out)
        if native_out.size:
            config = choose_grouped(problem, Machine.of_device(device))
            launch = prepare_grouped(problem, config, a, b, native_out, index, framework=framework)
            if key is not None:
                _ready.put(key, launch)
            launch()
        return as_framework("jax", native_out) if made and a.framework == "jax" else out


def prepare_grouped(
    problem: GroupedProblem,
    config: GroupedKernelConfig,
    a: ScaledTensor,
    b: ScaledTensor,
    out: Any,
    index: Any,
    *,
    form: int | None = None,
    framework: Framework = "cupy",
    epilogue: EpilogueSpec | None = None,
    operands: tuple[bytes, ...] = (),
) -> PreparedLaunch:
    """The launch on operands that obey every rule and lie on CuPy's current device.

    ``form`` makes an adaptive kernel take ``TALL`` or ``FLAT`` tiles whatever the sizes.
    ``operands``: what the ``epilogue`` reads, as the kernel's last arguments.
    """
    refusal = config.why_not_layout(problem.layout, problem.n)
    if refusal:
        reject("config", f"must suit {problem}", f"{config.name}: {refusal}", "Leave it out.")
    # No more blocks than tiles when every group ends in a short one, whichever form is taken.
    least = config.flat if isinstance(config, AdaptiveKernelConfig) else config
    row_tiles = -(-problem.rows // least.block_m) + problem.groups
    tiles = row_tiles * least.column_tiles(problem.n)
    return PreparedLaunch(
        load_kernel(gemm_source(config, epilogue)),
        config.blocks(tiles, Machine.of_device(a.data.data.device_id).sms),
        config.threads,
        (*_arguments(problem, config, a, b, out, index, form), *operands),
        shared_bytes=config.shared_bytes,
        pdl=settings.pdl(),
        framework=framework,
    )


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
        (1, config.scale_box), 0,
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
