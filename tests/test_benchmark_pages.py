"""The pages under docs/benchmarks say what the files beside them hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cpgemm.heuristics import explain

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "h200"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_large_rows() -> None:
    rows = {(r["n"], r["k"]): r for r in load("compare.json")["rows"] if r["m"] == 4096}
    line = re.compile(
        r"^\| (\d+) x (\d+) \| ([\d.]+) \| (\d+) \| (\S+) \| \S+ \| ([\d.]+) \|", re.M
    )
    found = line.findall(PAGE)
    assert len(found) == len(rows) == 6
    for n, k, us, tflops, over_block, over_tensor in found:
        row = rows[int(n), int(k)]
        ours = row["us"]["cpgemm"]
        assert float(us) == pytest.approx(ours, abs=0.051)
        assert int(tflops) == round(row["tflops"])
        assert float(over_tensor) == pytest.approx(row["us"]["tensor"] / ours, abs=6e-4)
        if over_block == "n/a":
            assert "block" not in row["us"]
        else:
            assert float(over_block) == pytest.approx(row["us"]["block"] / ours, abs=6e-4)


def test_smallest_ratio_over_block() -> None:
    us = [row["us"] for row in load("compare.json")["rows"]]
    smallest = min(one["block"] / one["cpgemm"] for one in us if "block" in one)
    said = re.search(r"smallest ratio of any row over block is ([\d.]+)\.", PAGE)
    assert said and float(said[1]) == pytest.approx(smallest, abs=6e-4)


def test_every_result_was_right() -> None:
    for row in load("compare.json")["rows"]:
        assert row["error"]["cpgemm"] <= 0.002
    errors = [row["error_exact"] for row in load("demo.json")["rows"]]
    assert len(errors) == 18 and min(errors) > 0.00165 and max(errors) < 0.00169


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
    """docs/performance.md, of the random shapes that the model was fitted to."""
    losses = []
    for row in load("model_timings.json")["shapes"]:
        us = {f"dense_{name}_bfloat16": time for name, time in row["us"].items()}
        chosen = explain(row["m"], row["n"], row["k"]).choice.config.name
        losses.append(us[chosen] / min(us.values()))
    near = round(100 * sum(loss <= 1.05 for loss in losses) / len(losses))
    mean = round(100 * (sum(losses) / len(losses) - 1), 1)
    text = " ".join((FOLDER.parents[1] / "performance.md").read_text(encoding="utf-8").split())
    assert f"On these {len(losses)} shapes its choice is within 5 % of the best in {near} %" in text
    assert f"{mean} % slower in the mean" in text


def test_decode_shares_of_the_floor() -> None:
    us: dict[tuple[int, int], dict[tuple[int, str], float]] = {}
    for row in load("bench.json")["rows"]:
        case = row["case"]
        if case["suite"] == "dense" and case["m"] <= 128 and row["status"] == "ok":
            us.setdefault((case["n"], case["k"]), {})[case["m"], row["contender"]] = row["us"]
    shares = []
    for (n, k), one in us.items():
        line = [one[m, "cpgemm"] / one[m, "memory floor"] for m in (1, 8, 16, 32, 64, 128)]
        assert f"| {n} x {k} | {' | '.join(f'{share:.2f}' for share in line)} |" in PAGE
        shares += line
    assert len(shares) == 36
    assert f"{min(shares):.2f} to {max(shares):.2f} times the live memory floor" in PAGE
