"""Execute the notebooks of examples/notebooks and write them with their outputs.

    python examples/run_notebooks.py                     # all of them, in place
    python examples/run_notebooks.py --out DIR           # into another folder
    python examples/run_notebooks.py --only 1 3          # by number

A cell that fails does not end its notebook, nor a notebook the run: errors are listed at the end,
and the exit code is 1.  What it needs is the extra ``examples``.  Files differ from run to run no
more than their outputs do: times of execution and the like are not kept.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"
ROOT = NOTEBOOKS.parent.parent
LARGEST = 1 << 20  # bytes of a notebook with its outputs


def paths(numbers: Sequence[int] = ()) -> list[Path]:
    """The notebooks, or those of these numbers, in their order."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if not numbers or int(path.name[:2]) in numbers]


def execute(path: Path, *, timeout: int = 300, env: Mapping[str, str] | None = None) -> Any:
    """The notebook at ``path`` after a run from top to bottom, in the folder of the notebooks.

    ``env``: variables of the kernel's process, besides those of this one.

    Cells that raise hold their error as an output, those behind them run all the same.  A cell
    that takes more than ``timeout`` seconds, or a dead kernel, ends the notebook: its last output
    says so.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    book = nbformat.read(path, as_version=4)
    for cell in code_cells(book):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        book, timeout=timeout, kernel_name="python3", allow_errors=True, record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )  # fmt: skip
    environment = {**os.environ, **(env or {})}
    found = filter(None, (str(ROOT), environment.get("PYTHONPATH")))
    try:
        client.execute(env={**environment, "PYTHONPATH": os.pathsep.join(found)})
    except (CellTimeoutError, DeadKernelError) as error:
        name = type(error).__name__
        begun = [cell for cell in code_cells(book) if _begun(cell)] or code_cells(book)[:1]
        text = str(error).partition("\n")[0]
        begun[-1].outputs.append(nbformat.v4.new_output("error", ename=name, evalue=text))
    tidy(book)
    return book


def code_cells(book: Any) -> list[Any]:
    """Cells of code in their order."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def errors(book: Any) -> Iterator[str]:
    """A line for each error that the outputs hold."""
    for at, cell in enumerate(book.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                said = " ".join(str(output.evalue).split())
                yield f"cell {at + 1}: {output.ename}: {said[:300]}"


def tidy(book: Any) -> None:
    """Leave in ``book`` what a reader sees, and nothing that differs from run to run besides."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": list(tags)} if tags else {}
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = {}
            previous = kept[-1] if kept else None
            if output.output_type == "stream" and _same_stream(previous, output):
                previous.text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "error":
                colours = re.compile(r"\x1b\[[0-9;]*m")
                output.traceback = [colours.sub("", line) for line in output.get("traceback", [])]
        cell.outputs = kept


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 when a cell failed or a notebook is too large."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (default: in place)"
    )
    parser.add_argument("--only", type=int, nargs="+", default=(), metavar="N", help="numbers")
    parser.add_argument("--timeout", type=int, default=300, metavar="S", help="seconds of a cell")
    chosen = parser.parse_args(arguments)
    books = paths(chosen.only)
    if not books:
        parser.error(f"no notebook has the numbers {list(chosen.only)}")
    folder = chosen.out or NOTEBOOKS
    folder.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    for path in books:
        start = time.perf_counter()
        try:
            book = execute(path, timeout=chosen.timeout)
        except Exception as error:  # the others are run all the same
            faults.append(f"{path.name}: {type(error).__name__}: {error}")
            print(f"{path.name}: FAILED", flush=True)
            continue
        target = folder / path.name
        nbformat.write(book, target)
        found = [f"{path.name}: {line}" for line in errors(book)]
        if target.stat().st_size > LARGEST:
            found.append(f"{path.name}: {target.stat().st_size:,} bytes, at most {LARGEST:,}")
        seconds = time.perf_counter() - start
        state = "ok" if not found else f"{len(found)} faults"
        print(f"{path.name}: {state}, {seconds:.1f} s, {target.stat().st_size:,} bytes", flush=True)
        faults += found
    print("\n".join(faults))
    return 1 if faults else 0


def _same_stream(previous: Any, output: Any) -> bool:
    return (
        previous is not None and previous.output_type == "stream" and previous.name == output.name
    )


def _begun(cell: Any) -> bool:
    return cell.execution_count is not None or bool(cell.outputs)


if __name__ == "__main__":
    sys.exit(main())
