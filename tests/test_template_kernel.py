"""``kernel_from_template``: what it takes, what it refuses, and on a GPU what it computes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import types
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import assert_close, operands, to_numpy
from tiny_kernels import needs_nvrtc
from user_kernels import NAIVE, dense_copy, naive

import cpgemm
from cpgemm import machine, template_kernel
from cpgemm.compiler import compile_count
from cpgemm.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    MissingDependencyError,
    WrongResultError,
)
from cpgemm.grouped_heuristics import grouped_configurations
from cpgemm.heuristics import configurations
from cpgemm.launch import PreparedLaunch, _laid_out
from cpgemm.problem import GemmProblem
from cpgemm.reference import gemm_reference
from cpgemm.template_kernel import _parameter

SHAPE = (300, 520, 1040)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(folder))
    return folder


def test_the_configuration_is_chosen_for_the_problem(tmp_path: Path) -> None:
    path = dense_copy(tmp_path)
    problem = GemmProblem(4096, 7168, 2048, "float32")
    chosen = cpgemm.kernel_from_template(path, problem)
    plan = cpgemm.plan_gemm(4096, 7168, 2048, out_dtype="float32")
    assert chosen.config == plan.config and chosen.problem == problem
    assert chosen.entry == plan.config.entry and chosen.name == "mine"
    assert chosen.rendered.shared_bytes == plan.config.shared_bytes
    assert chosen.out_dtype == "float32" and "TemplateKernel mine" in repr(chosen)


def test_sizes_alone_take_the_configurations_type(tmp_path: Path) -> None:
    config = next(c for c in configurations("float32") if c.family == "dense")
    kernel = cpgemm.kernel_from_template(dense_copy(tmp_path), SHAPE, config)
    assert kernel.problem == GemmProblem(*SHAPE, out_dtype="float32")


def test_without_a_problem(tmp_path: Path) -> None:
    config = configurations("bfloat16")[0]
    kernel = cpgemm.kernel_from_template(dense_copy(tmp_path), config=config, name="renamed")
    assert kernel.problem is None and kernel.name == "renamed"
    with pytest.raises(ArgumentError, match="problem: must be known to time a kernel"):
        kernel.time()


@needs_nvrtc
def test_editing_and_rendering_again(tmp_path: Path) -> None:
    path = dense_copy(tmp_path)
    config = next(c for c in configurations("bfloat16") if c.name.startswith("dense_64x32"))
    first = cpgemm.kernel_from_template(path, SHAPE, config)
    before = compile_count()
    assert first.counts.whole["wgmma"] and compile_count() == before + 1
    same = first.reload()
    assert same is not first and same.counts.whole == first.counts.whole
    assert compile_count() == before + 1
    path.write_text(path.read_text().replace("kUnroll = {{ config.unroll }}", "kUnroll = 1"))
    changed = first.reload()
    assert "kUnroll = 3" in first.source and "kUnroll = 1" in changed.source
    assert changed.counts.main_loop["wgmma"] < first.counts.main_loop["wgmma"]
    assert compile_count() == before + 2
    assert changed.config == config and changed.problem == first.problem


@needs_nvrtc
def test_a_kernel_of_its_own_signature() -> None:
    kernel = naive(SHAPE)
    assert kernel.config is None and kernel.entry == "naive_wgmma" == kernel.name
    assert kernel.resources.threads == 128 and kernel.resources.static_shared_bytes == 16384
    main = kernel.counts.main_loop
    assert main["wgmma"] == 4 and main["block barriers"] == 2 and main["TMA loads"] == 0
    assert kernel.reload().source == kernel.source


def test_a_configuration_fills_what_is_left_out(tmp_path: Path) -> None:
    config = configurations("bfloat16")[0]
    path = dense_copy(tmp_path)
    kernel = cpgemm.kernel_from_template(path, SHAPE, config, arguments=lambda a, b, out: ())
    assert kernel._own is not None and kernel._own.threads == config.threads
    assert kernel.entry == config.entry and kernel.rendered.shared_bytes == config.shared_bytes
    larger = cpgemm.kernel_from_template(path, SHAPE, config, shared_bytes=231424)
    assert larger.rendered.shared_bytes == 231424


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "problem, config, arguments: one must be given"),
        ({"problem": (0, 64, 64)}, "problem: must not be empty"),
        ({"problem": SHAPE, "grid": 4}, "grid: needs arguments as well; got 4"),
        ({"problem": SHAPE, "threads": 128}, "threads: needs arguments as well; got 128"),
        ({"arguments": tuple}, "grid and threads: must be given with arguments"),
        ({"arguments": tuple, "grid": 1}, "threads: must be given with arguments"),
        ({"arguments": tuple, "grid": 1, "threads": 32}, "entry: must name the kernel"),
        ({"config": grouped_configurations("bfloat16")[0]}, "config: must be of the dense or spl"),
        (
            {"problem": GemmProblem(*SHAPE, out_dtype="float32"),
             "config": configurations("bfloat16")[0]},
            "config: must suit .*it writes bfloat16",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cpgemm.kernel_from_template(dense_copy(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": (64, 64)}, r"problem: must be a GemmProblem or \(m, n, k\); got \(64, 64\)"),
        ({"problem": [64, 64, 64]}, "problem: must be a GemmProblem or"),
        ({"problem": SHAPE, "config": "dense"}, "config: must be a KernelConfig of any family"),
    ],
)
def test_what_is_of_another_type(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        cpgemm.kernel_from_template(dense_copy(tmp_path), **options)


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"path: must be a template's file; got '.*absent"):
        cpgemm.kernel_from_template(tmp_path / "absent.cu.j2", SHAPE)


@pytest.mark.parametrize(
    ("file", "name"),
    [("a kernel.cu.j2", "a_kernel"), ("_x.j2", "x"), ("k-1.cu", "k-1"), ("...", "kernel")],
)
def test_names_of_files_as_names_of_kernels(file: str, name: str) -> None:
    assert template_kernel._name_of(Path(file)) == name


def test_parameters() -> None:
    assert _parameter(0, 7) == np.int32(7) and _parameter(0, 7).dtype == np.int32
    assert _parameter(0, 1.5).dtype == np.float32 and _parameter(0, True).dtype == np.bool_
    assert _parameter(0, np.int64(2**40)).dtype == np.int64 and _parameter(0, b"map") == b"map"
    for value in (2**31, "text", np.zeros(3), None):
        with pytest.raises(ArgumentTypeError, match=r"arguments\[3\]: must be a NumPy scalar"):
            _parameter(3, value)


def test_operands_of_the_cpu_are_refused(rng, tmp_path: Path) -> None:
    a, b = operands(rng, *SHAPE)
    kernel = naive(SHAPE)
    with pytest.raises(ArgumentTypeError, match="a: must be on a GPU"):
        kernel(a, b)
    with pytest.raises(ArgumentTypeError, match="a: must be a ScaledTensor"):
        kernel(a.data, b)
    with pytest.raises(ArgumentError, match="must pose the kernel's GemmProblem"):
        naive((64, 520, 1040))(a, b)
    with pytest.raises(ArgumentError, match="a, b: must not be empty"):
        naive(None)(*operands(rng, 0, 64, 64))


def test_a_launch_keeps_what_its_parameters_point_to(monkeypatch, rng) -> None:
    """A workspace that ``arguments`` makes is not freed before the kernel has run."""
    made: list[weakref.ref[np.ndarray]] = []

    class Launch(PreparedLaunch):  # all but the driver's part
        __slots__ = ()

        def __init__(self, *given: Any, keep: object = None, **_: Any) -> None:
            self._keep = (*_laid_out(given[3]), keep)

    class OnGpu(np.ndarray):
        device = contextlib.nullcontext()

    def arguments(a: Any, b: Any, out: Any) -> Any:
        workspace = np.empty(1024).view(OnGpu)
        made.append(weakref.ref(workspace))
        return (workspace,)

    a, b = operands(rng, *SHAPE)
    object.__setattr__(a, "data", a.data.view(OnGpu))
    monkeypatch.setattr(template_kernel, "PreparedLaunch", Launch)
    monkeypatch.setattr(template_kernel, "load_kernel", lambda source: None)
    monkeypatch.setattr(template_kernel, "is_cupy", lambda x: isinstance(x, OnGpu))
    kernel = naive(SHAPE)
    assert kernel._own is not None
    kernel._own = dataclasses.replace(kernel._own, arguments=arguments)
    launch = kernel.prepare(a, b, cpgemm.gemm(*operands(rng, *SHAPE)))
    gc.collect()
    assert made[0]() is not None
    del launch
    gc.collect()
    assert made[0]() is None


@pytest.mark.skipif(machine.why_no_hopper() is None, reason="this machine has a GPU")
@pytest.mark.parametrize("method", ["check", "time"])
def test_without_a_gpu(method: str) -> None:
    with pytest.raises((DeviceError, MissingDependencyError), match=r"^device: |^cupy: "):
        getattr(naive(SHAPE), method)()


# ---------------------------------------------------------------------------- the check, on the CPU


@pytest.fixture
def numpy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy in CuPy's place, as far as ``check`` goes."""
    device = types.SimpleNamespace(Device=contextlib.nullcontext)
    fake = types.SimpleNamespace(full=np.full, asarray=np.asarray, tile=np.tile, cuda=device)
    monkeypatch.setattr(template_kernel, "_gpu", lambda: fake)


def launches(monkeypatch: pytest.MonkeyPatch, mistake: Any = lambda out: None) -> None:
    """Have kernels write the reference's result, and then make a mistake."""

    def call(self: Any, a: Any, b: Any, out: Any, c: Any = None) -> None:
        out[...] = gemm_reference(a, b, c=c, out_dtype=self.out_dtype)
        mistake(out)

    monkeypatch.setattr(template_kernel.TemplateKernel, "__call__", call)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_check_of_what_is_right(monkeypatch, numpy_gpu, out_dtype, accumulate) -> None:
    launches(monkeypatch)
    kernel = naive(GemmProblem(70, 72, 272, out_dtype, accumulate))
    found = kernel.check()
    assert 0 < found.error <= found.tolerance and found.fraction <= 1
    assert kernel.check() == found and kernel.check(seed=1) != found


def test_check_of_given_operands(monkeypatch, numpy_gpu, rng) -> None:
    launches(monkeypatch)
    a, b = operands(rng, 33, 40, 144)
    assert 0 < naive(None).check(a, b).fraction <= 1
    with pytest.raises(ArgumentError, match="a, b: must be given together"):
        naive(None).check(a)
    with pytest.raises(ArgumentError, match="problem: must be known to make operands"):
        naive(None).check()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda out: out.__setitem__((3, 5), 1e9), "1 of 5040 elements do not, in rows 3 to 3"),
        (lambda out: out.__setitem__((69, 71), np.nan), "1 elements are NaN: not written"),
        (lambda out: out.base.__setitem__(71, 0), "overwritten behind its last row"),
        (lambda out: out.base.__setitem__(0, 0), "overwritten before its first row"),
    ],
)
def test_check_of_what_is_wrong(monkeypatch, numpy_gpu, mistake, message) -> None:
    launches(monkeypatch, mistake)
    with pytest.raises(WrongResultError, match=f"naive_wgmma: .*{message}"):
        naive((70, 72, 272)).check()


def test_calls_have_operands_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sets as keep L2 cold; each call launches on its own and keeps it alive."""
    launched: list[int] = []

    def prepare(self: Any, a: Any, b: Any, out: Any, c: Any = None) -> Any:
        assert (a.shape, b.shape, out.shape) == ((70, 272), (72, 272), (70, 72)) and c is None
        address = out.ctypes.data
        return lambda: launched.append(address)

    monkeypatch.setattr(template_kernel, "_gpu", lambda: np)
    monkeypatch.setattr(template_kernel.TemplateKernel, "prepare", prepare)
    kernel = naive((70, 72, 272))
    for call in kernel.calls():
        call()
    assert len(launched) == len(set(launched)) == 32


# ----------------------------------------------------------------------------------------- launches


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [SHAPE, (4096, 1536, 2048), (64, 2112, 7168)])
def test_gpu_a_copy_computes_the_same(
    rng: np.random.Generator, tmp_path: Path, shape: Any, out_dtype: Any
) -> None:
    import cupy as cp

    problem = GemmProblem(*shape, out_dtype=out_dtype)
    config = cpgemm.plan_gemm(*shape, out_dtype=out_dtype).config
    kernel = cpgemm.kernel_from_template(dense_copy(tmp_path, template=config.template), problem)
    a, b = operands(rng, *shape, xp=cp)
    out = kernel(a, b)
    wanted = cpgemm.gemm(a, b, out_dtype=out_dtype)
    assert (to_numpy(out).view(np.uint8) == to_numpy(wanted).view(np.uint8)).all()
    assert kernel.check(a, b).fraction <= 1 and kernel.check().fraction <= 1


@pytest.mark.gpu
def test_gpu_every_dense_and_split_configuration(tmp_path: Path) -> None:
    for config in configurations("bfloat16"):
        path = dense_copy(tmp_path, template=config.template)
        kernel = cpgemm.kernel_from_template(path, SHAPE, config)
        assert 0 < kernel.check().fraction <= 1, config.name


@pytest.mark.gpu
def test_gpu_accumulates(tmp_path: Path) -> None:
    problem = GemmProblem(*SHAPE, accumulate=True)
    template = cpgemm.plan_gemm(*SHAPE, accumulate=True).config.template
    kernel = cpgemm.kernel_from_template(dense_copy(tmp_path, template=template), problem)
    assert 0 < kernel.check().fraction <= 1
    assert kernel.time(windows=1, window_ms=1.0).median_us > 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SHAPE, (64, 64, 128), (65, 72, 16), (1, 8, 144)])
def test_gpu_the_naive_kernel(rng, shape) -> None:
    import cupy as cp

    kernel = naive(shape)
    assert 0 < kernel.check().fraction <= 1 and 0 < kernel.check(seed=5).fraction <= 1
    a, b = operands(rng, *shape, xp=cp)
    out = kernel(a, b)
    assert_close(out, a, b, norm=False)
    assert naive(None)(a, b, out) is out
    assert kernel.time(windows=2, window_ms=1.0).median_us > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "old", "new", "message"),
    [
        # Row 63 is the second row of its thread.
        (64, "row_scale_8 = row + 8", "row_scale_8 = row + 9", "in rows 63 to 63"),
        (137, "kb < k_blocks", "kb < k_blocks - 1", "elements do not"),
        (137, "low_word(tile_a)", "low_word(tile_b)", "elements do not"),
        (137, "(lane % 4), m, n", "(lane % 4), m + 1, n", "overwritten behind its last row"),
        (137, "(lane % 4), m, n", "(lane % 4), m - 1, n", "128 elements are NaN: not written"),
    ],
)
def test_gpu_the_check_finds_mistakes(
    tmp_path: Path, rows: int, old: str, new: str, message: str
) -> None:
    text = NAIVE.read_text()
    assert text.count(old) == 1
    path = tmp_path / NAIVE.name
    path.write_text(text.replace(old, new))
    with pytest.raises(WrongResultError, match=message):
        naive((rows, 128, 256), path).check()


@pytest.mark.gpu
def test_gpu_changed_shared_memory_alone_is_another_kernel(tmp_path: Path) -> None:
    path = dense_copy(tmp_path)
    config = next(c for c in configurations("bfloat16") if c.name.startswith("dense_64x32"))
    kernel = cpgemm.kernel_from_template(path, SHAPE, config)
    assert kernel.check().fraction <= 1
    more = cpgemm.kernel_from_template(path, SHAPE, config, shared_bytes=config.shared_bytes + 1024)
    assert more.rendered.digest == kernel.rendered.digest and more.check().fraction <= 1
    assert kernel.reload().check().fraction <= 1 and more.check().fraction <= 1


@pytest.mark.gpu
def test_gpu_results_are_of_the_operands_kind(rng) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(64, 256, device="cuda")
    w = torch.randn(128, 256, device="cuda")
    a, b = cpgemm.quantize(x), cpgemm.quantize(w, (128, 128))
    out = naive((64, 128, 256))(a, b)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, cpgemm.gemm(a, b), rtol=2**-7, atol=1e-2)
