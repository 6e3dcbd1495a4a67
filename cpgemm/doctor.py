"""What this machine has, what works with it, and how to mend what does not.

Every check stands alone and catches what it provokes: the doctor must not fall ill itself.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cpgemm import env
from cpgemm.console import print_table

__all__ = ["Finding", "examine", "run"]

_OK, _MISSING, _BROKEN = "ok", "missing", "broken"
_EXTRA = 'pip install "cpgemm[cuda12]" (or cuda13)'
_CUPY_NAMES = ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")
# CUdevice_attribute of the driver API.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76

_TRIAL = """extern "C" __global__ void __launch_bounds__(128, 1) trial(float* out) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    out[threadIdx.x] = 1.0f;
}
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: what was looked at, ``ok`` / ``missing`` / ``broken``, what was found, the mend."""

    what: str
    state: str
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """All findings, in the order in which one builds on the other."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("Python", _python),
        ("NumPy path", _numpy_path),
        ("driver", _driver),
        ("CuPy", _cupy),
        ("NVRTC", _nvrtc),
        ("nvcc", _nvcc),
        ("cache", _cache),
        ("bridges", _bridges),
    ]
    findings: list[Finding] = []
    for what, check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding(what, _BROKEN, _brief(error), "reinstall what it names"))
    return findings


def verdict(findings: list[Finding]) -> str:
    """What works here, in one line."""
    state = {finding.what: finding.state for finding in findings}

    def lacking(*names: str) -> list[str]:
        return [name for name in names if state.get(name) != _OK]

    if lacking("NumPy path"):
        return "nothing: the NumPy path is broken"
    if lacking("NVRTC", "cuda-core", "cuda-bindings", "filelock", "cache"):
        return "NumPy path only"
    if missing := lacking("GPU", "CuPy"):
        return f"kernels compile, none runs (no {' and no '.join(missing)})"
    return "kernels run"


def run() -> int:
    """Print the findings and the verdict; 0 if at least the NumPy path works."""
    findings = examine()
    rows = [(item.what, item.state, item.found, item.mend) for item in findings]
    print_table(("what", "state", "found", "how to mend"), rows)
    print(f"\nworks here: {verdict(findings)}")
    return 1 if any(f.what == "NumPy path" and f.state != _OK for f in findings) else 0


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:90]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(distribution: str, module: str, mend: str) -> Finding:
    """ok when it imports, missing when it is not installed, broken when importing fails."""
    version = _version(distribution)
    try:
        importlib.import_module(module)
    except ImportError as error:
        if version is None:
            return Finding(distribution, _MISSING, "not installed", mend)
        return Finding(
            distribution,
            _BROKEN,
            f"{version}: {_brief(error)}",
            f"pip install --force-reinstall {distribution}",
        )
    return Finding(distribution, _OK, version or "installed")


def _python() -> list[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return [
        Finding("Python", _OK, f"{version} ({sys.executable})"),
        Finding("cpgemm", _OK, f"{_version('cpgemm') or 'source tree'} ({Path(__file__).parent})"),
        _package("numpy", "numpy", "pip install numpy"),
        _package("ml_dtypes", "ml_dtypes", "pip install ml_dtypes"),
        _package("jinja2", "jinja2", "pip install jinja2"),
        _package("rich", "rich", "optional, for colours and progress bars: pip install rich"),
        _package("filelock", "filelock", _EXTRA),
    ]


def _numpy_path() -> list[Finding]:
    """A small quantise and multiply: an import that works proves little."""
    import numpy as np

    import cpgemm

    try:
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((rows, 144), dtype=np.float32) for rows in (4, 8))
        product = cpgemm.gemm(cpgemm.quantize(a), cpgemm.quantize(b, (128, 128)))
        error = float(np.abs(np.asarray(product, dtype=np.float32) - a @ b.T).max())
    except Exception as problem:
        return [Finding("NumPy path", _BROKEN, _brief(problem), "reinstall cpgemm")]
    if not error < 5.0:  # e4m3 keeps three bits: entries near 12 are off by some tenths.
        return [Finding("NumPy path", _BROKEN, f"trial product off by {error}", "report this")]
    return [Finding("NumPy path", _OK, "trial product right")]


def _driver() -> list[Finding]:
    """Asks the driver itself, so that a missing CuPy does not hide a GPU."""
    install = "needed to run kernels: install NVIDIA's driver"
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [
            Finding("driver", _MISSING, "no libcuda.so.1", install),
            Finding("GPU", _MISSING, "no driver", "needed to run kernels: a Hopper GPU"),
        ]
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    status = library.cuInit(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    shown = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if status != 0:
        return [
            Finding("driver", _BROKEN, f"{shown}; cuInit answers {status}", "see nvidia-smi"),
            Finding("GPU", _MISSING, "driver not usable", "needed to run kernels: a Hopper GPU"),
        ]
    findings = [Finding("driver", _OK, shown)]
    library.cuDeviceGetCount(ctypes.byref(count))
    gpus = [_gpu(library, index) for index in range(count.value)]
    # Hopper first: one is enough, and the verdict looks at the line called GPU.
    gpus.sort(key=lambda gpu: gpu.state != _OK)
    for index, gpu in enumerate(gpus):
        what = "GPU" if index == 0 else f"GPU +{index}"
        findings.append(dataclasses.replace(gpu, what=what))
    if not gpus:
        findings.append(Finding("GPU", _MISSING, "none visible", "see CUDA_VISIBLE_DEVICES"))
    return findings


def _gpu(library: ctypes.CDLL, index: int) -> Finding:
    device, name, memory = ctypes.c_int(0), ctypes.create_string_buffer(128), ctypes.c_size_t(0)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int(0)
        library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    capability = (attribute(_MAJOR), attribute(_MINOR))
    found = (
        f"{index}: {name.value.decode(errors='replace')}, compute capability "
        f"{capability[0]}.{capability[1]}, {attribute(_MULTIPROCESSORS)} SMs, "
        f"{memory.value / 2**30:.0f} GiB"
    )
    if capability != (9, 0):
        return Finding("GPU", _MISSING, found, "kernels need 9.0 (Hopper); use NumPy arrays")
    return Finding("GPU", _OK, found)


def _cupy() -> list[Finding]:
    installed = [name for name in _CUPY_NAMES if _version(name)]
    if len(installed) > 1:
        mend = f"they overwrite each other; keep one: pip uninstall {installed[-1]}"
        cupy = Finding("CuPy", _BROKEN, " and ".join(installed), mend)
    else:
        cupy = _package(installed[0] if installed else "cupy", "cupy", _EXTRA)
        found = f"{installed[0]} {cupy.found}" if installed else cupy.found
        cupy = dataclasses.replace(cupy, what="CuPy", found=found)
    core = _package("cuda-core", "cuda.core", _EXTRA)
    bindings = _package("cuda-bindings", "cuda.bindings", _EXTRA)
    if bindings.state == _OK and installed and installed[0].startswith("cupy-cuda"):
        wanted, got = installed[0][len("cupy-cuda") :].rstrip("x"), bindings.found.split(".")[0]
        if wanted != got:
            mend = f"it must fit {installed[0]}: pip install 'cuda-bindings=={wanted}.*'"
            bindings = dataclasses.replace(bindings, state=_BROKEN, mend=mend)
    return [cupy, core, bindings]


def _nvrtc() -> list[Finding]:
    from cpgemm.render import KernelSource
    from cpgemm.resources import parse_report
    from cpgemm.toolchain import Nvrtc

    tool = Nvrtc()
    try:
        version = tool.version
    except ImportError as error:
        return [Finding("NVRTC", _MISSING, _brief(error), _EXTRA)]
    try:
        source = KernelSource("trial", _TRIAL, "trial", "trial", "")
        cubin, log, seconds = tool.compile(source, "sm_90a")
        parse_report(log, cubin, "trial")
    except Exception as error:
        return [Finding("NVRTC", _BROKEN, f"{version}: {_brief(error)}", f"reinstall: {_EXTRA}")]
    return [Finding("NVRTC", _OK, f"{version}, trial kernel in {seconds:.2f} s")]


def _nvcc() -> list[Finding]:
    from cpgemm.toolchain import Nvcc

    path = env.nvcc_path()
    if path is None:
        return [Finding("nvcc", _MISSING, "not found", "optional, for CPGEMM_COMPILER=nvcc")]
    try:
        return [Finding("nvcc", _OK, f"{Nvcc().version} ({path})")]
    except Exception as error:
        mend = "optional: set CPGEMM_NVCC, or leave it"
        return [Finding("nvcc", _BROKEN, f"{path}: {_brief(error)}", mend)]


def _cache() -> list[Finding]:
    folder = env.cache_dir()
    reports = list(folder.glob("sm_*/*/report.json"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    found = f"{folder}: {len(reports)} kernels, {size / 2**20:.1f} MiB"
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        mend = "set CPGEMM_CACHE_DIR to a folder that can be written"
        return [Finding("cache", _BROKEN, f"{found}; {os.strerror(error.errno or 0)}", mend)]
    return [Finding("cache", _OK, f"{found}, writable")]


def _bridges() -> list[Finding]:
    """By their metadata alone: importing either takes seconds and may take the GPU's memory."""
    findings = []
    for what, package in (("torch", "torch"), ("JAX", "jax")):
        version = _version(package)
        mend = "" if version else f"optional, to pass {what} arrays: pip install {package}"
        findings.append(Finding(what, _OK if version else _MISSING, version or "-", mend))
    return findings
