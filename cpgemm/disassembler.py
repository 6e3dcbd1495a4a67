"""Machine code as text, by NVIDIA's nvdisasm: a wheel, or part of any CUDA toolkit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from cpgemm import env
from cpgemm.errors import DeviceError, MissingDependencyError

__all__ = ["disassemble", "nvdisasm_path"]

_SECONDS = 120
_MEND = 'Run: pip install "cpgemm[inspect]"'


def nvdisasm_path() -> str | None:
    """The nvdisasm of the wheel ``nvidia-cuda-nvdisasm``, of a toolkit or on ``PATH``, or None.

    ``cuda.pathfinder``, which comes with cuda-core, knows the places of wheels and of conda.
    """
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:  # No cuda-core, or one of before binaries were looked for.
        found = None
    else:
        found = find_nvidia_binary_utility("nvdisasm")
    return found or shutil.which("nvdisasm") or env.toolkit_program("nvdisasm")


def disassemble(cubin: Path) -> str:
    """The code of every function in ``cubin`` as nvdisasm prints it, branch targets as labels.

    Raises ``MissingDependencyError`` without nvdisasm, ``DeviceError`` when it fails.
    """
    program = nvdisasm_path()
    if program is None:
        raise MissingDependencyError(
            "nvdisasm: showing machine code needs it; it is neither installed as a wheel, nor in "
            f"$CUDA_HOME/bin, nor on PATH. {_MEND}"
        )
    command = [program, "--print-code", str(cubin)]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"nvdisasm: {program} cannot be run: {error}. {_MEND}") from error
    if done.returncode != 0:
        said = re.sub(r"\s+", " ", done.stderr).strip()
        raise DeviceError(
            f"nvdisasm: {program} fails on {cubin} (exit code {done.returncode}: {said}). It may "
            f"be older than the compiler. {_MEND}"
        )
    return done.stdout
