"""The bridge's way in: other libraries' arrays as views, and how long their memory lives."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
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
    FakeCuda,
    Producer,
    cuda_jax,
    cuda_torch,
    eventually,
    fake_cuda,
    filled,
    late_kernels,
    same_bits,
)
from hypothesis import given

from cpgemm import dlpack
from cpgemm import dlpack_abi as abi
from cpgemm.dlpack import as_framework, as_native, current_stream, empty, framework_of
from cpgemm.errors import ArgumentError, ArgumentTypeError

__all__ = ["fake_cuda"]  # a fixture, found by name

ROOT = Path(__file__).resolve().parent.parent
KINDS = pytest.mark.parametrize("versioned", [False, True], ids=["dltensor", "versioned"])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def need(library: str) -> Any:
    return pytest.importorskip(library, reason=f"{library} is not installed")


def torch_dtype(torch: Any, dtype: np.dtype[Any]) -> Any:
    return getattr(torch, dtype.name)


def torch_tensor(torch: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
    """A tensor with the bits of ``filled``."""
    raw = torch.from_numpy(filled(shape, dtype).view(np.uint8)).to(device)
    return raw.view(torch_dtype(torch, dtype))


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------- framework_of


class Speaker:
    """A library of its own."""

    def __dlpack__(self, *, stream: object = None) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...  # type: ignore[empty-body]


class HalfSpeaker:
    def __dlpack__(self) -> object: ...


def test_framework_by_type() -> None:
    class Mine(np.ndarray):
        pass

    assert framework_of(np.zeros(3)) == "numpy" == framework_of(np.zeros(3).view(Mine))
    assert framework_of(Speaker()) == "dlpack"
    for other in (None, 3, [1.0], "x", np.float32(1), np.float32, Speaker, HalfSpeaker()):
        assert framework_of(other) is None
    assert framework_of(np.zeros(3)) == "numpy"  # now from the cache


def test_framework_of_cupy() -> None:
    cupy = need("cupy")
    assert framework_of(abi.cupy_view(0, 0, None, 0, (0,), FP8, None)) == "cupy"
    assert framework_of(cupy.float32) is None


def test_framework_of_torch() -> None:
    torch = need("torch")
    assert framework_of(torch.zeros(2)) == "torch"
    assert framework_of(torch.nn.Parameter(torch.zeros(2))) == "torch"
    for other in (torch.float32, torch.Size([2]), torch.nn.Linear(2, 2), torch.device("cpu")):
        assert framework_of(other) is None


def test_framework_of_jax() -> None:
    jax = need("jax")
    seen = []
    array = jax.numpy.zeros(3)
    jax.jit(lambda x: (seen.append(framework_of(x)), x)[1])(array)
    jax.vmap(lambda x: (seen.append(framework_of(x)), x)[1])(array)
    jax.grad(lambda x: (seen.append(framework_of(x)), x.sum())[1])(array)
    assert framework_of(array) == "jax" and set(seen) == {"jax"}
    assert framework_of(jax.ShapeDtypeStruct((3,), np.float32)) is None


def test_nothing_is_imported_for_numpy_arrays() -> None:
    code = """
import sys
before = set(sys.modules)
import numpy as np
from cpgemm.dlpack import as_native, empty, framework_of, share
x = np.zeros((2, 2), np.float32)
assert as_native("x", x) is x and framework_of(x) == "numpy"
assert as_native("x", np.from_dlpack(share(x))) is not None
empty("numpy", (2,), "float32", x)
heavy = {"cupy", "torch", "jax", "jaxlib"}
print(heavy & {name.partition(".")[0] for name in set(sys.modules) - before} or "nothing")
"""
    assert run(code) == "nothing"


# ----------------------------------------------------------------------- NumPy, and what is refused


def test_numpy_arrays_pass() -> None:
    array = filled((2, 3), FP8)
    assert as_native("a", array) is array and as_native("a", array, writable=True) is array
    array.flags.writeable = False
    assert as_native("a", array) is array
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a read-only NumPy array"):
        as_native("out", array, writable=True)


@pytest.mark.parametrize("value", [None, 3.0, [1.0, 2.0], "x"], ids=type)
def test_what_is_no_array_is_refused(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^b: must be a NumPy, CuPy, torch or JAX array"):
        as_native("b", value)


# -------------------------------------------------------------------------------- DLPack on the CPU


@KINDS
@EACH_DTYPE
def test_dlpack_is_a_view(dtype: np.dtype[Any], versioned: bool) -> None:
    array = filled((6, 8), dtype)[1::2, ::-2]
    producer = Producer(array, versioned=versioned, offset=32)
    view = as_native("x", producer, writable=True)
    assert view.ctypes.data == array.ctypes.data and view.strides == array.strides
    assert same_bits(view, array) and view.flags.writeable
    assert producer.asked == {"max_version": (1, 1), "copy": False}  # and no stream on the CPU


@KINDS
def test_dlpack_of_before_2023(versioned: bool) -> None:
    producer = Producer(filled((3, 2), BF16), modern=False, versioned=versioned, null_strides=True)
    view = as_native("x", producer)
    assert same_bits(view, producer.tensor.array) and view.flags.c_contiguous
    assert producer.asked == {}


@given(data=st.data())
def test_any_strides_and_offsets(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    extents = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    array = filled(extents, dtype)
    array = array.transpose(data.draw(st.permutations(range(array.ndim))))
    for axis in range(array.ndim):
        start, step = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1, 2, -1, -3]))
        picked = slice(start, None, step) if step > 0 else slice(None, start, step)
        array = array[(slice(None),) * axis + (picked,)]
    if data.draw(st.booleans()):
        array = np.broadcast_to(array, (3, *array.shape))
    producer = Producer(
        array,
        versioned=data.draw(st.booleans()),
        offset=data.draw(st.integers(0, 300)),
        null_strides=bool(array.flags.c_contiguous) and data.draw(st.booleans()),
    )
    tensor = producer.tensor
    view = as_native("x", producer)
    assert same_bits(view, array)
    if array.size:
        assert view.ctypes.data == array.ctypes.data
        steps = [s for s, extent in zip(view.strides, view.shape, strict=True) if extent > 1]
        wanted = [s for s, extent in zip(array.strides, array.shape, strict=True) if extent > 1]
        assert steps == wanted
    del view, producer  # no cycles, hence at once
    assert tensor.deleted == 1


@KINDS
def test_memory_outlives_its_producer(versioned: bool) -> None:
    wanted = filled((64, 64), FP8).copy()
    producer = Producer(filled((64, 64), FP8), versioned=versioned)
    tensor = producer.tensor
    part = as_native("x", producer).T[3:]
    gone = weakref.ref(producer)
    del producer
    gc.collect()
    others = [np.full(64 * 64, 1, np.uint8) for _ in range(64)]
    assert gone() is None and tensor.deleted == 0 and len(others) == 64
    assert same_bits(part, wanted.T[3:])
    memory = tensor.array
    del part
    gc.collect()
    assert tensor.deleted == 1 and (memory.view(np.uint8) == POISON).all()


def test_nothing_keeps_memory_that_is_refused() -> None:
    producer = Producer(filled((2,), FP8), flags=abi.READ_ONLY)
    with pytest.raises(ArgumentError) as caught:
        as_native("x", producer, writable=True)
    del caught
    gc.collect()
    assert producer.tensor.deleted == 1


def test_no_axes() -> None:
    view = as_native("x", Producer(filled((), np.dtype(np.float32))))
    assert view.shape == () and same_bits(view, filled((), np.dtype(np.float32)))


def test_read_only_flag() -> None:
    assert not as_native("x", Producer(filled((2,), FP8), flags=abi.READ_ONLY)).flags.writeable
    nothing = Producer(filled((0, 2), FP8), flags=abi.READ_ONLY)
    assert not as_native("x", nothing).flags.writeable
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a read-only Producer"):
        as_native("out", Producer(filled((2,), FP8), flags=abi.READ_ONLY), writable=True)


def test_a_copy_cannot_be_written() -> None:
    view = as_native("x", Producer(filled((2,), FP8), flags=abi.IS_COPIED))
    assert same_bits(view, filled((2,), FP8))
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a copy of a Producer"):
        as_native("out", Producer(filled((2,), FP8), flags=abi.IS_COPIED), writable=True)


@pytest.mark.parametrize("device", [(abi.CPU, 0), (abi.CUDA_HOST, 0)])
def test_host_memory_is_numpys(device: tuple[int, int]) -> None:
    producer = Producer(filled((2, 3), FP8), device=device)
    assert as_native("x", producer).ctypes.data == producer.tensor.array.ctypes.data


def test_other_devices_are_refused() -> None:
    rocm = Producer(filled((2,), FP8), device=(10, 0))
    with pytest.raises(ArgumentError, match=r"^x: must be in CPU or CUDA memory.*device type 10"):
        as_native("x", rocm)
    assert rocm.tensor.deleted == 0  # was never asked for


@pytest.mark.parametrize("dtype", [(5, 8, 1), (1, 8, 4), (17, 4, 1), (10, 16, 1)], ids=str)
def test_other_dtypes_are_refused(dtype: tuple[int, int, int]) -> None:
    producer = Producer(filled((2,), np.dtype(np.uint8)), dtype=dtype)
    code, bits, lanes = dtype
    got = f"got {lanes} x {bits} bits of DLPack type code {code}"
    with pytest.raises(ArgumentTypeError, match=f"^x: must be of integers, .*{got}") as caught:
        as_native("x", producer)
    del caught
    gc.collect()
    assert producer.tensor.deleted == 1


@pytest.mark.parametrize("kind", [BufferError, RuntimeError, ValueError, TypeError])
def test_what_a_producer_says_is_passed_on(kind: type[Exception]) -> None:
    class Unwilling(Speaker):
        def __dlpack__(self, **_: object) -> object:
            raise kind("it has wings")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (abi.CPU, 0)

    with pytest.raises(ArgumentError, match=rf"^q: .*Unwilling.*{kind.__name__}: it has wings"):
        as_native("q", Unwilling())


def test_a_spent_capsule_is_refused() -> None:
    producer = Producer(filled((2,), FP8))
    view = as_native("x", producer)
    with pytest.raises(
        ArgumentError, match=r"^x: must be exportable.*not an unused DLPack capsule"
    ):
        as_native("x", producer)
    assert producer.tensor.deleted == 0 and view.shape == (2,)


# ------------------------------------------------------- DLPack on CUDA, with host memory behind it


@KINDS
@EACH_DTYPE
def test_cuda_memory_is_cupys(fake_cuda: FakeCuda, dtype: np.dtype[Any], versioned: bool) -> None:
    array = filled((6, 8), dtype)[1:, ::2]
    producer = Producer(array, versioned=versioned, device=(abi.CUDA, 2), offset=16)
    tensor = producer.tensor
    view = as_native("x", producer, writable=True)
    assert framework_of(view) == "cupy" and view.data.ptr == array.ctypes.data
    assert view.shape == array.shape and view.strides == array.strides and view.dtype == dtype
    assert view.data.device_id == 2
    del producer
    gc.collect()
    assert tensor.deleted == 0
    del view
    gc.collect()
    assert tensor.deleted == 1


@pytest.mark.parametrize(("handle", "spelt"), [(0, 1), (1, 1), (2, 2), (0x7F00, 0x7F00)])
@pytest.mark.parametrize("modern", [False, True])
def test_producer_is_told_the_stream(
    fake_cuda: FakeCuda, handle: int, spelt: int, modern: bool
) -> None:
    fake_cuda.stream.ptr = handle
    producer = Producer(filled((2,), FP8), device=(abi.CUDA, 0), modern=modern)
    as_native("x", producer)
    assert producer.asked["stream"] == spelt


def test_cuda_memory_stays_while_the_stream_is_busy(fake_cuda: FakeCuda) -> None:
    fake_cuda.stream.done = False
    first = Producer(filled((2,), FP8), device=(abi.CUDA, 1))
    as_native("x", first)
    gc.collect()
    assert first.tensor.deleted == 0 and len(fake_cuda.events) == 1
    fake_cuda.events[0].done = True
    second = as_native("x", Producer(filled((2,), FP8), device=(abi.CUDA, 1)))
    assert first.tensor.deleted == 1 and second.shape == (2,)  # looked at on the next import


def test_read_only_cuda_memory(fake_cuda: FakeCuda) -> None:
    view = as_native("x", Producer(filled((2,), FP8), device=(abi.CUDA, 0), flags=abi.READ_ONLY))
    assert framework_of(view) == "cupy"
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a read-only Producer"):
        as_native(
            "out",
            Producer(filled((2,), FP8), device=(abi.CUDA, 0), flags=abi.READ_ONLY),
            writable=True,
        )


def test_empty_cuda_memory(fake_cuda: FakeCuda) -> None:
    for device in ((abi.CUDA, 1), (abi.CUDA_MANAGED, 1)):
        producer = Producer(filled((0, 4), FP8), device=device)
        producer.tensor._kept[0].dl_tensor.data = None
        view = as_native("x", producer)
        assert view.shape == (0, 4) and view.dtype == FP8 and view.data.device_id == 1


# --------------------------------------------------------------------------------- torch on the CPU


@EACH_DTYPE
def test_torch_is_a_view(dtype: np.dtype[Any]) -> None:
    torch = need("torch")
    whole = torch_tensor(torch, (6, 8), dtype, "cpu")
    wanted = filled((6, 8), dtype)
    for tensor, expected in (
        (whole, wanted),
        (whole.T, wanted.T),
        (whole[1:, ::2], wanted[1:, ::2]),
        (whole[2].expand(3, 8), np.broadcast_to(wanted[2], (3, 8))),
        (whole[0, 0], wanted[0, 0]),
    ):
        view = as_native("x", tensor, writable=True)
        assert view.ctypes.data == tensor.data_ptr()
        assert view.strides == tuple(dtype.itemsize * s for s in tensor.stride())
        assert same_bits(view, np.asarray(expected)) and view.flags.writeable


def test_torch_without_elements() -> None:
    torch = need("torch")
    assert as_native("x", torch.empty((0, 4), dtype=torch.float8_e4m3fn)).shape == (0, 4)


def test_torch_memory_outlives_tensor_and_swapped_data() -> None:
    torch = need("torch")
    tensor = torch_tensor(torch, (64, 64), FP8, "cpu")
    view = as_native("x", tensor)
    kept = as_native("x", parameter := torch.nn.Parameter(tensor.clone(), requires_grad=False))
    del tensor
    parameter.data = torch.zeros(1)  # as Module.to does
    gc.collect()
    others = [torch.full((64 * 64,), 1, dtype=torch.uint8) for _ in range(64)]
    assert len(others) == 64
    assert same_bits(view, filled((64, 64), FP8)) and same_bits(kept, filled((64, 64), FP8))


def test_torch_writes_are_seen_on_both_sides() -> None:
    torch = need("torch")
    tensor = torch.zeros((2, 2), dtype=torch.bfloat16)
    view = as_native("out", tensor, writable=True)
    view[0, 1] = 2.5
    tensor[1, 1] = 4.0
    assert tensor[0, 1] == 2.5 and view[1, 1] == 4.0


def test_torch_gradients_are_refused() -> None:
    torch = need("torch")
    parameter = torch.nn.Parameter(torch.zeros(2))
    with (
        torch.no_grad(),
        pytest.raises(ArgumentError, match=r"^w: must not require gradients.*\.detach\(\)"),
    ):
        as_native("w", parameter)
    assert as_native("w", parameter.detach()).ctypes.data == parameter.data_ptr()


def test_torch_tensors_without_plain_memory_are_refused() -> None:
    torch = need("torch")
    rule = "^x: must be a tensor with strides and with memory of its own"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are said to be in beta state
        eye = torch.eye(3)
        unusual = [
            eye.to_sparse(),
            eye.to_sparse_csr(),
            torch.imag(torch.zeros(3, dtype=torch.complex64).conj()),
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        ]
        for tensor in unusual:
            with pytest.raises(ArgumentError, match=rule):
                as_native("x", tensor)
    seen = []

    def inside(x: Any) -> Any:
        with pytest.raises(ArgumentError, match=rule):
            as_native("x", x)
        seen.append(type(x))
        return x

    torch.func.vmap(inside)(eye)
    torch.func.functionalize(inside)(eye)
    assert len(seen) == 2


def test_torch_meta_and_fake_tensors_are_refused() -> None:
    torch = need("torch")
    fakes = need("torch._subclasses.fake_tensor")
    with pytest.raises(ArgumentError, match=r"^x: must be in CPU or CUDA memory.*device meta"):
        as_native("x", torch.zeros(3, device="meta"))
    with (
        warnings.catch_warnings(),
        fakes.FakeTensorMode(),
        pytest.raises(ArgumentTypeError, match=r"^x: must have memory; .*FakeTensor.*cpgemm.torch"),
    ):
        warnings.simplefilter("error")  # its data_ptr warns, so it must not be asked
        as_native("x", torch.zeros(3))


def test_torch_dtypes_of_its_own_are_refused() -> None:
    torch = need("torch")
    with pytest.raises(ArgumentTypeError, match=r"^x: must be of integers.*got torch\.complex64"):
        as_native("x", torch.zeros(3, dtype=torch.complex64))


class StandIn:
    """A torch tensor of the CPU that says it is on a GPU."""

    is_cuda, is_cpu = True, False

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def get_device(self) -> int:
        return 1


@EACH_DTYPE
def test_torch_cuda_road_on_host_memory(dtype: np.dtype[Any]) -> None:
    torch = need("torch")
    need("cupy")
    whole = torch_tensor(torch, (6, 8), dtype, "cpu")
    for tensor in (whole, whole.T, whole[1:, ::2], whole[2].expand(3, 8), whole[:0], whole[0, 0]):
        view = dlpack._from_torch("x", StandIn(tensor), True)
        assert framework_of(view) == "cupy" and view.data.ptr == tensor.data_ptr()
        assert view.shape == tuple(tensor.shape) and view.dtype == dtype
        assert view.data.device_id == 1
        if tensor.numel():
            assert view.strides == tuple(dtype.itemsize * s for s in tensor.stride())
            end = whole.data_ptr() + whole.numel() * dtype.itemsize
            assert view.data.mem.size >= end - tensor.data_ptr()


def test_torch_cuda_road_knows_lazy_signs() -> None:
    torch = need("torch")
    lazy = torch.imag(torch.full((3,), 1j, dtype=torch.complex64).conj())
    assert lazy.is_neg()  # its memory holds the opposite of its values
    with pytest.raises(ArgumentError, match=r"^x: .*signs have yet to be flipped.*\.resolve_neg\("):
        dlpack._from_torch("x", StandIn(lazy), False)


def test_torch_cuda_road_keeps_the_storage() -> None:
    torch = need("torch")
    need("cupy")
    tensor = torch_tensor(torch, (8, 8), FP8, "cpu")
    storage = tensor.untyped_storage()
    view = dlpack._from_torch("x", StandIn(tensor), True)
    assert view.data.mem._owner.data_ptr() == storage.data_ptr()
    tensor.data = torch.zeros(1)
    gc.collect()
    memory = torch.empty(0, dtype=torch.uint8).set_(view.data.mem._owner)
    assert memory.data_ptr() == view.data.ptr
    assert same_bits(memory.numpy().view(FP8).reshape(8, 8), filled((8, 8), FP8))


# ----------------------------------------------------------------------------------- JAX on the CPU


def cpu_jax() -> Any:
    jax = need("jax")
    return jax, lambda array: jax.device_put(array, jax.devices("cpu")[0])


@EACH_DTYPE
def test_jax_is_a_read_only_view(dtype: np.dtype[Any]) -> None:
    _, put = cpu_jax()
    array = put(filled((6, 8), dtype))
    view = as_native("x", array)
    assert view.ctypes.data == array.unsafe_buffer_pointer()
    assert same_bits(view, filled((6, 8), dtype)) and not view.flags.writeable
    with pytest.raises(
        ArgumentError, match=r"^out: must be writable; got a JAX array, which is imm"
    ):
        as_native("out", array, writable=True)


def test_jax_memory_outlives_its_array() -> None:
    _, put = cpu_jax()
    array = put(filled((64, 64), FP8)) + 0
    wanted = np.asarray(array).copy()
    view = as_native("x", array)
    array.delete()
    del array
    gc.collect()
    others = [put(np.full((64, 64), 1, np.uint8)) for _ in range(64)]
    assert same_bits(view, wanted) and len(others) == 64


def test_jax_tracers_are_refused() -> None:
    jax, put = cpu_jax()
    array = put(np.ones(3, np.float32))

    def inside(x: Any) -> Any:
        with pytest.raises(ArgumentTypeError, match=r"^x: must be a concrete array; .*cpgemm\.jax"):
            as_native("x", x)
        return x.sum()

    jax.jit(inside)(array)
    jax.grad(inside)(array)
    jax.vmap(inside)(array[:, None])


def test_jax_arrays_that_cannot_be_exported_are_refused() -> None:
    jax, put = cpu_jax()
    array = put(np.ones(3, np.float32))
    array.delete()
    with pytest.raises(ArgumentError, match=r"^x: must be exportable .* Give a live array on one"):
        as_native("x", array)
    with pytest.raises(ArgumentTypeError, match=r"^x: must be .*; got PRNGKeyArray|^x: .*dtype"):
        as_native("x", jax.random.key(0))


def test_sharded_jax_arrays_are_refused() -> None:
    need("jax")
    code = """
import jax, numpy as np
from cpgemm.dlpack import as_native
devices = jax.devices("cpu")
mesh = jax.sharding.Mesh(np.array(devices), ("x",))
spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
x = jax.device_put(np.arange(8, dtype=np.float32), spread)
try:
    as_native("a", x)
except ValueError as error:
    print(len(devices), error)
print(as_native("a", x.addressable_shards[1].data))
"""
    flags = "--xla_force_host_platform_device_count=2"
    said = run(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert said.startswith("2 a: must be exportable through DLPack without a copy; got ArrayImpl")
    assert "Give a live array on one device, for example x.addressable_shards[0].data." in said
    assert said.endswith("[4. 5. 6. 7.]")


def test_a_process_may_end_with_views_alive() -> None:
    need("jax")
    code = """
import jax, numpy as np
from cpgemm.dlpack import as_native, to_jax
x = jax.device_put(np.arange(8, dtype=np.float32), jax.devices("cpu")[0])
view = as_native("x", x)
back = to_jax(view)
cycle = [view]
cycle.append(cycle)
print(float(back.sum()))
"""
    assert run(code, JAX_PLATFORMS="cpu") == "28.0"


# ------------------------------------------------------------------------ room for results, streams


def test_empty_on_the_cpu() -> None:
    array = filled((2, 2), FP8)
    for framework in ("numpy", "cupy", "jax", "dlpack"):
        room = empty(framework, (3, 5), BF16, array)  # type: ignore[arg-type]
        assert type(room) is np.ndarray and room.shape == (3, 5) and room.dtype == BF16
    assert empty("numpy", [2, 3], "float32", Producer(array)).dtype == np.float32


def test_empty_for_torch() -> None:
    torch = need("torch")
    for like in (torch.zeros(2), np.zeros(2)):
        room = empty("torch", (3, 5), FP8, like)
        assert room.shape == (3, 5) and room.dtype == torch.float8_e4m3fn and room.is_cpu
        assert room.is_contiguous()
        assert as_native("out", room, writable=True).ctypes.data == room.data_ptr()
    with pytest.raises(ArgumentTypeError, match=r"^dtype: must be one that torch has"):
        empty("torch", (2,), np.dtype("S3"), np.zeros(2))
    assert type(empty("numpy", (2,), BF16, torch.zeros(2))) is np.ndarray


def test_as_framework() -> None:
    array = filled((16, 16), BF16)
    for framework in ("numpy", "cupy", "dlpack"):
        assert as_framework(framework, array) is array  # type: ignore[arg-type]
    need("torch")
    assert as_framework("torch", array).data_ptr() == array.ctypes.data


def test_as_framework_jax() -> None:
    need("jax")
    array = filled((16, 16), BF16)
    assert as_framework("jax", array).unsafe_buffer_pointer() == array.ctypes.data


# ----------------------------------------------------------------------------------------- on a GPU


def host(array: Any) -> np.ndarray:
    """A CuPy array's values; as bytes, because CuPy copies no FP8."""
    carrier = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize]
    return array.view(carrier).get().view(array.dtype)


@pytest.mark.gpu
@EACH_DTYPE
def test_gpu_torch_is_a_view(dtype: np.dtype[Any]) -> None:
    torch = cuda_torch()
    whole, wanted = torch_tensor(torch, (6, 8), dtype, "cuda"), filled((6, 8), dtype)
    for tensor, expected in (
        (whole, wanted),
        (whole.T, wanted.T),
        (whole[1:, ::2], wanted[1:, ::2]),
        (whole[2].expand(3, 8), np.broadcast_to(wanted[2], (3, 8))),
        (whole[:0], wanted[:0]),
    ):
        view = as_native("x", tensor, writable=True)
        assert view.data.ptr == tensor.data_ptr() and view.dtype == dtype
        assert view.device.id == tensor.get_device()
        assert view.shape == tuple(tensor.shape)
        if tensor.numel():
            assert view.strides == tuple(dtype.itemsize * s for s in tensor.stride())
        assert same_bits(host(view), np.ascontiguousarray(expected))


@pytest.mark.gpu
def test_gpu_torch_memory_is_kept_and_given_back() -> None:
    torch = cuda_torch()
    import cupy

    gc.collect()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    tensor = torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    view, kept = as_native("x", tensor), as_native("x", parameter)
    del tensor
    parameter.data = torch.zeros(1, device="cuda")  # as Module.to does
    gc.collect()
    others = [torch.full((1 << 20,), 1, dtype=torch.uint8, device="cuda") for _ in range(16)]
    torch.cuda.synchronize()
    assert len(others) == 16
    assert bool((view == 7).all()) and bool((kept == 7).all())
    cupy.cuda.runtime.deviceSynchronize()
    assert torch.cuda.memory_allocated() >= start + (18 << 20)
    del others, parameter, view, kept
    gc.collect()
    assert torch.cuda.memory_allocated() == start


@pytest.mark.gpu
def test_gpu_streams_are_the_current_ones() -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    for framework in ("cupy", "jax", "dlpack", "numpy"):
        assert current_stream(framework, 0) == cupy.cuda.get_current_stream().ptr  # type: ignore[arg-type]
        with stream:
            assert current_stream(framework, 0) == stream.ptr  # type: ignore[arg-type]
    torch = cuda_torch()
    assert current_stream("torch", 0) == torch.cuda.current_stream(0).cuda_stream
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        inner = torch.cuda.current_stream(0).cuda_stream
        assert current_stream("torch", 0) == inner != 0


@pytest.mark.gpu
def test_gpu_empty() -> None:
    import cupy

    like = cupy.zeros(2, np.uint8)
    for framework in ("cupy", "jax", "dlpack"):
        for dtype in (FP8, E5M2, BF16, np.dtype(np.float32)):
            room = empty(framework, (3, 5), dtype, like)  # type: ignore[arg-type]
            assert room.dtype == dtype and room.shape == (3, 5) and room.device == like.device
    torch = cuda_torch()
    start = torch.cuda.memory_allocated()
    room = empty("torch", (256, 256), BF16, like)
    assert room.dtype == torch.bfloat16 and room.get_device() == like.device.id
    assert torch.cuda.memory_allocated() >= start + 256 * 256 * 2  # its caching allocator
    assert empty("cupy", (2,), BF16, room).device == like.device


class Wrapped:
    """Somebody else's CUDA array: a CuPy array that is not one by type."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("managed", [False, True])
def test_gpu_dlpack_is_a_view_and_gives_back(managed: bool) -> None:
    import cupy

    pool = cupy.cuda.MemoryPool(*([cupy.cuda.malloc_managed] if managed else []))
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.arange(64, dtype=np.float32).reshape(8, 8)
    assert framework_of(Wrapped(array)) == "dlpack"
    kind = abi.CUDA_MANAGED if managed else abi.CUDA
    assert Wrapped(array).__dlpack_device__()[0] == kind
    part = array[1:, ::2]
    view = as_native("x", Wrapped(part), writable=True)
    assert view.data.ptr == part.data.ptr and view.strides == part.strides
    assert view.device == array.device
    used = pool.used_bytes()
    del array, part
    gc.collect()
    assert pool.used_bytes() == used > 0
    np.testing.assert_array_equal(view.get(), np.arange(64).reshape(8, 8)[1:, ::2])
    cupy.cuda.get_current_stream().synchronize()
    del view
    gc.collect()
    assert pool.used_bytes() == 0


@pytest.mark.gpu
def test_gpu_memory_is_given_back_when_the_stream_is_done() -> None:
    import cupy

    fill, _ = late_kernels()
    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.zeros(1024, np.uint8)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        view = as_native("x", Wrapped(array), writable=True)
        fill((1,), (256,), (view, np.int64(1024), np.int32(7), np.int64(LATE_CLOCKS)))
    del array, view
    gc.collect()
    assert not stream.done and pool.used_bytes() > 0  # the kernel is still to write there
    stream.synchronize()
    abi.release_retired()
    assert pool.used_bytes() == 0


@pytest.mark.gpu
@EACH_DTYPE
def test_gpu_jax_is_a_view(dtype: np.dtype[Any]) -> None:
    jax = cuda_jax()
    array = jax.device_put(filled((6, 8), dtype), jax.devices("cuda")[0])
    view = as_native("x", array)
    assert view.data.ptr == array.unsafe_buffer_pointer() and view.dtype == dtype
    assert view.device.id == jax.devices("cuda")[0].local_hardware_id
    assert same_bits(host(view), filled((6, 8), dtype))
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a JAX array"):
        as_native("out", array, writable=True)


def late_jax_array(jax: Any) -> Any:
    """An array of 1 + 1/4096 that JAX is still computing, or skips the test."""
    size, turns = 4096, 400
    start = jax.device_put(np.full((size, size), 1 / size, np.float32), jax.devices("cuda")[0])

    @jax.jit
    def slow(x: Any) -> Any:  # every power of this matrix is the matrix itself
        return jax.lax.fori_loop(0, turns, lambda _, y: y @ x, x) + 1

    slow(start).block_until_ready()  # compiles
    late = slow(start)
    if late.is_ready():
        pytest.skip("JAX computed it before it returned, so that nothing can be shown")
    return late


@pytest.mark.gpu
def test_gpu_jax_work_comes_before_ours() -> None:
    jax = cuda_jax()
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        cupy.zeros((2, 2), np.float32).copy()  # loads what copying needs, which could wait
        view = as_native("x", late_jax_array(jax))
        copied = view.copy().get()
    np.testing.assert_allclose(copied, 1 + 1 / 4096, rtol=1e-3)


@pytest.mark.gpu
def test_gpu_the_host_does_not_wait_for_jax() -> None:
    jax = cuda_jax()
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        late = late_jax_array(jax)
        view = as_native("x", late)
        assert not late.is_ready()
        assert view.data.ptr == late.unsafe_buffer_pointer()


@pytest.mark.gpu
def test_gpu_jax_memory_is_kept_until_our_work_is_done() -> None:
    jax = cuda_jax()
    import cupy

    _, copy = late_kernels()
    place, size = jax.devices("cuda")[0], 1 << 20
    stream = cupy.cuda.Stream(non_blocking=True)
    out = cupy.zeros(size, np.uint8)
    array = jax.device_put(np.full(size, 7, np.uint8), place).block_until_ready()
    address = array.unsafe_buffer_pointer()
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        view = as_native("x", array)
        copy((1,), (1024,), (view, out, np.int64(size), np.int64(LATE_CLOCKS)))
    del view, array
    gc.collect()
    others = [
        jax.device_put(np.full(size, 1, np.uint8), place).block_until_ready() for _ in range(8)
    ]
    reused = address in [other.unsafe_buffer_pointer() for other in others]
    stream.synchronize()
    assert not reused and bool((out == 7).all())


@pytest.mark.gpu
def test_gpu_jax_memory_is_given_back() -> None:
    jax = cuda_jax()
    import cupy

    place = jax.devices("cuda")[0]
    if place.memory_stats() is None:
        pytest.skip("this JAX tells nothing about its memory")

    def in_use() -> int:
        cupy.cuda.runtime.deviceSynchronize()
        # Another exchange, because JAX and the bridge clear up when they are used.
        as_native("y", jax.device_put(np.zeros(4, np.float32), place))
        gc.collect()
        return int(place.memory_stats()["bytes_in_use"])

    size, start = 64 << 20, in_use()
    array = jax.device_put(np.full(size, 7, np.uint8), place)
    view = as_native("x", array)
    del array
    assert in_use() >= start + size
    others = [jax.device_put(np.full(size, 1, np.uint8), place) for _ in range(2)]
    assert bool((view == 7).all()) and len(others) == 2
    del view, others
    assert eventually(lambda: in_use() < start + (1 << 20))


@pytest.mark.gpu
def test_gpu_other_devices() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    with cupy.cuda.Device(1):
        array = cupy.arange(8, dtype=np.float32)
    view = as_native("x", Wrapped(array))
    assert view.device.id == 1 and view.data.ptr == array.data.ptr
    assert empty("cupy", (2,), BF16, array).device.id == 1
    torch = cuda_torch()
    tensor = torch.arange(8, dtype=torch.bfloat16, device="cuda:1")
    view = as_native("x", tensor)
    assert view.device.id == 1 and view.data.ptr == tensor.data_ptr()
    assert empty("torch", (2,), BF16, view).get_device() == 1
    jax = cuda_jax()
    spread = jax.device_put(np.arange(8, dtype=np.float32), jax.devices("cuda")[1])
    view = as_native("x", spread)
    assert view.device.id == 1 and view.data.ptr == spread.unsafe_buffer_pointer()
