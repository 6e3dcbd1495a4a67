"""cpgemm: FP8 matrix products with fine-grained scaling for CuPy on NVIDIA Hopper.

    a = cpgemm.quantize(x, (1, 128))        # activations: a scale per row and 128 of K
    b = cpgemm.quantize(w, (128, 128))      # weights: a scale per 128 x 128 block
    d = cpgemm.gemm(a, b)                   # bfloat16, a @ b.T

NumPy arrays take a reference path with the same semantics and need no GPU.  Arrays of torch, JAX
and any DLPack producer are taken without a copy, and results are of their kind.

Submodules: ``cpgemm.moe``, ``cpgemm.epilogues``, ``cpgemm.deep_gemm`` (DeepGEMM's names),
``cpgemm.dlpack``, ``cpgemm.torch`` and ``cpgemm.jax`` (which import torch and JAX; nothing else
here does).
"""

import importlib as _importlib
from types import ModuleType as _ModuleType

from cpgemm.checkpoint import load_safetensors, save_safetensors
from cpgemm.compiler import compile_count, freeze
from cpgemm.config import KernelConfig
from cpgemm.errors import (
    ArgumentError,
    ArgumentTypeError,
    CompileError,
    CpgemmError,
    DeviceError,
    FrozenError,
    KernelWarning,
    MissingDependencyError,
    WrongResultError,
)
from cpgemm.gemm import gemm
from cpgemm.gemm_forms import gemm_nn, gemm_nt, gemm_tn, gemm_tt
from cpgemm.grouped import contiguous_alignment, grouped_gemm_contiguous, grouped_gemm_masked
from cpgemm.kernel_diff import diff
from cpgemm.kernel_view import Kernel
from cpgemm.open_kernels import kernel
from cpgemm.plan import GemmPlan, plan_gemm
from cpgemm.problem import GemmProblem
from cpgemm.quantize import quantize
from cpgemm.scaled import ScaledTensor
from cpgemm.template_kernel import kernel_from_template
from cpgemm.tuned import explain
from cpgemm.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CompileError",
    "CpgemmError",
    "DeviceError",
    "FrozenError",
    "GemmPlan",
    "GemmProblem",
    "Kernel",
    "KernelConfig",
    "KernelWarning",
    "MissingDependencyError",
    "ScaledTensor",
    "WrongResultError",
    "compile_count",
    "contiguous_alignment",
    "diff",
    "explain",
    "freeze",
    "gemm",
    "gemm_nn",
    "gemm_nt",
    "gemm_tn",
    "gemm_tt",
    "grouped_gemm_contiguous",
    "grouped_gemm_masked",
    "kernel",
    "kernel_from_template",
    "load_safetensors",
    "plan_gemm",
    "quantize",
    "save_safetensors",
    "tune",
]


def load_ipython_extension(shell: object) -> None:
    """``%load_ext cpgemm``: register cpgemm's magics with an IPython shell."""
    from cpgemm.magics import load

    load(shell)


_SUBMODULES = ("deep_gemm", "dlpack", "epilogues", "jax", "moe", "pictures", "torch")


def __getattr__(name: str) -> _ModuleType:
    """Submodules are imported when they are first named."""
    if name in _SUBMODULES:
        return _importlib.import_module(f"cpgemm.{name}")
    raise AttributeError(f"module 'cpgemm' has no attribute {name!r}")
