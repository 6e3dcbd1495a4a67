"""Files of a checkpoint: where a tensor is, and its bytes without reading anything else.

The safetensors library checks each file that is opened: offsets in bounds, no overlap, no gap,
sizes that fit dtype and shape.  But it cannot hand out F8_E4M3 without torch, because its NumPy
face asks NumPy for a dtype ``float8_e4m3fn``, which is not there.  Therefore bytes are taken from a
read-only memory map, at the offsets that the file's header gives: 8 bytes of length
(little-endian), then JSON, then the tensors.  Only pages that are touched are ever read.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from cpgemm.errors import ArgumentError, ArgumentTypeError, MissingDependencyError, reject
from cpgemm.layout import Array

__all__ = ["DTYPES", "INDEX", "SCALE", "WEIGHT", "Checkpoint", "Paths", "library"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Stamp = tuple[int, int, int, int]

INDEX = "model.safetensors.index.json"
WEIGHT = ".weight"
SCALE = "_scale_inv"  # behind the whole name of a weight
DTYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
# What reading a damaged header, map or index raises.
_DAMAGE = (AttributeError, KeyError, OSError, TypeError, ValueError)


def library() -> Any:
    """The safetensors package with its NumPy face."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise MissingDependencyError(
            "safetensors: reading and writing checkpoints needs it; it is not installed. "
            'Run: pip install safetensors (or "cpgemm[checkpoints]").'
        ) from error
    return safetensors


# ------------------------------------------------------------------------------------ one file


class Entry(NamedTuple):
    """Where a tensor is: ``start`` and ``stop`` in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class File:
    """The header of a file that the library has checked, and its map while somebody uses it."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        package = library()
        self.path = path
        self._stamp = stamp
        # A map holds a file descriptor and the file's space on disk: it dies with its last array.
        self._map: weakref.ref[mmap.mmap] | None = None
        try:
            with package.safe_open(str(path), framework="numpy"):  # which checks the header
                pass
            self.entries = dict(self._read_header())
        except (package.SafetensorError, *_DAMAGE) as error:
            self._reject(error)

    def _reject(self, reason: object) -> NoReturn:
        reject(
            "path",
            "must be a whole safetensors file",
            f"{self.path} ({reason})",
            "It may be cut short, changed, or a Git LFS pointer: fetch it again. If it is whole, a "
            "newer safetensors library may know it.",
        )

    def _read_header(self) -> Iterator[tuple[str, Entry]]:
        content = self._mapped()
        base = 8 + int.from_bytes(content[:8], "little")
        for name, fields in json.loads(content[8:base]).items():
            if name != "__metadata__":
                start, stop = fields["data_offsets"]
                yield name, Entry(fields["dtype"], (*fields["shape"],), base + start, base + stop)

    def _mapped(self) -> mmap.mmap:
        found = None if self._map is None else self._map()
        if found is None:
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self._stamp:
                    raise ValueError("it was replaced while it was read")
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map = weakref.ref(found)
        return found

    def array(self, name: str) -> Array:
        """A read-only view of a tensor in its shape and dtype; reads nothing."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            reject(
                "name",
                f"must name a tensor of dtype {', '.join(DTYPES)}",
                f"{name} of dtype {entry.dtype}",
                "NumPy and ml_dtypes have no such dtype.",
                kind=ArgumentTypeError,
            )
        try:
            content = np.frombuffer(self._mapped(), np.uint8)[entry.start : entry.stop]
        except (OSError, ValueError) as error:
            self._reject(error)
        if content.size != math.prod(entry.shape) * dtype.itemsize:
            self._reject(f"{name} has {content.size} bytes, not what {entry.shape} needs")
        return content.view(dtype).reshape(entry.shape)


def _stamp(status: os.stat_result) -> Stamp:
    """What tells one content of a path from another."""
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def _stamp_of(path: Path) -> Stamp:
    try:
        if path.is_dir():
            raise IsADirectoryError("a folder")
        return _stamp(path.stat())
    except (OSError, ValueError) as error:
        reject(
            "path",
            "must name files that can be read",
            f"{str(path)!r} ({getattr(error, 'strerror', None) or error})",
            "Check the spelling, or fetch the file.",
        )


def _open(path: Path) -> File:
    return _known_file(path, _stamp_of(path))


# Headers are kept, because the layers of a model are mostly loaded one after the other.
@functools.lru_cache(maxsize=256)
def _known_file(path: Path, stamp: Stamp) -> File:
    return File(path, stamp)


@functools.lru_cache(maxsize=4)
def _known_index(path: Path, stamp: Stamp) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in found.values()):
            raise ValueError("a value is no string")
    except _DAMAGE as error:
        reject(
            "path",
            'must have an index with a "weight_map" from names of tensors to names of files',
            f"{path} ({type(error).__name__}: {error})",
            "Fetch the index again, or give the files.",
        )
    return dict(found)


# ------------------------------------------------------------------------------------ all files


class Checkpoint:
    """What a path stands for (see ``cpgemm.checkpoint.load_safetensors``)."""

    def __init__(self, path: Paths) -> None:
        library()
        self._files: list[Path] = []
        self._index: dict[str, str] | None = None
        self._index_path = Path()
        if not isinstance(path, (str, os.PathLike)):
            if not (isinstance(path, Sequence) and path):
                _reject_path(path)
            for one in path:
                if not isinstance(one, (str, os.PathLike)):
                    _reject_path(one)
            self._files = [Path(one).expanduser() for one in path]
            return
        place = Path(path).expanduser()
        if place.is_dir():
            if not (place / INDEX).is_file():
                self._files = sorted(place.glob("*.safetensors"))
                if not self._files:
                    _reject_path(f"{str(place)!r}, a folder without {INDEX} and *.safetensors")
                return
            place = place / INDEX
        if place.suffix != ".json":
            self._files = [place]
            return
        self._index_path = place
        self._index = _known_index(place, _stamp_of(place))

    def find(self, name: str, beside: File | None = None) -> File | None:
        """The file with this tensor; first ``beside``, since some indices leave scales out."""
        if beside is not None and name in beside.entries:
            return beside
        if self._index is None:
            return next((file for file in map(_open, self._files) if name in file.entries), None)
        if name not in self._index:
            return None
        listed = Path(self._index[name])
        # An index comes from elsewhere: it must not lead out of its folder.
        if listed.is_absolute() or ".." in listed.parts:
            self._reject_index(f"{name} in {str(listed)!r}", "It names files outside its folder.")
        file = _open(self._index_path.parent / listed)
        if name not in file.entries:
            self._reject_index(f"{name}, which is not in {listed}", "Fetch both again.")
        return file

    def _reject_index(self, got: str, mend: str) -> NoReturn:
        reject("path", "must have an index that fits its files", f"{self._index_path}: {got}", mend)

    def names(self) -> Iterator[str]:
        """Names of all tensors."""
        if self._index is not None:
            yield from self._index
        for path in self._files:
            yield from _open(path).entries

    def resolve(self, name: str) -> tuple[str, File]:
        """The tensor that ``name`` stands for, with or without ``.weight``, and its file."""
        for full in (name, name + WEIGHT):
            file = self.find(full)
            if file is not None:
                return full, file
        known = sorted(
            {found.removesuffix(WEIGHT) for found in self.names() if not found.endswith(SCALE)}
        )
        close = difflib.get_close_matches(name.removesuffix(WEIGHT), known, n=3)
        mend = f"Did you mean {' or '.join(map(repr, close))}?"
        if not close:
            some = ", ".join(map(repr, known[:3])) or "none"
            mend = f"It has {some}{' and others' if known[3:] else ''}."
        reject("name", "must name a tensor of the checkpoint", repr(name), mend)


def _reject_path(got: object) -> NoReturn:
    reject(
        "path",
        "must be a safetensors file, a sequence of such files, or the folder of a checkpoint",
        got if isinstance(got, str) else repr(got),
        f"A checkpoint's folder has *.safetensors and, if these are several, {INDEX}.",
        kind=ArgumentTypeError if not isinstance(got, (str, Sequence)) else ArgumentError,
    )
