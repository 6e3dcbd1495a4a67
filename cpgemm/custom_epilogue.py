"""``Custom``: an epilogue of the user's own, a small CUDA function in a file.

    // clip.cuh
    __device__ float clip(float value, int row, int column, Array<float> limits) {
        return fminf(fmaxf(value, -limits[column]), limits[column]);
    }

    d = cpgemm.gemm(a, b, epilogue=Custom("clip.cuh", limits))

docs/epilogues.md has the whole contract.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpgemm.calls import signature
from cpgemm.dlpack import as_native, framework_of
from cpgemm.epilogue_spec import Stage
from cpgemm.epilogue_step import Field, Step, check_same_device, operand
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.problem import OUT_DTYPES
from cpgemm.scaled import Array, is_cupy, pointer

__all__ = ["Custom"]

_DTYPES: dict[str, np.dtype[Any]] = {**OUT_DTYPES, "int32": np.dtype(np.int32)}
_FUNCTION = re.compile(r"__device__\b[^;{}()]*?\bfloat\s+(\w+)\s*\(")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


class Custom(Step):
    """``value = function(value, row, column, *arrays)`` for each value, a user's CUDA function.

    ``source``: the path of a file, or the CUDA text itself (what holds a brace is text), with

        __device__ float NAME(float value, int row, int column, Array<T> first, ...)

    ``row`` and ``column`` count those of D where the step stands (through all groups of a masked
    product).  Each of ``arrays`` (float32, bfloat16 or int32; 1 or 2 axes, rows contiguous; where
    the operands are) becomes an ``Array<float>``, ``Array<bfloat16>`` or ``Array<int>``, which is
    read by ``array[i]`` and ``array(row, column)``; bfloat16 reads as float.  Shapes are the
    function's affair: it is called for rows and columns that D has, and no others.

    ``function``: its name, by default the last such function of the text.  ``numpy``: the same for
    the CPU, ``numpy(values, rows, columns, *arrays)`` with float32 (R, N), int (R, 1) and (1, N);
    without it NumPy operands are refused.

    The file is read here: make another ``Custom`` to see a change.  An error of the compiler names
    the file and its own line.
    """

    kind = "custom"

    def __init__(
        self,
        source: str | Path,
        *arrays: Any,
        function: str | None = None,
        numpy: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.path, text = _read(source)
        self.text = text.rstrip("\n")
        self.function = function or _find_function(self.text)
        self.numpy = numpy
        self.given = arrays
        self.natives = tuple(
            as_native(f"arrays[{number}]", array) for number, array in enumerate(arrays)
        )
        self.dtypes = tuple(
            _check_array(f"arrays[{number}]", array) for number, array in enumerate(self.natives)
        )
        digest = hashlib.sha256(f"{self.path}\0{self.function}\0{text}".encode()).hexdigest()
        signed = tuple(signature(array) for array in self.natives)
        libraries = tuple(framework_of(array) for array in arrays)
        self.signature = None if None in signed else (self.kind, digest, libraries, *signed)

    def __repr__(self) -> str:
        return f"Custom({self.function})"

    def stage(self) -> Stage:
        return Stage(
            self.kind,
            path=self.path,
            function=self.function,
            dtypes=self.dtypes,
            source=self.text,
        )

    def check_field(self, field: Field) -> Field:
        for number, array in enumerate(self.natives):
            check_same_device(f"arrays[{number}]", array, field)
        if field.device == "cpu" and self.numpy is None:
            reject(
                "numpy",
                "must be given to use a Custom epilogue on the CPU",
                None,
                "Give the same function for NumPy arrays.",
                kind=ArgumentTypeError,
            )
        return field

    def operands(self) -> tuple[bytes, ...]:
        return tuple(operand(pointer(array), _pitch(array)) for array in self.natives)

    def apply_to(self, values: Array, rows: slice, group: int) -> Array:
        assert self.numpy is not None, "check has seen to it"
        row = np.arange(rows.start, rows.stop)[:, None]
        column = np.arange(values.shape[1])[None, :]
        result = np.asarray(self.numpy(values, row, column, *self.natives), np.float32)
        return np.broadcast_to(result, values.shape)


def _read(source: str | Path) -> tuple[str, str]:
    """How errors shall call the text, and the text."""
    if isinstance(source, str) and "{" in source:
        return "custom epilogue", source
    path = Path(source)
    try:
        # What the compiler will say shall be a path that an editor opens.
        return str(path.absolute()).replace("\\", "/").replace('"', ""), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reject(
            "source",
            "must be CUDA text or the path of a file with it",
            f"{str(source)!r} ({error})",
            "Correct the path.",
        )


def _find_function(text: str) -> str:
    found = _FUNCTION.findall(_COMMENT.sub(" ", text))
    if not found:
        reject(
            "source",
            "must define __device__ float NAME(float value, int row, int column, ...)",
            f"{len(text.splitlines())} lines without it",
            "docs/epilogues.md shows an example.",
        )
    return str(found[-1])


def _check_array(name: str, array: Array) -> str:
    dtype = next((key for key, kind in _DTYPES.items() if array.dtype == kind), None)
    if dtype is None:
        reject(
            name,
            "must have dtype float32, bfloat16 or int32",
            array.dtype,
            "Convert it with astype.",
            kind=ArgumentTypeError,
        )
    if array.ndim not in (1, 2):
        reject(name, "must have 1 or 2 axes", f"shape {tuple(array.shape)}", "Reshape it.")
    if array.size and (
        (array.shape[-1] > 1 and array.strides[-1] != array.itemsize)
        or (array.ndim == 2 and array.strides[0] % array.itemsize)
        or (is_cupy(array) and pointer(array) % array.itemsize)
    ):
        reject(
            name,
            "must have contiguous rows",
            f"shape {tuple(array.shape)} with strides {tuple(array.strides)}",
            "Copy it with ascontiguousarray.",
        )
    return dtype


def _pitch(array: Array) -> int:
    """Elements between two rows."""
    return int(array.strides[0]) // int(array.itemsize) if array.ndim == 2 else 0
