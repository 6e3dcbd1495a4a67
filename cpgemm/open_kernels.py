"""``kernel``: any kernel of the package, by sizes, by configuration or by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpgemm.config import KernelConfig
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.kernel_view import Kernel
from cpgemm.kernels import all_sources, gemm_source
from cpgemm.plan import plan_gemm
from cpgemm.problem import OutDtype
from cpgemm.render import find_source

__all__ = ["kernel"]


def kernel(
    what: int | str | KernelConfig,
    n: int | None = None,
    k: int | None = None,
    *,
    out_dtype: OutDtype = "bfloat16",
    accumulate: bool = False,
) -> Kernel:
    """A kernel to look into: source, PTX, machine code, resources, instruction counts, log.

    ``what``, with ``n`` and ``k`` where it is a size, names the kernel:

    - ``kernel(m, n, k)``: the one that ``gemm`` chooses for this size (and ``out_dtype``,
      ``accumulate``)
    - ``kernel(config)``: the one of a ``KernelConfig`` of any family
    - ``kernel("name")``: one of the finite set, quantisers and mixture-of-experts helpers included;
      ``python -m cpgemm render --list`` names them

    Needs no GPU; nothing is compiled before a property is asked for.  Raises ``ArgumentError`` for
    a size that no kernel takes or an unknown name, ``ArgumentTypeError`` for anything else.
    """
    if isinstance(what, (int, np.integer)) and not isinstance(what, bool):
        if n is None or k is None:
            reject("n, k", "must follow m", (what, n, k), "Call kernel(m, n, k).")
        sizes = (int(what), n, k)
        return plan_gemm(*sizes, out_dtype=out_dtype, accumulate=accumulate).kernel
    if n is not None or k is not None:
        reject("n, k", "belong to kernel(m, n, k)", (n, k), "Leave them out.")
    if (out_dtype, accumulate) != ("bfloat16", False):
        reject(
            "out_dtype, accumulate",
            "belong to kernel(m, n, k)",
            (out_dtype, accumulate),
            "Leave them out: a name and a config say theirs.",
        )
    if isinstance(what, str):
        return Kernel(find_source(what, all_sources(), argument="what"))
    if isinstance(what, KernelConfig):
        return Kernel(gemm_source(what), threads=what.threads)
    found: Any = type(what).__qualname__
    reject(
        "what",
        "must be m with n and k, a KernelConfig or a kernel's name",
        found,
        "Names: python -m cpgemm render --list.",
        kind=ArgumentTypeError,
    )
