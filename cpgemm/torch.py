"""Quantising, block-scaled FP8 products and a linear layer for PyTorch, ``torch.compile`` included.

    a, a_scales = cpgemm.torch.quantize(x)
    b, b_scales = cpgemm.torch.quantize(w, (128, 128))
    d = cpgemm.torch.gemm(a, a_scales, b, b_scales)         # bfloat16, x @ w.T

Import it by its name: ``import cpgemm.torch``; ``import cpgemm`` alone imports no torch.

The functions are operators of torch (``torch.ops.cpgemm.*``): ``torch.compile``, ``torch.export``
and CUDA graphs go through them.  Tensors on a GPU run one kernel on torch's current stream, into
memory of torch's allocator; those on the CPU take the NumPy path with the same semantics.  None of
the functions has a derivative; ``Linear`` has.

Broken rules raise ``ArgumentError`` or ``ArgumentTypeError`` naming the argument, also while torch
traces (where ``torch.compile`` wraps them in an error of its own).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpgemm.errors import MissingDependencyError
from cpgemm.layout import Granularity, ScaleFormat

try:
    import torch
except ImportError as _error:
    raise MissingDependencyError(
        "torch: cpgemm.torch needs it; it cannot be imported. Install PyTorch for your platform."
    ) from _error


from cpgemm.torch_linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Linear",
    "gemm",
    "gemm_out",
    "grouped_gemm_contiguous",
    "grouped_gemm_masked",
    "quantize",
]

_ops = torch.ops.cpgemm
_quantize, _gemm, _gemm_out = _ops.quantize.default, _ops.gemm.default, _ops.gemm_out.default
_contiguous = _ops.grouped_gemm_contiguous.default
_masked = _ops.grouped_gemm_masked.default


def quantize(
    x: Tensor, granularity: Granularity = (1, 128), *, scale_format: ScaleFormat = "float32"
) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` with the rule of ``cpgemm.quantize``; returns ``(data, scales)``.

    ``x``: float32, float16 or bfloat16 of shape (R, K) or (G, R, K), K a multiple of 16.
    ``granularity``: (1, 128), (128, 128), or (128, 1), which quantises columns (R is a multiple of
    16 then).  ``scale_format``: "float32", or "pow2" for scales that are powers of two.

    ``data``: float8_e4m3fn of x's shape.  ``scales``: float32, one for each block, short last
    blocks included, in the memory layout that the products read:

    - (1, 128): (..., R, ceil(K/128)), strides (..., 1, P) with P = R rounded up to 4;
    - (128, 128): (..., ceil(R/128), ceil(K/128)), contiguous;
    - (128, 1): (..., ceil(R/128), K), strides (..., P, 1) with P = K rounded up to 4; ``data`` is
      contiguous along R.

    Raises ``ArgumentError`` and ``ArgumentTypeError``, as all operators here do, when called or
    traced; what depends on memory (strides, addresses) when it runs.
    """
    rows, columns = granularity
    return _quantize(x, rows, columns, scale_format)


def gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """D = C + A @ B.T from block-scaled e4m3 operands.

    a: float8_e4m3fn (M, K); a_scales: float32 (M, ceil(K/128)).  b: float8_e4m3fn (N, K); b_scales:
    float32 (ceil(N/128), ceil(K/128)).  Codes are contiguous along K; scales that are not in the
    layout of ``quantize`` are copied into it at each call.  c: None or (M, N) of ``out_dtype``.
    ``out_dtype``: torch.bfloat16 or torch.float32; by default that of ``c``, else bfloat16.  K is a
    multiple of 16, N of 8, M anything.  Returns (M, N), contiguous.  Raises as ``quantize``.
    """
    return _gemm(a, a_scales, b, b_scales, c=c, out_dtype=out_dtype)


def gemm_out(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    out: Tensor,
    *,
    c: Tensor | None = None,
) -> Tensor:
    """``gemm`` into ``out``, which is returned; a, a_scales, b, b_scales as there.

    out: (M, N), bfloat16 or float32, rows contiguous, row pitch and address multiples of 16 bytes.
    c: None or like ``out``; it may be ``out`` itself.
    """
    _gemm_out(a, a_scales, b, b_scales, out=out, c=c)
    return out


def grouped_gemm_contiguous(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    offsets: Tensor | None = None,
    m_indices: Tensor | None = None,
    ends: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    fill_padding: bool = False,
) -> Tensor:
    """out[rows of g] = a[rows of g] @ b[g].T; ``cpgemm.grouped_gemm_contiguous`` as an operator.

    a: float8_e4m3fn (M_total, K); a_scales: float32 (M_total, ceil(K/128)).  b: float8_e4m3fn
    (groups, N, K); b_scales: float32 (groups, ceil(N/128), ceil(K/128)).  Exactly one int32 tensor
    says which rows belong to which group: ``offsets`` (groups + 1,), ``m_indices`` (M_total,) or
    ``ends`` (groups,); its contents stay on the device.  ``out_dtype``: torch.bfloat16 (also for
    None) or torch.float32.

    Returns (M_total, N).  Rows outside every group hold anything, or zeros with ``fill_padding``.
    """
    return _contiguous(
        *(a, a_scales, b, b_scales),
        offsets=offsets,
        m_indices=m_indices,
        ends=ends,
        out_dtype=out_dtype,
        fill_padding=fill_padding,
    )


def grouped_gemm_masked(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    masked_m: Tensor,
    out_dtype: torch.dtype | None = None,
    fill_padding: bool = False,
) -> Tensor:
    """out[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T for each group g.

    a: float8_e4m3fn (groups, M_max, K); a_scales: float32 (groups, M_max, ceil(K/128)).  b:
    float8_e4m3fn (groups, N, K); b_scales: float32 (groups, ceil(N/128), ceil(K/128)).  masked_m:
    int32 (groups,), each between 0 and M_max; its contents stay on the device.  ``out_dtype``:
    torch.bfloat16 (also for None) or torch.float32.

    Returns (groups, M_max, N).  Rows from masked_m[g] on hold anything, or zeros with
    ``fill_padding``, for which the whole result is cleared first.
    """
    options = {"out_dtype": out_dtype, "fill_padding": fill_padding}
    return _masked(a, a_scales, b, b_scales, masked_m=masked_m, **options)
