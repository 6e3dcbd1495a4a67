"""The ABI of DLPack: layouts, capsules, deleters, and how long memory is kept."""

from __future__ import annotations

import ctypes
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dlpack_producers import (
    BF16,
    FP8,
    FakeCuda,
    Producer,
    Tensor,
    capsule_name,
    fake_cuda,
    filled,
    same_bits,
)

from cpgemm import dlpack_abi as abi
from cpgemm.errors import MissingDependencyError

__all__ = ["fake_cuda"]  # a fixture, found by name

KINDS = pytest.mark.parametrize("versioned", [False, True], ids=["dltensor", "versioned"])


# --------------------------------------------------------------------------------- the C structures


def test_structures_are_those_of_the_header() -> None:
    # Offsets of a 64-bit C compiler, from dlpack.h 1.1.
    def offsets(kind: Any) -> dict[str, int]:
        return {name: getattr(kind, name).offset for name, _ in kind._fields_}

    assert ctypes.sizeof(abi.DLDataType) == 4 and ctypes.sizeof(abi.DLDevice) == 8
    assert ctypes.sizeof(abi.DLTensor) == 48
    assert offsets(abi.DLTensor) == {
        "data": 0,
        "device": 8,
        "ndim": 16,
        "dtype": 20,
        "shape": 24,
        "strides": 32,
        "byte_offset": 40,
    }
    assert ctypes.sizeof(abi.DLManagedTensor) == 64
    assert offsets(abi.DLManagedTensor) == {"dl_tensor": 0, "manager_ctx": 48, "deleter": 56}
    assert ctypes.sizeof(abi.DLManagedTensorVersioned) == 80
    assert offsets(abi.DLManagedTensorVersioned) == {
        "major": 0,
        "minor": 4,
        "manager_ctx": 8,
        "deleter": 16,
        "flags": 24,
        "dl_tensor": 32,
    }


def test_codes() -> None:
    named = {dtype.name: code for dtype, code in abi.CODES.items()}
    assert named["float8_e4m3fn"] == 10 and named["float8_e5m2"] == 12
    assert named["float8_e8m0fnu"] == 14 and named["bfloat16"] == 4
    assert named["float32"] == 2 and named["int32"] == 0 and named["uint8"] == 1
    assert named["bool"] == 6
    assert abi.DTYPES[(10, 8, 1)] == FP8 and abi.DTYPES[(4, 16, 1)] == BF16
    assert len(abi.DTYPES) == len(abi.CODES)


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_reads_what_numpy_writes(max_version: tuple[int, int] | None) -> None:
    array = filled((4, 6), np.dtype(np.float32))[:, 1:4]
    if max_version is None:
        capsule = array.__dlpack__()
    else:
        array.flags.writeable = False
        try:
            capsule = array.__dlpack__(max_version=max_version)
        except TypeError:
            pytest.skip(f"NumPy {np.__version__} has the old protocol only")
    managed = abi.take(capsule)
    assert managed.address == array.ctypes.data
    assert managed.device == (abi.CPU, 0) and managed.dtype == (2, 32, 1)
    assert managed.shape == (4, 3) and managed.strides == (6, 1)
    assert managed.flags == (0 if max_version is None else abi.READ_ONLY)
    assert capsule_name(capsule).startswith(b"used_dltensor")


# ------------------------------------------------------------------------------ taking and deleting


@KINDS
def test_take_describes_and_marks_as_used(versioned: bool) -> None:
    array = filled((3, 5), BF16)
    tensor = Tensor(array[:, 1:], versioned=versioned, offset=64, flags=2 if versioned else 0)
    managed = abi.take(tensor.capsule)
    suffix = b"_versioned" if versioned else b""
    assert capsule_name(tensor.capsule) == b"used_dltensor" + suffix
    assert managed.address == array.ctypes.data + 2
    assert managed.dtype == (4, 16, 1) and managed.device == (abi.CPU, 0)
    assert managed.shape == (3, 4) and managed.strides == (5, 1)
    assert managed.flags == (abi.IS_COPIED if versioned else 0)


@KINDS
def test_deleter_is_called_once_by_the_last_reference(versioned: bool) -> None:
    tensor = Tensor(filled((4,), FP8), versioned=versioned)
    managed = abi.take(tensor.capsule)
    also = managed
    del managed
    gc.collect()
    assert tensor.deleted == 0 and also.shape == (4,)
    del also
    gc.collect()
    assert tensor.deleted == 1
    tensor.capsule = None  # a used capsule has nothing to give back
    gc.collect()
    assert tensor.deleted == 1


@KINDS
def test_a_capsule_is_used_up(versioned: bool) -> None:
    tensor = Tensor(filled((4,), FP8), versioned=versioned)
    managed = abi.take(tensor.capsule)
    with pytest.raises(BufferError, match="not an unused DLPack capsule"):
        abi.take(tensor.capsule)
    with pytest.raises(BufferError, match="not an unused DLPack capsule"):
        abi.relabel(tensor.capsule, 1, 8)
    assert tensor.deleted == 0 and managed.shape == (4,)


@pytest.mark.parametrize("thing", [None, 3, "dltensor", np.zeros(3)], ids=type)
def test_what_is_no_capsule_is_refused(thing: object) -> None:
    with pytest.raises(BufferError, match="not an unused DLPack capsule"):
        abi.take(thing)


def test_another_major_version_goes_back_unread() -> None:
    tensor = Tensor(filled((4,), FP8), major=2)
    with pytest.raises(BufferError, match=r"DLPack 2\.0"):
        abi.take(tensor.capsule)
    gc.collect()
    assert tensor.deleted == 1
    assert capsule_name(tensor.capsule) == b"used_dltensor_versioned"


@KINDS
def test_null_strides_null_deleter_and_no_axes(versioned: bool) -> None:
    plain = Tensor(filled((2, 3), FP8), versioned=versioned, null_strides=True, null_deleter=True)
    managed = abi.take(plain.capsule)
    assert managed.strides is None and managed.shape == (2, 3)
    del managed
    assert plain.deleted == 0
    Tensor.alive.discard(plain)
    scalar = abi.take(Tensor(filled((), BF16), versioned=versioned).capsule)
    assert scalar.shape == () and scalar.strides in (None, ())


@KINDS
def test_relabel(versioned: bool) -> None:
    tensor = Tensor(filled((2, 3), np.dtype(np.uint8)), versioned=versioned)
    with pytest.raises(BufferError, match="8 bits, not 16"):
        abi.relabel(tensor.capsule, 4, 16)
    abi.relabel(tensor.capsule, 10, 8)
    managed = abi.take(tensor.capsule)
    assert managed.dtype == (10, 8, 1) and managed.shape == (2, 3)


def test_relabel_refuses_vectors() -> None:
    tensor = Tensor(filled((2,), np.dtype(np.uint8)), dtype=(1, 8, 4))
    with pytest.raises(BufferError, match="4 x 8 bits"):
        abi.relabel(tensor.capsule, 10, 8)


def test_imported_names_what_is_missing() -> None:
    with pytest.raises(MissingDependencyError, match=r"no_such_library: .*pip install no_such_lib"):
        abi.imported("no_such_library.part")


# --------------------------------------------------------------------------------- arrays on memory


class Owner:
    """Something that can be watched."""


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("dtype", [FP8, BF16, np.dtype(np.int64)], ids=str)
def test_numpy_view(dtype: np.dtype[Any], writable: bool) -> None:
    array, owner = filled((4, 6), dtype), Owner()
    gone = weakref.ref(owner)
    strides = (-array.strides[0], 2 * array.strides[1])
    wanted = array[::-1, 1::2]
    view = abi.numpy_view(wanted.ctypes.data, owner, wanted.shape, dtype, strides, writable)
    assert view.ctypes.data == wanted.ctypes.data and view.strides == wanted.strides
    assert same_bits(view, wanted) and view.flags.writeable is writable
    part = view[1:]
    del owner, view
    gc.collect()
    assert gone() is not None and same_bits(part, wanted[1:])
    del part
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("writable", [False, True])
def test_numpy_view_of_nothing(writable: bool) -> None:
    view = abi.numpy_view(0, None, (0, 5), FP8, None, writable)
    assert view.shape == (0, 5) and view.dtype == FP8 and view.flags.writeable is writable


@pytest.mark.parametrize("dtype", [FP8, BF16, np.dtype(np.float32)], ids=str)
def test_cupy_view(dtype: np.dtype[Any]) -> None:
    # A CuPy array can be made of any address; without a GPU it cannot be used, only looked at.
    pytest.importorskip("cupy", reason="CuPy is not installed")
    array, owner = filled((4, 6), dtype), Owner()
    gone = weakref.ref(owner)
    view = abi.cupy_view(array.ctypes.data, array.nbytes, owner, 0, (4, 3), dtype, array.strides)
    assert view.data.ptr == array.ctypes.data and view.data.device_id == 0
    assert view.shape == (4, 3) and view.strides == array.strides and view.dtype == dtype
    part = view.T[1:]
    del owner, view
    gc.collect()
    assert gone() is not None and part.data.ptr == array.ctypes.data + dtype.itemsize
    del part
    gc.collect()
    assert gone() is None
    nothing = abi.cupy_view(0, 0, None, 0, (0, 5), dtype, None)
    assert nothing.shape == (0, 5) and nothing.data.ptr == 0


# ------------------------------------------------------------------------ memory that a stream uses


def _retire(cuda: FakeCuda) -> Producer:
    """A tensor that came and went while the stream was in whatever state it is in."""
    producer = Producer(filled((8,), FP8))
    owner = abi.OnStream(abi.take(producer.tensor.capsule), cuda, cuda.stream, 3)
    assert producer.tensor.deleted == 0
    del owner
    gc.collect()
    return producer


def test_an_idle_stream_gives_memory_back_at_once(fake_cuda: FakeCuda) -> None:
    assert _retire(fake_cuda).tensor.deleted == 1
    assert fake_cuda.events == [] and fake_cuda.ordinal is None


def test_a_busy_stream_keeps_memory_until_it_passed_that_point(fake_cuda: FakeCuda) -> None:
    fake_cuda.stream.done = False
    first, second = _retire(fake_cuda), _retire(fake_cuda)
    assert first.tensor.deleted == second.tensor.deleted == 0
    assert [event.stream for event in fake_cuda.events] == [fake_cuda.stream] * 2
    fake_cuda.events[1].done = True  # out of order, as on two streams
    abi.release_retired()
    assert (first.tensor.deleted, second.tensor.deleted) == (0, 1)
    fake_cuda.stream.done = True  # the event counts, not what was enqueued since
    abi.release_retired()
    assert first.tensor.deleted == 0
    fake_cuda.events[0].done = True
    abi.release_retired()
    assert (first.tensor.deleted, second.tensor.deleted) == (1, 1)
    assert len(fake_cuda.events) == 2


@pytest.mark.parametrize("state", ["capturing", "broken"])
def test_a_stream_that_cannot_be_asked_keeps_memory(fake_cuda: FakeCuda, state: str) -> None:
    setattr(fake_cuda.stream, state, True)
    producer = _retire(fake_cuda)
    abi.release_retired()
    assert producer.tensor.deleted == 0 and fake_cuda.stream.queries == 2
    assert fake_cuda.events == []
    setattr(fake_cuda.stream, state, False)
    abi.release_retired()
    assert producer.tensor.deleted == 1


def test_memory_may_retire_while_others_are_released(fake_cuda: FakeCuda) -> None:
    # The deleter of the first lets go of the second: __del__ runs inside release_retired.
    fake_cuda.stream.done = False
    second = Producer(filled((8,), FP8))
    chain = [abi.OnStream(abi.take(second.tensor.capsule), fake_cuda, fake_cuda.stream, 0)]
    first = Producer(filled((8,), FP8))
    delete = first.tensor._delete
    first.tensor._delete = lambda address: (chain.clear(), delete(address))  # type: ignore[method-assign]
    managed = abi.take(first.tensor.capsule)
    managed._deleter = first.tensor._delete
    owner = abi.OnStream(managed, fake_cuda, fake_cuda.stream, 0)
    del owner, managed
    gc.collect()
    assert chain != [] and len(fake_cuda.events) == 1
    fake_cuda.events[0].done = True
    abi.release_retired()
    assert first.tensor.deleted == 1 and chain == [] and second.tensor.deleted == 0
    fake_cuda.events[1].done = True
    abi.release_retired()
    assert second.tensor.deleted == 1


def test_a_dying_process_is_left_alone() -> None:
    tensor = Tensor(filled((4,), FP8))
    managed = abi.take(tensor.capsule)
    managed.__del__(ending=lambda: True)
    assert tensor.deleted == 0
    abi.OnStream.__del__(SimpleNamespace(_entry=None), ending=lambda: True)  # type: ignore[arg-type]
    assert not abi._retired
