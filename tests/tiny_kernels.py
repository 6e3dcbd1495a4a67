"""Small kernels for the tests of render, compiler and command line, and what runs beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpgemm.render import KernelSource

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

needs_nvrtc = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cuda", "filelock"))
    or importlib.util.find_spec("cuda.core") is None,
    reason="needs NVRTC, cuda-core and filelock: pip install 'cpgemm[cuda12]'",
)

COPY = """
extern "C" __global__ void __launch_bounds__(128, 1) copy(const float* in, float* out, int n) {
    for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) out[i] = in[i];
}
"""

# A dynamically indexed array has to live in local memory.
LOCAL = """
extern "C" __global__ void local(float* p, int n) {
    float a[64];
    for (int i = 0; i < 64; i++) a[i] = p[i * n];
    for (int i = 0; i < n; i++) a[(i * 7 + n) & 63] += a[(i * 13) & 63];
    for (int i = 0; i < 64; i++) p[i * n] = a[i];
}
"""

_MMA = (
    'asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 '
    '{%0, %1, %2, %3}, %4, %5, 1, 1, 1;" '
    ': "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b) : "memory");'
)

# A plain add to an accumulator between two wgmmas serialises them.
SERIALIZED = f"""
extern "C" __global__ void __launch_bounds__(128, 1)
serialized(float* p, unsigned long long a, unsigned long long b) {{
    float d[4] = {{}};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    {_MMA}
    d[1] += p[7];
    {_MMA}
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; i++) p[threadIdx.x * 4 + i] = d[i];
}}
"""

# Without a register cap at entry ptxas drops setmaxnreg.
NO_CAP = """
extern "C" __global__ void no_cap(float* p) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    p[threadIdx.x] = 1.0f;
}
"""

# 3 wgmmas (of different operands: ptxas rolls equal ones into a loop), 2 TMA loads, 1 L2 prefetch,
# 1 store and 1 reduction by TMA, 1 bulk copy.
WGMMA = f"""
struct alignas(64) TensorMap {{ char opaque[128]; }};

extern "C" __global__ void __launch_bounds__(128, 1)
wgmma(float* p, unsigned long long a, unsigned long long b,
      const __grid_constant__ TensorMap map) {{
    extern __shared__ __align__(1024) unsigned char smem[];
    __shared__ unsigned long long bar;
    unsigned s = (unsigned)__cvta_generic_to_shared(smem);
    unsigned m = (unsigned)__cvta_generic_to_shared(&bar);
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {{%1, %2}}];"
                 :: "l"(&map), "r"(0), "r"(1) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {{%3, %4}}], [%2];"
                 :: "r"(s), "l"(&map), "r"(m), "r"(0), "r"(1) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {{%3, %4}}], [%2], %5;"
                 :: "r"(s), "l"(&map), "r"(m), "r"(0), "r"(1), "h"((short)3) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %3, [%2];" :: "r"(s), "l"(p), "r"(m), "r"(128) : "memory");
    float d[4] = {{}};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    {_MMA}
    a += 2, b += 4;
    {_MMA}
    a += 7;
    {_MMA}
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; i++) p[threadIdx.x * 4 + i] = d[i];
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {{%1, %2}}], [%3];"
                 :: "l"(&map), "r"(0), "r"(1), "r"(s) : "memory");
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group "
                 "[%0, {{%1, %2}}], [%3];" :: "l"(&map), "r"(0), "r"(1), "r"(s) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}}
"""


def source(text: str, entry: str, *, name: str | None = None, shared: int = 0) -> KernelSource:
    """A ``KernelSource`` without a template; its digest covers the text alone."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return KernelSource(name or entry, text, entry, "none", digest, shared)


def kernel_named(name: str) -> KernelSource:
    """A kernel of the package."""
    from cpgemm.kernels import all_sources

    return next(kernel for kernel in all_sources() if kernel.name == name)


def fresh_copy(mark: object) -> KernelSource:
    """The copy kernel under a digest of its own."""
    return source(f"// {mark}\n{COPY}", "copy")


def compile_at_barrier(barrier: Any, results: Any, cache: str) -> None:
    """One of several processes that ask for the same kernel at the same time."""
    os.environ["CPGEMM_CACHE_DIR"] = cache
    from cpgemm.compiler import compile_count, compile_kernel

    barrier.wait(60)
    kernel = compile_kernel(fresh_copy("barrier"))
    results.put((compile_count(), kernel.cached, kernel.cubin.read_bytes()))


def run_cli(*args: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """``python -m cpgemm args`` in a process of its own."""
    return run_python("-m", "cpgemm", *args, cache=cache)


def run_python(*args: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """``python args`` in the repository, with a cache folder of its own."""
    return subprocess.run(
        [sys.executable, *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "CPGEMM_CACHE_DIR": str(cache)},
    )
