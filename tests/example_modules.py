"""Files of ``examples/`` as modules: most names begin with a digit, which ``import`` refuses."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tiny_kernels import ROOT


def load_example(name: str) -> ModuleType:
    """A fresh module of the file ``name``."""
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
