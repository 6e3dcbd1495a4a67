"""Functions on NumPy and CuPy arrays that take the arrays of other libraries too."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from cpgemm.dlpack import as_framework, as_native, framework_of
from cpgemm.layout import is_array, is_cupy
from cpgemm.scaled import ScaledTensor
from cpgemm.streams import working_stream

__all__ = ["bridged"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def bridged(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let ``function`` take arrays of torch, JAX and any DLPack producer, and return their kind.

    Such arguments become views (``dlpack.as_native``; ``out`` must be writable).  The first
    argument says whose result it is and whose stream the work goes to.  What ``function`` allocates
    is NumPy's or CuPy's memory.
    """
    parameters = inspect.signature(function)
    first = next(iter(parameters.parameters))

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = parameters.bind(*args, **kwargs)
        given = bound.arguments.get("out")
        framework = None
        for name, value in bound.arguments.items():
            own = value.framework if isinstance(value, ScaledTensor) else framework_of(value)
            if own in ("torch", "jax", "dlpack") and not isinstance(value, ScaledTensor):
                bound.arguments[name] = as_native(name, value, writable=name == "out")
            if name == first:
                framework = own
        if framework is None or framework in ("numpy", "cupy"):
            return function(*bound.args, **bound.kwargs)
        subject = bound.arguments[first]
        data = subject.data if isinstance(subject, ScaledTensor) else subject
        if not is_cupy(data):
            return _returned(function(*bound.args, **bound.kwargs), given, framework)
        with working_stream(framework, data.data.device_id):
            return _returned(function(*bound.args, **bound.kwargs), given, framework)

    return call


def _returned(result: Any, given: Any, framework: Any) -> Any:
    if given is not None:
        return given
    if isinstance(result, ScaledTensor):
        return dataclasses.replace(result, framework=framework)
    return as_framework(framework, result) if is_array(result) else result
