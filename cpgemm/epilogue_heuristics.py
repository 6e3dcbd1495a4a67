"""Which kernel computes a product with an epilogue.

Steps that only change values take the kernels of plain products.  ``SwiGLU`` and ``Quantize`` store
D themselves, from kernels that stage nothing for TMA: those for float32.  ``Quantize`` needs
consumers that hold whole blocks of 128 columns of D, alone or two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpgemm.config import GroupedKernelConfig, KernelConfig, SplitKernelConfig
from cpgemm.cost_model import Machine
from cpgemm.epilogue_spec import EpilogueSpec
from cpgemm.grouped_heuristics import adaptive_configuration, choose_grouped, grouped_configurations
from cpgemm.grouped_problem import GroupedProblem
from cpgemm.heuristics import Tile, configurations, deepest, fastest
from cpgemm.problem import GemmProblem, OutDtype
from cpgemm.tuned import choose

__all__ = ["choose_fused_grouped", "choose_kernel", "fused_configurations", "why_not"]

# Behind SwiGLU, 256 columns of the product make one block of D: two consumers have 128 each.
_SWIGLU_QUANTIZE = (Tile(128, 256, 2, column_parts=2), Tile(64, 256, 2, column_parts=2))


def kernel_dtype(epilogue: EpilogueSpec) -> OutDtype:
    """The ``out_dtype`` of the kernels that can have this epilogue."""
    if epilogue.own_store or epilogue.output == "codes":
        return "float32"
    return epilogue.output


def fused_configurations(
    epilogue: EpilogueSpec, *, grouped: bool = False
) -> tuple[KernelConfig, ...]:
    """Every configuration that a product with this epilogue may take; a finite set."""
    dtype = kernel_dtype(epilogue)
    candidates: Sequence[KernelConfig]
    if grouped:
        candidates = _grouped_configurations(epilogue, dtype)
    elif epilogue.swiglu and epilogue.quantize:
        candidates = [deepest(KernelConfig, tile, dtype) for tile in _SWIGLU_QUANTIZE]
    else:
        candidates = configurations(dtype)
    return tuple(config for config in candidates if epilogue.why_not(config) is None)


def _grouped_configurations(
    epilogue: EpilogueSpec, dtype: OutDtype
) -> Sequence[GroupedKernelConfig]:
    if epilogue.swiglu and epilogue.quantize:
        return (deepest(GroupedKernelConfig, _SWIGLU_QUANTIZE[0], dtype),)
    if epilogue.own_store:
        # Stores of 16 bytes compile as quickly as those by TMA: the tallest tile will do.
        return tuple(adaptive_configuration(Tile(256, 128, 2), width, dtype) for width in (128, 96))
    return grouped_configurations(dtype)


def why_not(
    problem: GemmProblem, config: KernelConfig, epilogue: EpilogueSpec | None
) -> str | None:
    """Why a kernel of ``config`` cannot compute this; None when it can."""
    if epilogue is None:
        return config.why_not(problem)
    unstaged = replace(problem, out_dtype=kernel_dtype(epilogue))
    return config.why_not(unstaged) or epilogue.why_not(config)


def choose_kernel(
    problem: GemmProblem, machine: Machine, unsplit: bool, epilogue: EpilogueSpec | None = None
) -> KernelConfig:
    """The configuration for a dense product; ``problem.n`` counts rows of B.

    The plain product's, measured or predicted, unless the epilogue stores D itself.  ``unsplit``:
    one that does not split K.
    """
    if epilogue is None or not epilogue.own_store:
        return choose(problem, machine, unsplit=unsplit)
    unstaged = replace(problem, out_dtype=kernel_dtype(epilogue))
    candidates = [
        config
        for config in fused_configurations(epilogue)
        if not (unsplit and isinstance(config, SplitKernelConfig))
    ]
    return fastest(unstaged, candidates, machine)


def choose_fused_grouped(
    problem: GroupedProblem, epilogue: EpilogueSpec, machine: Machine
) -> GroupedKernelConfig:
    """The configuration for a grouped product; ``problem.n`` counts rows of each B."""
    if not epilogue.own_store:
        return choose_grouped(problem, machine)
    candidates = fused_configurations(epilogue, grouped=True)
    wanted = choose_grouped(replace(problem, out_dtype="float32"), machine)
    flat = getattr(wanted, "flat_n", 0)
    chosen = next((one for one in candidates if getattr(one, "flat_n", 0) == flat), candidates[0])
    assert isinstance(chosen, GroupedKernelConfig)
    return chosen
