"""Other libraries on the same operands: cuBLASLt through torch, and DeepGEMM.

Each is used where it is installed and reported as absent with the reason otherwise.  All of them
multiply the memory that cpgemm multiplies; scales lie as each library wants them, which is as
cpgemm stores them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from cpgemm.bench.contenders import Absent, Call, Contender
from cpgemm.bench.operands import Operands, Product
from cpgemm.dlpack import to_torch
from cpgemm.scaled import BLOCK

__all__ = [
    "cublaslt",
    "deep_gemm",
    "deep_gemm_launches",
    "find_deep_gemm",
    "find_torch",
]

_FUNCTIONS = {
    "contiguous": (
        "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    ),
    "masked": (
        "m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked",
        "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    ),
    "dense": ("fp8_gemm_nt", "gemm_fp8_fp8_bf16_nt"),
}  # fmt: skip
"""What DeepGEMM's functions are called, newest first."""


def find_torch() -> Any:
    """torch with CUDA; ``Absent`` says what is wrong."""
    try:
        import torch
    except ImportError as error:
        raise Absent("torch is not installed") from error
    if not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} finds no CUDA device")
    return torch


def find_deep_gemm() -> Any:
    """The real DeepGEMM, even where ``deep_gemm`` stands for ``cpgemm.deep_gemm`` in this process.

    ``Absent`` says why there is none.
    """
    find_torch()
    found = _look_for_deep_gemm()
    if isinstance(found, str):
        raise Absent(found)
    return found


@functools.cache
def _look_for_deep_gemm() -> Any:
    """The module, or why there is none; looked for once, because importing it takes seconds."""

    def named() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "deep_gemm"]

    aliased = {name: sys.modules[name] for name in named()}
    current = aliased.get("deep_gemm")
    if current is not None and not _is_ours(current):
        return current
    for name in aliased:
        del sys.modules[name]
    try:
        return importlib.import_module("deep_gemm")
    except Exception as error:  # it looks for a CUDA toolkit while it is imported, and more
        if isinstance(error, ModuleNotFoundError) and error.name == "deep_gemm":
            return "deep_gemm is not installed"
        return f"deep_gemm cannot be imported: {_brief(error)}"
    finally:
        if current is not None:
            for name in named():
                del sys.modules[name]
            sys.modules.update(aliased)


def _is_ours(module: Any) -> bool:
    return str(getattr(module, "__name__", "")).partition(".")[0] == "cpgemm"


# --------------------------------------------------------------------------------------- cuBLASLt


def cublaslt(name: str, product: Product) -> Contender:
    """``torch._scaled_mm``, with block scales or (less work) with one scale for each operand."""
    torch = find_torch()
    case = product.case
    if not hasattr(torch, "_scaled_mm"):
        raise Absent(f"torch {torch.__version__} has no _scaled_mm")
    if case.suite != "dense":
        raise Absent("no grouped product with block scales")
    by_blocks = name == "cublaslt block"
    if by_blocks and case.n % BLOCK:
        raise Absent(f"block scales need N % {BLOCK} == 0")
    calls = [torch_call(one, by_blocks=by_blocks) for one in product.sets]
    try:
        calls[0]()
    except RuntimeError as error:
        raise Absent(f"torch._scaled_mm refuses: {_brief(error)}") from error
    return Contender(name, calls, by_blocks=by_blocks)


def torch_call(one: Operands, *, by_blocks: bool) -> Call:
    """``torch._scaled_mm`` on the memory of ``one``."""
    torch = find_torch()
    (a, scale_a), (b, scale_b), out = one.a.to_torch(), one.b.to_torch(), to_torch(one.out)
    if by_blocks:
        # (M, K / 128) with strides (1, pitch), as cpgemm stores it, and (K / 128, N / 128).
        scale_b = scale_b.t()
    else:
        scale_a = scale_b = torch.ones((), dtype=torch.float32, device="cuda")
    return functools.partial(
        torch._scaled_mm, a, b.t(), scale_a=scale_a, scale_b=scale_b,
        out_dtype=torch.bfloat16, use_fast_accum=not by_blocks, out=out,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- DeepGEMM


def deep_gemm(name: str, product: Product) -> Contender:
    """DeepGEMM's kernel for the case, with and without programmatic dependent launch."""
    pdl = name.endswith(" pdl")
    launches = deep_gemm_launches(product, pdl=pdl)
    set_pdl = getattr(find_deep_gemm(), "set_pdl", None)
    if set_pdl is None:
        return Contender(name, launches)

    def with_setting(launch: Call) -> Call:
        def call() -> None:
            set_pdl(pdl)
            launch()

        return call

    # The library's setting is global, and contenders are captured one after another.
    return Contender(name, [with_setting(launch) for launch in launches])


def deep_gemm_launches(product: Product, *, pdl: bool) -> list[Call]:
    """One call for each set; leaves DeepGEMM set to ``pdl``."""
    library = find_deep_gemm()
    set_pdl = getattr(library, "set_pdl", None)
    if set_pdl is not None:
        set_pdl(pdl)
    elif pdl:
        raise Absent("this deep_gemm has no set_pdl")
    names = _FUNCTIONS[product.case.suite]
    function = next((f for n in names if (f := getattr(library, n, None)) is not None), None)
    if function is None:
        raise Absent(f"this deep_gemm has no {names[0]}")
    return [deep_gemm_call(library, function, product, one) for one in product.sets]


def deep_gemm_call(library: Any, function: Any, product: Product, one: Operands) -> Call:
    """One call on the memory of ``one``, scales in the layout that is not converted again."""
    relay = getattr(library, "get_mn_major_tma_aligned_tensor", None)
    data, scales = one.a.to_torch()
    a = (data, scales if relay is None else relay(scales))
    arguments: tuple[Any, ...] = (a, one.b.to_torch(), to_torch(one.out))
    if one.index is not None:
        arguments += (to_torch(one.index),)
    if product.case.suite == "masked":
        arguments += (product.case.m,)
    return functools.partial(function, *arguments)


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
