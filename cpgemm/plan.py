"""``GemmPlan``: the kernel for one dense problem, its launch on operands, and how it was chosen.

Plans are cached by problem; ``gemm`` makes them as it needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import numpy as np

from cpgemm import settings
from cpgemm.calls import ReadyCalls, signature, signers, working_framework
from cpgemm.compiler import CompiledKernel, compile_kernel, load_kernel
from cpgemm.config import TAIL_ROWS, KernelConfig, SplitKernelConfig
from cpgemm.cost_model import H200, Machine
from cpgemm.dlpack import Framework, as_native
from cpgemm.epilogue_heuristics import choose_kernel, why_not
from cpgemm.epilogue_spec import EpilogueSpec
from cpgemm.epilogue_step import output_of, require_epilogue
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.heuristics import Explanation
from cpgemm.kernel_view import Kernel
from cpgemm.kernels import gemm_source
from cpgemm.launch import PreparedLaunch
from cpgemm.problem import (
    Deterministic,
    GemmProblem,
    OutDtype,
    wants_unsplit,
)
from cpgemm.render import KernelSource
from cpgemm.scaled import BLOCK, ScaledTensor, is_cupy, pointer
from cpgemm.tma import matrix_map, row_pitch, tensor_map
from cpgemm.tuned import explain

__all__ = ["GemmPlan", "cached_plan", "call_key", "current_machine", "fused_plan", "plan_gemm"]


class GemmPlan:
    """A prepared product of one size: problem, kernel, launch configuration.

    Made by ``plan_gemm``.  ``problem``: sizes and dtype; ``config``: the kernel, ``ArgumentError``
    is raised when it does not suit; ``machine``: whose multiprocessors the grid counts;
    ``static_b``: as in ``gemm``; ``epilogue``: what its kernel does with the sums.

    ``plan(a, b, out, c)`` checks the operands, launches as ``gemm`` does and returns ``out``.  The
    kernel is compiled (or found in the cache) and loaded at the first call on each device.
    ``plan.config``, ``plan.source``, ``plan.kernel`` and ``plan.explain()`` need no GPU.

    ``source`` is launched instead of the package's kernel of ``config``, with the same arguments:
    ``kernel_from_template`` makes such plans.
    """

    def __init__(
        self,
        problem: GemmProblem,
        config: KernelConfig,
        machine: Machine,
        static_b: bool = False,
        source: KernelSource | None = None,
        epilogue: EpilogueSpec | None = None,
    ) -> None:
        refusal = why_not(problem, config, epilogue)
        if refusal:
            reject("config", f"must suit {problem}", f"{config.name}: {refusal}", "Leave it out.")
        self.problem = problem
        self.config = config
        self.machine = machine
        self.static_b = static_b
        self.epilogue = epilogue
        self._source = source
        self._ready = ReadyCalls()

    @property
    def source(self) -> KernelSource:
        """The rendered kernel."""
        if self._source is not None:
            return self._source
        return gemm_source(self.config, self.epilogue)

    @functools.cached_property
    def kernel(self) -> Kernel:
        """The kernel to look into: its source, PTX, machine code, resources, counts, log."""
        return Kernel(self.source, threads=self.config.threads)

    def compile(self) -> CompiledKernel:
        """Compile the kernel, or find it in the cache, ahead of the first call; needs no GPU."""
        return compile_kernel(self.source)

    @property
    def pdl(self) -> bool:
        """Whether launches are programmatic dependent ones: where ``settings`` say so.

        Split kernels need ``static_b`` for it: with nothing to load ahead they lose 2 to 14 %.
        """
        return settings.pdl() and (self.static_b or not isinstance(self.config, SplitKernelConfig))

    def explain(self) -> Explanation:
        """Every candidate with its predicted time, and the floor; of the product alone, without its
        epilogue.
        """
        p = self.problem
        return explain(
            p.m, p.n, p.k, out_dtype=p.out_dtype, accumulate=p.accumulate, machine=self.machine
        )

    def _repr_html_(self) -> str:
        from cpgemm.displays.plan import plan_html

        return plan_html(self)

    def __repr__(self) -> str:
        return f"GemmPlan({self.problem}, {self.config.name}, on {self.machine.name})"

    def __call__(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any = None) -> Any:
        """Compute ``out = c + a @ b.T``; raises what ``gemm`` raises, and for another problem."""
        if self.epilogue is not None:
            rule = "a plan with one prepares its kernel and is not called"
            reject("epilogue", rule, self.epilogue.title, "Call cpgemm.gemm with the epilogue.")
        key = call_key(a, b, out, c)
        launch = self._ready.get(key)
        if launch is None:
            launch = self._check(a, b, out, c)
            if key is not None:
                self._ready.put(key, launch)
        launch()
        return out

    def _check(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any) -> PreparedLaunch:
        native_out = None if out is None else as_native("out", out, writable=True)
        native_c = None if c is None else as_native("c", c)
        problem = GemmProblem.of(a, b, native_out, native_c, self.problem.out_dtype)
        if problem != self.problem:
            reject(
                "a, b, c", f"must pose the planned {self.problem}", problem, "Make another plan."
            )
        if not is_cupy(a.data):
            reject(
                "a",
                "must be on a GPU: a plan launches a kernel",
                "arrays of the CPU",
                "Call cpgemm.gemm for the reference path.",
                kind=ArgumentTypeError,
            )
        if out is None:
            reject("out", "must be given to a plan", None, "Allocate it, or call cpgemm.gemm.")
        with a.data.device:
            return self.prepare(a, b, native_out, native_c, working_framework(a, b, out, c))

    def prepare(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        out: Any,
        c: Any,
        framework: Framework,
        operands: tuple[bytes, ...] = (),
    ) -> PreparedLaunch:
        """The launch on operands that obey every rule and lie on CuPy's current device.

        ``operands``: what the epilogue reads, as the kernel's last arguments.
        """
        config, source = self.config, self.source
        return PreparedLaunch(
            load_kernel(source),
            config.blocks(config.tiles(self.problem), self.machine.sms),
            config.threads,
            (*self._arguments(a, b, out, c), *operands),
            shared_bytes=source.shared_bytes,
            pdl=self.pdl,
            framework=framework,
        )

    def _arguments(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any) -> tuple[Any, ...]:
        """The kernel's parameters in their order, in the units of its signature."""
        config, p = self.config, self.problem
        rows = config.rows_loaded(p.m)
        # A single tile of rows has no tail; its map is made once, and fills the place of the other.
        tail = TAIL_ROWS if p.m > config.block_m else rows
        map_a, map_tail = (
            matrix_map(a.data, (box // config.cluster_n, BLOCK), 128) for box in (rows, tail)
        )
        map_b = matrix_map(b.data, (config.block_n // config.cluster_m, BLOCK), 128)
        scale_pitch = 4 * a.scales_pitch
        map_scale_a = tensor_map(pointer(a.scales), p.k_blocks, p.m, scale_pitch, 4, (1, rows), 0)
        map_d: tuple[bytes, ...] = ()
        if not isinstance(config, SplitKernelConfig):
            # The float32 kernels store from registers and never look at their map of D.
            box = config.store_box
            map_d = (matrix_map(out, box, box[1] * 2) if config.staged else map_a,)
        item = out.itemsize
        return (
            map_a,
            map_tail,
            map_b,
            map_scale_a,
            *map_d,
            np.uint64(pointer(b.scales)),
            np.uint64(0 if c is None else pointer(c)),
            np.uint64(pointer(out)),
            np.int64(0 if c is None else row_pitch(c) // item),
            np.int64(row_pitch(out) // item),
            np.int32(p.m),
            np.int32(p.n),
            np.int32(p.k),
            np.int32(rows),
            # Alone, loads of B that go first would only keep those of A waiting.
            np.int32(self.static_b and self.pdl),
        )


@functools.lru_cache(maxsize=4096)
def cached_plan(
    problem: GemmProblem,
    config: KernelConfig,
    machine: Machine,
    static_b: bool,
    epilogue: EpilogueSpec | None = None,
) -> GemmPlan:
    """The one plan for these, which all threads and calls share."""
    return GemmPlan(problem, config, machine, static_b, epilogue=epilogue)


def fused_plan(
    problem: GemmProblem, epilogue: EpilogueSpec, device: int, deterministic: Any, static_b: Any
) -> GemmPlan:
    """The plan that ``gemm`` takes on CuPy's device number ``device``; options as it has them."""
    machine = Machine.of_device(device)
    config = choose_kernel(problem, machine, wants_unsplit(deterministic), epilogue)
    return cached_plan(problem, config, machine, bool(static_b), epilogue)


def current_machine() -> Machine:
    """The current GPU when CuPy has one, otherwise the H200 that the model was fitted to."""
    try:
        import cupy

        return Machine.of_device(cupy.cuda.runtime.getDevice())
    except Exception:  # No CuPy, no driver, no device: CuPy raises a different error for each.
        return H200


def plan_gemm(
    m: int,
    n: int,
    k: int,
    *,
    out_dtype: OutDtype = "bfloat16",
    accumulate: bool = False,
    config: KernelConfig | None = None,
    deterministic: Deterministic = True,
    static_b: bool = False,
    epilogue: Any = None,
) -> GemmPlan:
    """Prepare D = C + A @ B.T for A (m, k) and B (n, k), cached.

    ``out_dtype``: "bfloat16" or "float32", of D and C.  ``accumulate`` says whether calls pass
    ``c``.  ``config`` overrides the choice.  ``deterministic`` and ``static_b`` are those of
    ``gemm``.  A plan with an ``epilogue`` (``cpgemm.epilogues``) shows and compiles the kernel that
    ``gemm`` takes with it.  Raises ``ArgumentError`` for sizes that no kernel takes (k % 16, n % 8,
    empty), a misfit ``config`` or ``epilogue``.
    """
    unsplit = wants_unsplit(deterministic)
    problem = GemmProblem(m, n, k, out_dtype, accumulate)
    if 0 in (problem.m, problem.n, problem.k):
        reject("m, n, k", "must not be 0 in a plan", (m, n, k), "Call cpgemm.gemm, which returns.")
    spec = None
    if epilogue is not None:
        spec = require_epilogue(epilogue).spec(output_of(epilogue, problem.out_dtype))
        epilogue.check_sizes((problem.m, problem.n), spec.output)
        if accumulate and spec.own_store:
            reject(
                "accumulate", "cannot be had with SwiGLU or Quantize", True,
                "Put epilogues.Residual(c) before them.",
            )  # fmt: skip
    machine = current_machine()
    if config is None:
        config = choose_kernel(problem, machine, unsplit, spec)
    elif unsplit and isinstance(config, SplitKernelConfig):
        reject(
            "config", "must add along K in one order for batch invariance", config.name,
            "Leave it out.",
        )  # fmt: skip
    return cached_plan(problem, config, machine, bool(static_b), spec)


def call_key(
    a: Any, b: Any, out: Any, c: Any, deterministic: Deterministic = True, static_b: bool = False
) -> Hashable:
    """What the launch of a dense product depends on; None when it is not to be remembered."""
    # Most of what a repeated call costs in Python is spent here: ``signers`` saves three calls.
    signed = signers[type(out)](out)
    if signed is None:
        return None
    if c is None:
        return signers[type(a)](a), signers[type(b)](b), signed, deterministic, static_b
    read = signature(c)
    if read is None:
        return None
    return signature(a), signature(b), signed, read, deterministic, static_b
