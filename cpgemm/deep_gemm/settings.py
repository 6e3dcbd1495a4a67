"""DeepGEMM's process-wide settings: multiprocessors, dependent launch, and hints without effect."""

from __future__ import annotations

import functools

from cpgemm import settings
from cpgemm.cost_model import H200
from cpgemm.errors import ArgumentTypeError, reject

__all__ = [
    "get_compile_mode",
    "get_num_sms",
    "get_pdl",
    "get_tc_util",
    "set_compile_mode",
    "set_ignore_compile_dims",
    "set_num_sms",
    "set_pdl",
    "set_tc_util",
]

_tc_util = 100
_compile_mode = 0


@functools.cache
def _sms_of(device: int) -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


def _sms_of_device() -> int:
    """Multiprocessors of the current GPU; those of an H200 without one, for the NumPy path."""
    try:
        import cupy

        return _sms_of(cupy.cuda.runtime.getDevice())
    except Exception:  # No CuPy, no driver, no device: CuPy raises a different error for each.
        return H200.sms


def _whole_number(name: str, value: object, limit: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        reject(name, "must be an integer", repr(value), "Give a number.", kind=ArgumentTypeError)
    number = int(value)
    if not 0 <= number <= limit:
        reject(name, f"must be between 0 and {limit}", number, "0 takes the limit away.")
    return number


def set_num_sms(num_sms: int) -> None:
    """Let products use ``num_sms`` multiprocessors at most, from the next call on; 0: all.

    A process-wide limit on the grid of each product, dense or grouped; kernels of other libraries
    may run on the rest.  CUDA graphs keep the limit that they were captured with.  Raises
    ``ArgumentError`` or ``ArgumentTypeError`` for what is no such number.
    """
    every = _sms_of_device()
    number = _whole_number("num_sms", num_sms, every)
    settings.set_sms(number if 0 < number < every else None)


def get_num_sms() -> int:
    """The limit of ``set_num_sms``, or the multiprocessors of the current GPU (132 without one)."""
    limit = settings.sms()
    return _sms_of_device() if limit is None else limit


def set_pdl(new_enable_pdl: bool) -> None:
    """Launch products with programmatic dependent launch, or not; overrides ``CPGEMM_PDL``.

    ``new_enable_pdl``: taken as a bool.
    """
    settings.set_pdl(bool(new_enable_pdl))


def get_pdl() -> bool:
    """Whether products are launched with programmatic dependent launch."""
    return settings.pdl()


def set_tc_util(new_tc_util: int) -> None:
    """Keep ``new_tc_util`` for ``get_tc_util`` only: the choice of kernels has a model of its own.

    Raises ``ArgumentError`` or ``ArgumentTypeError`` unless it is a number from 0 to 100.
    """
    global _tc_util
    _tc_util = _whole_number("new_tc_util", new_tc_util, 100) or 100


def get_tc_util() -> int:
    """What ``set_tc_util`` was given; 100 at first."""
    return _tc_util


def set_ignore_compile_dims(new_value: bool) -> None:
    """Take any ``new_value``; no size is compiled in, so that there is nothing to ignore."""
    del new_value


def set_compile_mode(mode: int) -> None:
    """Keep ``mode`` for ``get_compile_mode`` only, a name of SGLang's fork.

    Products are always launched.  Raises ``ArgumentError`` or ``ArgumentTypeError`` unless it is 0
    or 1.
    """
    global _compile_mode
    _compile_mode = _whole_number("mode", mode, 1)


def get_compile_mode() -> int:
    """What ``set_compile_mode`` was given; 0 at first."""
    return _compile_mode
