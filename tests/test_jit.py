"""The JIT from end to end; ``python tests/test_jit.py`` runs this file alone.

Without a GPU the kernel set is compiled and its reports are checked; with one, kernels run.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if __name__ == "__main__":
    # Ahead of the imports below: pytest puts the checkout on the path.
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

from tiny_kernels import fresh_copy, needs_nvrtc, source

from cpgemm.compiler import compile_count, compile_kernel, freeze, load_kernel

if TYPE_CHECKING:
    from cpgemm.render import KernelSource

pytestmark = needs_nvrtc

# The H200's limit for one block; a kernel above it compiles and never launches.
MAX_SHARED_BYTES = 227 * 1024
MAX_SECONDS = 0.6

SHARED = """
extern "C" __global__ void __launch_bounds__(128, 1) shared(float* out, int last) {
    extern __shared__ float memory[];
    memory[last - threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = memory[last - 127 + threadIdx.x];
}
"""


def _kernel_set() -> list[KernelSource]:
    if importlib.util.find_spec("cpgemm.kernels") is None:
        return []
    from cpgemm.kernels import all_sources

    return list(all_sources())


KERNELS = _kernel_set()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CPGEMM_COMPILER", raising=False)
    return tmp_path


def test_the_set_is_finite_and_its_names_are_unique() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert 0 < len(names) == len(set(names))
    assert len({kernel.digest for kernel in KERNELS}) == len(names)
    assert [kernel.name for kernel in _kernel_set()] == names


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_of_the_set(kernel: KernelSource) -> None:
    """Compiled afresh for sm_90a: no spill, no local memory, nothing serialised, fits an SM."""
    made = compile_kernel(kernel)
    report = made.report
    print(f"{kernel.name}: {made.seconds:.3f} s (aim: {MAX_SECONDS} s), {report}")
    assert not made.cached and report.faults() == ()
    assert report.spill_store_bytes == report.spill_load_bytes == report.stack_bytes == 0
    assert not report.serialized
    assert 0 < report.registers <= 255
    assert kernel.shared_bytes + report.static_shared_bytes <= MAX_SHARED_BYTES
    if "wgmma.mma_async" in kernel.text:
        assert report.wgmma > 0
    if "TensorMap map_b" in kernel.text:
        assert report.tma_loads > 0


@pytest.mark.gpu
def test_load_and_run() -> None:
    import cupy as cp

    loaded = load_kernel(fresh_copy("run"))
    values = np.random.default_rng().standard_normal(1000).astype(np.float32)
    given, got = cp.asarray(values), cp.full(1000, cp.nan, dtype=cp.float32)
    loaded.function((4,), (128,), (given, got, np.int32(1000)))
    assert np.array_equal(cp.asnumpy(got), values)
    assert loaded.handle != 0 and loaded.device == cp.cuda.runtime.getDevice()
    assert loaded.function.local_size_bytes == 0


@pytest.mark.gpu
def test_a_loaded_kernel_stays_loaded(cache: Path) -> None:
    first = load_kernel(fresh_copy("stay"))
    before = compile_count()
    with freeze():
        again = load_kernel(fresh_copy("stay"))
    assert again is first and compile_count() == before


@pytest.mark.gpu
def test_shared_memory_above_the_default_limit() -> None:
    import cupy as cp

    bytes_ = 200 * 1024
    loaded = load_kernel(source(SHARED, "shared", shared=bytes_))
    got = cp.empty(128, dtype=cp.float32)
    last = np.int32(bytes_ // 4 - 1)
    loaded.function((1,), (128,), (got, last), shared_mem=bytes_)
    assert np.array_equal(cp.asnumpy(got), np.arange(128)[::-1].astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_of_the_set_loads(kernel: KernelSource) -> None:
    loaded: Any = load_kernel(kernel).function
    assert loaded.local_size_bytes == 0
    assert loaded.max_dynamic_shared_size_bytes >= kernel.shared_bytes
