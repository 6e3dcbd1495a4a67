"""CUTLASS as a peer: calls of the compiled variants; the quickest one of a case is the peer."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpgemm.bench.contenders import Absent, Call, Contender
from cpgemm.bench.cutlass_build import Builder, Variant, variants_of
from cpgemm.bench.operands import Operands, Product
from cpgemm.layout import pointer

__all__ = ["Calls", "cutlass"]


class Calls:
    """Calls of one variant on a product's operand sets.

    ``Absent`` where CUTLASS refuses the sizes.
    """

    def __init__(self, variant: Variant, library: Path, product: Product) -> None:
        self.variant = variant
        self._library = _load(str(library))
        self.calls = [self._prepare(product, one) for one in product.sets]

    def _prepare(self, product: Product, one: Operands) -> _Call:
        status = ctypes.c_int(0)
        kept: list[Any] = []
        handle = self._create(product, one, status, kept)
        if not handle:
            text = self._library.cpgemm_cutlass_status(status).decode()
            raise Absent(f"CUTLASS refuses: {text}")
        call = _Call(self._library, handle, kept)
        weakref.finalize(call, self._library.cpgemm_cutlass_destroy, ctypes.c_void_p(handle))
        return call

    def _create(
        self, product: Product, one: Operands, status: ctypes.c_int, kept: list[Any]
    ) -> int | None:
        import cupy

        case = product.case
        sms = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        arrays = (one.a.data, one.b.data, one.a.scales, one.b.scales, one.out)
        pointers = [ctypes.c_void_p(pointer(array)) for array in arrays]
        pitch = one.a.scales_pitch
        if self.variant.source == "dense":
            made = self._library.cpgemm_cutlass_create(
                *pointers, case.m, case.n, case.k, pitch, sms, ctypes.byref(status)
            )
            return made or None
        counts = (ctypes.c_int * case.groups)(*product.rows)
        packed = packed_scales(one.a.scales, case.groups, case.m)
        kept.append(packed)
        pointers[2] = ctypes.c_void_p(pointer(packed))
        made = self._library.cpgemm_cutlass_grouped_create(
            *pointers, counts, case.groups, case.n, case.k, product.row_room,
            packed.shape[1] * case.m, case.m, sms, ctypes.byref(status),
        )  # fmt: skip
        return made or None


def packed_scales(scales: Any, groups: int, m: int) -> Any:
    """Scales of A as (groups, k-blocks, m), without gaps.

    CUTLASS's grouped collective goes from k-block to k-block by the rows of the group, whatever the
    strides that it is given: each group needs a matrix of its own, as high as the group.
    ``scales``: (groups, rows, k-blocks) with m rows or more, or (groups * m, k-blocks).
    """
    if scales.ndim == 3:
        by_group = scales[:, :m].swapaxes(-1, -2)
    else:
        by_group = scales.T.reshape(-1, groups, m).swapaxes(0, 1)
    return by_group.copy(order="C")


def cutlass(
    product: Product,
    builder: Builder,
    quickest: Callable[[Mapping[str, Sequence[Call]]], str],
) -> Contender:
    """The quickest variant that is there and takes the case; ``quickest`` times and chooses."""
    candidates: dict[str, Sequence[Call]] = {}
    reasons: list[str] = []
    for variant in variants_of(product.case.suite):
        try:
            library = builder.library(variant)
            candidates[variant.name] = Calls(variant, library, product).calls
        except Absent as error:
            reasons.append(str(error))
        except OSError as error:  # a library of another machine
            reasons.append(f"{variant.name} cannot be loaded: {error}")
    if not candidates:
        raise Absent("; ".join(dict.fromkeys(reasons)))
    chosen = quickest(candidates) if len(candidates) > 1 else next(iter(candidates))
    return Contender("cutlass", candidates[chosen], kernel=chosen)


class _Call:
    def __init__(self, library: Any, handle: int, kept: list[Any]) -> None:
        import cupy

        self._kept = kept  # what the handle points to
        self._library, self._handle = library, ctypes.c_void_p(handle)
        self._run, self._stream = library.cpgemm_cutlass_run, cupy.cuda.get_current_stream

    def __call__(self) -> None:
        status = self._run(self._handle, ctypes.c_void_p(self._stream().ptr))
        if status:
            text = self._library.cpgemm_cutlass_status(status).decode()
            raise RuntimeError(f"CUTLASS does not launch: {text}")


@functools.cache
def _load(path: str) -> Any:
    library = ctypes.CDLL(path)
    address, number = ctypes.c_void_p, ctypes.c_int
    library.cpgemm_cutlass_run.argtypes = [address, address]
    library.cpgemm_cutlass_run.restype = number
    library.cpgemm_cutlass_destroy.argtypes = [address]
    library.cpgemm_cutlass_destroy.restype = None
    library.cpgemm_cutlass_status.argtypes = [number]
    library.cpgemm_cutlass_status.restype = ctypes.c_char_p
    status = ctypes.POINTER(ctypes.c_int)
    with contextlib.suppress(AttributeError):  # each source has one of the two
        library.cpgemm_cutlass_create.argtypes = [address] * 5 + [number] * 5 + [status]
        library.cpgemm_cutlass_create.restype = address
    with contextlib.suppress(AttributeError):
        counts = ctypes.POINTER(ctypes.c_int)
        library.cpgemm_cutlass_grouped_create.argtypes = (
            [address] * 5 + [counts] + [number] * 7 + [status]
        )
        library.cpgemm_cutlass_grouped_create.restype = address
    return library
