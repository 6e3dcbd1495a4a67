"""A user's templates in the tests: the dense one, changed, and one of another signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import cpgemm
from cpgemm import env
from cpgemm.template_kernel import TemplateKernel

NAIVE = Path(__file__).resolve().parent / "user_templates" / "naive_wgmma.cu.j2"
NAIVE_COLUMNS = 64


def dense_copy(folder: Path, *changes: tuple[str, str], template: str = "dense.cu.j2") -> Path:
    """``mine.cu.j2`` in ``folder``: the package's template with texts replaced."""
    text = (env.template_dir() / template).read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "mine.cu.j2"
    path.write_text(text, encoding="utf-8")
    return path


def naive(problem: Any, path: Path = NAIVE, **options: Any) -> TemplateKernel:
    """The naive kernel: a template with values, a grid and a signature of its own."""
    return cpgemm.kernel_from_template(
        path,
        problem,
        values={"block_n": NAIVE_COLUMNS},
        entry="naive_wgmma",
        threads=128,
        grid=lambda p: (-(-p.n // NAIVE_COLUMNS), -(-p.m // 64)),
        arguments=naive_arguments,
        **options,
    )


def naive_arguments(a: Any, b: Any, out: Any) -> tuple[Any, ...]:
    """The parameters of ``naive_wgmma`` in their order."""
    return (
        a.data, a.scales, b.data, b.scales, out,
        np.int64(a.data.strides[0]), np.int64(b.data.strides[0]),
        a.scales_pitch, *out.shape, a.shape[1],
    )  # fmt: skip
