"""README and examples do what they say: results, commands, links (test_docs.py runs all code).

Without a Hopper GPU ``import cupy as cp`` is replaced by ``import numpy as cp``, as README says.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_pages import PAGES, ROOT, name_of, run_blocks
from example_modules import load_example

import cpgemm
from cpgemm import __main__ as command_line
from cpgemm import env, machine

README = (ROOT / "README.md").read_text(encoding="utf-8")
ON_GPU = machine.why_no_hopper() is None


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_block(text: str) -> dict[str, Any]:
    """Execute a block of README by itself; its names.  tests/test_docs.py runs them all."""
    names: dict[str, Any] = {}
    exec(text if ON_GPU else text.replace("import cupy as cp", "import numpy as cp"), names)
    return names


def to_host(array: Any) -> np.ndarray:
    """A NumPy array of what a block made with NumPy or CuPy."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def test_the_first_example_is_ten_lines_of_cupy_and_right() -> None:
    text = blocks("python")[0]
    assert text.startswith("import cupy") and len(text.splitlines()) <= 10
    names = run_block(text)
    got = to_host(names["d"]).astype(np.float32)
    wanted = to_host(names["x"]) @ to_host(names["w"]).T
    assert got.shape == (256, 512)
    assert np.linalg.norm(got - wanted) < 0.06 * np.linalg.norm(wanted)


def test_the_grouped_example_is_right() -> None:
    names = run_block(next(text for text in blocks("python") if "grouped" in text))
    x, w, got = (to_host(names[name]).astype(np.float32) for name in ("x", "w", "d"))
    offsets = to_host(names["offsets"])
    wanted = np.concatenate(
        [x[first:last] @ w[g].T for g, (first, last) in enumerate(itertools.pairwise(offsets))]
    )
    assert got.shape == wanted.shape == (300, 256)
    assert np.linalg.norm(got - wanted) < 0.06 * np.linalg.norm(wanted)


def test_the_layer_shown_is_right() -> None:
    """Against float64; examples/02_moe_layer.py derives the tolerance."""
    example = load_example("02_moe_layer.py")
    # On a GPU the last block replays the layer with other experts.
    names = run_blocks(ROOT / "docs" / "moe.md", {"gpu"} if ON_GPU else ())
    host = [to_host(names[name]) for name in ("x", "ids", "weights", "up_float", "down_float")]
    wanted = example.float_layer(*host)
    got = to_host(names["out"]).astype(np.float64)
    assert np.linalg.norm(got - wanted) < example.TOLERANCE * np.linalg.norm(wanted)


def test_the_error_shown_names_argument_rule_value_and_mend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_block(next(text for text in blocks("python") if "except" in text))
    shown = capsys.readouterr().out
    assert shown.startswith("x: ") and "multiple of 16; got 100. Pad" in shown


def test_the_order_of_sections() -> None:
    wanted = ["Two commands", "Example", "Hardware", "Without that hardware", "Command line"]
    assert re.findall(r"^## (.+)$", README, re.MULTILINE)[:5] == wanted
    assert "make demo" in blocks("bash")[0] and "make test" in blocks("bash")[0]


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command line of cpgemm in a page's blocks."""
    return [
        shlex.split(line, comments=True)
        for block in blocks("bash", page.read_text(encoding="utf-8"))
        for line in block.splitlines()
        if line.startswith("python -m cpgemm")
    ]


def test_commands_parse() -> None:
    parser = command_line._parser()
    assert {words[3] for words in commands_of(ROOT / "README.md")} == {
        "doctor", "demo", "explain", "render", "compile", "tune", "bench",
    }  # fmt: skip
    commands = [words for page in PAGES for words in commands_of(page)]
    for words in commands:
        assert parser.parse_args(words[3:]).handler is not None, words
    kernels = subprocess.run(
        [sys.executable, "-m", "cpgemm", "render", "--list"],
        check=True, capture_output=True, text=True, cwd=ROOT,
    ).stdout.split()  # fmt: skip
    for words in commands:
        if words[3] == "render" and not words[4].startswith("-"):
            assert words[4] in kernels


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for page in PAGES:
        text = "\n".join(blocks("bash", page.read_text(encoding="utf-8")))
        wanted = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
        assert wanted <= targets, (name_of(page), wanted - targets)


def test_every_environment_variable_is_there() -> None:
    known = set(re.findall(r"CPGEMM_[A-Z_]+", env.__doc__ or ""))
    assert known == set(re.findall(r"^\| `(CPGEMM_[A-Z_]+)`", README, re.MULTILINE))


def test_every_exception_is_there() -> None:
    for name in dir(cpgemm):
        if name.endswith("Error"):
            assert f"{name}`" in README, name


@pytest.mark.parametrize("document", PAGES, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_names_of_files_and_kernels_in_documents_exist() -> None:
    for document in PAGES:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`([\w./]+\.(?:py|cuh|j2))`", text):
            folders = ("", "cpgemm", "cuda_src", "templates", "examples", "tests")
            assert any((ROOT / folder / name).exists() for folder in folders), (document, name)
        for name in re.findall(r"examples/\w+\.py", text):
            assert (ROOT / name).exists(), (document, name)


# -------------------------------------------------------------------------------------- examples


def run_example(name: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_quickstart() -> None:
    done = run_example("01_quickstart.py")
    assert done.returncode == 0, done.stderr
    found = re.search(r"bfloat16 \(256, 2112\), relative error (0\.\d+)", done.stdout)
    assert found is not None and 0.01 < float(found.group(1)) < 0.06
    assert ("cupy" in done.stdout) == ON_GPU


@pytest.mark.skipif(ON_GPU, reason="this machine has what the benchmarks need")
@pytest.mark.parametrize("name", ["03_grouped_benchmark.py", "05_epilogues.py"])
def test_benchmarks_say_what_they_lack(name: str) -> None:
    done = run_example(name)
    assert done.returncode == 2 and "needs a Hopper GPU" in done.stderr
    assert "Traceback" not in done.stderr
