"""What ``%load_ext cpgemm`` brings: ``%gemm_explain``, ``%gemm_bench``, ``%%gemm_epilogue``.

Mistakes are shown as one line (IPython's ``UsageError``), as on the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import keyword
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from cpgemm.errors import CpgemmError, DeviceError, reject

if TYPE_CHECKING:
    from cpgemm.bench.result import Report
    from cpgemm.heuristics import Explanation

__all__ = ["CellEpilogue", "GemmMagics", "load"]


def load(shell: Any) -> None:
    """Register the magics with an IPython shell."""
    shell.register_magics(GemmMagics)


class _Helped(Exception):
    """``-h`` was given and answered."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.split()[0]}: {message}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Helped


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    try:
        yield
    except CpgemmError as error:
        raise UsageError(f"cpgemm: {error}") from None


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"cannot be read: {error}") from None


class CellEpilogue:
    """An epilogue from a cell: called with the arrays that it reads, it gives the epilogue.

    ``name``: of its CUDA function.  ``source``: the cell's text.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """The ``cpgemm.epilogues.Custom`` of the cell's function and these arrays.

        ``options``: those of ``Custom``, such as ``numpy``, the same function for the CPU.
        """
        custom = importlib.import_module("cpgemm.epilogues").Custom
        return custom(self.source, *arrays, function=self.name, **options)

    def __repr__(self) -> str:
        return f"epilogue {self.name} from a cell: call it with the arrays that it reads"


@magics_class
class GemmMagics(Magics):
    """cpgemm's magics; ``%gemm_bench -h`` and the like print what they take."""

    @line_magic
    def gemm_explain(self, line: str) -> Explanation | None:
        """%gemm_explain M N K [--out-dtype bfloat16|float32] [--accumulate]

        Which kernel a product of this size gets, why, and the time to expect.  The explanation is
        shown, and may be kept: x = %gemm_explain 64 2112 7168.
        """
        from cpgemm.__main__ import add_explain_arguments
        from cpgemm.plan import current_machine
        from cpgemm.tuned import explain

        parser = _Parser(prog="%gemm_explain", description="Which kernel a shape gets, and why.")
        add_explain_arguments(parser)
        with contextlib.suppress(_Helped), _short_errors():
            args = parser.parse_args(_words(line))
            return explain(
                args.m, args.n, args.k, out_dtype=args.out_dtype, accumulate=args.accumulate,
                machine=current_machine(),
            )  # fmt: skip
        return None

    @line_magic
    def gemm_bench(self, line: str) -> Report | None:
        """%gemm_bench M N K [--suite SUITE] [--groups G] [options of python -m cpgemm bench]

        Time a product beside its live peers and floors; the report is shown, and may be kept.  For
        a first look: --quick.  Without a Hopper GPU small products are timed on the NumPy path.
        """
        with contextlib.suppress(_Helped), _short_errors():
            return _bench(_words(line))
        return None

    @cell_magic
    def gemm_epilogue(self, line: str, cell: str) -> None:
        """%%gemm_epilogue NAME

        Make an epilogue of the cell's CUDA text, which defines the function
        __device__ float NAME(float value, int row, int column, Array<T> first, ...).
        NAME then takes the arrays in Python: cpgemm.gemm(a, b, epilogue=NAME(first)).
        """
        parser = _Parser(prog="%%gemm_epilogue", description="An epilogue from CUDA text.")
        parser.add_argument("name", metavar="NAME", help="of the CUDA function, and in Python")
        with contextlib.suppress(_Helped), _short_errors():
            name = parser.parse_args(_words(line)).name
            made = _epilogue(name, cell)
            assert self.shell is not None, "IPython makes magics with their shell"
            self.shell.push({name: made})
            print(made)


def _bench(words: Sequence[str]) -> Report:
    from cpgemm import machine
    from cpgemm.bench import cases, cli
    from cpgemm.console import positive

    sizes = _Parser(prog="%gemm_bench", description="Time a product beside peers and floors.")
    for name in ("m", "n", "k"):
        sizes.add_argument(name, type=positive, metavar=name.upper())
    sizes.add_argument(
        "--suite", choices=("dense", "contiguous", "masked"), default="dense",
        help="dense, or groups of rows with --groups (default: %(default)s)",
    )  # fmt: skip
    sizes.add_argument("--groups", type=positive, metavar="G", help="with contiguous, masked")
    sizes.epilog = "Further options are those of python -m cpgemm bench: --quick, --peers, --json."
    given, rest = sizes.parse_known_args(words)
    bench = cli.add_parser(_Parser(prog="%gemm_bench").add_subparsers())
    groups = [] if given.groups is None else ["--groups", str(given.groups)]
    args = bench.parse_args(
        [given.suite, "--m", str(given.m), "--n", str(given.n), "--k", str(given.k),
         *groups, *rest]
    )  # fmt: skip
    case = cases.single([given.suite], m=given.m, n=given.n, k=given.k, groups=given.groups)
    why = machine.why_no_hopper()
    if why is not None and cases.on_cpu(case)[1]:
        raise DeviceError(
            f"device: {case[0].name} needs a Hopper GPU to be timed; got {why}. "
            "The NumPy path times products of up to 4 GFLOP: choose smaller sizes."
        )
    return cli.measured(args)


def _epilogue(name: str, cell: str) -> CellEpilogue:
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        reject("NAME", "must be a name in Python and in C", repr(name), "Choose another.")
    if not re.search(rf"\bfloat\s+{name}\s*\([^;]*\{{", cell):
        wanted = f"__device__ float {name}(float value, int row, int column, ...)"
        reject("cell", f"must define {wanted}", "no such function", "docs/epilogues.md has more.")
    return CellEpilogue(name, cell)
