"""Launches loaded kernels through the driver: parameters laid out once, launched many times.

CuPy's own launch has no attributes (programmatic dependent launch) and lays the parameters out at
every call.  Cluster sizes stand in the kernels (``__cluster_dims__``), so that a grid counts blocks
everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

from cpgemm.compiler import LoadedKernel
from cpgemm.dlpack import Framework, stream_getter

__all__ = ["PreparedLaunch", "launch"]


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


class PreparedLaunch:
    """A kernel with its grid and its parameters, immutable: threads and streams may share it.

    ``args``: NumPy scalars of the parameters' exact types (device pointers as ``np.uint64``), and
    bytes for what is passed by value (tensor maps).  ``grid`` and ``block`` count blocks and
    threads, ``shared_bytes`` is dynamic shared memory, ``pdl`` programmatic dependent launch.
    ``keep`` lives as long as the launch: what owns memory that only the parameters point to.

    Calling it enqueues the kernel on the current stream of ``framework`` (``dlpack``) and returns
    at once; ``on`` takes the handle of a stream.
    """

    __slots__ = (
        "_address", "_block", "_configs", "_current_device", "_function", "_grid", "_keep",
        "_launch", "_pdl", "_shared_bytes", "_stream", "_success", "device", "framework", "kernel",
    )  # fmt: skip

    def __init__(
        self,
        kernel: LoadedKernel,
        grid: int | tuple[int, ...],
        block: int,
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
        pdl: bool = False,
        framework: Framework = "cupy",
        keep: object = None,
    ) -> None:
        driver = _driver()
        self.kernel, self.device, self.framework = kernel, kernel.device, framework
        self._grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        self._block, self._shared_bytes, self._pdl = block, shared_bytes, pdl
        self._function = driver.CUfunction(kernel.handle)
        self._keep = (*_laid_out(args), keep)
        self._address = ctypes.addressof(self._keep[1])
        self._configs: dict[int, Any] = {}  # by stream
        # Looked up once: a launch costs some 5 us of the host's time, most of it in the driver.
        self._launch, self._success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
        self._stream = stream_getter(framework)
        self._current_device = sys.modules["cupy"].cuda.runtime.getDevice

    def __call__(self) -> None:
        self.on(self._stream(self.device))

    def on(self, stream: int) -> None:
        """Enqueue the kernel on the stream of this handle, of the kernel's device."""
        if self._current_device() != self.device:
            # The handle 0 means the current context's own stream.
            with sys.modules["cupy"].cuda.Device(self.device):
                self.on(stream)
            return
        config = self._configs.get(stream)
        if config is None:
            config = self._config(stream)
        status = self._launch(config, self._function, self._address, 0)[0]
        if status is not self._success and status != self._success:
            raise RuntimeError(
                f"cpgemm: the driver refuses to launch {self.kernel.compiled.source.name} "
                f"({status!s}): grid {self._grid}, block {self._block}, "
                f"{self._shared_bytes} bytes of shared memory"
            )

    def _config(self, stream: int) -> Any:
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._block, 1, 1
        config.sharedMemBytes, config.hStream = self._shared_bytes, stream
        config.numAttrs = 0
        if self._pdl:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        if len(self._configs) > 64:  # streams come and go
            self._configs = {}
        self._configs[stream] = config
        return config


def _laid_out(args: Sequence[Any]) -> tuple[Any, Any]:
    """The parameters one after another, each naturally aligned, and the address of each."""
    parts: list[bytes] = []
    offsets: list[int] = []
    end = 0
    for arg in args:
        raw = arg if isinstance(arg, bytes) else arg.tobytes()
        gap = -end % min(len(raw), 64)  # a tensor map lies at multiples of 64
        parts += (bytes(gap), raw)
        offsets.append(end + gap)
        end += gap + len(raw)
    buffer = ctypes.create_string_buffer(end + 64)
    base = -(-ctypes.addressof(buffer) // 64) * 64
    ctypes.memmove(base, b"".join(parts), end)
    return buffer, (ctypes.c_void_p * len(offsets))(*[base + offset for offset in offsets])


def launch(
    kernel: LoadedKernel,
    grid: int | tuple[int, ...],
    block: int,
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    pdl: bool = False,
) -> None:
    """Enqueue ``kernel`` once on CuPy's current stream; arguments as for ``PreparedLaunch``."""
    PreparedLaunch(kernel, grid, block, args, shared_bytes=shared_bytes, pdl=pdl)()
