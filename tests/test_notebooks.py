"""Notebooks run from top to bottom without a GPU, and with one; what is committed comes from one.

Without a GPU a cell that begins with ``%%gpu`` prints that it is skipped, as one with ``%%needs
PACKAGE`` does where the package is not installed; here both are reported as skipped tests.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from example_modules import load_example
from tiny_kernels import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra test)")
pytest.importorskip("nbclient", reason="nbclient is not installed (extra test)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra test)")


RUNNER = load_example("run_notebooks.py")
BOOKS: list[Path] = RUNNER.paths()
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
SKIPPED_GPU = "Skipped: needs a Hopper GPU"
every_book = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


@functools.cache
def committed(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@functools.cache
def on_cpu(path: Path) -> Any:
    """Executed once for all tests, by a kernel that sees no GPU."""
    return RUNNER.execute(path, timeout=300, env=NO_GPU)


@functools.cache
def on_gpu(path: Path) -> Any:
    return RUNNER.execute(path, timeout=300)


def cells(book: Any, first: str = "") -> dict[int, Any]:
    """Cells of code that begin with ``first``, by their number in the notebook."""
    return {
        number: cell
        for number, cell in enumerate(book.cells, 1)
        if cell.cell_type == "code" and cell.source.startswith(first)
    }


def printed(cell: Any) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def needs(cell: Any) -> list[str]:
    """The packages of a ``%%needs`` cell."""
    return re.findall(r"\S+", cell.source.partition("\n")[0])[1:]


def absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


def gpu_books() -> list[Any]:
    found = ((path, list(cells(committed(path), "%%gpu"))) for path in BOOKS)
    return [
        pytest.param(path, id=f"{path.stem}-cells-{'-'.join(map(str, numbers))}")
        for path, numbers in found
        if numbers
    ]


def package_books() -> list[Any]:
    found = {
        (path, package): None
        for path in BOOKS
        for cell in cells(committed(path), "%%needs").values()
        for package in needs(cell)
    }
    return [pytest.param(*pair, id=f"{pair[0].stem}-{pair[1]}") for pair in found]


def test_there_are_eight() -> None:
    assert [int(path.name[:2]) for path in BOOKS] == list(range(1, 9))


@every_book
def test_runs_from_top_to_bottom_without_a_gpu(path: Path) -> None:
    if path.name.startswith("06"):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra examples)")
    book = on_cpu(path)
    assert list(RUNNER.errors(book)) == []
    assert all(cell.execution_count for cell in cells(book).values() if cell.source)
    for number, cell in cells(book, "%%gpu").items():
        assert printed(cell).startswith(SKIPPED_GPU) and len(cell.outputs) == 1, number
    for number, cell in cells(book, "%%needs").items():
        lacking = [package for package in needs(cell) if absent(package)]
        assert printed(cell).startswith("Skipped: ") == bool(lacking), number


@pytest.mark.parametrize(("path", "package"), package_books())
def test_cells_that_need_a_package(path: Path, package: str) -> None:
    wanted = {n: c for n, c in cells(on_cpu(path), "%%needs").items() if package in needs(c)}
    if absent(package):
        numbers = ", ".join(map(str, wanted))
        pytest.skip(f"cells {numbers} of {path.name} need {package}, which is not installed")
    for cell in wanted.values():
        assert cell.outputs and not printed(cell).startswith("Skipped: ")


@pytest.mark.gpu
@pytest.mark.parametrize("path", gpu_books())
def test_gpu_cells_run(path: Path) -> None:
    book = on_gpu(path)
    assert list(RUNNER.errors(book)) == []
    for number, cell in cells(book, "%%gpu").items():
        assert printed(cell).startswith("On NVIDIA ") and "Skipped" not in printed(cell), number


# ---------------------------------------------------------------------------- what is committed


@every_book
def test_outputs_are_committed(path: Path) -> None:
    book = committed(path)
    assert list(RUNNER.errors(book)) == []
    counts = [cell.execution_count for cell in cells(book).values()]
    assert counts == list(range(1, len(counts) + 1)), "run examples/run_notebooks.py on an H200"
    assert "H200" in "".join(printed(cell) for cell in cells(book).values())
    for number, cell in cells(book).items():
        assert not printed(cell).startswith("Skipped: "), number
    for number, cell in cells(book, "%%gpu").items():
        assert printed(cell).startswith("On NVIDIA H200"), number


@every_book
def test_files_are_tidy(path: Path) -> None:
    book = committed(path)
    again = copy.deepcopy(book)
    RUNNER.tidy(again)
    assert json.dumps(again, sort_keys=True) == json.dumps(book, sort_keys=True)
    assert path.stat().st_size <= RUNNER.LARGEST
    assert [cell.id for cell in book.cells] == [
        f"cell-{number:02}" for number in range(1, len(book.cells) + 1)
    ]
    tagged = {n for n, c in cells(book).items() if c.metadata.get("tags") == ["gpu"]}
    assert tagged == set(cells(book, "%%gpu"))


@every_book
def test_links_of_texts_lead_somewhere(path: Path) -> None:
    texts = [cell.source for cell in committed(path).cells if cell.cell_type == "markdown"]
    assert re.match(rf"# {int(path.name[:2])}\. \S", texts[0])
    for text in texts:
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in target or (path.parent / target).exists(), target


def test_the_list_of_examples_is_complete() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    files = [*(ROOT / "examples").glob("*.py"), *BOOKS]
    for file in files:
        assert f"]({file.relative_to(ROOT / 'examples').as_posix()})" in listed, file.name
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in BOOKS:
        assert path.name in page, path.name


# ------------------------------------------------------------------------------------ the runner


def small_book(folder: Path, *sources: str) -> Path:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in sources])
    path = folder / "01_small.ipynb"
    nbformat.write(book, path)
    return path


def test_a_failing_cell_ends_nothing_and_is_reported(tmp_path: Path) -> None:
    path = small_book(tmp_path, "print('a')\nprint('b')", "1 / 0", "import sys; print(6 * 7)")
    book = RUNNER.execute(path, timeout=60)
    assert [printed(cell) for cell in book.cells] == ["a\nb\n", "", "42\n"]
    assert list(RUNNER.errors(book)) == ["cell 2: ZeroDivisionError: division by zero"]
    assert not any("\x1b" in line for line in book.cells[1].outputs[0].traceback)


def test_a_cell_that_hangs_is_reported(tmp_path: Path) -> None:
    path = small_book(tmp_path, "print('a')", "import time\ntime.sleep(60)", "print('c')")
    book = RUNNER.execute(path, timeout=2)
    assert printed(book.cells[0]) == "a\n" and not book.cells[2].outputs
    # Whether the interrupted cell gets to say so as well is a matter of time.
    lines = list(RUNNER.errors(book))
    assert all(line.startswith("cell 2: ") for line in lines)
    assert lines[-1].startswith("cell 2: CellTimeoutError")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_book(tmp_path, "1 + 1")
    monkeypatch.setattr(RUNNER, "NOTEBOOKS", tmp_path)
    out = tmp_path / "out"
    assert RUNNER.main(["--out", str(out), "--only", "1"]) == 0
    assert "01_small.ipynb: ok" in capsys.readouterr().out
    (cell,) = nbformat.read(out / "01_small.ipynb", as_version=4).cells
    assert cell.outputs[0].data["text/plain"] == "2" and cell.metadata == {}
    with pytest.raises(SystemExit):
        RUNNER.main(["--only", "9"])
    assert "no notebook has the numbers [9]" in capsys.readouterr().err


def test_tidy_keeps_what_is_seen() -> None:
    cell = nbformat.v4.new_code_cell(
        "x",
        metadata={"execution": {"shell.execute_reply": "2026"}, "tags": ["gpu"]},
        outputs=[
            nbformat.v4.new_output("stream", name="stdout", text="a"),
            nbformat.v4.new_output("stream", name="stdout", text="b"),
            nbformat.v4.new_output("stream", name="stderr", text="c"),
            nbformat.v4.new_output(
                "display_data", data={"image/png": "AA"}, metadata={"image/png": {"width": 1}}
            ),
        ],
    )
    book = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}})
    RUNNER.tidy(book)
    assert [out.get("text") for out in cell.outputs] == ["ab", "c", None]
    assert cell.metadata == {"tags": ["gpu"]} and cell.outputs[-1].metadata == {}
    assert set(book.metadata) == {"kernelspec", "language_info"}
    nbformat.validate(book)
