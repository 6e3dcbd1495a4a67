"""The names that ``deep_gemm.jit_kernels`` of early 2025 exported."""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.gemms import (
    gemm_fp8_fp8_bf16_nt,
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
)
from cpgemm.deep_gemm.layouts import (
    ceil_div,
    get_col_major_tma_aligned_tensor,
    get_m_alignment_for_contiguous_layout,
)
from cpgemm.deep_gemm.settings import get_num_sms, set_num_sms

__all__ = [
    "ceil_div",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_num_sms",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "set_num_sms",
]

__getattr__ = finder(__name__)
