"""DLPack producers that the tests build by hand, a stand-in for CUDA, slow kernels for a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cpgemm import dlpack_abi as abi

# For GPUs that torch, CuPy and several test processes share: JAX would take most of it at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

FP8, E5M2, BF16 = (
    np.dtype(kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16)
)
DTYPES = [FP8, E5M2, BF16, *map(np.dtype, (np.float32, np.int32, np.uint8, np.bool_))]
POISON = 0xEE  # what memory is filled with when its producer gets it back

_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def filled(shape: tuple[int, ...], dtype: np.dtype[Any], *, align: int = 64) -> np.ndarray:
    """Distinct bit patterns (as far as the dtype has them) in memory aligned to ``align`` bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + align, np.uint8)
    raw = raw[-raw.ctypes.data % align :][:size]
    raw[...] = np.arange(size) % (2 if dtype == np.bool_ else 113)  # no NaN, so that values compare
    return raw.view(dtype).reshape(shape)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two NumPy arrays agree in dtype, shape and every bit."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


class Tensor:
    """A managed tensor in C memory, over the memory of a NumPy array, and its capsule.

    It keeps the array until the deleter is called, as a C library would, and counts the calls; then
    it poisons the memory.
    """

    alive: set[Tensor] = set()  # noqa: RUF012

    def __init__(
        self,
        array: np.ndarray,
        *,
        versioned: bool = True,
        device: tuple[int, int] = (abi.CPU, 0),
        flags: int = 0,
        offset: int = 0,
        null_strides: bool = False,
        dtype: tuple[int, int, int] | None = None,
        major: int = 1,
        null_deleter: bool = False,
    ) -> None:
        self.array, self.deleted = array, 0
        structure = (abi.DLManagedTensorVersioned if versioned else abi.DLManagedTensor)()
        if versioned:
            structure.major, structure.minor, structure.flags = major, 0, flags
        item = array.itemsize
        extents = (ctypes.c_int64 * array.ndim)(*array.shape)
        steps = (ctypes.c_int64 * array.ndim)(*(stride // item for stride in array.strides))
        pointer = ctypes.POINTER(ctypes.c_int64)
        tensor = structure.dl_tensor
        tensor.data = array.ctypes.data - offset
        tensor.byte_offset = offset
        tensor.device = abi.DLDevice(*device)
        tensor.ndim = array.ndim
        tensor.dtype = abi.DLDataType(*(dtype or (abi.CODES[array.dtype], 8 * item, 1)))
        tensor.shape = ctypes.cast(extents, pointer)
        tensor.strides = None if null_strides else ctypes.cast(steps, pointer)
        deleter = _Deleter(self._delete)
        structure.deleter = None if null_deleter else ctypes.cast(deleter, ctypes.c_void_p)
        self._kept = (structure, extents, steps, deleter)
        name = b"dltensor_versioned" if versioned else b"dltensor"
        self.capsule = _new_capsule(ctypes.addressof(structure), name, None)
        Tensor.alive.add(self)

    def _delete(self, address: int) -> None:
        assert address == ctypes.addressof(self._kept[0])
        self.deleted += 1
        base = self.array if self.array.base is None else self.array.base
        if isinstance(base, np.ndarray) and base.flags.writeable:
            base.view(np.uint8)[...] = POISON
        Tensor.alive.discard(self)


class Producer:
    """An object that hands out one ``Tensor``; remembers what it was asked with."""

    def __init__(self, array: np.ndarray, *, modern: bool = True, **options: Any) -> None:
        self.tensor = Tensor(array, **options)
        self.modern = modern
        self.asked: dict[str, Any] = {}

    def __dlpack_device__(self) -> tuple[int, int]:
        device = self.tensor._kept[0].dl_tensor.device
        return (device.device_type, device.device_id)

    def __dlpack__(self, **options: Any) -> Any:
        if not self.modern and set(options) - {"stream"}:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        self.asked = options
        return self.tensor.capsule


# -------------------------------------------------------------------------------- CUDA without CUDA


class FakeStream:
    """A stream whose progress the test decides."""

    def __init__(self, ptr: int = 0) -> None:
        self.ptr = ptr
        self.done, self.capturing, self.broken = True, False, False
        self.queries = 0

    def is_capturing(self) -> bool:
        self.queries += 1
        if self.broken:
            raise RuntimeError("cudaErrorUnknown")
        return self.capturing


class FakeCuda:
    """As much of ``cupy.cuda`` as the import of a DLPack tensor uses; memory is the host's."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.ordinal: int | None = None
        self.events: list[SimpleNamespace] = []

    def Device(self, ordinal: int) -> Any:
        cuda = self

        class _Device:
            def __enter__(self) -> None:
                self.previous, cuda.ordinal = cuda.ordinal, ordinal

            def __exit__(self, *_: object) -> None:
                cuda.ordinal = self.previous

        return _Device()

    def get_current_stream(self, ordinal: int = -1) -> FakeStream:
        assert self.ordinal is not None or ordinal >= 0, "the device must be chosen first"
        return self.stream

    def Event(self, disable_timing: bool = False) -> Any:
        assert disable_timing
        event = SimpleNamespace(done=False)
        event.record = lambda stream: setattr(event, "stream", stream)
        self.events.append(event)
        return event


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """CuPy's arrays are real, streams, events and devices are not."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    cuda = FakeCuda(FakeStream())
    abi._cupy_classes()  # the real ones, cached
    real: Callable[[str], Any] = abi.imported

    def imported(library: str) -> Any:
        return SimpleNamespace(cuda=cuda) if library == "cupy" else real(library)

    monkeypatch.setattr(abi, "imported", imported)
    abi._retired.clear()
    yield cuda
    cuda.stream.done, cuda.stream.capturing, cuda.stream.broken = True, False, False
    for event in cuda.events:
        event.done = True
    gc.collect()
    abi.release_retired()
    assert not abi._retired


# ------------------------------------------------------------------------------- the real libraries


def cuda_torch() -> Any:
    """torch with CUDA; skips the test without."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


def cuda_jax() -> Any:
    """JAX with CUDA; skips the test without."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA ({error})")
    return jax


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether ``condition`` comes true soon: libraries free memory on threads of their own."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return condition()


# Each waits a while before it touches memory, so that a reader that did not wait comes too early.
_LATE = """
__device__ void wait(long long clocks) {
    for (long long start = clock64(); clock64() - start < clocks;) {}
}
extern "C" __global__ void late_fill(unsigned char* out, long long n, int value, long long clocks) {
    wait(clocks);
    for (long long i = threadIdx.x; i < n; i += blockDim.x) out[i] = value;
}
extern "C" __global__ void late_copy(const unsigned char* in, unsigned char* out, long long n,
                                     long long clocks) {
    wait(clocks);
    for (long long i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i];
}
"""
LATE_CLOCKS = 1_000_000_000  # 0.5 s at 2 GHz: hosts are slow when tests share them


def late_kernels() -> tuple[Any, Any]:
    """``late_fill`` and ``late_copy``, compiled and loaded, so that launching them is all."""
    import cupy

    module = cupy.RawModule(code=_LATE)
    return module.get_function("late_fill"), module.get_function("late_copy")
