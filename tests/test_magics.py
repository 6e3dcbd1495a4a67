"""``%load_ext cpgemm`` in a real IPython shell, progress in a real notebook, docs/jupyter.md."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_kernels import ROOT

import cpgemm
from cpgemm import machine
from cpgemm.bench.result import Report
from cpgemm.console import in_notebook
from cpgemm.heuristics import Explanation

pytest.importorskip("IPython", reason="IPython is not installed (extra jupyter)")

ON_GPU = machine.why_no_hopper() is None


@pytest.fixture
def shell(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    shell.history_manager.enabled = False
    run(shell, "%load_ext cpgemm")
    yield shell
    InteractiveShell.clear_instance()


def run(shell: Any, cell: str) -> Any:
    """The cell's result; its error is raised."""
    done = shell.run_cell(cell)
    done.raise_error()
    return done.result


def refused(shell: Any, capsys: pytest.CaptureFixture[str], cell: str) -> str:
    """What is said to a cell that is not understood: one line, no traceback."""
    from IPython.core.error import UsageError

    capsys.readouterr()
    done = shell.run_cell(cell)
    assert isinstance(done.error_in_exec, UsageError)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("UsageError: ")
    return lines[0].removeprefix("UsageError: ")


# --------------------------------------------------------------------------------------- explain


def test_explain_gives_the_explanation(shell: Any) -> None:
    found = run(shell, "%gemm_explain 64 2112 7168")
    assert isinstance(found, Explanation) and found == cpgemm.explain(64, 2112, 7168)
    options = "--out-dtype float32 --accumulate"
    run(shell, f"m = 4096\nkept = %gemm_explain {{m}} 7168 2048 {options}")
    wanted = cpgemm.explain(4096, 7168, 2048, out_dtype="float32", accumulate=True)
    assert shell.user_ns["kept"] == wanted
    formatted, _ = shell.display_formatter.format(found)
    assert formatted["text/plain"] == str(found)
    assert "<table" in formatted["text/html"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("64 2112", "required: K"),
        ("64 2112 x", "argument K: must be a positive number; got 'x'"),
        ("64 2113 7168", "cpgemm: n: N must be a multiple of 8; got 2113"),
        ("64 2112 7168 --out-dtype half", "--out-dtype: invalid choice: 'half'"),
        ("64 2112 7168 '", "No closing quotation"),
    ],
)
def test_mistakes_are_one_line(
    shell: Any, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert said in refused(shell, capsys, f"%gemm_explain {line}")


def test_help_is_printed(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("%gemm_explain", "%gemm_bench"):
        capsys.readouterr()
        assert run(shell, f"{name} -h") is None
        said = capsys.readouterr().out
        assert said.startswith(f"usage: {name}") and "M N K" in said
    assert "M N K" in shell.find_line_magic("gemm_bench").__doc__


# ----------------------------------------------------------------------------------------- bench


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU to measure on")
def test_bench_on_the_cpu_says_what_it_cannot_do(
    shell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(shell, "%gemm_bench 16 256 512 --quick --seed 7")
    said = capsys.readouterr().out
    assert "No Hopper GPU" in said and "cannot be timed here" in said
    assert isinstance(report, Report) and report.complete and report.seed == 7
    (row,) = report.rows
    assert (row.case.name, row.kernel, row.status) == ("dense 16x256x512", "NumPy", "ok")
    formatted, _ = shell.display_formatter.format(report)
    assert "16x256x512" in formatted["text/plain"] and "\x1b" not in formatted["text/plain"]
    assert "16x256x512" in formatted["text/html"]


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU to measure on")
def test_what_is_too_large_for_the_cpu_is_refused(
    shell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(shell, capsys, "%gemm_bench 4096 7168 16384")
    assert re.match(r"cpgemm: device: dense 4096x7168x16384 needs a Hopper GPU to be timed", said)


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU to measure on")
def test_grouped_products_and_files(shell: Any, tmp_path: Any) -> None:
    path = tmp_path / "bench.json"
    words = f"--suite masked --groups 3 --quick --json {path}"
    report = run(shell, f"%gemm_bench 8 256 512 {words}")
    assert report.rows[0].case.name == "masked 3x8x256x512"
    assert json.loads(path.read_text())["rows"][0]["case"]["groups"] == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("16 256", "required: K"),
        ("16 250 512", "cpgemm: n: N must be a multiple of 8; got 250"),
        ("16 256 512 --peers nobody", "must be none or some of cublaslt, deep_gemm, cutlass"),
        ("16 256 512 --suite masked", "cpgemm: --groups: is needed for a shape of masked"),
        ("16 256 512 --compare a b", "cpgemm: --compare: measures nothing"),
        ("16 256 512 --fast", "unrecognized arguments: --fast"),
    ],
)
def test_bench_mistakes_are_one_line(
    shell: Any, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert said in refused(shell, capsys, f"%gemm_bench {line}")


@pytest.mark.gpu
def test_bench_on_the_gpu(shell: Any) -> None:
    report = run(shell, "%gemm_bench 64 2112 7168 --quick --peers none")
    ours = [row for row in report.rows if row.role == "ours"]
    assert {row.status for row in ours} == {"ok"} and len(ours) == 2
    assert any(row.role == "memory floor" for row in report.rows)
    assert "of floor" in report._repr_html_()


# -------------------------------------------------------------------------------------- epilogue

CELL = """%%gemm_epilogue shifted
__device__ float shifted(float value, int row, int column, Array<float> shift) {
    return value + shift[column];
}
"""


def test_an_epilogue_is_bound_to_its_name(
    shell: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    module = ModuleType("cpgemm.epilogues")
    module.Custom = lambda *given, **options: made.append((given, options)) or "made"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cpgemm.epilogues", module)
    run(shell, CELL)
    assert capsys.readouterr().out.startswith("epilogue shifted")
    shift = np.ones(4, np.float32)
    shell.user_ns["shift"] = shift
    assert run(shell, "shifted(shift, numpy=len)") == "made"
    ((source, array), options) = made[0]
    assert source == CELL.split("\n", 1)[1] and array is shift
    assert options == {"function": "shifted", "numpy": len}


def test_an_epilogue_of_a_cell_is_used_in_the_next(shell: Any, rng: np.random.Generator) -> None:
    pytest.importorskip("cpgemm.epilogues", reason="there are no epilogues yet")
    a = cpgemm.quantize(rng.standard_normal((16, 256), dtype=np.float32))
    b = cpgemm.quantize(rng.standard_normal((128, 256), dtype=np.float32), (128, 128))
    shift = rng.standard_normal(128, dtype=np.float32)
    run(shell, CELL)
    shell.push({"a": a, "b": b, "shift": shift, "gemm": cpgemm.gemm})
    numpy = "lambda value, row, column, shift: value + shift[column]"
    call = f"gemm(a, b, out_dtype='float32', epilogue=shifted(shift, numpy={numpy}))"
    wanted = cpgemm.gemm(a, b, out_dtype="float32") + shift
    # One addition in float32, by either way.
    np.testing.assert_allclose(run(shell, call), wanted, rtol=2**-23, atol=2**-23)


@pytest.mark.gpu
def test_an_epilogue_of_a_cell_runs_on_the_gpu(shell: Any, rng: np.random.Generator) -> None:
    pytest.importorskip("cpgemm.epilogues", reason="there are no epilogues yet")
    import cupy as cp

    x = cp.asarray(rng.standard_normal((64, 512), dtype=np.float32))
    w = cp.asarray(rng.standard_normal((256, 512), dtype=np.float32))
    a, b = cpgemm.quantize(x), cpgemm.quantize(w, (128, 128))
    shift = cp.asarray(rng.standard_normal(256, dtype=np.float32))
    run(shell, CELL)
    shell.push({"a": a, "b": b, "shift": shift, "gemm": cpgemm.gemm})
    got = run(shell, "gemm(a, b, out_dtype='float32', epilogue=shifted(shift))").get()
    wanted = (cpgemm.gemm(a, b, out_dtype="float32") + shift).get()
    # The same sums in the same order, or those of another kernel: 512 additions in float32.
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=512 * 2**-23 * scale)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%gemm_epilogue\nx", "required: NAME"),
        ("%%gemm_epilogue lambda\nx", "cpgemm: NAME: must be a name in Python and in C"),
        ("%%gemm_epilogue a-b\nx", "cpgemm: NAME: must be a name in Python and in C"),
        ("%%gemm_epilogue other\n" + CELL.split("\n", 1)[1], "cpgemm: cell: must define"),
        ("%%gemm_epilogue other\nfloat other(float value);", "cpgemm: cell: must define"),
    ],
)
def test_epilogue_mistakes_are_one_line(
    shell: Any, capsys: pytest.CaptureFixture[str], cell: str, said: str
) -> None:
    assert said in refused(shell, capsys, cell)
    assert "other" not in shell.user_ns


# -------------------------------------------------------------------------------------- notebooks


def test_this_is_no_notebook(shell: Any) -> None:
    assert not in_notebook()


def notebook(*cells: str) -> list[list[Any]]:
    """The outputs of each cell, run by a Jupyter kernel of its own."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra test)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra test)")
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client = nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**os.environ, "PYTHONPATH": path})
    return [cell.outputs for cell in book.cells]


def test_a_notebook_is_not_littered() -> None:
    loaded, steps, bench, picture = notebook(
        "%load_ext cpgemm",
        "from cpgemm.console import progress\n"
        "import time\n"
        "with progress('multiplying', 40) as step:\n"
        "    for at in range(40):\n"
        "        time.sleep(0.01)\n"
        "        step(f'case {at}')",
        "r = %gemm_bench 16 256 512 --quick --seed 1",
        "import cpgemm\ncpgemm.pictures.pipeline(cpgemm.plan_gemm(64, 2112, 7168), theme='dark')",
    )
    assert loaded == []
    (bar,) = steps
    assert bar.output_type == "display_data" and "multiplying 40/40" in bar.data["text/plain"]
    assert "<progress" not in bar.data["text/html"], "done: one line stays"
    assert "40/40" in bar.data["text/html"]
    assert [out.name for out in bench if out.output_type == "stream"] in ([], ["stdout"])
    displays = [out for out in bench if out.output_type == "display_data"]
    assert len(displays) == 1 and "measuring 1/1" in displays[0].data["text/plain"]
    assert not any("ipywidgets" in str(out) for out in bench)
    (shown,) = picture
    assert shown.output_type == "execute_result" and shown.data["image/png"]


def test_the_blocks_of_the_document_run(shell: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "jupyter.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|ipython)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        if not ON_GPU:
            block = block.replace("import cupy as cp", "import numpy as cp")
        run(shell, block)
