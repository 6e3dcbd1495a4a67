"""The names of ``deep_gemm.utils.math``."""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.casts import (
    ceil_to_ue8m0,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_custom_dims_cast_to_fp8,
    per_token_cast_to_fp8,
)
from cpgemm.deep_gemm.layouts import align, ceil_div

__all__ = [
    "align",
    "ceil_div",
    "ceil_to_ue8m0",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp8",
]

__getattr__ = finder(__name__)
