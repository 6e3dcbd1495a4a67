"""The demo: its data, its comparison, its table, and the whole of it on small layers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpgemm
from cpgemm import demo, machine
from cpgemm.demo import (
    Row,
    add_arguments,
    format_us,
    main,
    make_activations,
    make_weights,
    print_rows,
    relative_errors,
)
from cpgemm.errors import ArgumentError
from cpgemm.scaled import ScaledTensor
from cpgemm.timing import Timing

ROW = Row(4096, 24576, 1536, "dense_256x128_s3_w2_multicast_a_bfloat16", 0.00166, 0.0288, True)
TIMED = dataclasses.replace(
    ROW, time_us=231.94, spread_pct=1.0, tflops=1333.2, gb_per_s=1058.9, floor_fraction=0.889
)


def arguments(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(texts)


def test_arguments() -> None:
    args = arguments(
        "--m", "1", "64", "--shape", "4096x7168", "--shape", "8X16", "24x32", "--m", "7",
        "--seed", "7", "--json", "report.json",
    )  # fmt: skip
    assert args.m == [1, 64, 7] and args.shape == [(4096, 7168), (8, 16), (24, 32)]
    assert (args.seed, args.json) == (7, Path("report.json"))
    assert vars(arguments()) == {"m": None, "shape": None, "seed": None, "json": None}


@pytest.mark.parametrize("wrong", [("--m", "0"), ("--m", "x"), ("--shape", "8"), ("--shape", "8x")])
def test_arguments_that_are_none(wrong: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments(*wrong)


# ----------------------------------------------------------------------------------------- data


def test_activations_have_outlier_channels(rng: np.random.Generator) -> None:
    values = make_activations(512, 2048, rng)
    assert values.dtype == np.float32 and values.shape == (512, 2048)
    sizes = values.std(axis=0)
    outliers = np.count_nonzero(sizes > 10)
    assert outliers == 16 and sizes[sizes > 10].min() > 15 and sizes.max() < 75
    assert sizes[sizes < 10].min() > 0.7 and sizes[sizes < 10].max() < 1.3
    assert np.count_nonzero(make_activations(256, 16, rng).std(axis=0) > 10) == 1


def test_weights_keep_the_size_of_activations(rng: np.random.Generator) -> None:
    values = make_weights(256, 1024, rng)
    assert values.dtype == np.float32 and values.shape == (256, 1024)
    assert values.std() == pytest.approx(1 / 32, rel=0.05)


# ----------------------------------------------------------------------------------- comparison


def test_the_sample_meets_every_64_rows_and_columns_of_the_default_layers() -> None:
    for n, _ in demo.LAYERS:
        assert np.diff(np.linspace(0, n, demo._SAMPLE_COLUMNS + 1)).max() <= 64
    assert 4096 / demo._SAMPLE_ROWS <= 64


def test_errors_see_a_wrong_element_and_a_wrong_scale(rng: np.random.Generator) -> None:
    x, w = make_activations(64, 256, rng), make_weights(128, 256, rng)
    a, b = cpgemm.quantize(x), cpgemm.quantize(w, (128, 128))
    sample = (np.arange(64), np.arange(128))
    right = cpgemm.gemm(a, b)
    exact, floats = relative_errors(right, x, w, a, b, sample)
    assert exact < 0.002 and 0.01 < floats < 0.06
    wrong = right.copy()
    wrong[33, 77] = 1e3
    assert relative_errors(wrong, x, w, a, b, sample)[0] > 0.002
    doubled = ScaledTensor.from_arrays(a.data, a.scales * 2, (1, 128))
    exact, floats = relative_errors(cpgemm.gemm(doubled, b), x, w, doubled, b, sample)
    assert exact < 0.002 and floats == pytest.approx(1.0, abs=0.1)


# ---------------------------------------------------------------------------------------- table


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (7.05, "7.0us"), (999.9, "999.9us"), (999.99, "1.0ms"), (10_800.0, "10.8ms"),
        (999_990.0, "1.0s"), (61e6, "61.0s"),
    ],
)  # fmt: skip
def test_times(microseconds: float, text: str) -> None:
    assert format_us(microseconds) == text


@pytest.mark.parametrize(("width", "named"), [(80, False), (100, False), (120, True)])
def test_the_table_fits(width: int, named: bool, capsys: pytest.CaptureFixture[str]) -> None:
    small = dataclasses.replace(TIMED, m=64, kernel="dense_64x128_s8_w1_bfloat16", tflops=9.871)
    print_rows([TIMED, small], width)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    table = out.split("\n\n")[0].splitlines()
    assert table[0].split() == [
        "M", "x", "N", "x", "K", "kernel", "exact", "float", "time", "TFLOPS", "GB/s", "floor",
    ]  # fmt: skip
    assert all(text in table[1] for text in ("4096x24576x1536", "231.9us", "1333", "1059", "89%"))
    assert "9.9" in table[2] and (TIMED.kernel in table[1]) == named
    assert named or table[3:] == [f"[1] {TIMED.kernel}", f"[2] {small.kernel}"]
    assert "floor: " in out


def test_the_table_without_floor_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([dataclasses.replace(TIMED, kernel="NumPy", floor_fraction=None)], 80)
    out = capsys.readouterr().out
    assert "NumPy" in out and "[1]" not in out and "floor: " not in out


def test_a_wrong_result_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([TIMED, dataclasses.replace(ROW, passed=False, error_exact=float("nan"))], 80)
    wrong = capsys.readouterr().out.splitlines()[2]
    assert "FAILED" in wrong and "nan" in wrong and "us" not in wrong


# ---------------------------------------------------------------------------------- the whole of it


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_no_hopper", lambda: "no driver")


@pytest.mark.usefixtures("no_gpu")
def test_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = tmp_path / "out" / "demo.json"
    shapes = ("--shape", "200x272", "128x1024", "--m", "1", "70")
    assert main(arguments(*shapes, "--seed", "11", "--json", str(report))) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(report), "").splitlines())) <= 80
    assert "No Hopper GPU (no driver): NumPy path; times are this CPU's.\n" in out
    assert "host memory peak: " in out and "FAILED" not in out
    record = json.loads(report.read_text())
    assert record["seed"] == 11 and record["machine"]["numpy"]
    assert [(row["m"], row["n"], row["k"]) for row in record["rows"]] == [
        (1, 200, 272), (70, 200, 272), (1, 128, 1024), (70, 128, 1024),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["passed"] and row["error_exact"] <= 0.004 and row["time_us"] > 0
        assert row["floor_fraction"] is None and row["kernel"] == "NumPy"


@pytest.mark.usefixtures("no_gpu")
def test_fewer_rows_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LAYERS", ((64, 128),))
    assert main(argparse.Namespace()) == 0, "a caller need not set what it does not choose"
    out = capsys.readouterr().out
    assert "No Hopper GPU (no driver): NumPy path, M = 64 only; times are this CPU's.\n" in out
    assert "64x64x128" in out


@pytest.mark.usefixtures("no_gpu")
def test_a_wrong_result_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpgemm.gemm

    def off_by_a_hundredth(*args: Any) -> Any:
        result = right(*args)
        return (result.astype(np.float32) * 1.01).astype(result.dtype)

    monkeypatch.setattr(cpgemm, "gemm", off_by_a_hundredth)
    assert main(arguments("--m", "16", "--shape", "64x128", "--seed", "3")) == 1
    out = capsys.readouterr().out
    assert "FAILED 16x64x128: NumPy is off by 0.01" in out and "seed 3" in out


@pytest.mark.usefixtures("no_gpu")
def test_what_was_measured_is_shown_when_a_later_layer_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpgemm.quantize

    def breaks(x: Any, *args: Any) -> Any:
        if x.shape[1] == 256:
            raise RuntimeError("out of memory")
        return right(x, *args)

    monkeypatch.setattr(cpgemm, "quantize", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(arguments("--m", "16", "--shape", "64x128", "64x256"))
    out = capsys.readouterr().out
    assert "16x64x128" in out and "16x64x256" not in out


@pytest.mark.usefixtures("no_gpu")
def test_bad_sizes_are_refused_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ArgumentError, match=r"k: .* multiple of 16; got 100"):
        main(arguments("--shape", "64x128", "64x100"))
    assert capsys.readouterr().out == ""


def stand_in_for_cupy() -> Any:
    """NumPy under CuPy's name; its arrays are NumPy's, which take the NumPy path."""
    module: Any = types.ModuleType("cupy")
    module.asarray, module.full, module.asnumpy = np.asarray, np.full, np.asarray
    module.ndarray = type("ndarray", (), {})
    return module


@pytest.mark.parametrize("leave_out", [False, True])
def test_the_gpu_path_with_stand_ins(
    leave_out: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the kernel, the timing and the copies; an unwritten element must be found."""
    timed: list[int] = []

    def plan_gemm(m: int, n: int, k: int) -> Any:
        def plan(a: ScaledTensor, b: ScaledTensor, out: Any) -> None:
            out[...] = cpgemm.gemm(a, b)
            if leave_out:
                out[-1, -1] = np.nan

        real = cpgemm.explain(m, n, k)
        stand_in: Any = lambda *args: plan(*args)  # noqa: E731 - a plan is callable, with fields
        stand_in.config, stand_in.explain = real.choice.config, lambda: real
        return stand_in

    def time_interleaved(contenders: dict[str, list[Any]], **options: Any) -> dict[str, Timing]:
        for call in contenders["gemm"]:
            call()
        timed.append(len(contenders["gemm"]))
        return {"gemm": Timing(10.0, 1.0, (10.0,))}

    monkeypatch.setattr(machine, "why_no_hopper", lambda: None)
    record = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: record)
    monkeypatch.setattr(cpgemm, "plan_gemm", plan_gemm)
    monkeypatch.setattr(demo, "time_interleaved", time_interleaved)
    monkeypatch.setitem(sys.modules, "cupy", stand_in_for_cupy())
    # 600 rows, so that the last is most likely not in the sample of 256.
    code = main(arguments("--m", "600", "--shape", "1024x128", "--seed", "5"))
    out = capsys.readouterr().out
    assert code == int(leave_out) and ("FAILED" in out) == leave_out
    assert timed == ([] if leave_out else [32])
    assert leave_out or ("10.0us" in out and "floor: " in out and "dense_" in out)


@pytest.mark.gpu
def test_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "demo.json"
    shapes = ("--shape", "2112x7168", "7168x2048", "--m", "64", "300")
    assert main(arguments(*shapes, "--json", str(report))) == 0
    out = capsys.readouterr().out
    assert "device memory peak: " in out and "No Hopper GPU" not in out
    for row in json.loads(report.read_text())["rows"]:
        assert row["passed"] and row["error_exact"] <= 0.002
        assert 0.05 < row["floor_fraction"] < 1.2
