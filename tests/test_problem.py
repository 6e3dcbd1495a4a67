"""Every rule of ``cpgemm.problem``: one test each, and what is left alone when it breaks."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cpgemm
from cpgemm import problem
from cpgemm.errors import ArgumentError, ArgumentTypeError, DeviceError
from cpgemm.problem import GemmProblem, check_alignment, check_device
from cpgemm.scaled import ScaledTensor

BF16 = ml_dtypes.bfloat16


@pytest.fixture
def pair(rng):
    a = cpgemm.quantize(rng.standard_normal((6, 256), dtype=np.float32), (1, 128))
    b = cpgemm.quantize(rng.standard_normal((16, 256), dtype=np.float32), (128, 128))
    return a, b


def rejected(match, call, kind=ArgumentError):
    with pytest.raises(kind, match=match) as caught:
        call()
    message = str(caught.value)
    assert "; got " in message and message.rstrip().endswith("."), message


def test_operand_must_be_scaled(pair):
    rejected("^a: must be a ScaledTensor", lambda: cpgemm.gemm(np.ones((2, 16)), pair[1]),
             ArgumentTypeError)  # fmt: skip


def test_granularity_of_a(pair):
    rejected(r"^a: must have granularity \(1, 128\)", lambda: cpgemm.gemm(pair[1], pair[1]))


def test_granularity_of_b(pair):
    rejected(r"^b: must have granularity \(128, 128\)", lambda: cpgemm.gemm(pair[0], pair[0]))


def test_axes(rng):
    grouped = cpgemm.quantize(rng.standard_normal((2, 16, 128), dtype=np.float32), (128, 128))
    a = cpgemm.quantize(rng.standard_normal((2, 128), dtype=np.float32), (1, 128))
    rejected("^b: must have 2 axes", lambda: cpgemm.gemm(a, grouped))


def test_k_of_operands_must_agree(pair, rng):
    b = cpgemm.quantize(rng.standard_normal((16, 128), dtype=np.float32), (128, 128))
    rejected(r"^b: must have as many columns \(K\) as a, 256", lambda: cpgemm.gemm(pair[0], b))


def test_k_multiple_of_16():
    a = ScaledTensor.from_arrays(np.zeros((2, 24), np.uint8), np.ones((2, 1), np.float32), (1, 128))
    b = ScaledTensor.from_arrays(
        np.zeros((8, 24), np.uint8), np.ones((1, 1), np.float32), (128, 128)
    )
    rejected("^a: K must be a multiple of 16; got 24", lambda: cpgemm.gemm(a, b))


def test_n_multiple_of_8(pair, rng):
    b = cpgemm.quantize(rng.standard_normal((12, 256), dtype=np.float32), (128, 128))
    rejected("^n: N must be a multiple of 8; got 12", lambda: cpgemm.gemm(pair[0], b))


def test_operand_must_be_contiguous_along_k(pair, rng):
    square = cpgemm.quantize(rng.standard_normal((256, 256), dtype=np.float32), (128, 128))
    rejected(r"^b: must be contiguous along K .*k_major", lambda: cpgemm.gemm(pair[0], square.T))


def test_out_dtype_name(pair):
    rejected("^out_dtype: must be 'bfloat16' or 'float32'",
             lambda: cpgemm.gemm(*pair, out_dtype="float16"), ArgumentTypeError)  # fmt: skip


@pytest.mark.parametrize("given", ["float32", np.float32, np.dtype(np.float32)])
def test_out_dtype_spellings(pair, given):
    assert cpgemm.gemm(*pair, out_dtype=given).dtype == np.float32


@pytest.mark.parametrize("name", ["out", "c"])
class TestMatrix:
    """``out`` and ``c`` obey the same rules."""

    @staticmethod
    def call(pair, name, array, out_dtype="bfloat16"):
        return lambda: cpgemm.gemm(*pair, **{name: array}, out_dtype=out_dtype)

    def test_kind(self, pair, name):
        call = self.call(pair, name, [[0.0]])
        rejected(f"^{name}: must be a NumPy, CuPy, torch or JAX array", call, ArgumentTypeError)

    def test_dtype(self, pair, name):
        wrong = np.zeros((6, 16), np.float32)
        rejected(f"^{name}: must have dtype bfloat16", self.call(pair, name, wrong),
                 ArgumentTypeError)  # fmt: skip

    def test_shape(self, pair, name):
        rejected(rf"^{name}: must have shape \(6, 16\)",
                 self.call(pair, name, np.zeros((16, 6), BF16)))  # fmt: skip

    def test_rows_contiguous(self, pair, name):
        rejected(f"^{name}: must be contiguous along its rows",
                 self.call(pair, name, np.zeros((16, 6), BF16).T))  # fmt: skip

    def test_row_stride_zero(self, pair, name):
        array = np.lib.stride_tricks.as_strided(np.zeros(16, BF16), (6, 16), (0, 2))
        rejected(f"^{name}: must be contiguous along its rows", self.call(pair, name, array))


def test_broken_rules_leave_out_untouched(pair):
    out = np.full((6, 16), 7, BF16)
    rejected("^c: must have shape", lambda: cpgemm.gemm(*pair, out, c=np.zeros((5, 16), BF16)))
    assert (out == 7).all()


def test_out_overlaps_operand():
    memory = np.zeros(16 * 256 * 2, np.uint8)
    data = memory[: 8 * 256].reshape(8, 256)
    a = ScaledTensor.from_arrays(data, np.ones((8, 2), np.float32), (1, 128))
    b = ScaledTensor.from_arrays(
        np.zeros((16, 256), np.uint8), np.ones((1, 2), np.float32), (128, 128)
    )
    out = memory[128 : 128 + 8 * 16 * 2].view(BF16).reshape(8, 16)
    rejected("^out: must not overlap a;", lambda: cpgemm.gemm(a, b, out))


def test_out_overlaps_scales(pair):
    a, b = pair
    storage = np.zeros(4096, np.float32)
    scales = storage[: 2 * 8].reshape(2, 8)[:, :6].T
    a = ScaledTensor.from_arrays(a.data, scales, (1, 128))
    assert np.shares_memory(a.scales, storage)
    out = storage[: 6 * 16].reshape(6, 16)
    rejected("^out: must not overlap a.scales", lambda: cpgemm.gemm(a, b, out))


def test_out_overlaps_c_in_part(pair):
    storage = np.zeros((7, 16), BF16)
    rejected("^out: must not overlap c", lambda: cpgemm.gemm(*pair, storage[1:], c=storage[:6]))


def test_c_may_be_out(pair):
    out = np.ones((6, 16), np.float32)
    expected = cpgemm.gemm(*pair, out_dtype="float32") + 1
    assert cpgemm.gemm(*pair, out, c=out) is out
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_address_alignment():
    memory = np.zeros(1024, np.uint8)
    start = -memory.ctypes.data % 16 + 8
    rejected("^a: must start at a 16-byte aligned address",
             lambda: check_alignment("a", memory[start : start + 256].reshape(4, 64)))  # fmt: skip


def test_pitch_alignment():
    memory = np.zeros(1024, np.uint8)
    start = -memory.ctypes.data % 16
    rows = np.lib.stride_tricks.as_strided(memory[start:], (4, 64), (72, 1))
    rejected("^b: must have a row pitch that is a multiple of 16 bytes; got 72 bytes",
             lambda: check_alignment("b", rows))  # fmt: skip


def test_gpu_that_is_not_hopper(monkeypatch):
    device = SimpleNamespace(id=0, compute_capability="100")
    operand = SimpleNamespace(data=SimpleNamespace(device=device))
    monkeypatch.setattr(problem, "is_cupy", lambda x: True)
    rejected("compute capability 9.0.*got compute capability 10.0 of device 0",
             lambda: check_device(operand), DeviceError)  # fmt: skip
    device.compute_capability = "90"
    check_device(operand)


def test_operands_on_two_devices(pair, monkeypatch):
    a, b = pair
    monkeypatch.setattr(ScaledTensor, "device", property(lambda s: "cpu" if s is a else "cuda:1"))
    rejected("^b: must be on a's device, cpu; got cuda:1", lambda: cpgemm.gemm(a, b))


@pytest.mark.parametrize("size", [-1, 2**31])
def test_sizes_in_range(size):
    rejected("^m: must be between 0", lambda: GemmProblem(size, 8, 16))


@pytest.mark.parametrize("size", [1.5, True, "4"])
def test_sizes_are_integers(size):
    rejected("^m: must be an integer", lambda: GemmProblem(size, 8, 16), ArgumentTypeError)


def test_bytes_and_flops():
    p = GemmProblem(64, 2112, 7168)
    assert p.flops == 2 * 64 * 2112 * 7168
    scales = 4 * 56 * (64 + 17)
    assert p.bytes == (64 + 2112) * 7168 + scales + 64 * 2112 * 2
    assert GemmProblem(64, 2112, 7168, accumulate=True).bytes == p.bytes + 64 * 2112 * 2
    assert p.bytes == pytest.approx(15.9e6, rel=0.01)
