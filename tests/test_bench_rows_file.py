"""A user's own list of cases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpgemm.bench import rows_file
from cpgemm.bench.result import Case
from cpgemm.bench.rows_file import read_rows
from cpgemm.errors import ArgumentError

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "schema.md"
PLAIN = """\
# layers of mine
dense 64 4096 7168   # decode

contiguous 4x8192 4096 7168
masked 32X20 4096 4096
quantize 4096 7168
quantize 4096 7168 float32 128x128 pow2
dense 64 4096 7168
"""
CASES = (
    Case("dense", 64, 4096, 7168),
    Case("contiguous", 8192, 4096, 7168, 4),
    Case("masked", 20, 4096, 4096, 32),
    Case("quantize", 4096, 0, 7168, 0, "bfloat16 1x128 float32"),
    Case("quantize", 4096, 0, 7168, 0, "float32 128x128 pow2"),
)


def read(tmp_path: Path, text: str) -> tuple[Case, ...]:
    path = tmp_path / "rows"
    path.write_text(text, encoding="utf-8")
    return read_rows(path)


def test_plain_lines(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN) == CASES


def test_json(tmp_path: Path) -> None:
    text = """
    [ {"suite": "dense", "m": 64, "n": 4096, "k": 7168},
      {"m": 64, "n": 4096, "k": 7168},
      {"suite": "contiguous", "groups": 4, "m": 8192, "n": 4096, "k": 7168},
      {"suite": "masked", "groups": 32, "m": 20, "n": 4096, "k": 4096}, {"suite": "quantize",
       "m": 4096, "k": 7168},
      {"suite": "quantize", "m": 4096, "k": 7168, "detail": "float32 128x128 pow2"} ]
    """
    assert read(tmp_path, text) == CASES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dense 64 4096 7168\ndens 1 8 16", "line 2, suite: must be one of dense, contiguous"),
        ("jit 1 8 16", "line 1, suite: must be one of"),
        ("\n\ndense 64 x 7168", "line 3, N: must be a whole number; got 'x'"),
        ("dense 64 -8 7168", "line 1, N: must be a whole number; got '-8'"),
        ("dense \uff16 8 16", "line 1, M: must be a whole number"),
        ("dense 64 4096", "line 1, K: is needed: dense M N K; got end of line"),
        ("dense 64 4096 7168 8", "line 1, 8: is too much: dense M N K; got '8'"),
        ("dense 64 4096 100", "line 1, k: K must be a multiple of 16; got 100. Pad"),
        ("dense 64 4100 7168", "line 1, n: N must be a multiple of 8; got 4100"),
        ("dense 0 4096 7168", "line 1, m: must be at least 1; got 0"),
        ("masked 20 4096 4096", "line 1, GROUPSxM: must be two numbers, such as 32x20; got '20'"),
        ("masked ax20 4096 4096", "line 1, GROUPS: must be a whole number; got 'a'"),
        ("masked 2x 4096 4096", "line 1, M: must be a whole number; got ''"),
        ("masked 2000x20 8 16", "line 1, groups: must be between 1 and 1024; got 2000"),
        ("quantize 8 16 int8", "line 1, detail: must be DTYPE GRANULARITY FORMAT"),
        ("# nothing\n", "must hold at least one case; got none in"),
        ("[]", "must hold at least one case"),
        ("[\n{},\n]", "must be JSON; got "),
        ('{"m": 1}', "line 1, file: must be one list of objects; got {"),
        ("[]]", "line 1, file: must be one list of objects"),
        ("[7]", "line 1, entry: must be an object; got 7"),
        ('[\n {"m": 1, "n": 8, "k": 16},\n {"m": 1, "n": 8}]', "line 3, k: is needed; got none"),
        ('[{"m": 1.5, "n": 8, "k": 16}]', "line 1, m: must be a whole number; got 1.5"),
        ('[{"m": true, "n": 8, "k": 16}]', "line 1, m: must be a whole number; got True"),
        ('[{"M": 1, "n": 8, "k": 16}]', "line 1, M: is no field of dense"),
        ('[{"suite": ["dense"]}]', "line 1, suite: must be one of"),
        ('[{"m": 1, "n": 8, "k": 16, "detail": "x"}]', "line 1, detail: must be a text, and only"),
    ],
)
def test_errors_name_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=r"^--rows: ") as caught:
        read(tmp_path, text)
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--rows: must name a readable text file; got "):
        read_rows(tmp_path / "nothing")


def test_the_documented_examples(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## Rows files")[2]
    plain, json = (
        "\n".join(line.strip() for line in block.splitlines())
        for block in re.findall(r"((?:^    .*\n)+)", text, re.MULTILINE)
    )
    assert len(read(tmp_path, plain)) == 5 and len(read(tmp_path, json)) == 2
    for block in re.findall(r"::\n\n((?:    .*\n)+)", rows_file.__doc__ or ""):
        assert read(tmp_path, block.replace(", and what", "  # and what").replace("    ", ""))
