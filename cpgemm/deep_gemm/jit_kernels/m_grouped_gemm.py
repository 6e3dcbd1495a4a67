"""The products of ``deep_gemm.jit_kernels.m_grouped_gemm`` of early 2025."""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.gemms import (
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
)

__all__ = ["m_grouped_gemm_fp8_fp8_bf16_nt_contiguous", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"]

__getattr__ = finder(__name__)
