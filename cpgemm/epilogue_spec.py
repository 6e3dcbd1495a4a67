"""``EpilogueSpec``: what of an epilogue is compiled in, without the arrays that it reads.

``cpgemm.epilogues`` makes specifications, ``templates/epilogue.j2`` renders them.  A kernel is its
configuration and its specification; both are hashable.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal

from cpgemm.config import AdaptiveKernelConfig, KernelConfig, SplitKernelConfig
from cpgemm.layout import BLOCK, ScaleFormat
from cpgemm.problem import OutDtype

__all__ = ["EpilogueSpec", "Output", "Stage"]

Output = Literal["bfloat16", "float32", "codes"]
_LONGEST_NAME = 36  # of an epilogue, within a kernel's name


@dataclass(frozen=True)
class Stage:
    """One step of an epilogue.

    ``kind``: bias, silu, gelu_erf, gelu_tanh, residual, scale, swiglu, quantize or custom.
    ``dtype``: of the array that a bias or a residual reads.  ``per_group``: whether the bias has a
    row for each group.  ``scale_format``: of a quantised result.  ``path``, ``function``,
    ``dtypes``, ``source``: a user's file, its function, what its arrays hold, its text.
    """

    kind: str
    dtype: str = ""
    per_group: bool = False
    scale_format: ScaleFormat = "float32"
    path: str = ""
    function: str = ""
    dtypes: tuple[str, ...] = ()
    source: str = dataclasses.field(default="", repr=False)

    @property
    def operands(self) -> int:
        """Arguments of the kernel that this step takes."""
        if self.kind == "custom":
            return len(self.dtypes)
        return {"bias": 1, "residual": 1, "scale": 1, "quantize": 2}.get(self.kind, 0)

    @property
    def title(self) -> str:
        """What it is, for people."""
        details = {
            "bias": f"{self.dtype}{', per group' if self.per_group else ''}",
            "residual": self.dtype,
            "quantize": self.scale_format,
            "custom": self.function,
        }.get(self.kind)
        return f"{self.kind} ({details})" if details else self.kind


@dataclass(frozen=True)
class EpilogueSpec:
    """The steps of an epilogue in their order, and what D holds.

    ``output``: the dtype of D, or ``"codes"`` for e4m3 with scales.  ``resume_lines``: the lines of
    the rendered kernel behind each of ``files``, which ``kernels`` finds.
    """

    stages: tuple[Stage, ...]
    output: Output = "bfloat16"
    resume_lines: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The steps, for people."""
        return " | ".join(stage.title for stage in self.stages)

    @property
    def name(self) -> str:
        """Readable, fit for a file name, not always unique: digests are."""
        parts = [stage.function or stage.kind for stage in self.stages]
        name = "_".join(parts)
        if self.own_store:
            name += f"_{self.output}"
        if len(name) > _LONGEST_NAME:
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            name = f"{name[: _LONGEST_NAME - 9]}_{digest}"
        return name

    @property
    def out_dtype(self) -> OutDtype:
        """The dtype of a D that is not quantised."""
        assert self.output != "codes"
        return self.output

    @property
    def swiglu(self) -> bool:
        """Whether D has half of the product's columns."""
        return any(stage.kind == "swiglu" for stage in self.stages)

    @property
    def quantize(self) -> Stage | None:
        """The step that quantises, the last one, if there is one."""
        last = self.stages[-1]
        return last if last.kind == "quantize" else None

    @property
    def own_store(self) -> bool:
        """Whether D is stored otherwise than by kernels without an epilogue."""
        return self.swiglu or self.quantize is not None

    @property
    def wants_group(self) -> bool:
        """Whether consumers must know the group of their rows."""
        return any(stage.per_group for stage in self.stages)

    @property
    def value_stages(self) -> tuple[Stage, ...]:
        """The steps that change values one by one."""
        return tuple(stage for stage in self.stages if stage.kind not in ("swiglu", "quantize"))

    @property
    def before_swiglu(self) -> tuple[Stage, ...]:
        """Those of ``value_stages`` on the product's own columns."""
        kinds = [stage.kind for stage in self.stages]
        end = kinds.index("swiglu") if self.swiglu else len(kinds)
        return tuple(stage for stage in self.stages[:end] if stage.kind != "quantize")

    @property
    def after_swiglu(self) -> tuple[Stage, ...]:
        """Those of ``value_stages`` on the columns that SwiGLU leaves."""
        return self.value_stages[len(self.before_swiglu) :]

    @property
    def customs(self) -> tuple[Stage, ...]:
        """The users' functions, each once."""
        return tuple(dict.fromkeys(stage for stage in self.stages if stage.kind == "custom"))

    @property
    def files(self) -> tuple[Stage, ...]:
        """The first step of each text of a user's: a text stands in the kernel once."""
        found: dict[tuple[str, str], Stage] = {}
        for stage in self.customs:
            found.setdefault((stage.path, stage.source), stage)
        return tuple(found.values())

    @property
    def operands(self) -> int:
        """Arguments that the kernel takes besides its own."""
        return sum(stage.operands for stage in self.stages)

    def columns(self, n: int) -> int:
        """Columns of D for ``n`` rows of B."""
        return n // 2 if self.swiglu else n

    def why_not(self, config: KernelConfig) -> str | None:
        """Why a kernel of ``config`` cannot have this epilogue; None when it can."""
        if not self.own_store:
            if config.out_dtype != self.output:
                return f"it writes {config.out_dtype}, the epilogue makes {self.output}"
            return None
        if config.staged:
            return "it stages D for TMA, which this epilogue stores itself: take a float32 kernel"
        if self.quantize is None:
            return None
        if isinstance(config, SplitKernelConfig):
            return "no block of a split kernel holds whole blocks of 128 columns"
        forms = [config, config.flat] if isinstance(config, AdaptiveKernelConfig) else [config]
        for form in forms:
            wave = self.columns(form.wave_n)
            shares = form.column_parts
            if wave * shares != BLOCK or wave not in (BLOCK, BLOCK // 2):
                return f"its consumers do not hold whole blocks of {BLOCK} columns of D"
        return None
