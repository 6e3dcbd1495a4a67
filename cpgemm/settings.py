"""Settings of the process that change which kernels are launched, and how.

They may be changed at any time and hold from the next call on; CUDA graphs keep what they were
captured with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from cpgemm import env

__all__ = ["changed", "on_change", "pdl", "set_pdl", "set_sms", "set_tuned", "sms", "tuned"]

_pdl: bool | None = None
_sms: int | None = None
_tuned: bool | None = None
_listeners: list[weakref.ref[Callable[[], None]]] = []


def pdl() -> bool:
    """Whether products are launched with programmatic dependent launch."""
    return env.pdl() if _pdl is None else _pdl


def set_pdl(enabled: bool | None) -> None:
    """Launch products with programmatic dependent launch, or not; None: as ``CPGEMM_PDL`` says."""
    global _pdl
    _pdl = enabled
    changed()


def sms() -> int | None:
    """How many multiprocessors products may use at most; None: all."""
    return _sms


def set_sms(limit: int | None) -> None:
    """Let products use ``limit`` multiprocessors at most; None: all."""
    global _sms
    _sms = limit
    changed()


def tuned() -> bool:
    """Whether choices of kernels that ``cpgemm.tune`` measured take part."""
    return env.tuned() if _tuned is None else _tuned


def set_tuned(enabled: bool | None) -> None:
    """Let measured choices take part, or not; None: as ``CPGEMM_TUNED`` says."""
    global _tuned
    _tuned = enabled
    changed()


def on_change(forget: Callable[[], None]) -> None:
    """Call the bound method ``forget`` whenever a setting changes, as long as its object lives."""
    _listeners.append(weakref.WeakMethod(forget))


def changed() -> None:
    """Tell all who remember launches or choices that these may be different now."""
    _listeners[:] = [listener for listener in _listeners if listener() is not None]
    for listener in list(_listeners):
        forget = listener()
        if forget is not None:
            forget()
