"""Functions on NumPy and CuPy arrays that take other libraries' arrays too."""

import numpy as np
import pytest

from cpgemm.bridged import bridged
from cpgemm.dlpack import framework_of
from cpgemm.errors import ArgumentError


@bridged
def doubled(x, *, out=None, factor=2):
    """Twice the array."""
    assert isinstance(x, np.ndarray)
    if out is None:
        return x * factor
    out[...] = x * factor
    return out


def test_numpy_arrays_pass_through():
    x = np.arange(3.0)
    assert isinstance(doubled(x), np.ndarray)
    out = np.zeros(3)
    assert doubled(x, out=out, factor=3) is out and out.tolist() == [0, 3, 6]
    assert doubled.__doc__ == "Twice the array."


def test_tensors_come_and_go():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.arange(3, dtype=torch.float32)
    got = doubled(x)
    assert framework_of(got) == "torch" and got.tolist() == [0, 2, 4]
    out = torch.zeros(3)
    assert doubled(x, out=out) is out and out.tolist() == [0, 2, 4]


def test_jax_arrays_come_and_are_not_written():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    x = jax.numpy.arange(3.0)
    assert framework_of(doubled(x)) == "jax"
    with pytest.raises(ArgumentError, match=r"^out: must be writable; got a JAX array"):
        doubled(x, out=x)


def test_what_is_no_array_is_left_to_the_function():
    with pytest.raises(AssertionError):
        doubled([1, 2])
    with pytest.raises(TypeError):
        doubled(np.zeros(2), wrong=1)
