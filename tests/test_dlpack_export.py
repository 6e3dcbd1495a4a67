"""The bridge's way out: NumPy and CuPy arrays for torch, JAX and any DLPack consumer."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from dlpack_producers import (
    BF16,
    DTYPES,
    E5M2,
    FP8,
    LATE_CLOCKS,
    POISON,
    Tensor,
    capsule_name,
    cuda_jax,
    cuda_torch,
    eventually,
    filled,
    late_kernels,
    same_bits,
)
from hypothesis import given

from cpgemm import dlpack_abi as abi
from cpgemm.dlpack import as_native, share, to_jax, to_torch
from cpgemm.errors import ArgumentError, ArgumentTypeError

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def need(library: str) -> Any:
    return pytest.importorskip(library, reason=f"{library} is not installed")


def versioned_numpy() -> bool:
    """Whether this NumPy speaks DLPack 1.0 (2.1 and newer do)."""
    try:
        np.zeros(1).__dlpack__(max_version=(1, 0))
    except TypeError:
        return False
    return True


def owned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray, Tensor]:
    """An array on memory that is poisoned when the last user is gone, and who counts that."""
    tensor = Tensor(filled(shape, dtype))
    managed = abi.take(tensor.capsule)
    view = abi.numpy_view(managed.address, managed, shape, dtype, None, True)
    return view, tensor


# ------------------ share


@EACH_DTYPE
@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 1)])
def test_share_has_the_true_dtype(
    dtype: np.dtype[Any], max_version: tuple[int, int] | None
) -> None:
    if max_version is not None and not versioned_numpy():
        pytest.skip(f"NumPy {np.__version__} has the old protocol only")
    array = filled((6, 8), dtype)[1:, ::2]
    shared = share(array)
    assert shared.__dlpack_device__() == (abi.CPU, 0)
    options = {} if max_version is None else {"max_version": max_version}
    capsule = shared.__dlpack__(**options)
    is_versioned = max_version is not None and max_version[0] >= 1
    assert capsule_name(capsule) == (b"dltensor_versioned" if is_versioned else b"dltensor")
    managed = abi.take(capsule)
    assert managed.dtype == (abi.CODES[dtype], 8 * dtype.itemsize, 1)
    assert managed.address == array.ctypes.data and managed.shape == array.shape
    assert managed.strides == tuple(s // dtype.itemsize for s in array.strides)
    assert managed.flags == 0


@given(data=st.data())
def test_share_and_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    array = filled(tuple(data.draw(st.lists(st.integers(0, 5), max_size=4))), dtype)
    array = array.transpose(data.draw(st.permutations(range(array.ndim))))
    if array.ndim:
        array = array[data.draw(st.integers(0, 2)) :: data.draw(st.sampled_from([1, 2, -1]))]
    view = as_native("x", share(array))
    assert same_bits(view, array)
    if array.size:
        assert view.ctypes.data == array.ctypes.data


def test_share_answers_the_whole_protocol() -> None:
    if not versioned_numpy():
        pytest.skip(f"NumPy {np.__version__} has the old protocol only")
    array = filled((4,), BF16)
    with pytest.raises((RuntimeError, ValueError), match="stream"):  # by the version of NumPy
        share(array).__dlpack__(stream=1)  # the CPU has none
    copied = abi.take(share(array).__dlpack__(max_version=(1, 0), copy=True))
    assert copied.address != array.ctypes.data and copied.dtype == (4, 16, 1)
    assert copied.flags & abi.IS_COPIED
    there = share(array).__dlpack__(dl_device=(abi.CPU, 0), copy=False)
    assert abi.take(there).address == array.ctypes.data


def test_share_of_read_only_memory() -> None:
    if not versioned_numpy():
        pytest.skip(f"NumPy {np.__version__} has the old protocol only")
    array = filled((4,), FP8)
    array.flags.writeable = False
    assert not as_native("x", share(array)).flags.writeable
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a read-only"):
        as_native("out", share(array), writable=True)
    with pytest.raises(BufferError):
        share(array).__dlpack__()


def test_share_keeps_memory() -> None:
    array, tensor = owned((64, 64), FP8)
    view = as_native("x", share(array))
    del array
    gc.collect()
    assert tensor.deleted == 0 and same_bits(view, filled((64, 64), FP8))
    del view
    gc.collect()
    assert tensor.deleted == 1 and (tensor.array.view(np.uint8) == POISON).all()


def test_an_unused_capsule_keeps_nothing() -> None:
    array, tensor = owned((8,), FP8)
    capsule = share(array).__dlpack__()
    del array
    gc.collect()
    assert tensor.deleted == 0
    del capsule
    gc.collect()
    assert tensor.deleted == 1


@pytest.mark.parametrize("function", [share, to_torch, to_jax])
def test_only_our_arrays_and_dtypes(function: Any) -> None:
    with pytest.raises(
        ArgumentTypeError, match=r"^array: must be a NumPy or a CuPy array; got list"
    ):
        function([1.0])
    for dtype in ("complex64", ">f4", "S3", object):
        with pytest.raises(ArgumentTypeError, match=r"^array: must be of integers, bool"):
            function(np.zeros(3, dtype))


# ------------------ torch


@EACH_DTYPE
def test_to_torch_is_a_view(dtype: np.dtype[Any]) -> None:
    torch = need("torch")
    whole = filled((6, 8), dtype)
    for array in (whole, whole.T, whole[1:, ::2], whole[0, 0:1], whole[:, 3]):
        tensor = to_torch(array)
        assert tensor.dtype == getattr(torch, dtype.name) and tensor.data_ptr() == array.ctypes.data
        assert tuple(tensor.shape) == array.shape
        assert tuple(dtype.itemsize * s for s in tensor.stride()) == array.strides
        assert same_bits(as_native("x", tensor), array)
    nothing = to_torch(whole[:0])
    assert nothing.shape == (0, 8) and nothing.dtype == getattr(torch, dtype.name)


@EACH_DTYPE
def test_torch_imports_what_is_shared(dtype: np.dtype[Any]) -> None:
    torch = need("torch")
    array = filled((6, 8), dtype)[1:, ::2]
    try:
        tensor = torch.from_dlpack(share(array))
    except RuntimeError as error:  # before it knew the codes of DLPack 1.1
        pytest.skip(f"torch {torch.__version__}: {error}")
    assert tensor.dtype == getattr(torch, dtype.name) and tensor.data_ptr() == array.ctypes.data


def test_to_torch_keeps_memory() -> None:
    need("torch")
    array, owner = owned((64, 64), FP8)
    tensor = to_torch(array)
    del array
    gc.collect()
    assert owner.deleted == 0 and same_bits(as_native("x", tensor), filled((64, 64), FP8))
    part = tensor[1:]
    del tensor
    gc.collect()
    assert owner.deleted == 0
    del part
    gc.collect()
    assert owner.deleted == 1


def test_to_torch_of_read_only_memory() -> None:
    need("torch")
    array = filled((4,), FP8)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, once per process
        assert to_torch(array).data_ptr() == array.ctypes.data


def test_to_torch_refuses_what_torch_cannot_hold() -> None:
    need("torch")
    with pytest.raises(ArgumentError, match=r"^array: must be one that torch can hold.*\(-1,\)"):
        to_torch(filled((4,), FP8)[::-1])


# ------------------ JAX


def test_to_jax_follows_layouts() -> None:
    need("jax")
    whole = filled((16, 24), BF16)
    cube = filled((3, 8, 16), FP8)
    for array in (whole, whole.T, cube.transpose(2, 0, 1), whole[None, :, None]):
        result = to_jax(array)
        assert result.unsafe_buffer_pointer() == array.ctypes.data
        assert same_bits(np.asarray(result), array)
        assert same_bits(as_native("x", result), array)
        assert same_bits(np.asarray(result.T), array.T)  # JAX computes with that layout, too


@EACH_DTYPE
def test_to_jax_is_a_view(dtype: np.dtype[Any]) -> None:
    need("jax")
    array = filled((16, 16), dtype)
    result = to_jax(array)
    assert result.dtype == dtype and result.shape == array.shape
    assert result.unsafe_buffer_pointer() == array.ctypes.data
    view = as_native("x", result)
    assert view.ctypes.data == array.ctypes.data and same_bits(view, array)
    assert to_jax(array[:0]).shape == (0, 16) and to_jax(array[:0]).dtype == dtype


@EACH_DTYPE
def test_to_jax_copies_what_jax_cannot_hold(dtype: np.dtype[Any]) -> None:
    need("jax")
    whole = filled((17, 16), dtype)
    odd = filled((17,), dtype)[1:]  # not aligned
    for array in (whole[:, :9], whole[::2], whole[::-1], np.broadcast_to(whole[0], (3, 16)), odd):
        result = to_jax(array)
        assert result.dtype == dtype and same_bits(np.asarray(result), np.ascontiguousarray(array))


def test_to_jax_of_read_only_memory() -> None:
    need("jax")
    array = filled((16, 16), FP8)
    array.flags.writeable = False
    assert to_jax(array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("read_only", [False, True])
def test_to_jax_keeps_memory(read_only: bool) -> None:
    need("jax")
    array, owner = owned((64, 64), FP8)
    array.flags.writeable = not read_only
    result = to_jax(array)
    del array
    gc.collect()
    assert owner.deleted == 0 and same_bits(as_native("x", result), filled((64, 64), FP8))
    del result
    gc.collect()
    as_native("x", to_jax(np.zeros(1, np.float32)))  # JAX clears up when it is called
    gc.collect()
    assert owner.deleted == 1


def test_between_torch_and_jax() -> None:
    torch = need("torch")
    need("jax")
    for dtype in (FP8, E5M2, BF16):
        array = filled((16, 16), dtype)
        there = to_jax(as_native("t", to_torch(array)))
        back = to_torch(as_native("j", there))
        assert back.dtype == getattr(torch, dtype.name) and back.data_ptr() == array.ctypes.data


# ------------------ on a GPU


def device_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A CuPy array with the bits of ``filled``."""
    import cupy

    return cupy.asarray(filled(shape, dtype).view(np.uint8)).view(dtype)


@pytest.mark.gpu
@EACH_DTYPE
@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_gpu_share_and_back(dtype: np.dtype[Any], max_version: tuple[int, int] | None) -> None:
    array = device_array((6, 8), dtype)[1:, ::2]
    shared = share(array)
    assert shared.__dlpack_device__() == (abi.CUDA, array.device.id)
    options = {} if max_version is None else {"max_version": max_version}
    managed = abi.take(shared.__dlpack__(**options))
    assert managed.dtype == (abi.CODES[dtype], 8 * dtype.itemsize, 1)
    view = as_native("x", share(array), writable=True)
    assert view.data.ptr == array.data.ptr and view.strides == array.strides
    assert view.dtype == dtype and view.shape == array.shape


@pytest.mark.gpu
def test_gpu_share_to_the_cpu() -> None:
    array = device_array((6, 8), FP8)
    capsule = share(array).__dlpack__(max_version=(1, 0), dl_device=(abi.CPU, 0), copy=True)
    managed = abi.take(capsule)
    assert managed.device == (abi.CPU, 0) and managed.dtype == (10, 8, 1)
    view = abi.numpy_view(managed.address, managed, (6, 8), FP8, None, True)
    assert same_bits(view, filled((6, 8), FP8))


@pytest.mark.gpu
@EACH_DTYPE
def test_gpu_to_torch_is_a_view(dtype: np.dtype[Any]) -> None:
    torch = cuda_torch()
    whole, wanted = device_array((6, 8), dtype), filled((6, 8), dtype)
    for array, expected in (
        (whole, wanted),
        (whole.T, wanted.T),
        (whole[1:, ::2], wanted[1:, ::2]),
    ):
        tensor = to_torch(array)
        assert tensor.dtype == getattr(torch, dtype.name)
        assert tensor.data_ptr() == array.data.ptr and tensor.get_device() == array.device.id
        assert tuple(dtype.itemsize * s for s in tensor.stride()) == array.strides
        assert same_bits(as_native("x", tensor.cpu()), np.ascontiguousarray(expected))
        assert as_native("x", tensor).data.ptr == array.data.ptr
    nothing = to_torch(whole[:0])
    assert nothing.shape == (0, 8) and nothing.is_cuda


@pytest.mark.gpu
@EACH_DTYPE
def test_gpu_to_jax_is_a_view(dtype: np.dtype[Any]) -> None:
    cuda_jax()
    whole, wanted = device_array((16, 24), dtype), filled((16, 24), dtype)
    for array, expected in ((whole, wanted), (whole.T, wanted.T), (whole[8:], wanted[8:])):
        result = to_jax(array)
        assert result.dtype == dtype and result.unsafe_buffer_pointer() == array.data.ptr
        assert same_bits(np.asarray(result), np.ascontiguousarray(expected))
        view = as_native("x", result)
        assert view.data.ptr == array.data.ptr and view.strides == array.strides
    for array, expected in ((whole[:, :9], wanted[:, :9]), (whole[0, 1:], wanted[0, 1:])):
        result = to_jax(array)  # a copy, for its gaps or its address
        assert result.unsafe_buffer_pointer() != array.data.ptr
        assert same_bits(np.asarray(result), expected.copy())
    nothing = to_jax(whole[:0])
    assert nothing.shape == (0, 24) and nothing.devices() == to_jax(whole).devices()


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gpu_memory_is_kept_and_given_back(library: str) -> None:
    import cupy

    jax = cuda_torch() if library == "torch" else cuda_jax()
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.full(1 << 20, 7, np.uint8)
    result = to_torch(array) if library == "torch" else to_jax(array)
    del array
    gc.collect()
    assert pool.used_bytes() == 1 << 20
    with cupy.cuda.using_allocator(pool.malloc):
        others = [cupy.full(1 << 20, 1, np.uint8) for _ in range(4)]
    cupy.cuda.runtime.deviceSynchronize()
    assert len(others) == 4 and bool((result == 7).all())
    del others, result
    if library == "jax":  # it clears up when it is called
        jax.numpy.zeros(4).block_until_ready()
    assert eventually(lambda: pool.used_bytes() == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gpu_our_work_comes_before_theirs(library: str) -> None:
    import cupy

    fill, _ = late_kernels()
    if library == "torch":
        torch = cuda_torch()
        torch.zeros(2, device="cuda").clone()  # initialises what might wait
    else:
        jax = cuda_jax()
        jax.numpy.copy(to_jax(cupy.zeros(1 << 16, np.uint8))).block_until_ready()
    array = cupy.zeros(1 << 16, np.uint8)
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        fill((1,), (256,), (array, np.int64(1 << 16), np.int32(7), np.int64(LATE_CLOCKS)))
        if library == "torch":
            with torch.cuda.stream(torch.cuda.Stream()):
                tensor = to_torch(array)
                pending = not stream.done
                copied = tensor.clone().cpu().numpy()
        else:
            result = to_jax(array)
            pending = not stream.done
            copied = np.asarray(jax.numpy.copy(result))
    assert (copied == 7).all()
    assert pending, "the host waited for the kernel"


@pytest.mark.gpu
def test_gpu_torch_memory_of_a_view_of_a_view() -> None:
    # torch -> CuPy -> torch: the first tensor's storage lives as long as the last one's.
    torch = cuda_torch()
    gc.collect()
    start = torch.cuda.memory_allocated()
    tensor = torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    storage = weakref.ref(tensor)
    again = to_torch(as_native("x", tensor))
    del tensor
    gc.collect()
    assert storage() is None and torch.cuda.memory_allocated() >= start + (1 << 20)
    others = [torch.full((1 << 20,), 1, dtype=torch.uint8, device="cuda") for _ in range(4)]
    assert bool((again == 7).all()) and len(others) == 4
    del again, others
    gc.collect()
    assert torch.cuda.memory_allocated() == start


@pytest.mark.gpu
def test_gpu_other_devices() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    with cupy.cuda.Device(1):
        array = device_array((16, 16), FP8)
    assert as_native("x", share(array)).device.id == 1
    cuda_torch()
    assert to_torch(array).get_device() == 1 and to_torch(array).data_ptr() == array.data.ptr
    cuda_jax()
    result = to_jax(array)
    assert result.unsafe_buffer_pointer() == array.data.ptr
    assert next(iter(result.devices())).local_hardware_id == 1
