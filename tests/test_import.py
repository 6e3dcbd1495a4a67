"""``import cpgemm`` is light: nothing that needs a GPU, a compiler or seconds."""

from __future__ import annotations

import os
import subprocess
import sys

from tiny_kernels import ROOT

HEAVY = ("cupy", "cupy_backends", "torch", "jax", "jinja2", "cuda", "rich", "filelock", "pytest")

CODE = f"""
import sys, time
before = set(sys.modules)  # a .pth file may have imported something already
start = time.perf_counter()
import cpgemm
print(time.perf_counter() - start)
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({HEAVY!r})))
"""


def _fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def test_import_is_light() -> None:
    # Seconds depend on the machine and its load: printed, not asserted (the aim is 0.5).
    seconds, heavy = _fresh(CODE).split("\n")[:2]
    print(f"import cpgemm: {float(seconds):.3f} s")
    assert heavy == ""


def test_the_command_line_is_light() -> None:
    code = CODE.replace("import cpgemm\n", "import cpgemm.__main__; cpgemm.__main__._parser()\n")
    assert _fresh(code).split("\n")[1] == ""


def test_version_is_that_of_the_metadata() -> None:
    import configparser

    import cpgemm

    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert cpgemm.__version__ == metadata["metadata"]["version"]
