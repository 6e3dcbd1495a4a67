"""Exceptions of cpgemm and the one place where their messages are put together.

Every message of a rejected argument has four parts: the argument, the rule, the value that was got,
and the mend.  ``reject`` builds it, so that no caller can leave a part out.
"""

from __future__ import annotations

from typing import NoReturn

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CompileError",
    "CpgemmError",
    "DeviceError",
    "FrozenError",
    "KernelWarning",
    "MissingDependencyError",
    "WrongResultError",
    "reject",
]


class CpgemmError(Exception):
    """Base class of everything that cpgemm raises on purpose."""


class ArgumentError(CpgemmError, ValueError):
    """An argument has a value, shape, layout or alignment that the call cannot take."""


class ArgumentTypeError(CpgemmError, TypeError):
    """An argument is of a type or dtype that the call cannot take."""


class DeviceError(CpgemmError, RuntimeError):
    """The machine, its GPU or its driver cannot do what was asked."""


class MissingDependencyError(CpgemmError, ImportError):
    """An optional package is needed for this call and is not installed."""


class CompileError(CpgemmError, RuntimeError):
    """A kernel did not compile, or into something that is refused (spills, serialised wgmma).

    ``log`` holds the compiler's log, ``source_path`` the rendered source where it was kept.
    """

    def __init__(self, message: str, *, log: str = "", source_path: str | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.source_path = source_path


class FrozenError(CpgemmError, RuntimeError):
    """A kernel would have been compiled inside ``cpgemm.freeze()``."""


class WrongResultError(CpgemmError, AssertionError):
    """A kernel of a user's template computes something else than the product."""


class KernelWarning(UserWarning):
    """A kernel of a user's template works, but slowly: it spills or serialises its wgmma."""


def reject(
    argument: str,
    rule: str,
    got: object,
    mend: str,
    *,
    kind: type[CpgemmError] = ArgumentError,
) -> NoReturn:
    """Raise ``kind`` with the message ``argument: rule; got ...; mend``."""
    raise kind(f"{argument}: {rule}; got {got}. {mend}")
