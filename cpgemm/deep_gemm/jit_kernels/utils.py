"""The names of ``deep_gemm.jit_kernels.utils`` of early 2025."""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.layouts import (
    ceil_div,
    get_col_major_tma_aligned_tensor,
    get_m_alignment_for_contiguous_layout,
    get_tma_aligned_size,
)
from cpgemm.deep_gemm.settings import get_num_sms, set_num_sms

__all__ = [
    "ceil_div",
    "get_col_major_tma_aligned_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_tma_aligned_size",
    "set_num_sms",
]

__getattr__ = finder(__name__)
