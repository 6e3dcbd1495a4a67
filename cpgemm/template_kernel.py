"""``kernel_from_template``: a kernel of the user's own, compiled, launched, checked and timed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpgemm.calls import working_framework
from cpgemm.compiler import load_kernel, require_cupy
from cpgemm.config import GroupedKernelConfig, KernelConfig
from cpgemm.cost_model import Machine
from cpgemm.dlpack import as_framework, as_native, empty
from cpgemm.errors import ArgumentTypeError, DeviceError, WrongResultError, reject
from cpgemm.kernel_check import CheckResult, compare, on_host, seeded_operands
from cpgemm.kernel_view import Kernel
from cpgemm.launch import PreparedLaunch
from cpgemm.layout import is_array, is_cupy, pointer
from cpgemm.plan import GemmPlan, plan_gemm
from cpgemm.problem import OUT_DTYPES, GemmProblem, OutDtype, infer_out_dtype
from cpgemm.quantize import quantize
from cpgemm.render import KernelSource
from cpgemm.scaled import BLOCK, ScaledTensor
from cpgemm.streams import working_stream
from cpgemm.timing import Timing, time_interleaved
from cpgemm.trial_operands import OperandMemory, OperandSet
from cpgemm.user_template import render_file

__all__ = ["TemplateKernel", "kernel_from_template"]

Grid = int | tuple[int, ...]
Arguments = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class _OwnLaunch:
    """What a kernel with a signature of its own is launched with."""

    grid: Grid | Callable[[GemmProblem], Grid]
    threads: int
    arguments: Arguments


class TemplateKernel(Kernel):
    """A kernel of a user's template; ``kernel_from_template`` makes it.

    Everything that a ``Kernel`` shows, and: ``kernel(a, b, out)`` launches it, ``check`` compares
    its result with the reference, ``time`` times it, ``reload`` renders the file as it is now.
    ``problem`` (None: any) and ``config`` (None: none) are those that it was made for, ``own`` and
    ``threads`` how it is launched when not as its config's.
    """

    def __init__(
        self,
        source: KernelSource,
        problem: GemmProblem | None,
        config: KernelConfig | None,
        own: _OwnLaunch | None,
        threads: int | None,
        reload: Callable[[], TemplateKernel],
    ) -> None:
        super().__init__(source, threads=threads)
        self.problem = problem
        self.config = config
        self._own = own
        self._reload = reload

    @property
    def out_dtype(self) -> OutDtype:
        """Of results that the kernel makes room for: the problem's, the config's, or bfloat16."""
        known = self.problem or self.config
        return "bfloat16" if known is None else known.out_dtype

    def reload(self) -> TemplateKernel:
        """The kernel of the same file as it is now; what has not changed is not compiled again."""
        return self._reload()

    def __call__(self, a: ScaledTensor, b: ScaledTensor, out: Any = None, c: Any = None) -> Any:
        """Enqueue out = c + a @ b.T on the current stream and return ``out``.

        Operands as for ``gemm``, on a GPU; ``out`` is allocated when it is not given.  Raises what
        ``gemm`` raises, and ``ArgumentError`` for another problem than the kernel's.
        """
        made = out is None
        if made:
            native_c = None if c is None else as_native("c", c)
            problem = GemmProblem.of(a, b, None, native_c, self.out_dtype)
            out = empty(a.framework, (problem.m, problem.n), OUT_DTYPES[self.out_dtype], a.data)
        self.prepare(a, b, out, c)()
        # JAX's was CuPy's until it was complete.
        return as_framework("jax", out) if made and a.framework == "jax" else out

    def prepare(self, a: ScaledTensor, b: ScaledTensor, out: Any, c: Any = None) -> PreparedLaunch:
        """The launch on these operands, after checking them; they must outlive it.

        Arrays that ``arguments`` returns, a workspace of its own for example, live as long as the
        launch.
        """
        native_out = as_native("out", out, writable=True)
        native_c = None if c is None else as_native("c", c)
        dtype = infer_out_dtype(None, native_out, native_c)
        problem = GemmProblem.of(a, b, native_out, native_c, dtype)
        if self.problem is not None and problem != self.problem:
            reject(
                "a, b, c", f"must pose the kernel's {self.problem}", problem, "Make another kernel."
            )
        if 0 in (problem.m, problem.n, problem.k):
            reject("a, b", "must not be empty", problem, "Call cpgemm.gemm, which returns.")
        if not is_cupy(a.data):
            reject(
                "a",
                "must be on a GPU: a kernel is launched",
                "arrays of the CPU",
                "Quantise CuPy arrays.",
                kind=ArgumentTypeError,
            )
        framework = working_framework(a, b, out, c)
        with a.data.device:
            if self._own is None:
                assert self.config is not None
                machine = Machine.of_device(a.data.device.id)
                plan = GemmPlan(problem, self.config, machine, source=self.rendered)
                return plan.prepare(a, b, native_out, native_c, framework)
            own = self._own
            given = (a, b, native_out) if c is None else (a, b, native_out, native_c)
            values = list(own.arguments(*given))
            return PreparedLaunch(
                load_kernel(self.rendered),
                own.grid(problem) if callable(own.grid) else own.grid,
                own.threads,
                [_parameter(at, value) for at, value in enumerate(values)],
                shared_bytes=self.rendered.shared_bytes,
                framework=framework,
                keep=values,
            )

    def check(
        self, a: ScaledTensor | None = None, b: ScaledTensor | None = None, *, seed: int = 0
    ) -> CheckResult:
        """Launch on ``a`` and ``b`` and compare every element with the sum in float64.

        Operands that are not given are made from ``seed`` for the kernel's problem, C too where it
        accumulates.  The result lies between guards and holds NaN before the launch.  Returns the
        largest error and what rounding allows there (``kernel_check`` says how that is derived).
        Waits for the GPU; the sums are made on the host and take its time.

        Raises ``WrongResultError`` where the result is wrong or something beyond it was written.
        """
        cupy = _gpu()
        if (a is None) != (b is None):
            reject("a, b", "must be given together or not at all", "one of them", "Give both.")
        if a is None or b is None:
            a, b = self._operands(seed)
        accumulate = self.problem is not None and self.problem.accumulate
        m, n = a.shape[0], b.shape[0]
        kind = OUT_DTYPES[self.out_dtype]
        # On the stream of the launch: what is filled before it and read behind it is in order.
        here = cupy.cuda.Device()
        if is_cupy(a.data):
            here = working_stream(working_framework(a, b), a.data.device.id)
        with here:
            bits = np.uint16 if kind.itemsize == 2 else np.uint32
            poison = np.iinfo(bits).max  # NaN in either type
            guarded = cupy.full((m + 2, n), poison, dtype=bits)
            c = None
            if accumulate:
                values = np.random.default_rng([seed, 1]).standard_normal((m, n), np.float32)
                c = cupy.asarray(values.astype(kind).view(bits)).view(kind)
            self(a, b, guarded[1 : m + 1].view(kind), c)
            host = on_host(guarded)
        for at, where in ((0, "before its first row"), (m + 1, "behind its last row")):
            if (host[at] != poison).any():
                raise WrongResultError(f"{self.name}: out is overwritten {where}; check the edges.")
        got = host[1 : m + 1].view(kind)
        wanted = None if c is None else on_host(c)
        return compare(self.name, got, on_host(a), on_host(b), wanted)

    def calls(self, *, seed: int = 0) -> list[Callable[[], None]]:
        """Launches on sets of operands of their own, together larger than L2, to be timed.

        For ``timing.time_interleaved({one.name: one.calls(), other.name: other.calls()})``, which
        is how kernels are compared.  ``seed``: of their values.
        """
        problem = self._known_problem("time")
        memory = OperandMemory([problem], seed=seed, xp=_gpu())
        made: list[Callable[[], None]] = []
        for one in memory.sets(problem):
            launch = self.prepare(one.a, one.b, one.out, one.c)
            made.append(functools.partial(_launch_on, launch, one))
        return made

    def time(self, *, windows: int = 7, window_ms: float = 10.0, seed: int = 0) -> Timing:
        """Microseconds per launch with a cold L2, over ``windows`` windows of ``window_ms`` each.

        ``timing.time_interleaved`` says how; ``seed`` as for ``calls``.
        """
        calls = {self.name: self.calls(seed=seed)}
        return time_interleaved(calls, windows=windows, window_ms=window_ms, seed=seed)[self.name]

    def _operands(self, seed: int) -> tuple[ScaledTensor, ScaledTensor]:
        problem = self._known_problem("make operands for")
        x, w = seeded_operands(problem.m, problem.n, problem.k, seed, _gpu())
        return quantize(x), quantize(w, (BLOCK, BLOCK))

    def _known_problem(self, purpose: str) -> GemmProblem:
        if self.problem is None:
            reject(
                "problem",
                f"must be known to {purpose} a kernel",
                None,
                "Give kernel_from_template a problem, or operands to check.",
            )
        return self.problem


def kernel_from_template(
    path: str | Path,
    problem: GemmProblem | tuple[int, int, int] | None = None,
    config: KernelConfig | None = None,
    *,
    values: Mapping[str, object] | None = None,
    name: str | None = None,
    entry: str | None = None,
    grid: Grid | Callable[[GemmProblem], Grid] | None = None,
    threads: int | None = None,
    shared_bytes: int | None = None,
    arguments: Arguments | None = None,
    strict: bool = False,
) -> TemplateKernel:
    """Render the Jinja template at ``path`` to a kernel that computes D = C + A @ B.T.

    The template may include the package's headers (``#include "mainloop.cuh"``) and import its
    macros (``{% from "wgmma.j2" import wgmma_e4m3 %}``); files of the same name in the template's
    own folder come first.  It is rendered at once, and compiled when something is asked of it or
    launched, into the same disk cache as all kernels: what has not changed is not compiled again.

    Without ``arguments`` the kernel is launched as the package's own of the same ``config``
    (``KernelConfig`` or ``SplitKernelConfig``; None: chosen for ``problem``): ``entry`` (default:
    the config's) has the parameters of dense.cu.j2 or dense_split.cu.j2, and the template sees
    ``config``.  ``grid`` and ``threads`` are left out then.

    With ``arguments`` the kernel has any signature: ``arguments(a, b, out)``, or
    ``arguments(a, b, out, c)`` where there is a C, returns its parameters in their order, for
    ``ScaledTensor`` operands and CuPy arrays.  Parameters are NumPy scalars of the exact types,
    CuPy arrays (their address), bytes (tensor maps: ``cpgemm.tma.matrix_map``), Python integers
    (int) or floats (float).  ``entry``, ``grid`` and ``threads`` are then needed unless ``config``
    gives them; ``grid`` counts blocks and may be a function of the problem.

    - ``problem``: a ``GemmProblem`` or (m, n, k); None: whatever operands pose
    - ``values``: further names for the template
    - ``name``: of the kernel; default: the file's, without its endings
    - ``shared_bytes``: dynamic shared memory of a block; default: the config's, else 0
    - ``strict``: refuse builds that spill or serialise wgmma (``CompileError``) as for the
      package's kernels; otherwise they are a ``KernelWarning``

    Needs no GPU until it is launched.  Raises ``CompileError`` with the line of the template, or
    of the macro or header, that Jinja or the compiler refuses; ``ArgumentError`` for arguments that
    do not fit together.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        reject("path", "must be a template's file", repr(str(path)), "Give the path of a file.")
    if not isinstance(config, KernelConfig | None):
        reject(
            "config",
            "must be a KernelConfig of any family",
            repr(config),
            "A plan's .config is one.",
            kind=ArgumentTypeError,
        )
    wanted = _problem_of(problem, config)
    if wanted is not None and 0 in (wanted.m, wanted.n, wanted.k):
        reject("problem", "must not be empty", wanted, "Call cpgemm.gemm, which returns.")
    if config is None and arguments is None:
        if wanted is None:
            reject(
                "problem, config, arguments",
                "one must be given",
                "none",
                "Give the problem, the config of the package's kernel, or arguments.",
            )
        config = plan_gemm(
            wanted.m, wanted.n, wanted.k, out_dtype=wanted.out_dtype, accumulate=wanted.accumulate
        ).config
    own = _own_launch(config, grid, threads, arguments)
    if own is None and config is not None:
        threads = config.threads
        refusal = None if wanted is None else config.why_not(wanted)
        if refusal:
            reject("config", f"must suit {wanted}", f"{config.name}: {refusal}", "Leave it out.")
    elif own is not None:
        threads = own.threads
    if entry is None:
        if config is None:
            reject("entry", "must name the kernel", None, 'Give the extern "C" function\'s name.')
        entry = config.entry
    if shared_bytes is None:
        shared_bytes = 0 if config is None else config.shared_bytes
    # The package's own templates ask whether there is an epilogue.
    seen: dict[str, object] = {"epilogue": None}
    if config is not None:
        seen["config"] = config
    source = render_file(
        file,
        name=_name_of(file) if name is None else name,
        entry=entry,
        values={**seen, **(values or {})},
        shared_bytes=shared_bytes,
        strict=strict,
    )
    again = functools.partial(
        kernel_from_template, path, problem, config, values=values, name=name, entry=entry,
        grid=grid, threads=threads if arguments is not None else None, shared_bytes=shared_bytes,
        arguments=arguments, strict=strict,
    )  # fmt: skip
    return TemplateKernel(source, wanted, config, own, threads, again)


def _problem_of(problem: object, config: KernelConfig | None) -> GemmProblem | None:
    if problem is None or isinstance(problem, GemmProblem):
        return problem
    if isinstance(problem, tuple) and len(problem) == 3:
        return GemmProblem(*problem, out_dtype="bfloat16" if config is None else config.out_dtype)
    reject(
        "problem",
        "must be a GemmProblem or (m, n, k)",
        repr(problem),
        "Give three sizes, or None for whatever operands pose.",
        kind=ArgumentTypeError,
    )


def _own_launch(
    config: KernelConfig | None,
    grid: Grid | Callable[[GemmProblem], Grid] | None,
    threads: int | None,
    arguments: Arguments | None,
) -> _OwnLaunch | None:
    """How a kernel with ``arguments`` is launched; None for one launched as its config's."""
    if arguments is None:
        for name, given in (("grid", grid), ("threads", threads)):
            if given is not None:
                reject(name, "needs arguments as well", given, "Leave it out: config decides.")
        if isinstance(config, GroupedKernelConfig):
            reject(
                "config",
                "must be of the dense or split family, or come with arguments",
                config.name,
                "Give arguments, which build the kernel's parameters.",
            )
        return None
    if config is not None:
        chosen = config
        if grid is None:
            grid = lambda problem: chosen.blocks(chosen.tiles(problem), _multiprocessors())  # noqa: E731
        threads = chosen.threads if threads is None else threads
    if grid is None or threads is None:
        missing = " and ".join(
            name for name, given in (("grid", grid), ("threads", threads)) if given is None
        )
        reject(missing, "must be given with arguments", None, "Give blocks and threads per block.")
    return _OwnLaunch(grid, threads, arguments)


def _multiprocessors() -> int:
    return Machine.of_device(_gpu().cuda.runtime.getDevice()).sms


def _parameter(at: int, value: object) -> Any:
    """One parameter of a launch in the form that ``PreparedLaunch`` takes."""
    if isinstance(value, (bytes, np.generic)):
        return value
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int) and -(2**31) <= value < 2**31:
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    if is_array(value) and is_cupy(value):
        return np.uint64(pointer(value))
    reject(
        f"arguments[{at}]",
        "must be a NumPy scalar, a CuPy array, bytes, an int of 32 bits or a float",
        f"{value!r:.80}" if isinstance(value, (int, str)) else type(value).__qualname__,
        "For a ScaledTensor give .data and .scales; for other sizes a NumPy scalar.",
        kind=ArgumentTypeError,
    )


def _launch_on(launch: PreparedLaunch, operands: OperandSet) -> None:
    """Launch; ``operands`` are what the launch has the addresses of, and live as long as this."""
    launch()


def _name_of(path: Path) -> str:
    """A kernel's name from its file's: ``my kernel.cu.j2`` is ``my_kernel``."""
    stem = path.name.split(".")[0] or "kernel"
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem).lstrip("_-")[:100] or "kernel"


def _gpu() -> Any:
    """CuPy, on a machine with a device: what check and time need before they make operands."""
    cupy = require_cupy()
    try:
        cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"device: running a kernel needs a Hopper GPU and its driver; got {error}. "
            "Everything but launching, check and time works without one."
        ) from error
    return cupy
