"""The product of ``deep_gemm.jit_kernels.gemm`` of early 2025."""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.gemms import gemm_fp8_fp8_bf16_nt

__all__ = ["gemm_fp8_fp8_bf16_nt"]

__getattr__ = finder(__name__)
