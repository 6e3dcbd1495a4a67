"""The names of ``deep_gemm.utils``.

Imports are absolute: under ``sys.modules["deep_gemm"]`` Python loads this folder once more by the
other name, and the functions must stay the same objects.
"""

from cpgemm.deep_gemm.absent import finder
from cpgemm.deep_gemm.utils import layout, math
from cpgemm.deep_gemm.utils.layout import *  # noqa: F403
from cpgemm.deep_gemm.utils.math import *  # noqa: F403

__all__ = [*layout.__all__, *math.__all__, "layout", "math"]

__getattr__ = finder(__name__)
