"""README and the pages of docs/: their Python blocks and how to run them, for tests that read them.

A block that needs something that may be missing has a line of HTML above it, which no reader sees:

    <!-- needs: torch gpu -->

Blocks of a page share one namespace, in their order.  Without a Hopper GPU ``import cupy as cp`` is
replaced by ``import numpy as cp``, as README says.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpgemm import machine

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
MODULES = (
    "IPython",
    "jax",
    "matplotlib",
    "safetensors",
    "torch",
)  # what blocks may need, and "gpu"

_BLOCK = re.compile(
    r"^(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced Python block: its text, the number of its first line, what must be there to run."""

    line: int
    text: str
    needs: frozenset[str]


def name_of(page: Path) -> str:
    """As people write it: from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    """All Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start(2)), found[2], frozenset((found[1] or "").split()))
        for found in _BLOCK.finditer(text)
    ]


def why_not(need: str) -> str | None:
    """What is missing for a block that needs ``need``; None when nothing is."""
    if need == "gpu":
        return machine.why_no_hopper()
    if need not in MODULES:
        raise ValueError(f"{need}: write gpu or one of {MODULES}")
    return None if importlib.util.find_spec(need) else f"{need} is not installed"


def run_blocks(page: Path, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Execute, one after another, the blocks that need no more than ``needs``; their names."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in python_blocks(page):
        if not block.needs <= set(needs):
            continue
        text = block.text
        if why_not("gpu"):
            text = text.replace("import cupy as cp", "import numpy as cp")
        # Blank lines in front: a traceback then names the line of the page.
        exec(compile("\n" * block.line + text, str(page), "exec"), names)
    return names
