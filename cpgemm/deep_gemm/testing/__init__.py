"""The names of ``deep_gemm.testing`` that measure; those that time raise NotImplementedError."""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.compare import calc_diff, count_bytes
from cpgemm.deep_gemm.testing import numeric

__all__ = ["calc_diff", "count_bytes", "numeric"]

__getattr__ = finder(__name__)
