"""A user's own list of cases: plain lines or JSON.

Plain text, one case a line, ``#`` starts a comment::

    dense 64 4096 7168              # M N K
    contiguous 4x8192 4096 7168     # GROUPSxM N K
    masked 32x20 4096 4096          # GROUPSxM N K
    quantize 4096 7168              # M K, and what to quantise: bfloat16 1x128 float32

JSON is a list of objects with the same fields by name::

    [{"suite": "masked", "groups": 32, "m": 20, "n": 4096, "k": 4096}]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from cpgemm.bench.cases import check_case, quantize_details, sizes_of
from cpgemm.bench.result import Case
from cpgemm.errors import ArgumentError, reject

__all__ = ["read_rows"]

_SUITES = ("dense", "contiguous", "masked", "quantize")
_FIELDS: dict[str, tuple[str, ...]] = {"dense": ("M", "N", "K"), "quantize": ("M", "K")}
_QUANTIZE = "bfloat16 1x128 float32"
_SEE = "See docs/benchmarks/schema.md."
_SPACE = " \t\r\n"


def read_rows(path: Path) -> tuple[Case, ...]:
    """The cases of a rows file (see above), each once, in its order.

    Raises ``ArgumentError`` that names the file, the line and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reject("--rows", "must name a readable text file", f"{path} ({error})", "Check the path.")
    found = _from_json if text.lstrip()[:1] in ("[", "{") else _from_lines
    cases = tuple(dict.fromkeys(found(str(path), text)))
    if not cases:
        reject("--rows", "must hold at least one case", f"none in {path}", _SEE)
    return cases


def _from_lines(path: str, text: str) -> Iterator[Case]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path} line {number}"
        name = _suite(where, words[0])
        fields = _FIELDS.get(name, ("GROUPSxM", "N", "K"))
        detail = " ".join(words[len(fields) + 1 :])
        for at, field in enumerate(fields, 1):
            if at >= len(words):
                _reject(where, field, f"is needed: {name} {' '.join(fields)}", "end of line")
        if detail and name != "quantize":
            _reject(where, detail, f"is too much: {name} {' '.join(fields)}", repr(detail))
        sizes: dict[str, int] = {}
        for field, word in zip(fields, words[1:], strict=False):
            if field == "GROUPSxM":
                groups, cross, m = word.lower().partition("x")
                if not cross:
                    _reject(where, field, "must be two numbers, such as 32x20", repr(word))
                sizes["groups"] = _number(where, "GROUPS", groups)
                sizes["m"] = _number(where, "M", m)
            else:
                sizes[field.lower()] = _number(where, field, word)
        yield _case(where, name, sizes, detail)


def _from_json(path: str, text: str) -> Iterator[Case]:
    for number, item in _items(path, text):
        where = f"{path} line {number}"
        if not isinstance(item, dict):
            _reject(where, "entry", "must be an object", _short(item))
        name = _suite(where, item.get("suite", "dense"))
        detail = item.get("detail", "")
        if not isinstance(detail, str) or (detail and name != "quantize"):
            _reject(where, "detail", "must be a text, and only for quantize", _short(detail))
        wanted = sizes_of(name)
        for key in item:
            if key not in ("suite", "detail", *wanted):
                _reject(where, key, f"is no field of {name}", f"one of that name; {_have(wanted)}")
        for key in wanted:
            if key not in item:
                _reject(where, key, "is needed", f"none; {_have(wanted)}")
        yield _case(where, name, {key: _number(where, key, item[key]) for key in wanted}, detail)


def _items(path: str, text: str) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON list with the lines on which they start."""
    decoder = json.JSONDecoder()
    at = len(text) - len(text.lstrip())
    try:
        whole, end = decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        _reject(f"{path} line {error.lineno}", f"column {error.colno}", "must be JSON", error.msg)
    if not isinstance(whole, list) or text[end:].strip():
        _reject(f"{path} line 1", "file", "must be one list of objects", _short(whole))
    at += 1
    for _ in whole:
        while text[at] in _SPACE + ",":
            at += 1
        item, end = decoder.raw_decode(text, at)
        yield text.count("\n", 0, at) + 1, item
        at = end


def _suite(where: str, name: object) -> str:
    if name not in _SUITES:
        _reject(where, "suite", f"must be one of {', '.join(_SUITES)}", repr(name))
    return str(name)


def _number(where: str, field: str, value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    _reject(where, field, "must be a whole number", repr(value))


def _case(where: str, name: str, sizes: dict[str, int], detail: str) -> Case:
    if name == "quantize":
        detail = detail or _QUANTIZE
        if detail not in quantize_details():
            what = "must be DTYPE GRANULARITY FORMAT, such as " + _QUANTIZE
            _reject(where, "detail", what, repr(detail))
    case = Case(name, **sizes, detail=detail)
    try:
        check_case(case)
    except ArgumentError as error:
        raise ArgumentError(f"--rows: {where}, {error}") from None
    return case


def _have(wanted: tuple[str, ...]) -> str:
    return "fields: " + ", ".join(("suite", *wanted))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _reject(where: str, field: str, rule: str, got: str) -> NoReturn:
    raise ArgumentError(f"--rows: {where}, {field}: {rule}; got {got}. {_SEE}")
