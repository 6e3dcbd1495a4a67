"""The command line: some in this process over a set of small kernels, some as a user runs it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
from tiny_kernels import LOCAL, WGMMA, fresh_copy, needs_nvrtc, run_cli, run_python, source

import cpgemm
from cpgemm.__main__ import main
from cpgemm.cost_model import H200
from cpgemm.doctor import Finding, verdict

needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("cpgemm.kernels") is None, reason="needs cpgemm.kernels"
)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Put a stand-in in the place of the module ``cpgemm.name``."""
    module = types.ModuleType(f"cpgemm.{name}")
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cpgemm, name, module, raising=False)


@pytest.fixture
def kernel_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = [fresh_copy("cli"), source(WGMMA, "wgmma", shared=2048), source(LOCAL, "local")]
    install(monkeypatch, "kernels", all_sources=lambda: sources)
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "cache"))


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "doctor", "compile", "render", "explain", "tune"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"cpgemm {cpgemm.__version__}\n"


@pytest.mark.usefixtures("kernel_set")
def test_render(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["copy", "wgmma", "local"]
    assert main(["render", "wgmma"]) == 0
    assert capsys.readouterr().out == WGMMA


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["render", "wgma"], "one of the 3 kernels; got 'wgma'. Did you mean wgmma?"),
        (["render", "zzzzz"], "got 'zzzzz'. Names: python -m cpgemm render --list."),
        (["render"], "the name of one kernel or --list; got neither"),
        (["render", "copy", "--list"], "got both"),
        (["compile", "wgmma", "coppy"], "Did you mean copy?"),
        (["compile"], "--all or the names of kernels; got neither"),
        (["compile", "copy", "--all"], "got both"),
        (["compile", "copy", "--arch", "sm_80"], "arch: must be sm_90a; got 'sm_80'"),
    ],
)
def test_misuse(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["explain", "0", "8", "16"], "must be a positive number; got '0'"),
        (["demo", "--shape", "12"], "must be NxK, such as 4096x7168; got '12'"),
        (["demo", "--m", "many"], "must be a positive number; got 'many'"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_misuse_that_argparse_sees(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2 and says in capsys.readouterr().err


@needs_nvrtc
@pytest.mark.usefixtures("kernel_set")
def test_compile_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "new" / "report.json"
    args = ["compile", "wgmma", "copy", "wgmma", "--jobs", "1", "--json", str(report)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "2 kernels for sm_90a: 2 compiled, 0 from the cache, 0 refused" in out
    record = json.loads(report.read_text())
    assert record["arch"] == "sm_90a" and record["compiler"] == "nvrtc" and record["refused"] == []
    rows = {row["name"]: row for row in record["kernels"]}
    assert list(rows) == ["wgmma", "copy"]
    row = rows["wgmma"]
    assert (row["wgmma"], row["tma_loads"], row["tma_stores"]) == (3, 2, 2)
    assert (row["spill_store_bytes"], row["spill_load_bytes"], row["local_bytes"]) == (0, 0, 0)
    assert row["shared_dynamic_bytes"] == 2048 and row["shared_static_bytes"] >= 8
    assert row["registers"] > 0 and row["seconds"] > 0
    assert (row["serialized"], row["cached"], row["error"]) == (False, False, None)
    assert main(["compile", "copy", "--jobs", "1"]) == 0
    assert "0 compiled, 1 from the cache" in capsys.readouterr().out
    assert main(["compile", "copy", "--jobs", "1", "--no-cache"]) == 0
    assert "1 compiled, 0 from the cache" in capsys.readouterr().out


@needs_nvrtc
@pytest.mark.usefixtures("kernel_set")
def test_a_refused_kernel_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["compile", "--all", "--jobs", "2", "--json", str(report)]) == 1
    out = capsys.readouterr().out
    assert "2 compiled, 0 from the cache, 1 refused" in out
    assert "refused: local is refused: local memory is used" in out
    record = json.loads(report.read_text())
    assert record["refused"] == ["local"] and len(record["kernels"]) == 3


def test_explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """For the GPU that is there, an H200 without one."""
    here = dataclasses.replace(H200, name="here")

    def explain(m: int, n: int, k: int, **options: object) -> str:
        assert options.pop("machine") is here
        return f"{m} {n} {k} {sorted(options.items())}"

    monkeypatch.setattr(cpgemm, "explain", explain, raising=False)
    monkeypatch.setattr("cpgemm.plan.current_machine", lambda: here)
    assert main(["explain", "64", "4096", "7168", "--out-dtype", "float32", "--accumulate"]) == 0
    expected = "64 4096 7168 [('accumulate', True), ('out_dtype', 'float32')]\n"
    assert capsys.readouterr().out == expected


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr("cpgemm.demo.main", seen.append)
    assert main(["demo", "--m", "1", "64", "--shape", "4096x7168", "8X16", "--seed", "7"]) == 0
    assert (seen[0].m, seen[0].shape, seen[0].seed) == ([1, 64], [(4096, 7168), (8, 16)], 7)
    assert main(["demo"]) == 0
    assert (seen[1].m, seen[1].shape, seen[1].seed) == (None, None, None)


def test_doctor_as_a_user_runs_it(tmp_path: Path) -> None:
    done = run_cli("doctor", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("Python", "NumPy path", "driver", "GPU", "CuPy", "NVRTC", "cache", "torch", "JAX"):
        assert any(line.startswith(what) for line in done.stdout.splitlines()), what
    assert done.stdout.splitlines()[-1].startswith("works here: ")
    assert not (tmp_path / "cache").exists(), "looking leaves nothing behind"


def test_doctor_without_optional_packages(tmp_path: Path) -> None:
    """None in ``sys.modules`` makes an import fail as if the package were not installed."""
    code = (
        "import sys\n"
        "absent = ('cupy', 'cuda.core', 'cuda.bindings', 'rich', 'filelock')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from cpgemm.__main__ import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = run_python("-c", code, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "works here: NumPy path only"
    assert 'pip install "cpgemm[cuda12]"' in done.stdout


def test_doctor_and_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("doctor", cache=tmp_path / "file")
    line = next(line for line in done.stdout.splitlines() if line.startswith("cache"))
    assert "broken" in line and "CPGEMM_CACHE_DIR" in line


_NAMES = ("NumPy path", "NVRTC", "cuda-core", "cuda-bindings", "filelock", "cache", "GPU", "CuPy")


@pytest.mark.parametrize(
    ("lacking", "says"),
    [
        ((), "kernels run"),
        (("GPU",), "kernels compile, none runs (no GPU)"),
        (("GPU", "CuPy"), "kernels compile, none runs (no GPU and no CuPy)"),
        (("GPU", "NVRTC"), "NumPy path only"),
        (("NumPy path",), "nothing: the NumPy path is broken"),
    ],
)
def test_verdicts(lacking: tuple[str, ...], says: str) -> None:
    findings = [Finding(what, "missing" if what in lacking else "ok", "") for what in _NAMES]
    assert verdict(findings) == says


@needs_nvrtc
@needs_kernels
def test_one_kernel_of_the_set_as_a_user_compiles_it(tmp_path: Path) -> None:
    names = run_cli("render", "--list", cache=tmp_path).stdout.split()
    report = tmp_path / "report.json"
    done = run_cli("compile", names[0], "--json", str(report), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["kernels"][0]["name"] == names[0]
    shown = run_cli("render", names[0], cache=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith(f"// {names[0]}\n")
    wrong = run_cli("render", names[0][:-1] + "_", cache=tmp_path)
    assert wrong.returncode == 2 and "Did you mean" in wrong.stderr
