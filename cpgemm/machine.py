"""What a measurement was made on: machine, versions, commit, and peaks of memory.

Nothing here fails for want of a GPU, of CuPy or of a checkout: what cannot be found is None.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpgemm.problem import HOPPER

__all__ = [
    "DevicePeak",
    "MachineRecord",
    "describe",
    "device_peak",
    "format_bytes",
    "host_peak_bytes",
    "why_no_hopper",
]

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_ROOT = Path(__file__).resolve().parent.parent
_CUPY_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")


@dataclasses.dataclass(frozen=True)
class MachineRecord:
    """The machine and the software; None where something is absent or cannot be found.

    ``driver`` is the release of NVIDIA's driver, ``cuda_driver`` the CUDA version that it supports,
    ``nvrtc`` the compiler.  ``memory_bytes`` belongs to the GPU, ``host_memory_bytes`` to the host.
    ``commit`` is that of the checkout, with ``+`` when files differ from it; ``date`` is UTC.
    """

    gpu: str | None
    compute_capability: str | None
    sms: int | None
    memory_bytes: int | None
    driver: str | None
    cuda_driver: str | None
    nvrtc: str | None
    cupy: str | None
    torch: str | None
    numpy: str | None
    ml_dtypes: str | None
    python: str
    cpgemm: str
    commit: str | None
    system: str
    cpu: str | None
    cores: int
    host_memory_bytes: int | None
    date: str

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line: hardware, versions, commit, date."""
        return "; ".join((self.hardware, self.software, self.date))

    @property
    def hardware(self) -> str:
        """GPU, or CPU where there is none, with its size and driver."""
        if self.gpu is None:
            return f"{self.cpu or 'unknown CPU'}, {self.cores} cores, no GPU"
        parts = [self.gpu]
        if self.sms is not None:
            parts.append(f"{self.sms} SMs")
        if self.memory_bytes is not None:
            parts.append(format_bytes(self.memory_bytes))
        if self.driver is not None:
            parts.append(f"driver {self.driver}")
        return ", ".join(parts)

    @property
    def software(self) -> str:
        """Versions of what takes part, and the commit."""
        named = (
            ("CUDA", self.cuda_driver),
            ("NVRTC", self.nvrtc),
            ("CuPy", self.cupy),
            ("NumPy", self.numpy),
            ("Python", self.python),
            ("cpgemm", self.cpgemm),
            ("commit", self.commit),
        )
        return ", ".join(f"{name} {version}" for name, version in named if version is not None)


def describe() -> MachineRecord:
    """Look at this machine: the current CuPy device, the host, the packages, the checkout."""
    import cpgemm

    properties = _gpu_properties()
    name = properties.get("name")
    return MachineRecord(
        gpu=name.decode(errors="replace") if isinstance(name, bytes) else name,
        compute_capability=(
            f"{properties['major']}.{properties['minor']}" if "major" in properties else None
        ),
        sms=properties.get("multiProcessorCount"),
        memory_bytes=properties.get("totalGlobalMem"),
        driver=_driver_release(),
        cuda_driver=_cuda_driver(),
        nvrtc=_nvrtc(),
        cupy=next((found for name in _CUPY_PACKAGES if (found := _version(name))), None),
        torch=_version("torch"),
        numpy=_version("numpy"),
        ml_dtypes=_version("ml_dtypes"),
        python=platform.python_version(),
        cpgemm=cpgemm.__version__,
        commit=_commit(_ROOT),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=_cores(),
        host_memory_bytes=_host_memory(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def why_no_hopper() -> str | None:
    """None when CuPy's current device is a Hopper GPU, else the reason in a few words."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        if cupy.cuda.runtime.getDeviceCount() < 1:
            return "no CUDA device"
        capability = str(cupy.cuda.Device().compute_capability)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        name, _, text = str(error).partition(": ")
        # What CuPy says of a machine without a driver sounds as if the driver were too old.
        return {"cudaErrorInsufficientDriver": "no driver", "cudaErrorNoDevice": "no GPU"}.get(
            name, text or name
        )
    if capability != HOPPER:
        return f"compute capability {capability[:-1]}.{capability[-1:]} instead of 9.0"
    return None


# ------------------------------------------------------------------------------- peaks of memory


@dataclasses.dataclass
class DevicePeak:
    """High-water marks of device memory in bytes; None without a GPU.

    ``used_bytes``: what arrays of CuPy's pool held at one time.  ``held_bytes``: what the pool had
    taken from the driver.  Neither counts the CUDA context, loaded code and other libraries.
    """

    used_bytes: int | None = None
    held_bytes: int | None = None


@contextlib.contextmanager
def device_peak() -> Iterator[DevicePeak]:
    """Watch the allocations that this thread makes from CuPy's pool inside the ``with`` block."""
    peak = DevicePeak()
    try:
        import cupy

        usable = cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # absent, broken, no driver: no device memory to watch in any case
        usable = False
    if not usable:
        yield peak
        return
    pool = cupy.get_default_memory_pool()

    def look() -> None:
        peak.used_bytes = max(peak.used_bytes or 0, int(pool.used_bytes()))
        peak.held_bytes = max(peak.held_bytes or 0, int(pool.total_bytes()))

    class Watch(cupy.cuda.MemoryHook):
        name = f"cpgemm.machine.device_peak {id(peak):x}"  # CuPy wants unique names

        def malloc_postprocess(self, **_kwargs: Any) -> None:
            look()

    look()
    with Watch():
        yield peak


def host_peak_bytes() -> int | None:
    """Largest resident memory that this process has had, in bytes; None where it is not told."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # Linux counts in KiB


def format_bytes(count: int | None) -> str:
    """``1.2 GiB``; ``-`` for None."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


# ---------------------------------------------------------------------------------- single facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_properties() -> dict[str, Any]:
    try:
        import cupy

        runtime = cupy.cuda.runtime
        if runtime.getDeviceCount() < 1:
            return {}
        return dict(runtime.getDeviceProperties(runtime.getDevice()))
    except Exception:  # a broken CuPy or driver is the doctor's business, not this one's
        return {}


def _cuda_driver() -> str | None:
    try:
        import cupy

        number = int(cupy.cuda.runtime.driverGetVersion())
    except Exception:
        return None
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _nvrtc() -> str | None:
    try:
        from cpgemm.toolchain import Nvrtc

        return str(Nvrtc().version)
    except Exception:
        return None


def _driver_release() -> str | None:
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return driver_release(text)


def driver_release(text: str) -> str | None:
    """``580.159.04`` from the text of ``/proc/driver/nvidia/version``."""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)*)\s", text)
    return found.group(1) if found else None


def _output(*command: str) -> str | None:
    """First line that a command prints, None when it fails, is absent or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def _commit(root: Path) -> str | None:
    """Commit of the checkout that ``root`` is the top of; None for an installed copy."""
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")


def _cpu_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory() -> int | None:
    try:
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return None
