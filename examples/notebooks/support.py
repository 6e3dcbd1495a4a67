"""What the notebooks share: the arrays to use, the GPU's name, and the cell magic ``%%gpu``.

``xp`` is CuPy on a Hopper GPU and NumPy elsewhere; ``GPU`` is the GPU's name, None elsewhere.

``%%gpu`` in the first line of a cell says that the cell needs a Hopper GPU: with one it runs like
any other and names the GPU, without one it prints why it is skipped.  ``%%needs torch`` does the
same for a package.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

# JAX would take most of a GPU's memory at its first array.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What someone has tuned on this machine would change what the notebooks show.
os.environ["CPGEMM_TUNED"] = "0"

import numpy as np

from cpgemm import machine

__all__ = ["GPU", "WHY_NO_GPU", "to_host", "where", "xp"]

WHY_NO_GPU = machine.why_no_hopper()
xp: Any = np
GPU: str | None = None
if WHY_NO_GPU is None:
    import cupy as xp

    GPU = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())["name"].decode()


def where() -> str:
    """A sentence that says where the cells run."""
    if GPU is not None:
        return f"Running on {GPU}, with CuPy."
    return f"No Hopper GPU here ({WHY_NO_GPU}): NumPy computes the same, cells with %%gpu skip."


def to_host(array: Any) -> np.ndarray:
    """A NumPy array of a NumPy or CuPy one; bfloat16 becomes float32."""
    if array.dtype.name == "bfloat16":  # CuPy moves it as the bits that it is
        bits = array.view(np.uint16)
        bits = bits.get() if hasattr(bits, "get") else bits
        return bits.view(array.dtype).astype(np.float32)
    return array.get() if hasattr(array, "get") else np.asarray(array)


def _gpu(line: str, cell: str) -> None:
    """Run the cell on a Hopper GPU, or say that it is skipped."""
    lacking = None if GPU is not None else f"needs a Hopper GPU ({WHY_NO_GPU})"
    if GPU is not None:
        print(f"On {GPU}:")
    _run_unless(lacking, cell)


def _needs(line: str, cell: str) -> None:
    """Run the cell where the packages named in ``line`` are, or say that it is skipped."""
    lacking = [name for name in line.split() if _absent(name)]
    _run_unless(f"{', '.join(lacking)} is not installed" if lacking else None, cell)


def _absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # the package around it is not there either
        return True


def _run_unless(lacking: str | None, cell: str) -> None:
    shell = _shell()
    compile(shell.transform_cell(cell), "<cell>", "exec")  # a slip shows in what is skipped too
    if lacking is not None:
        print(f"Skipped: {lacking}.")
        return
    shell.run_cell(cell, store_history=False).raise_error()


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _plain_figures() -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#e3e6ea",
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.prop_cycle": mpl.cycler(
                color=["#1040cc", "#b48a1c", "#0c9664", "#cc4aac", "#2b2730", "#c2410c"]
            ),
        }
    )


if _shell() is not None:
    _shell().register_magic_function(_gpu, "cell", "gpu")
    _shell().register_magic_function(_needs, "cell", "needs")
    _plain_figures()
