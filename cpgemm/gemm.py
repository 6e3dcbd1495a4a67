"""``gemm`` and ``GemmPlan``: block-scaled FP8 matrix products.

    D[m, n] = cast( C[m, n] + sum over kb of  sA[m, kb] * sB[n // 128, kb]
                                              * sum over k in block kb of A[m, k] * B[n, k] )

CuPy operands run one kernel on CuPy's current stream; NumPy operands take the reference path.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cpgemm import env, launch
from cpgemm.compiler import LoadedKernel, load_kernel
from cpgemm.config import KernelConfig
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.heuristics import H200, Explanation, Machine, choose, explain
from cpgemm.kernels import gemm_source
from cpgemm.problem import GemmProblem, OutDtype, empty_result, infer_out_dtype
from cpgemm.reference import gemm_reference
from cpgemm.render import KernelSource
from cpgemm.scaled import BLOCK, ScaledTensor, is_cupy, pointer, require_scaled
from cpgemm.tma import matrix_map, row_pitch, tensor_map

__all__ = ["GemmPlan", "gemm", "gemm_nn", "gemm_nt", "gemm_tn", "gemm_tt", "plan_gemm"]


class GemmPlan:
    """A prepared product of one size: problem, kernel, launch configuration.

    ``plan(a, b, out, c)`` checks the operands, launches on CuPy's current stream and returns
    ``out``.  The kernel is compiled (or found in the cache) and loaded at the first call on each
    device.  ``plan.config``, ``plan.source`` and ``plan.explain()`` need no GPU.
    """

    def __init__(self, problem: GemmProblem, config: KernelConfig, machine: Machine) -> None:
        refusal = config.why_not(problem)
        if refusal:
            reject("config", f"must suit {problem}", f"{config.name}: {refusal}", "Leave it out.")
        self.problem = problem
        self.config = config
        self.machine = machine
        self._kernels: dict[int, LoadedKernel] = {}

    @property
    def source(self) -> KernelSource:
        """The rendered kernel."""
        return gemm_source(self.config)

    def explain(self) -> Explanation:
        """Every candidate with its predicted time, and the floor."""
        p = self.problem
        return explain(
            p.m, p.n, p.k, out_dtype=p.out_dtype, accumulate=p.accumulate, machine=self.machine
        )

    def __call__(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any = None) -> Any:
        """Compute ``out = c + a @ b.T``; raises what ``gemm`` raises, and for another problem."""
        problem = GemmProblem.of(a, b, out, c, self.problem.out_dtype)
        if problem != self.problem:
            reject(
                "a, b, c", f"must pose the planned {self.problem}", problem, "Make another plan."
            )
        if not is_cupy(a.data):
            reject(
                "a",
                "must hold CuPy arrays: a plan launches a kernel",
                "NumPy arrays",
                "Call cpgemm.gemm for the reference path.",
                kind=ArgumentTypeError,
            )
        if out is None:
            reject("out", "must be given to a plan", None, "Allocate it, or call cpgemm.gemm.")
        with a.data.device:
            self.launch(a, b, out, c)
        return out

    def launch(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any) -> None:
        """Launch on operands that obey every rule and lie on CuPy's current device."""
        device = a.data.device.id
        kernel = self._kernels.get(device)
        if kernel is None:
            kernel = self._kernels[device] = load_kernel(self.source)
        config, p = self.config, self.problem
        launch_config = launch.launch_config(
            config.blocks(config.tiles(p), self.machine.sms),
            config.threads,
            config.shared_bytes,
            env.pdl(),
        )
        launch.run(kernel, launch_config, self._arguments(a, b, out, c))

    def _arguments(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any) -> tuple[Any, ...]:
        """The kernel's parameters in their order, in the units of its signature."""
        config, p = self.config, self.problem
        rows = config.rows_loaded(p.m)
        map_a = matrix_map(a.data, (rows // config.cluster_n, BLOCK), 128)
        map_b = matrix_map(b.data, (config.block_n // config.cluster_m, BLOCK), 128)
        scale_pitch = 4 * a.scales_pitch
        map_scale_a = tensor_map(
            pointer(a.scales), p.k_blocks, p.m, scale_pitch, 4, (1, rows), 0, a.data.device.id
        )
        # The float32 kernels store from registers and never look at their map of D.
        map_d = (
            matrix_map(out, config.store_box, config.store_box[1] * 2) if config.staged else map_a
        )
        item = out.itemsize
        return (
            map_a,
            map_b,
            map_scale_a,
            map_d,
            np.uint64(pointer(b.scales)),
            np.uint64(0 if c is None else pointer(c)),
            np.uint64(pointer(out)),
            np.int64(0 if c is None else row_pitch(c) // item),
            np.int64(row_pitch(out) // item),
            np.int32(p.m),
            np.int32(p.n),
            np.int32(p.k),
            np.int32(rows),
        )


@functools.lru_cache(maxsize=4096)
def _plan(problem: GemmProblem, config: KernelConfig | None, machine: Machine) -> GemmPlan:
    return GemmPlan(problem, config or choose(problem, machine), machine)


def _current_machine() -> Machine:
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
) -> GemmPlan:
    """Prepare D = C + A @ B.T for A (m, k) and B (n, k), cached.

    ``accumulate`` says whether calls pass ``c``.  ``config`` overrides the choice.  Raises
    ``ArgumentError`` for sizes that no kernel takes (k % 16, n % 8, empty) or a misfit ``config``.
    """
    problem = GemmProblem(m, n, k, out_dtype, accumulate)
    if 0 in (problem.m, problem.n, problem.k):
        reject("m, n, k", "must not be 0 in a plan", (m, n, k), "Call cpgemm.gemm, which returns.")
    return _plan(problem, config, _current_machine())


def gemm(
    a: ScaledTensor, b: ScaledTensor, out: Any = None, *, c: Any = None, out_dtype: Any = None
) -> Any:
    """D = C + A @ B.T from block-scaled e4m3 operands.

    a: ScaledTensor (M, K), granularity (1, 128).  b: ScaledTensor (N, K), granularity (128, 128).
    out, c: (M, N) of ``out_dtype``, rows contiguous, row pitch and address multiples of 16 bytes;
    ``c`` may be ``out`` itself.  ``out_dtype``: "bfloat16" or "float32"; by default the dtype of
    ``out``, else of ``c``, else bfloat16.  K is a multiple of 16, N of 8, M anything; empty sizes
    do what linear algebra says (K = 0 gives C or zeros).

    CuPy operands: one kernel on CuPy's current stream, nothing allocated but ``out``.  NumPy
    operands: the reference path with the same semantics.  Returns ``out``.

    Raises ``ArgumentError``, ``ArgumentTypeError`` or ``DeviceError`` before anything is launched
    or written, ``CompileError`` when a kernel does not build.
    """
    problem = GemmProblem.of(a, b, out, c, infer_out_dtype(out_dtype, out, c))
    if not is_cupy(a.data):
        result = gemm_reference(a, b, c=c, out_dtype=problem.out_dtype)
        if out is None:
            return result
        out[...] = result
        return out
    with a.data.device:
        if out is None:
            out = empty_result((problem.m, problem.n), problem.out_dtype)
        if problem.k == 0 and out.size:
            _fill(out, c)
        elif out.size:
            device = a.data.device.id
            _plan(problem, None, Machine.of_device(device)).launch(a, b, out, c)
    return out


def _fill(out: Any, c: Any) -> None:
    """K = 0: D is C, or zeros. As bits, because CuPy has few kernels for bfloat16."""
    bits = np.uint16 if out.itemsize == 2 else np.uint32
    out.view(bits)[...] = 0 if c is None else c.view(bits)


def gemm_nt(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """``gemm`` by its BLAS name: A (M, K) as it is, B (N, K) transposed."""
    return gemm(a, b, out, **options)


def gemm_nn(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """D = C + A @ B with b (K, N), granularity (128, 128).

    Hopper's FP8 tensor cores read both operands along K, so this makes a transposed copy of ``b``
    first (``b.T.k_major()``); keep that copy yourself when ``b`` is used again.
    """
    return gemm(a, _transposed("b", b), out, **options)


def gemm_tn(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """D = C + A.T @ B with a (K, M), granularity (128, 1), and b (K, N), granularity (128, 128).

    Makes transposed copies of what is not stored along K (``gemm_nn`` says why).
    ``quantize(x, (128, 1))`` stores along K already, so that its result is not copied again.
    """
    return gemm(_transposed("a", a), _transposed("b", b), out, **options)


def gemm_tt(a: ScaledTensor, b: ScaledTensor, out: Any = None, **options: Any) -> Any:
    """D = C + A.T @ B.T with a (K, M), granularity (128, 1), and b (N, K), granularity (128, 128).

    Makes a transposed copy of ``a`` unless it is stored along K (``gemm_nn`` says why).
    """
    return gemm(_transposed("a", a), b, out, **options)


def _transposed(name: str, operand: object) -> ScaledTensor:
    return require_scaled(name, operand, "Quantise it with cpgemm.quantize.").T.k_major()
