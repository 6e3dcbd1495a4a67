"""Every path and environment variable that cpgemm reads.

======================  =======================================================================
``CPGEMM_CACHE_DIR``    where rendered sources, cubins, logs and reports are kept
                        (default: the user's cache folder of the platform)
``CPGEMM_COMPILER``     ``nvrtc`` (default) or ``nvcc``
``CPGEMM_NVCC``         the nvcc to call (default: ``nvcc`` on ``PATH``, then ``$CUDA_HOME/bin``)
``CPGEMM_PDL``          ``1`` launches GEMMs with programmatic dependent launch (default ``0``);
                        read when operands are new, ``settings.set_pdl`` changes it for all
``CPGEMM_CHECK``        ``1`` downloads and checks the index arrays of grouped GEMMs on a GPU, which
                        waits for the stream (default ``0``: their contents are never read)
``CPGEMM_TUNED``        ``0`` leaves every choice of a kernel to the cost model; a path names the
                        file of measured choices (default: one for each GPU model in the cache)
======================  =======================================================================

Variables are read when they are needed, so that a test or a notebook can change them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cpgemm.errors import reject

__all__ = [
    "cache_dir",
    "check",
    "compiler",
    "header_dir",
    "nvcc_path",
    "pdl",
    "template_dir",
    "toolkit_program",
    "tuned",
    "tuned_file",
]

_PACKAGE = Path(__file__).resolve().parent


def _data_dir(name: str) -> Path:
    """Package data of an installed wheel first, then the repository's top-level folder."""
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"cpgemm: the folder {name!r} is missing beside {_PACKAGE}; reinstall the package"
    )


def template_dir() -> Path:
    """Folder of the Jinja templates (``*.cu.j2``, ``*.j2``)."""
    return _data_dir("templates")


def header_dir() -> Path:
    """Folder of the CUDA headers (``*.cuh``)."""
    return _data_dir("cuda_src")


def cache_dir() -> Path:
    """Folder of compiled kernels; not created here."""
    chosen = os.environ.get("CPGEMM_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "cpgemm"


def compiler() -> str:
    """``"nvrtc"`` or ``"nvcc"``."""
    name = os.environ.get("CPGEMM_COMPILER", "nvrtc").strip().lower()
    if name not in ("nvrtc", "nvcc"):
        reject("CPGEMM_COMPILER", "must be nvrtc or nvcc", repr(name), "Unset it to use NVRTC.")
    return name


def nvcc_path() -> str | None:
    """The nvcc that ``CPGEMM_COMPILER=nvcc`` calls, or None when none is found."""
    chosen = os.environ.get("CPGEMM_NVCC")
    if chosen:
        return chosen
    return shutil.which("nvcc") or toolkit_program("nvcc")


def toolkit_program(name: str) -> str | None:
    """A program of the CUDA toolkit in ``$CUDA_HOME`` or its usual place, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidate = Path(home) / "bin" / name
    return str(candidate) if candidate.is_file() else None


def _flag(name: str, mend: str) -> bool:
    value = os.environ.get(name, "0").strip()
    if value not in ("0", "1"):
        reject(name, "must be 0 or 1", repr(value), mend)
    return value == "1"


def pdl() -> bool:
    """Whether GEMMs are launched with programmatic dependent launch."""
    return _flag("CPGEMM_PDL", "Unset it for plain launches.")


def check() -> bool:
    """Whether grouped GEMMs download and check their index arrays."""
    return _flag("CPGEMM_CHECK", "Unset it for calls that never wait.")


def tuned() -> bool:
    """Whether measured choices of kernels take part."""
    return os.environ.get("CPGEMM_TUNED", "").strip() != "0"


def tuned_file() -> Path | None:
    """The file of measured choices that the user named; None for that of the cache."""
    chosen = os.environ.get("CPGEMM_TUNED", "").strip()
    return None if chosen in ("", "0", "1") else Path(chosen).expanduser()
