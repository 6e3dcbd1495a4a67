"""Stand-ins for what the benchmark meets on a GPU: CuPy's streams and graphs, NVML, DeepGEMM."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_timing import FakeGpu

FAKE_DEEP_GEMM = """
__version__ = "2.9"
pdl = []
calls = []
def set_pdl(on): pdl.append(on)
def get_mn_major_tma_aligned_tensor(sf): return ("aligned", sf)
def fp8_gemm_nt(a, b, d): calls.append((pdl[-1], "dense", a, b, d))
def m_grouped_fp8_gemm_nt_contiguous(a, b, d, index): calls.append((pdl[-1], "contiguous", index))
def m_grouped_gemm_fp8_fp8_bf16_nt_masked(a, b, d, counts, expected_m):
    calls.append((pdl[-1], "masked", counts, expected_m))
"""


class Gpu(FakeGpu):
    """``FakeGpu`` with a memory pool and a device, as a session asks for them."""

    def __init__(self, us: dict[str, float]) -> None:
        super().__init__(us)
        self.freed = 0

    def module(self) -> Any:
        gpu = self
        module = super().module()

        class Stream(module.cuda.Stream):
            """Entered again inside itself, as CuPy's may be."""

            def __enter__(self) -> Any:
                self.entered = [*getattr(self, "entered", []), contextlib.ExitStack()]
                self.entered[-1].enter_context(gpu.entered("cupy"))
                return self

            def __exit__(self, *error: Any) -> None:
                self.entered.pop().close()

        def free() -> None:
            self.freed += 1

        pool = types.SimpleNamespace(free_all_blocks=free)
        module.cuda.Stream = Stream
        module.get_default_memory_pool = lambda: pool
        module.cuda.Device = lambda: types.SimpleNamespace(pci_bus_id="0000:1B:00.0")
        return module


class NvmlError(Exception):
    """``pynvml.NVMLError``."""


def nvml(clocks: Callable[[], float], watts: Callable[[], float], *, instant: bool = True) -> Any:
    """A module pynvml whose one device runs at these clocks and powers."""
    module: Any = types.ModuleType("pynvml")
    module.NVMLError, module.NVML_CLOCK_SM, module.NVML_SUCCESS = NvmlError, 1, 0
    module.opened = []
    module.nvmlInit = lambda: module.opened.append(True)
    module.nvmlShutdown = module.opened.pop
    module.nvmlDeviceGetHandleByPciBusId = lambda bus: f"device {bus}"

    def clock(device: str, kind: int) -> int:
        assert device == "device 0000:1B:00.0" and kind == 1
        return int(clocks())

    module.nvmlDeviceGetClockInfo = clock
    module.nvmlDeviceGetPowerUsage = lambda _device: int(watts() * 1e3)
    if instant:
        module.NVML_FI_DEV_POWER_INSTANT = 186
        module.nvmlDeviceGetFieldValues = lambda _device, _fields: [
            types.SimpleNamespace(
                nvmlReturn=0, value=types.SimpleNamespace(uiVal=int(watts() * 1e3))
            )
        ]
    return module


@pytest.fixture
def real_deep_gemm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``deep_gemm`` on the path, as an installed one would be."""
    folder = tmp_path / "site" / "deep_gemm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(FAKE_DEEP_GEMM)
    monkeypatch.syspath_prepend(str(folder.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "deep_gemm"]:
        monkeypatch.delitem(sys.modules, name)
