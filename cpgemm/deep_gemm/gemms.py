"""DeepGEMM's FP8 products on Hopper, computed by ``cpgemm.gemm`` and the grouped calls.

Operands are pairs (data, scaling factors) of torch tensors, CuPy or NumPy arrays; the result goes
into ``d`` and nothing is returned.  A has one float32 factor for 1 x 128 values, B one for
128 x 128.  Factors that are not yet in the layout of ``layouts`` are copied, in each call.

These arguments of DeepGEMM are taken and change nothing: ``compiled_dims``, because every size is
an argument of the kernels; ``disable_ue8m0_cast``, because Hopper reads float32 factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from cpgemm.deep_gemm.operands import (
    BLOCKS,
    ROWS,
    Pair,
    call_key,
    operand,
    remember,
    repeated,
    turned,
)
from cpgemm.errors import ArgumentError, ArgumentTypeError, reject
from cpgemm.gemm import gemm, ready_gemm
from cpgemm.grouped import grouped_gemm_contiguous, grouped_gemm_masked, ready_grouped
from cpgemm.scaled import ScaledTensor

__all__ = [
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "gemm_fp8_fp8_bf16_nt",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
]

Recipe = Sequence[int] | None


# ----------------------------------------------------------------------------------- dense calls


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: Any,
    c: Any = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = c + a @ b.T.

    a: e4m3 (M, K) and float32 (M, ceil(K / 128)).  b: e4m3 (N, K) and float32
    (ceil(N / 128), ceil(K / 128)).  d: bfloat16 or float32 (M, N), rows contiguous.  c: None or an
    array like ``d``, which may be ``d`` itself.  K is a multiple of 16, N of 8, M anything.
    recipe: None or (1, 128, 128); recipe_a: None or (1, 128); recipe_b: None or (128, 128).
    ``compiled_dims`` and ``disable_ue8m0_cast`` change nothing here.

    Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before anything is launched
    or written, ``NotImplementedError`` for another recipe.
    """
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    key = call_key("dense", a, b, d, c)
    if not repeated(key):
        operands = operand("a", a, ROWS), operand("b", b, BLOCKS)
        _dense(*operands, d, c)
        remember(key, (a, b), operands, ready_gemm(*operands, d, c))


def fp8_gemm_nn(
    a: Pair,
    b: Pair,
    d: Any,
    c: Any = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = c + a @ b with b: e4m3 (K, N) and float32 (ceil(K / 128), ceil(N / 128)).

    The rest as in ``fp8_gemm_nt``.  Hopper's FP8 tensor cores read both operands along K: a ``b``
    that is not contiguous along K is copied, in each call.
    """
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    _dense(operand("a", a, ROWS), turned("b", b, BLOCKS), d, c)


def fp8_gemm_tn(
    a: Pair,
    b: Pair,
    d: Any,
    c: Any = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = c + a.T @ b with a: e4m3 (K, M) and float32 (ceil(K / 128), M), b as in ``fp8_gemm_nn``.

    What is not contiguous along K is copied, in each call (``fp8_gemm_nn`` says why).  The rest as
    in ``fp8_gemm_nt``.
    """
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    _dense(turned("a", a, ROWS), turned("b", b, BLOCKS), d, c)


def fp8_gemm_tt(
    a: Pair,
    b: Pair,
    d: Any,
    c: Any = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = c + a.T @ b.T with a as in ``fp8_gemm_tn`` and b as in ``fp8_gemm_nt``.

    An ``a`` that is not contiguous along K is copied, in each call (``fp8_gemm_nn`` says why).  The
    rest as in ``fp8_gemm_nt``.
    """
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    _dense(turned("a", a, ROWS), operand("b", b, BLOCKS), d, c)


def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair, out: Any) -> None:
    """out = lhs @ rhs.T: ``fp8_gemm_nt`` by its name of early 2025.

    ``lhs`` and ``rhs`` are its ``a`` and ``b``, ``out`` its ``d``; the errors as in
    ``fp8_gemm_nt``.
    """
    key = call_key("dense", lhs, rhs, out, None)
    if not repeated(key):
        operands = operand("lhs", lhs, ROWS), operand("rhs", rhs, BLOCKS)
        _dense(*operands, out, None, "out")
        remember(key, (lhs, rhs), operands, ready_gemm(*operands, out, None))


# --------------------------------------------------------------------------------- grouped calls


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Any,
    grouped_layout: Any = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    *,
    m_indices: Any = None,
) -> None:
    """d[rows of g] = a[rows of g] @ b[g].T, the groups one behind the other in the rows of ``a``.

    a: e4m3 (M, K) and float32 (M, ceil(K / 128)).  b: e4m3 (G, N, K) and float32
    (G, ceil(N / 128), ceil(K / 128)).  d: (M, N), bfloat16 or float32.  Groups start at multiples
    of 128.  grouped_layout (``m_indices`` in earlier releases), int32, where ``a`` is:

    - the group of each row, (M,), constant within each aligned block of 128 rows, behind which -1
      may follow; rows of -1 are left alone in ``d``;
    - with ``use_psum_layout`` the end row of each group, (G,): group g starts at the end of the
      group before it rounded up to 128.  Rows outside all groups become zero in ``d``, or are left
      alone without ``ensure_zero_padding``.

    ``expected_m_for_psum_layout`` is only a hint in DeepGEMM and not looked at here.  Recipes and
    errors as in ``fp8_gemm_nt``.
    """
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    index = grouped_layout if m_indices is None else m_indices
    layout = "ends" if use_psum_layout else "m_indices"
    zero = bool(ensure_zero_padding and use_psum_layout)
    key = call_key((layout, zero), a, b, d, index)
    if not repeated(key):
        operands = operand("a", a, ROWS), operand("b", b, BLOCKS)
        _contiguous(*operands, d, index, use_psum_layout, ensure_zero_padding)
        remember(key, (a, b), operands, ready_grouped(*operands, d, index, layout, zero))


def m_grouped_fp8_gemm_nn_contiguous(
    a: Pair,
    b: Pair,
    d: Any,
    grouped_layout: Any = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    *,
    m_indices: Any = None,
) -> None:
    """d[rows of g] = a[rows of g] @ b[g] with b: e4m3 (G, K, N), float32 (G, ceil(K / 128), ...).

    The rest as in ``m_grouped_fp8_gemm_nt_contiguous``.  A ``b`` that is not contiguous along K is
    copied whole, in each call: keep such weights as (G, N, K).
    """
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    index = grouped_layout if m_indices is None else m_indices
    operands = operand("a", a, ROWS), turned("b", b, BLOCKS)
    _contiguous(*operands, d, index, use_psum_layout, ensure_zero_padding)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Pair, rhs: Pair, out: Any, m_indices: Any
) -> None:
    """``m_grouped_fp8_gemm_nt_contiguous`` by its name of early 2025, the group of each row.

    ``lhs`` and ``rhs`` are its ``a`` and ``b``, ``out`` its ``d``, ``m_indices`` its
    ``grouped_layout``; the errors as in ``fp8_gemm_nt``.
    """
    key = call_key(("m_indices", False), lhs, rhs, out, m_indices)
    if not repeated(key):
        operands = operand("lhs", lhs, ROWS), operand("rhs", rhs, BLOCKS)
        _contiguous(*operands, out, m_indices, False, False, "out", "m_indices")
        launch = ready_grouped(*operands, out, m_indices, "m_indices")
        remember(key, (lhs, rhs), operands, launch)


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: Any,
    masked_m: Any,
    expected_m: int | None = None,
    recipe: Recipe = None,
    recipe_a: Recipe = None,
    recipe_b: Recipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    *,
    enable_overlap: bool = False,
    max_block_n: int = 256,
    signal: Any = None,
) -> None:
    """d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T; the other rows of ``d`` are left alone.

    a: e4m3 (G, M_max, K) and float32 (G, M_max, ceil(K / 128)).  b: e4m3 (G, N, K) and float32
    (G, ceil(N / 128), ceil(K / 128)).  d: (G, M_max, N), bfloat16 or float32.  masked_m: int32
    (G,), where ``a`` is.  expected_m: about how many rows a group has, a hint.  Recipes and errors
    as in ``fp8_gemm_nt``.  ``enable_overlap``, ``max_block_n`` and ``signal`` belong to SGLang's
    fork; the first raises ``NotImplementedError``, the others change nothing.
    """
    if enable_overlap:
        raise NotImplementedError(
            "cpgemm.deep_gemm.m_grouped_fp8_gemm_nt_masked: enable_overlap is not there; call "
            "without it and overlap whole products on two streams, with set_num_sms"
        )
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        _check_recipe(recipe, recipe_a, recipe_b)
    key = call_key("masked", a, b, d, masked_m)
    if not repeated(key):
        operands = operand("a", a, ROWS), operand("b", b, BLOCKS)
        _masked(*operands, d, masked_m, expected_m)
        remember(key, (a, b), operands, ready_grouped(*operands, d, masked_m, "masked"))


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Pair, rhs: Pair, out: Any, masked_m: Any, expected_m: int
) -> None:
    """``m_grouped_fp8_gemm_nt_masked`` by its name of early 2025.

    ``lhs`` and ``rhs`` are its ``a`` and ``b``, ``out`` its ``d``; ``masked_m``, ``expected_m`` and
    the errors as in ``m_grouped_fp8_gemm_nt_masked``.
    """
    key = call_key("masked", lhs, rhs, out, masked_m)
    if not repeated(key):
        operands = operand("lhs", lhs, ROWS), operand("rhs", rhs, BLOCKS)
        _masked(*operands, out, masked_m, expected_m, "out")
        remember(key, (lhs, rhs), operands, ready_grouped(*operands, out, masked_m, "masked"))


# ------------------------------------------------------------------------- the way to the kernels


def _dense(a: ScaledTensor, b: ScaledTensor, d: Any, c: Any, name: str = "d") -> None:
    if d is None:
        _reject_no_result(name)
    try:
        gemm(a, b, d, c=c)
    except (ArgumentError, ArgumentTypeError) as error:
        _raise_renamed(error, {"out": name})


def _contiguous(
    a: ScaledTensor,
    b: ScaledTensor,
    d: Any,
    index: Any,
    ends: bool,
    zero: bool,
    name: str = "d",
    index_name: str = "grouped_layout",
) -> None:
    if d is None:
        _reject_no_result(name)
    try:
        if ends:
            grouped_gemm_contiguous(a, b, d, ends=index, fill_padding=bool(zero))
        else:
            grouped_gemm_contiguous(a, b, d, m_indices=index)
    except (ArgumentError, ArgumentTypeError) as error:
        names = dict.fromkeys(("m_indices, offsets, ends", "m_indices", "ends"), index_name)
        _raise_renamed(error, {"out": name, **names})


def _masked(
    a: ScaledTensor, b: ScaledTensor, d: Any, masked_m: Any, expected_m: Any, name: str = "d"
) -> None:
    if d is None:
        _reject_no_result(name)
    try:
        grouped_gemm_masked(a, b, d, masked_m=masked_m, expected_m=expected_m)
    except (ArgumentError, ArgumentTypeError) as error:
        _raise_renamed(error, {"out": name})


def _reject_no_result(name: str) -> NoReturn:
    reject(name, "must be given", None, "Allocate it: (M, N).", kind=ArgumentTypeError)


def _raise_renamed(error: ArgumentError | ArgumentTypeError, names: dict[str, str]) -> NoReturn:
    """The same error with the argument's name of this interface."""
    argument, colon, rest = str(error).partition(": ")
    raise type(error)(f"{names.get(argument, argument)}{colon}{rest}") from None


def _check_recipe(recipe: Recipe, recipe_a: Recipe, recipe_b: Recipe) -> None:
    for name, given, there in (
        ("recipe", recipe, (1, *BLOCKS)),
        ("recipe_a", recipe_a, ROWS),
        ("recipe_b", recipe_b, BLOCKS),
    ):
        if given is not None and tuple(given) != there:
            raise NotImplementedError(
                f"cpgemm.deep_gemm: {name}={tuple(given)} is not there, only {there}; cast A with "
                "per_token_cast_to_fp8 and B with per_block_cast_to_fp8, or multiply in bfloat16"
            )
