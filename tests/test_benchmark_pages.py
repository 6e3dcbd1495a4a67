"""The pages under docs/benchmarks say what the files beside them hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpgemm.heuristics import explain

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "h200"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def rows_of(suite: str) -> dict[tuple[int, ...], dict[str, dict[str, Any]]]:
    """Rows of bench.json that were timed, by groups, m, n, k and contender."""
    found: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in load("bench.json")["rows"]:
        case = row["case"]
        if case["suite"] == suite and row["status"] == "ok":
            key = case["groups"], case["m"], case["n"], case["k"]
            found.setdefault(key, {})[row["contender"]] = row
    return found


def over(rows: dict[str, dict[str, Any]], name: str, ours: str = "cpgemm") -> str:
    return f"{rows[name]['us'] / rows[ours]['us']:.2f}" if name in rows else "n/a"


def test_large_rows() -> None:
    peers = ("deep_gemm", "cublaslt block", "cublaslt tensor", "cutlass")
    large = {key: rows for key, rows in rows_of("dense").items() if key[1] == 4096}
    assert len(large) == 6
    for (_, m, n, k), rows in large.items():
        us = rows["cpgemm"]["us"]
        cells = [f"{us:.1f}", str(round(2e-6 * m * n * k / us)), *(over(rows, p) for p in peers)]
        assert f"| {n} x {k} | {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("suite", ["contiguous", "masked"])
def test_grouped_rows(suite: str) -> None:
    for (groups, m, n, k), rows in rows_of(suite).items():
        cells = [f"{rows['cpgemm']['us']:.1f}", over(rows, "deep_gemm"), over(rows, "cutlass")]
        assert f"| {suite} | {groups} x {m} | {n} x {k} | {' | '.join(cells)} |" in PAGE


def test_tables_of_few_rows() -> None:
    """Over the floor plain and with dependent launch, DeepGEMM, and what batch invariance costs."""
    dense = rows_of("dense")
    shares = []
    for n, k in sorted({key[2:] for key in dense}):
        lines: list[list[str]] = [[], [], [], []]
        for m in (1, 8, 16, 32, 64, 128):
            rows = dense[0, m, n, k]
            shares.append(rows["cpgemm"]["us"] / rows["memory floor"]["us"])
            lines[0].append(f"{shares[-1]:.2f}")
            lines[1].append(over(rows, "cpgemm pdl", "memory floor pdl"))
            lines[2].append(over(rows, "deep_gemm"))
            invariant = "batch invariant" in rows
            lines[3].append(over(rows, "batch invariant") if invariant else "1")
        for line in lines:
            assert f"| {n} x {k} | {' | '.join(line)} |" in PAGE
    assert len(shares) == 36
    assert f"{min(shares):.2f} to {max(shares):.2f} times the live memory floor" in PAGE


def test_every_result_was_right() -> None:
    report = load("bench.json")
    assert report["complete"]
    assert {row["status"] for row in report["rows"]} == {"ok", "absent"}
    errors = [row["error_exact"] for row in load("demo.json")["rows"]]
    assert len(errors) == 18
    assert f"| {min(errors):.5f} to {max(errors):.5f} (limit 0.002" in PAGE
    assert all(row["agree"] for row in load("epilogues.json"))


def test_epilogues() -> None:
    shown = 0
    for row in load("epilogues.json"):
        size = f"{row['m']} x {row['n']} x {row['k']}"
        name = row["epilogue"].replace("|", "then")
        us = [row[f"{what}_us"] for what in ("fused", "unfused", "gained", "saved")]
        shown += f"| {size} | {name} | {' | '.join(f'{one:.1f}' for one in us)} |" in PAGE
    assert shown == 21


def test_kernels_page() -> None:
    kernels = load("kernels.json")["kernels"]
    assert f"| {len(kernels)} kernels, no spills, no local memory, nothing serialised |" in PAGE
    for kernel in kernels:
        assert not kernel["spill_store_bytes"] and not kernel["local_bytes"], kernel["name"]
        assert not kernel["serialized"], kernel["name"]


def test_grouped_figures() -> None:
    us: dict[str, dict[str, float]] = {}
    for row in load("grouped.json")["rows"]:
        us.setdefault(row["row"], {})[row["contender"]] = row["us"]
    ragged = [
        round(100 * (one["ragged sizes"] / one["aligned sizes"] - 1))
        for one in us.values() if "aligned sizes" in one
    ]  # fmt: skip
    masked = [one for one in us.values() if "right hint" in one]
    worst = {
        hint: round(100 * (max(one[hint] / one["right hint"] for one in masked) - 1))
        for hint in ("hint 4096", "hint 16", "no hint")
    }
    assert len(masked) == 11
    assert f"**{ragged[0]} and {ragged[1]} % for 32 groups of 512 to 1024: missed**" in PAGE
    assert f"too large a hint: 0 to {worst['hint 4096']} %" in PAGE
    assert f"too small: 0 to {worst['hint 16']} %" in PAGE
    assert f"none: 0 to {worst['no hint']} %" in PAGE


def test_the_model_is_as_good_as_said() -> None:
    """docs/performance.md, of the random shapes that came after the fit."""
    losses = []
    for row in load("model_timings.json")["shapes"]:
        if row["seed"] == 4:
            us = {f"dense_{name}_bfloat16": time for name, time in row["us"].items()}
            chosen = explain(row["m"], row["n"], row["k"]).choice.config.name
            losses.append(us[chosen] / min(us.values()))
    near = round(100 * sum(loss <= 1.05 for loss in losses) / len(losses))
    mean = round(100 * (sum(losses) / len(losses) - 1), 1)
    text = " ".join((FOLDER.parents[1] / "performance.md").read_text(encoding="utf-8").split())
    claim = "random shapes that came after the fit its choice is within 5 % of the best in"
    assert f"On {len(losses)} {claim} {near} %" in text
    assert f"{mean} % slower in the mean" in text
