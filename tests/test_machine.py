"""The record of the machine: complete, printable, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cpgemm import machine
from cpgemm.machine import MachineRecord, describe, driver_release, format_bytes, why_no_hopper

RECORD = MachineRecord(
    gpu="NVIDIA H200",
    compute_capability="9.0",
    sms=132,
    memory_bytes=150_000_000_000,
    driver="580.159.04",
    cuda_driver="13.0",
    nvrtc="13.0.88",
    cupy="14.2.0",
    torch="2.11.0+cu130",
    numpy="2.4.0",
    ml_dtypes="0.5.4",
    python="3.12.3",
    cpgemm="0.1.0",
    commit="0123456789ab",
    system="Linux 6.8 x86_64",
    cpu="a CPU",
    cores=16,
    host_memory_bytes=2**37,
    date="2026-11-22 15:23 UTC",
)


def test_one_line() -> None:
    assert str(RECORD) == (
        "NVIDIA H200, 132 SMs, 139.7 GiB, driver 580.159.04; CUDA 13.0, NVRTC 13.0.88, "
        "CuPy 14.2.0, NumPy 2.4.0, Python 3.12.3, cpgemm 0.1.0, commit 0123456789ab; "
        "2026-11-22 15:23 UTC"
    )


def test_what_is_absent_leaves_no_gap() -> None:
    bare = dataclasses.replace(
        RECORD, gpu=None, driver=None, cuda_driver=None, nvrtc=None, cupy=None, commit=None
    )
    assert str(bare) == (
        "a CPU, 16 cores, no GPU; NumPy 2.4.0, Python 3.12.3, cpgemm 0.1.0; 2026-11-22 15:23 UTC"
    )


def test_this_machine() -> None:
    record = describe()
    assert json.loads(json.dumps(record.as_dict())) == record.as_dict()
    assert record.cores >= 1 and record.numpy and record.date.endswith("UTC")
    assert "\n" not in str(record)


def test_nothing_optional_is_needed() -> None:
    """None in ``sys.modules`` makes an import fail as if the package were not installed."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('cupy', 'cuda.core', 'cuda.bindings', 'resource')))\n"
        "from cpgemm import machine\n"
        "record = machine.describe()\n"
        "assert record.gpu is None and record.nvrtc is None, record\n"
        "assert machine.why_no_hopper() == 'CuPy is not installed'\n"
        "assert machine.host_peak_bytes() is None\n"
        "with machine.device_peak() as peak: pass\n"
        "assert peak.used_bytes is None\n"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_driver_release() -> None:
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
        "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
    )
    assert driver_release(text) == "580.159.04"
    older = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC"
    assert driver_release(older) == "535.54.03"
    assert driver_release("GCC version:  gcc version 11.4.0 ") is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "2 KiB"), (5 << 20, "5 MiB"),
        (3 << 29, "1.5 GiB"), (1 << 42, "4096.0 GiB"),
    ],
)  # fmt: skip
def test_bytes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_host_peak_grows_with_use() -> None:
    before = machine.host_peak_bytes()
    assert before is None or before > 1 << 20


def _fake_cupy(capability: str | None = "90", error: str | None = None) -> Any:
    class CudaError(RuntimeError):
        pass

    def count() -> int:
        if error is not None:
            raise CudaError(error)
        return 0 if capability is None else 1

    class Hook:
        hooks: list[Any] = []  # noqa: RUF012 - stands in for CuPy's registry

        def __enter__(self) -> Any:
            self.hooks.append(self)
            return self

        def __exit__(self, *error: Any) -> None:
            self.hooks.remove(self)

    runtime = types.SimpleNamespace(CUDARuntimeError=CudaError, getDeviceCount=count)
    device = types.SimpleNamespace(compute_capability=capability)
    module: Any = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: device, MemoryHook=Hook)
    module.ndarray = type("ndarray", (), {})
    return module


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        ({}, None),
        ({"capability": "100"}, "compute capability 10.0 instead of 9.0"),
        ({"capability": "89"}, "compute capability 8.9 instead of 9.0"),
        ({"capability": None}, "no CUDA device"),
        ({"error": "cudaErrorNoDevice: no CUDA-capable device is detected"}, "no GPU"),
        ({"error": "cudaErrorInsufficientDriver: CUDA driver version is ..."}, "no driver"),
        ({"error": "cudaErrorSystemNotReady: not ready"}, "not ready"),
    ],
)
def test_why_no_hopper(
    fake: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", _fake_cupy(**fake))
    assert why_no_hopper() == why


def test_device_peak_is_the_largest_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = _fake_cupy()
    pool = types.SimpleNamespace(used=1, used_bytes=lambda: pool.used, total_bytes=lambda: 100)
    cupy.get_default_memory_pool = lambda: pool
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with machine.device_peak() as outer, machine.device_peak() as inner:
        for used in (5, 70, 20):
            pool.used = used
            for hook in cupy.cuda.MemoryHook.hooks:
                hook.malloc_postprocess(device_id=0, size=1, mem_size=512, mem_ptr=1, pmem_id=1)
        names = {hook.name for hook in cupy.cuda.MemoryHook.hooks}
    assert len(names) == 2 and not cupy.cuda.MemoryHook.hooks
    assert (outer.used_bytes, outer.held_bytes) == (70, 100) == (inner.used_bytes, inner.held_bytes)


@pytest.mark.gpu
def test_device_peak_on_the_gpu() -> None:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    with machine.device_peak() as peak:
        del_me = cupy.empty(64 << 20, cupy.uint8)
        del del_me
        cupy.empty(16 << 20, cupy.uint8)
    assert peak.used_bytes is not None and peak.held_bytes is not None
    assert 64 << 20 <= peak.used_bytes <= peak.held_bytes
    record = describe()
    assert record.gpu and record.sms and record.memory_bytes and record.cuda_driver
    assert record.compute_capability == "9.0" and why_no_hopper() is None
