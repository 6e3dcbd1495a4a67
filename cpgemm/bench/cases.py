"""Which cases a run measures: the suites, single shapes, and a user's own list."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cpgemm.bench.result import Case
from cpgemm.errors import reject
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.problem import GemmProblem

__all__ = [
    "HOST_PATHS",
    "JIT_STEPS",
    "LAYERS",
    "SUITES",
    "check_case",
    "on_cpu",
    "quantize_details",
    "single",
    "sizes_of",
    "suite",
    "suites",
]

SUITES = ("dense", "contiguous", "masked", "quantize", "host", "jit")

LAYERS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(N, K) of the linear layers of DeepSeek-V3."""

_DENSE_ROWS = (1, 8, 16, 32, 64, 128, 4096)
_EXPERTS = ((4096, 7168), (7168, 2048))
_CONTIGUOUS = ((4, 8192), (8, 4096))
_MASKED = ((1, 1024), (2, 512), (4, 256))
_DECODE = (
    (32, 20, 4096, 4096), (32, 20, 7168, 2048), (32, 192, 4096, 4096),
    (9, 64, 4096, 7168), (8, 4, 4096, 7168),
)  # fmt: skip
_QUANTIZED = ((4096, 7168), (32768, 7168), (8192, 16384))
_FROM = ("float32", "bfloat16", "float16")
_GRANULARITIES = ("1x128", "128x128")
_SCALES = ("float32", "pow2")

HOST_PATHS = (
    "gemm out", "plan", "torch", "deep_gemm", "graph replay", "masked out", "quantize",
)  # fmt: skip
"""``detail`` of host cases: how a call is made."""
_HOST_SHAPE = (64, 7168, 2048)

JIT_STEPS = ("cold compile", "warm load", "import")
"""``detail`` of jit cases; the sizes of the first two choose the kernel, import has none."""
_JIT_SHAPE = (4096, 7168, 2048)

# What the NumPy path does within a second or two, quantising included.
_CPU_FLOPS, _CPU_ELEMENTS = 4e9, 4e7


def suite(name: str) -> tuple[Case, ...]:
    """The cases of one suite of ``SUITES``, or of ``all``.

    Raises ``ArgumentError`` for another name.
    """
    if name == "all":
        return tuple(case for one in SUITES for case in suite(one))
    if name == "dense":
        return tuple(Case("dense", m, n, k) for n, k in LAYERS for m in _DENSE_ROWS)
    if name == "contiguous":
        return tuple(Case(name, m, n, k, groups) for groups, m in _CONTIGUOUS for n, k in _EXPERTS)
    if name == "masked":
        published = [(groups, m, n, k) for groups, m in _MASKED for n, k in _EXPERTS]
        return tuple(Case(name, m, n, k, groups) for groups, m, n, k in (*published, *_DECODE))
    if name == "quantize":
        return tuple(
            Case(name, m, 0, k, 0, detail) for m, k in _QUANTIZED for detail in quantize_details()
        )
    if name == "host":
        return tuple(Case(name, *_HOST_SHAPE, 0, path) for path in HOST_PATHS)
    if name == "jit":
        compile_, load, import_ = JIT_STEPS
        return (
            Case(name, *_JIT_SHAPE, 0, compile_),
            Case(name, *_JIT_SHAPE, 0, load),
            Case(name, detail=import_),
        )
    reject(
        "suite", f"must be one of {', '.join(SUITES)} or all", repr(name), "Leave it out for dense."
    )


def suites(names: Sequence[str]) -> tuple[Case, ...]:
    """The cases of several suites, each case once."""
    return tuple(dict.fromkeys(case for name in names for case in suite(name)))


def quantize_details() -> tuple[str, ...]:
    """``<dtype of the input> <granularity> <scale format>``."""
    return tuple(" ".join(parts) for parts in itertools.product(_FROM, _GRANULARITIES, _SCALES))


def single(
    names: Sequence[str],
    *,
    m: int | None = None,
    n: int | None = None,
    k: int | None = None,
    groups: int | None = None,
) -> tuple[Case, ...]:
    """Cases of these sizes for each suite of ``names`` (none: dense; contiguous with ``groups``).

    ``quantize`` takes M and K; ``jit`` and ``host`` choose M, N, K for all their steps; the others
    take M, N, K, the grouped ones ``groups`` too.  Raises ``ArgumentError`` for a size that is
    lacking, one that is too many, and one that no kernel takes.
    """
    given = {"m": m, "n": n, "k": k, "groups": groups}
    cases: list[Case] = []
    for name in names or ("contiguous" if groups else "dense",):
        if name not in SUITES:
            reject(
                "suite", f"must be one of {', '.join(SUITES)} with a shape", repr(name), "Name one."
            )
        wanted = sizes_of(name)
        for size, value in given.items():
            if size in wanted and value is None:
                reject(
                    f"--{size}", f"is needed for a shape of {name}", "none", f"Add --{size} SIZE."
                )
            if size not in wanted and value is not None:
                reject(f"--{size}", f"is no size of {name}", value, "Leave it out.")
        sizes = (m or 0, n or 0, k or 0, groups or 0)
        details = {
            "quantize": quantize_details(), "host": HOST_PATHS, "jit": JIT_STEPS[:2]
        }.get(name, ("",))  # fmt: skip
        cases += [Case(name, *sizes, detail) for detail in details]
    for case in cases:
        check_case(case)
    return tuple(cases)


def sizes_of(name: str) -> tuple[str, ...]:
    """Which of ``groups``, ``m``, ``n``, ``k`` a case of this suite has."""
    if name == "quantize":
        return ("m", "k")
    return ("groups", "m", "n", "k") if name in ("contiguous", "masked") else ("m", "n", "k")


def check_case(case: Case) -> None:
    """Raise ``ArgumentError`` for a size that no kernel takes; it names ``m``, ``n``, ``k`` or
    ``groups``.
    """
    sizeless = case.suite == "jit" and not (case.m or case.n or case.k)
    for size in () if sizeless else sizes_of(case.suite):
        if getattr(case, size) < 1:
            reject(size, "must be at least 1", getattr(case, size), "Give a size.")
    if case.suite in ("contiguous", "masked"):
        masked = case.suite == "masked"
        rows = case.m if masked else case.groups * case.m
        GroupedProblem("masked" if masked else "offsets", case.groups, rows, case.n, case.k)
    else:
        GemmProblem(case.m, case.n, case.k)


def on_cpu(
    cases: Sequence[Case], *, any_size: bool = False
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Those that a machine without a Hopper GPU can measure, and the others.

    The steps of jit compile without a GPU; products and quantisation have a NumPy path, which takes
    a second and some GB for the sizes that are let through without ``any_size``; host paths launch
    kernels.
    """

    def possible(case: Case) -> bool:
        elements = max(case.groups, 1) * max(case.m, case.n) * case.k
        small = case.flops <= _CPU_FLOPS and elements <= _CPU_ELEMENTS
        return case.suite == "jit" or (case.suite != "host" and (small or any_size))

    return (
        tuple(case for case in cases if possible(case)),
        tuple(case for case in cases if not possible(case)),
    )
