"""DeepGEMM's names that are not there yet: each says what to use instead when it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["ABSENT", "finder"]

_BFLOAT16 = "multiply in bfloat16, for example with torch.matmul or cupy.matmul"
_BFLOAT16_GROUPS = (
    "loop over the groups in bfloat16 with torch.matmul or cupy.matmul, or cast to e4m3 for "
    "m_grouped_fp8_gemm_nt_contiguous and m_grouped_fp8_gemm_nt_masked"
)
_WGRAD = (
    "dequantise and accumulate in float32, for example out += torch.matmul(a.T, b), group by group"
)
_INDEXER = (
    "cpgemm has no attention kernels: keep DeepGEMM itself for them under its own name, or compute "
    "relu(q @ k.T) * weights with torch"
)
_BLACKWELL = "it belongs to Blackwell; on Hopper use float32 factors in the layout of "
_ROWS_LAYOUT = _BLACKWELL + "get_mn_major_tma_aligned_tensor"
_FP4 = "FP4 belongs to Blackwell; use per_token_cast_to_fp8 or per_block_cast_to_fp8"
_MEGA = (
    "it belongs to Blackwell; use m_grouped_fp8_gemm_nt_masked or "
    "m_grouped_fp8_gemm_nt_contiguous and the steps of cpgemm.moe"
)
_TIMING = "time with CUDA events, or with cpgemm.timing.time_interleaved on CuPy arrays"
_DIST = "call torch.distributed yourself"

# Name -> what to use instead.
ABSENT: dict[str, str] = {
    "fp8_gemm_nt_skip_head_mid": "call fp8_gemm_nt and copy the parts of each head with slices",
    "k_grouped_fp8_gemm_nt_contiguous": _WGRAD,
    "k_grouped_fp8_gemm_tn_contiguous": _WGRAD,
    "wgrad_gemm_fp8_fp8_fp32_nt": _WGRAD,
    "k_grouped_wgrad_gemm_fp8_fp8_fp32_nt": _WGRAD,
    "bf16_gemm_nt": _BFLOAT16,
    "bf16_gemm_nn": _BFLOAT16,
    "bf16_gemm_tn": _BFLOAT16,
    "bf16_gemm_tt": _BFLOAT16,
    "cublaslt_gemm_nt": _BFLOAT16,
    "cublaslt_gemm_nn": _BFLOAT16,
    "cublaslt_gemm_tn": _BFLOAT16,
    "cublaslt_gemm_tt": _BFLOAT16,
    "m_grouped_bf16_gemm_nt_contiguous": _BFLOAT16_GROUPS,
    "m_grouped_bf16_gemm_nn_contiguous": _BFLOAT16_GROUPS,
    "m_grouped_bf16_gemm_nt_masked": _BFLOAT16_GROUPS,
    "bf16_m_grouped_gemm_nt_masked": _BFLOAT16_GROUPS,
    "k_grouped_bf16_gemm_tn_contiguous": _WGRAD,
    "einsum": "call torch.einsum or cupy.einsum",
    "fp8_einsum": (
        "write it as fp8_gemm_nt or m_grouped_fp8_gemm_nt_masked over the batch axis, or "
        "dequantise and call torch.einsum"
    ),
    "fp8_mqa_logits": _INDEXER,
    "fp8_paged_mqa_logits": _INDEXER,
    "get_paged_mqa_logits_metadata": _INDEXER,
    "fp8_fp4_mqa_logits": _INDEXER,
    "fp8_fp4_paged_mqa_logits": _INDEXER,
    "tf32_hc_prenorm_gemm": "multiply in float32 with torch.matmul and sum the squares yourself",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": _ROWS_LAYOUT,
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": _ROWS_LAYOUT,
    "set_block_size_multiple_of": "plan_gemm(..., config=...) of cpgemm takes a kernel by its tile",
    "SymmBuffer": _MEGA,
    "get_symm_buffer_for_mega_moe": _MEGA,
    "transform_weights_for_mega_moe": _MEGA,
    "fp8_fp4_mega_moe": _MEGA,
    "bf16_mega_moe": _MEGA,
    "pack_ue8m0_to_int": _ROWS_LAYOUT,
    "unpack_ue8m0_from_int": _ROWS_LAYOUT,
    "per_token_cast_to_fp4": _FP4,
    "transpose_packed_fp4": _FP4,
    "cast_back_from_fp4": _FP4,
    "init_dist": _DIST,
    "uneven_all_gather": _DIST,
    "bench": _TIMING,
    "bench_kineto": _TIMING,
}


@functools.cache
def _stand_in(name: str) -> Callable[..., NoReturn]:
    def absent(*_arguments: object, **_options: object) -> NoReturn:
        raise NotImplementedError(f"cpgemm.deep_gemm.{name} is not there; {ABSENT[name]}")

    absent.__name__ = absent.__qualname__ = name
    absent.__doc__ = f"Not there; {ABSENT[name]}."
    return absent


def finder(module: str) -> Callable[[str], Any]:
    """A module's ``__getattr__``: stand-ins for the absent names, a helpful error for the rest."""

    def __getattr__(name: str) -> Any:
        if name in ABSENT:
            return _stand_in(name)
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}; docs/deep_gemm.md lists the names of "
            "DeepGEMM that cpgemm has, and dir() those of the module"
        )

    return __getattr__
