"""Quantising and block-scaled FP8 products on JAX arrays, as they are and under ``jax.jit``.

    a, b = cpgemm.jax.quantize(x), cpgemm.jax.quantize(w, (128, 128))
    d = cpgemm.jax.gemm(*a, *b)                  # bfloat16, x @ w.T

Import it by its name: ``import cpgemm.jax``; ``import cpgemm`` alone imports no JAX.

Each function becomes a custom call of the compiled program (``jax.ffi``).  On a GPU it runs
cpgemm's kernel on XLA's own stream, on buffers that XLA allocated; the host waits for nothing and
no data passes through it.  On a CPU it runs the NumPy path.  What ``jit`` and its relatives can do
with them is in docs/jax.md.

Arguments are JAX arrays, traced or not, or NumPy arrays, which JAX moves to its device.  Rules
about types and shapes raise ``ArgumentError`` or ``ArgumentTypeError`` when a function is called or
traced.  What shows only when the program runs (no Hopper GPU, a kernel that does not build, index
arrays that break a rule on a CPU) comes from JAX with cpgemm's message in it: as a
``jax.errors.JaxRuntimeError``, or as a ``ValueError`` when a repeated call fails at once.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from cpgemm import xla_calls
from cpgemm.errors import MissingDependencyError, reject
from cpgemm.group_index import GroupLayout, index_length, index_name, select_layout
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.layout import BLOCK, FP8, Granularity, ScaleFormat, scale_pitch, scale_shape
from cpgemm.problem import OUT_DTYPES, GemmProblem, OutDtype
from cpgemm.quantize_kernels import INPUT_DTYPES
from cpgemm.scaled_rules import (
    check_axes,
    check_block_axis,
    check_granularity,
    check_scale_format,
)

try:
    import jax
    import jax.numpy as jnp
except ImportError as _error:
    raise MissingDependencyError(
        "jax: cpgemm.jax needs it; it cannot be imported. Install JAX for your platform."
    ) from _error

from cpgemm.jax_rules import (
    check_array,
    check_operand_types,
    check_shape,
    check_shapes,
    host_bool,
    host_integer,
    out_dtype_of,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike

__all__ = ["gemm", "grouped_gemm_contiguous", "grouped_gemm_masked", "quantize"]

for _name, _platform, _handler in xla_calls.handlers():
    # Before JAX has set up a platform it keeps the target until then.
    jax.ffi.register_ffi_target(_name, jax.ffi.pycapsule(_handler.pointer), platform=_platform)


# ------------------------------------------------------------------------------------ public face


def quantize(
    x: ArrayLike, granularity: Granularity = (1, 128), *, scale_format: ScaleFormat = "float32"
) -> tuple[jax.Array, jax.Array]:
    """Quantise ``x`` with the rule of ``cpgemm.quantize``; returns ``(data, scales)``.

    ``x``: float32, float16 or bfloat16 of shape (R, K) or (G, R, K), K a multiple of 16.
    ``granularity``: (1, 128), (128, 128), or (128, 1), which quantises columns (R is a multiple of
    16 then).  ``scale_format``: "float32", or "pow2" for scales that are powers of two.

    ``data``: float8_e4m3fn of x's shape.  ``scales``: float32, one for each block, short last
    blocks included: (..., R, ceil(K/128)), (..., ceil(R/128), ceil(K/128)) or
    (..., ceil(R/128), K).  Bits are those of ``cpgemm.quantize``.  Raises ``ArgumentError`` and
    ``ArgumentTypeError``, when called or traced.
    """
    pair = check_granularity(granularity)
    check_scale_format(scale_format)
    check_array("x", x, *INPUT_DTYPES.values())
    return _quantize(x, granularity=pair, scale_format=scale_format)


def gemm(
    a_data: ArrayLike,
    a_scales: ArrayLike,
    b_data: ArrayLike,
    b_scales: ArrayLike,
    *,
    c: ArrayLike | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """D = C + A @ B.T from block-scaled e4m3 operands; ``cpgemm.gemm`` on JAX arrays.

    a_data: float8_e4m3fn (M, K); a_scales: float32 (M, ceil(K/128)).  b_data: float8_e4m3fn (N, K);
    b_scales: float32 (ceil(N/128), ceil(K/128)).  c: None or (M, N) of ``out_dtype``.
    ``out_dtype``: "bfloat16" or "float32"; by default that of ``c``, else bfloat16.  K is a
    multiple of 16, N of 8, M anything.  Returns (M, N).  Raises ``ArgumentError`` and
    ``ArgumentTypeError``, when called or traced.
    """
    check_operand_types(a_data, a_scales, b_data, b_scales)
    name = out_dtype_of(out_dtype, c)
    if c is not None:
        check_array("c", c, OUT_DTYPES[name])
    return _gemm(a_data, a_scales, b_data, b_scales, c, out_dtype=name)


def grouped_gemm_contiguous(
    a_data: ArrayLike,
    a_scales: ArrayLike,
    b_data: ArrayLike,
    b_scales: ArrayLike,
    *,
    m_indices: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    ends: ArrayLike | None = None,
    out_dtype: Any = None,
    fill_padding: bool = True,
) -> jax.Array:
    """out[rows of g] = a[rows of g] @ b[g].T; ``cpgemm.grouped_gemm_contiguous`` on JAX arrays.

    a_data: float8_e4m3fn (M_total, K); a_scales: float32 (M_total, ceil(K/128)).  b_data:
    float8_e4m3fn (groups, N, K); b_scales: float32 (groups, ceil(N/128), ceil(K/128)).  Exactly one
    int32 array says which rows belong to which group: ``offsets`` (groups + 1,), ``m_indices``
    (M_total,) or ``ends`` (groups,), with the rules of ``cpgemm.grouped_gemm_contiguous``; their
    contents may change from call to call without a new compilation.  ``out_dtype``: "bfloat16"
    (also for None) or "float32".

    Returns (M_total, N).  Rows outside every group are zero; with ``fill_padding=False`` they hold
    anything, which saves writing them.  Raises ``ArgumentError`` and ``ArgumentTypeError``, when
    called or traced.
    """
    layout, index = select_layout(m_indices=m_indices, offsets=offsets, ends=ends)
    return _grouped(
        layout, a_data, a_scales, b_data, b_scales, index, None, out_dtype, fill_padding
    )


def grouped_gemm_masked(
    a_data: ArrayLike,
    a_scales: ArrayLike,
    b_data: ArrayLike,
    b_scales: ArrayLike,
    *,
    masked_m: ArrayLike,
    expected_m: int | None = None,
    out_dtype: Any = None,
    fill_padding: bool = True,
) -> jax.Array:
    """out[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T for each group g.

    a_data: float8_e4m3fn (groups, M_max, K); a_scales: float32 (groups, M_max, ceil(K/128)).
    b_data: float8_e4m3fn (groups, N, K); b_scales: float32 (groups, ceil(N/128), ceil(K/128)).
    masked_m: int32 (groups,), each between 0 and M_max.  ``expected_m``, about how many rows a
    group has, only helps to choose a kernel; each value of it is compiled anew.  ``out_dtype``:
    "bfloat16" (also for None) or "float32".

    Returns (groups, M_max, N).  Rows from masked_m[g] on are zero, for which ``out`` is cleared
    first; with ``fill_padding=False`` they hold anything.  Raises ``ArgumentError`` and
    ``ArgumentTypeError``, when called or traced.
    """
    return _grouped(
        "masked", a_data, a_scales, b_data, b_scales, masked_m, expected_m, out_dtype, fill_padding
    )


# ------------------------------------------------------------------------------- traced functions
#
# Compiled by themselves for concrete arrays, inlined into what a caller traces.  Rules about shapes
# are in here, so that a repeated call does not pay for them again.


@functools.partial(jax.jit, static_argnames=("granularity", "scale_format"), inline=True)
def _quantize(
    x: jax.Array, *, granularity: Granularity, scale_format: ScaleFormat
) -> tuple[jax.Array, jax.Array]:
    check_axes("x", x.shape)
    if granularity == (BLOCK, 1):
        turned = jnp.swapaxes(x, -1, -2)
        data, scales = _quantize(turned, granularity=(1, BLOCK), scale_format=scale_format)
        return jnp.swapaxes(data, -1, -2), jnp.swapaxes(scales, -1, -2)
    check_block_axis(x.shape[-1])
    *outer, rows, kblocks = scale_shape(x.shape, granularity)
    by_rows = granularity == (1, BLOCK)
    data, scales = _custom_call(
        "quantize",
        xla_calls.QUANTIZE,
        (
            jax.ShapeDtypeStruct(x.shape, FP8),
            jax.ShapeDtypeStruct(
                (*outer, kblocks, scale_pitch(rows)) if by_rows else (*outer, rows, kblocks),
                np.float32,
            ),
        ),
        "broadcast_all",
        x,
        block_rows=granularity[0],
        scale_format=scale_format,
    )
    return data, jnp.swapaxes(scales[..., :rows], -1, -2) if by_rows else scales


@functools.partial(jax.jit, static_argnames="out_dtype", inline=True)
def _gemm(
    a_data: jax.Array,
    a_scales: jax.Array,
    b_data: jax.Array,
    b_scales: jax.Array,
    c: jax.Array | None,
    *,
    out_dtype: OutDtype,
) -> jax.Array:
    check_shapes(a_data, a_scales, b_data, b_scales, "(M, K)", "(N, K)")
    problem = GemmProblem(
        a_data.shape[0], b_data.shape[0], a_data.shape[1], out_dtype, c is not None
    )
    shape = (problem.m, problem.n)
    if c is not None:
        check_shape("c", c, shape, "these operands", "Give one value for each of the result.")
    operands = [a_data, _rows_fastest(a_scales), b_data, b_scales, *([] if c is None else [c])]
    result = jax.ShapeDtypeStruct(shape, OUT_DTYPES[out_dtype])
    return _custom_call("gemm", xla_calls.GEMM, (result,), "sequential", *operands)[0]


@functools.partial(
    jax.jit, static_argnames=("layout", "expected_m", "out_dtype", "fill_padding"), inline=True
)
def _grouped_gemm(
    a_data: jax.Array,
    a_scales: jax.Array,
    b_data: jax.Array,
    b_scales: jax.Array,
    index: jax.Array,
    *,
    layout: GroupLayout,
    expected_m: int | None,
    out_dtype: OutDtype,
    fill_padding: bool,
) -> jax.Array:
    masked = layout == "masked"
    form = "(groups, M_max, K)" if masked else "(M_total, K)"
    check_shapes(a_data, a_scales, b_data, b_scales, form, "(groups, N, K)")
    groups, n, k = b_data.shape
    if masked and a_data.shape[0] != groups:
        reject(
            "a_data",
            f"must have as many groups as b_data, {groups}",
            f"shape {a_data.shape}",
            "Give it as (groups, M_max, K).",
        )
    problem = GroupedProblem(layout, groups, a_data.shape[-2], n, k, out_dtype)
    check_shape(
        index_name(layout),
        index,
        (index_length(layout, groups, problem.m),),
        f"{groups} groups and {problem.m} rows",
        "Give one number for each.",
    )
    return _custom_call(
        "grouped_gemm_masked" if masked else "grouped_gemm_contiguous",
        xla_calls.GROUPED_GEMM,
        (jax.ShapeDtypeStruct(problem.shape, OUT_DTYPES[out_dtype]),),
        "sequential",
        *(a_data, _rows_fastest(a_scales), b_data, b_scales, index),
        layout=layout,
        fill_padding=fill_padding,
        expected_m=-1 if expected_m is None else expected_m,
    )[0]


def _grouped(
    layout: GroupLayout,
    a_data: ArrayLike,
    a_scales: ArrayLike,
    b_data: ArrayLike,
    b_scales: ArrayLike,
    index: ArrayLike,
    expected_m: int | None,
    out_dtype: Any,
    fill_padding: bool,
) -> jax.Array:
    check_operand_types(a_data, a_scales, b_data, b_scales)
    check_array(index_name(layout), index, np.dtype(np.int32))
    return _grouped_gemm(
        *(a_data, a_scales, b_data, b_scales, index),
        layout=layout,
        expected_m=host_integer("expected_m", expected_m),
        out_dtype=out_dtype_of(out_dtype, None),
        fill_padding=host_bool("fill_padding", fill_padding),
    )


def _rows_fastest(scales: jax.Array) -> jax.Array:
    """(..., R, ceil(K/128)) as (..., ceil(K/128), R4), padded: how the kernels read scales.

    XLA drops this and its counterpart in ``_quantize`` where one meets the other.
    """
    turned = jnp.swapaxes(scales, -1, -2)
    missing = scale_pitch(scales.shape[-2]) - scales.shape[-2]
    return jnp.pad(turned, [(0, 0)] * (turned.ndim - 1) + [(0, missing)]) if missing else turned


def _custom_call(
    face: str,
    name: str,
    results: tuple[jax.ShapeDtypeStruct, ...],
    vmap_method: str,
    *operands: jax.Array,
    **attributes: Any,
) -> tuple[jax.Array, ...]:
    """The custom call ``name``; ``face`` is the public function that an error names."""
    _wait_at_exit()

    @jax.custom_jvp
    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            jax.ffi.ffi_call(name, results, vmap_method=vmap_method)(*operands, **attributes)
        )

    @call.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        reject(
            f"cpgemm.jax.{face}",
            "has no derivative",
            "a request to differentiate it",
            "Put jax.lax.stop_gradient around its operands, or write a jax.custom_vjp around what "
            "it is part of (docs/jax.md shows one).",
        )

    return tuple(call(*operands))


@functools.cache
def _wait_at_exit() -> None:
    """See to it that no program is under way when the interpreter shuts down.

    From then on a thread of XLA's that wants to enter a handler is ended, and the process waits for
    its program for ever.  JAX waits for programs with callbacks by itself, not for custom calls.
    What is registered last runs first: this comes before JAX gives up its platforms.
    """
    atexit.register(_finish)


def _finish() -> None:
    """Wait for every result that is still held, and for all that this thread has submitted."""
    for platform in ("cpu", "cuda"):
        with contextlib.suppress(Exception):  # no such platform, or results that are errors
            for array in jax.live_arrays(platform):
                with contextlib.suppress(Exception):
                    array.block_until_ready()
            for device in jax.local_devices(backend=platform):
                # What one thread submits runs in order, also what nobody holds any more.
                (jax.device_put(np.float32(0), device) + 1).block_until_ready()
