"""The compiler and its disk cache, without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_kernels import (
    COPY,
    GOLDEN,
    LOCAL,
    NO_CAP,
    SERIALIZED,
    WGMMA,
    compile_at_barrier,
    fresh_copy,
    needs_nvrtc,
    source,
)

from cpgemm import compiler as compiler_module
from cpgemm import env
from cpgemm.compile_all import compile_all
from cpgemm.compiler import ARCH, compile_count, compile_kernel, freeze, load_kernel
from cpgemm.errors import (
    ArgumentError,
    CompileError,
    DeviceError,
    FrozenError,
    KernelWarning,
    MissingDependencyError,
)
from cpgemm.render import render
from cpgemm.toolchain import Nvcc, Nvrtc, toolchain

pytestmark = needs_nvrtc

needs_nvcc = pytest.mark.skipif(
    env.nvcc_path() is None, reason="needs nvcc: on PATH, in $CUDA_HOME/bin or in CPGEMM_NVCC"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(folder))
    monkeypatch.delenv("CPGEMM_COMPILER", raising=False)
    return folder


def test_an_entry_holds_four_files(cache: Path) -> None:
    kernel = compile_kernel(fresh_copy(0))
    folder = kernel.cubin.parent
    assert folder.parent == cache / ARCH and folder.name.startswith("copy-")
    assert sorted(file.name for file in folder.iterdir()) == [
        "kernel.cu",
        "kernel.cubin",
        "kernel.log",
        "report.json",
    ]
    assert (folder / "kernel.cu").read_text() == kernel.source.text
    assert kernel.cubin.read_bytes()[:4] == b"\x7fELF"
    assert "registers" in kernel.log and "\0" not in kernel.log
    record = json.loads((folder / "report.json").read_text())
    assert record["compiler"] == "nvrtc" and record["compiler_version"].count(".") == 2
    assert record["resources"]["registers"] == kernel.report.registers > 0
    assert not list((cache / ARCH).glob(".build-*")), "temporary folders are gone"


def test_a_hit_compiles_nothing() -> None:
    before = compile_count()
    first = compile_kernel(fresh_copy(0))
    again = compile_kernel(fresh_copy(0))
    assert compile_count() == before + 1
    assert (first.cached, again.cached) == (False, True)
    assert (again.cubin, again.log, again.report) == (first.cubin, first.log, first.report)
    assert not compile_kernel(fresh_copy(0), force=True).cached
    assert compile_count() == before + 2


def test_a_hit_works_in_a_cache_that_was_carried_elsewhere(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_kernel(fresh_copy(0))
    shutil.move(cache, tmp_path / "carried")
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "carried"))
    assert compile_kernel(fresh_copy(0)).cached


def test_an_unrelated_header_leaves_the_entry_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = tmp_path / "headers"
    shutil.copytree(GOLDEN, headers)
    monkeypatch.setattr(env, "template_dir", lambda: headers)
    monkeypatch.setattr(env, "header_dir", lambda: headers)

    def compiled() -> bool:
        config = {"block_m": 64, "stages": 2}
        values = {"config": config, "threads": 128, "accumulate": False}
        return not compile_kernel(
            render("tiny.cu.j2", name="tiny", entry="tiny", values=values)
        ).cached

    assert compiled() and not compiled()
    (headers / "unrelated.cuh").write_text("#pragma once\n")
    assert not compiled()
    with (headers / "tiny_inner.cuh").open("a") as file:
        file.write("constexpr int kMore = 1;\n")
    assert compiled() and not compiled()


def test_the_key_covers_options_version_and_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def folder() -> str:
        return compile_kernel(fresh_copy(0)).cubin.parent.name

    plain = folder()
    monkeypatch.setattr("cpgemm.toolchain.PTXAS_OPTIONS", ("-v",))
    options = folder()
    monkeypatch.setattr(Nvrtc, "version", "99.0.0")
    version = folder()
    assert len({plain, options, version}) == 3
    two = COPY + COPY.replace("copy", "copy2")
    entries = {compile_kernel(source(two, e, name="two")).cubin for e in ("copy", "copy2")}
    assert len(entries) == 2


@pytest.mark.parametrize(
    "harm", ["cut", "no cubin", "no source", "no log", "bad report", "empty report", "folder"]
)
def test_a_damaged_entry_is_rebuilt(harm: str) -> None:
    kernel = compile_kernel(fresh_copy(0))
    whole, folder = kernel.cubin.read_bytes(), kernel.cubin.parent
    if harm == "cut":
        kernel.cubin.write_bytes(whole[:-1])
    elif harm.startswith("no "):
        {"cubin": kernel.cubin, "source": folder / "kernel.cu", "log": folder / "kernel.log"}[
            harm[3:]
        ].unlink()
    elif harm == "bad report":
        (folder / "report.json").write_text('{"key": ')
    elif harm == "empty report":
        (folder / "report.json").write_text("{}")
    else:
        shutil.rmtree(folder)
        folder.write_text("a file where a folder should be")
    before = compile_count()
    again = compile_kernel(fresh_copy(0))
    assert not again.cached and compile_count() == before + 1
    assert again.cubin.read_bytes() == whole
    assert compile_kernel(fresh_copy(0)).cached


def test_eight_processes_compile_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(8), context.Queue()
    workers = [
        context.Process(target=compile_at_barrier, args=(barrier, results, str(cache)))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sum(count for count, _, _ in found) == 1, "one process compiles"
    assert sum(not cached for _, cached, _ in found) == 1
    assert len({cubin for _, _, cubin in found}) == 1
    assert len(list((cache / ARCH).glob("*/report.json"))) == 1


def test_eight_threads_compile_once() -> None:
    before, barrier = compile_count(), threading.Barrier(8)

    def work(_: int) -> bool:
        barrier.wait(60)
        return compile_kernel(fresh_copy("threads")).cached

    with ThreadPoolExecutor(8) as pool:
        cached = list(pool.map(work, range(8)))
    assert cached.count(False) == 1 and compile_count() == before + 1


FIRST_COMPILES = """
import threading
from concurrent.futures import ThreadPoolExecutor
from cpgemm.compiler import compile_kernel
from tiny_kernels import fresh_copy

barrier = threading.Barrier(4)

def work(i):
    barrier.wait(60)
    return compile_kernel(fresh_copy(i)).cached

with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(work, range(4))) == [False] * 4
"""


def test_the_first_compiles_of_a_process_in_four_threads() -> None:
    """Threads that import cuda.core at the same time could find it without its names."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_COMPILES],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_freeze() -> None:
    compile_kernel(fresh_copy(0))
    before = compile_count()
    with freeze():
        with freeze():
            assert compile_kernel(fresh_copy(0)).cached
        with pytest.raises(FrozenError, match=r"freeze\(\); got copy.*compile --all"):
            compile_kernel(fresh_copy(1))
        with pytest.raises(FrozenError):
            compile_kernel(fresh_copy(0), force=True)
        with ThreadPoolExecutor(1) as pool, pytest.raises(FrozenError):
            pool.submit(compile_kernel, fresh_copy(1)).result()
    assert compile_count() == before
    assert not compile_kernel(fresh_copy(1)).cached


def test_numbers_of_a_wgmma_kernel() -> None:
    report = compile_kernel(source(WGMMA, "wgmma")).report
    assert (report.wgmma, report.tma_loads, report.tma_stores) == (3, 2, 2)
    assert (report.tma_prefetches, report.bulk_copies, report.local_instructions) == (1, 1, 0)
    assert report.static_shared_bytes >= 8 and report.registers > 4
    assert report.faults() == () and not report.serialized


@pytest.mark.parametrize(
    ("text", "entry", "says"),
    [
        (LOCAL, "local", "local memory is used"),
        (SERIALIZED, "serialized", "instructions are serialized"),
        (NO_CAP, "no_cap", "setmaxnreg is ignored"),
    ],
)
@pytest.mark.parametrize("compiler", ["nvrtc", pytest.param("nvcc", marks=needs_nvcc)])
def test_refused_kernels(cache: Path, text: str, entry: str, says: str, compiler: str) -> None:
    with pytest.raises(CompileError, match=f"{entry} is refused: .*{says}") as caught:
        compile_kernel(source(text, entry), compiler=compiler)
    assert caught.value.source_path is not None and "ptxas" in caught.value.log
    assert Path(caught.value.source_path).read_text() == text, "the source is kept"
    assert not list((cache / ARCH).glob("*/report.json")), "nothing is published"


@pytest.mark.parametrize("compiler", ["nvrtc", pytest.param("nvcc", marks=needs_nvcc)])
def test_an_error_shows_the_line(compiler: str) -> None:
    text = "// one\n// two\n// three\n// four\nint broken = nowhere;\n// six\n"
    with pytest.raises(CompileError) as caught:
        compile_kernel(source(text, "broken"), compiler=compiler)
    message = str(caught.value)
    assert ">     5 | int broken = nowhere;" in message
    assert "      2 | // two" in message and "      6 | // six" in message
    assert "      1 |" not in message
    assert "nowhere" in caught.value.log
    assert f"source: {caught.value.source_path}" in message


def test_an_error_in_a_header_shows_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.cuh").write_text("#pragma once\n\n__device__ int f() { return nowhere; }\n")
    monkeypatch.setattr(env, "header_dir", lambda: tmp_path)
    with pytest.raises(CompileError, match=r"bad\.cuh:3\n(.*\n)*> +3 \| __device__ int f"):
        compile_kernel(source('#include "bad.cuh"\n' + COPY, "copy"))


def test_an_entry_that_the_source_lacks() -> None:
    with pytest.raises(CompileError, match=r"no kernel 'paste'; it reports copy"):
        compile_kernel(source(COPY, "paste"))


@needs_nvcc
def test_nvcc_has_an_entry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    by_nvrtc = compile_kernel(source(WGMMA, "wgmma"))
    monkeypatch.setenv("CPGEMM_COMPILER", "nvcc")
    by_nvcc = compile_kernel(source(WGMMA, "wgmma"))
    assert by_nvcc.cubin != by_nvrtc.cubin
    assert by_nvcc.report.wgmma == by_nvrtc.report.wgmma
    assert by_nvcc.report.tma_loads == by_nvrtc.report.tma_loads
    record = json.loads((by_nvcc.cubin.parent / "report.json").read_text())
    assert record["compiler"] == "nvcc" and "-std=c++17" in record["options"]


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "nvcc_path", lambda: None)
    with pytest.raises(DeviceError, match=r"CPGEMM_COMPILER: nvcc must.*unset CPGEMM_COMPILER"):
        compile_kernel(fresh_copy(0), compiler="nvcc")


def test_something_else_called_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPGEMM_NVCC", "/no/such/nvcc")
    with pytest.raises(DeviceError, match=r"CPGEMM_NVCC: /no/such/nvcc cannot be run"):
        compile_kernel(fresh_copy(0), compiler="nvcc")
    monkeypatch.setenv("CPGEMM_NVCC", "/bin/echo")
    with pytest.raises(DeviceError, match="does not answer as nvcc does"):
        assert Nvcc().version


def test_only_hopper_and_known_compilers() -> None:
    with pytest.raises(ArgumentError, match="arch: must be sm_90a; got 'sm_100a'"):
        compile_kernel(fresh_copy(0), arch="sm_100a")
    with pytest.raises(ArgumentError, match="compiler: must be 'nvrtc' or 'nvcc'; got 'gcc'"):
        toolchain("gcc")


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file in the way stops root too, which permissions do not.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(DeviceError, match=r"CPGEMM_CACHE_DIR: .*file/cache.*another folder"):
        compile_kernel(fresh_copy(0))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel(fresh_copy("present"))  # NVRTC's version is known from here on
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(MissingDependencyError, match=r"filelock: .*cpgemm\[cuda12\]"):
        compile_kernel(fresh_copy(0))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependencyError, match=r"cuda-core: .*cpgemm\[cuda12\]"):
        Nvrtc().compile(fresh_copy(0), ARCH)


def test_compile_all_keeps_order_and_goes_on_after_a_refusal() -> None:
    sources = [fresh_copy(0), source(LOCAL, "local"), source(WGMMA, "wgmma", shared=2048)]
    seen: list[str] = []
    rows = compile_all(sources, jobs=2, done=seen.append)
    assert [row.name for row in rows] == ["copy", "local", "wgmma"]
    assert sorted(seen) == ["copy", "local", "wgmma"]
    assert rows[1].error is not None and "local memory" in rows[1].error
    assert (rows[2].wgmma, rows[2].shared_dynamic_bytes, rows[2].cached) == (3, 2048, False)
    assert compile_all(sources[:1], jobs=1)[0].cached


def test_compile_all_raises_what_concerns_every_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "file"))
    for jobs in (1, 2):
        with pytest.raises(DeviceError, match="CPGEMM_CACHE_DIR"):
            compile_all([fresh_copy(0), fresh_copy(1)], jobs=jobs)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
@needs_nvrtc
def test_a_strict_load_is_not_served_by_a_lenient_one(monkeypatch: pytest.MonkeyPatch) -> None:
    function = types.SimpleNamespace(
        kernel=types.SimpleNamespace(ptr=1), max_dynamic_shared_size_bytes=0
    )
    runtime = types.SimpleNamespace(getDevice=lambda: 77, CUDARuntimeError=OSError)
    cuda = types.SimpleNamespace(
        runtime=runtime,
        driver=types.SimpleNamespace(CUDADriverError=OSError),
        Device=lambda device: types.SimpleNamespace(compute_capability="90"),
    )
    module = types.SimpleNamespace(get_function=lambda entry: function)
    fake = types.SimpleNamespace(cuda=cuda, RawModule=lambda path: module)
    monkeypatch.setattr(compiler_module, "require_cupy", lambda: fake)
    monkeypatch.setattr(compiler_module, "_loaded", {})
    strict = source(LOCAL, "local")
    with pytest.warns(KernelWarning, match="local memory is used"):
        load_kernel(dataclasses.replace(strict, strict=False))
    with pytest.raises(CompileError, match="local is refused"):
        load_kernel(strict)


def test_loading_without_a_gpu_says_so() -> None:
    code = (
        "import cpgemm.compiler as c, cpgemm.render as r\n"
        "try: c.load_kernel(r.KernelSource('x', '', 'x', '', ''))\n"
        "except c.DeviceError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(env.header_dir().parent)},
    )
    assert "device: running a kernel needs a Hopper GPU" in done.stdout


@needs_nvrtc
def test_nvrtc_writes_into_no_object_of_the_interpreter() -> None:
    """An empty log has one byte, and b" " * 1 is the one b" " that all of Python shares."""
    Nvrtc().ptx(fresh_copy("an empty log"), "sm_90a")
    assert b" "[0] == 32 and bytes([32])[0] == 32
