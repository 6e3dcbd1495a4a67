"""``python -m cpgemm bench``: measure, report, compare, publish."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpgemm import machine
from cpgemm.bench.cases import SUITES, on_cpu, single, suites
from cpgemm.bench.result import Case, Report, read_report, write_report, write_text
from cpgemm.console import positive
from cpgemm.errors import DeviceError, MissingDependencyError, reject
from cpgemm.random_data import seed_or_fresh

__all__ = ["add_parser", "measured", "run"]

INTERRUPTED = 130  # exit code after Ctrl-C

_WINDOWS, _WINDOW_MS = 7, 10.0
_QUICK_WINDOWS, _QUICK_WINDOW_MS = 5, 2.0
_PEERS = {
    "cublaslt": ("cublaslt block", "cublaslt tensor"), "deep_gemm": ("deep_gemm",),
    "cutlass": ("cutlass",),
}  # fmt: skip
_METHOD = (
    "CUDA graphs over rotating operand sets of three times L2, contenders of a case interleaved "
    "round by round in random order in one process, medians of windows, launch gaps included; "
    "outputs checked in the same run"
)

Done = Callable[[str], None]  # called once a case, with its name


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``bench`` to the subparsers of ``python -m cpgemm``."""
    text = "time every kernel beside live peers and floors, report, compare"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. See docs/benchmarks/method.md.",
    )
    parser.set_defaults(handler=run)
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} or all (default: dense)"
    )
    what = parser.add_argument_group("what to measure")
    for name, size in (("m", "rows of A, of each group"), ("n", "rows of B"), ("k", "columns")):
        what.add_argument(f"--{name}", type=positive, metavar=name.upper(), help=size)
    what.add_argument("--groups", type=positive, metavar="G", help="with SUITE contiguous, masked")
    what.add_argument("--rows", type=Path, metavar="FILE", help="a list of cases of your own")
    what.add_argument(
        "--peers", type=_peers, metavar="LIST",
        help=f"{','.join(_PEERS)} or none (default: all that are installed)",
    )  # fmt: skip
    what.add_argument(
        "--pdl", action=argparse.BooleanOptionalAction,
        help="only with, only without programmatic dependent launch (default: both)",
    )  # fmt: skip
    what.add_argument("--seed", type=_seed, help="of data and order (default: a fresh one)")
    what.add_argument(
        "--quick", action="store_true",
        help=f"{_QUICK_WINDOWS} windows of {_QUICK_WINDOW_MS:g} ms, not {_WINDOWS} of "
        f"{_WINDOW_MS:g} ms",
    )  # fmt: skip
    out = parser.add_argument_group("what to make of it")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    out.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into this folder")
    out.add_argument(
        "--publish", type=Path, metavar="DIR",
        help="write JSON, tables, pictures and the page beside DeepGEMM's published tables",
    )  # fmt: skip
    out.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="read this JSON, measure nothing"
    )
    out.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"),
        help="say what got faster or slower; exit code 1 for a regression",
    )  # fmt: skip
    out.add_argument(
        "--limit", type=_percent, default=5.0, metavar="PCT",
        help="a regression is slower by more than this (default: %(default)g)",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the options say.

    The exit code: 0 done; 1 a regression, or a result of ours that is wrong or failed; 130
    interrupted, with what was measured reported and written.  Bad options raise ``ArgumentError``
    before anything is measured.
    """
    _check_options(args)
    if args.compare:
        from cpgemm.bench.compare import compare, print_comparison

        found = compare(*map(read_report, args.compare), limit_pct=args.limit)
        print_comparison(found, _width())
        return found.exit_code
    if args.source:
        report = read_report(args.source)
        _make(report, args)
        return _exit_code(report)
    report, interrupted = _measure(args)
    _make(report, args)
    return INTERRUPTED if interrupted else _exit_code(report)


def measured(args: argparse.Namespace) -> Report:
    """Measure what the options say and write the files that they ask for; no tables are printed.

    For callers who show the report themselves.  Raises ``ArgumentError`` for options that measure
    nothing (--from, --compare) or contradict each other.
    """
    _check_options(args)
    if args.compare or args.source:
        reject("options", "must measure", "--compare or --from", "Leave it out.")
    report, _interrupted = _measure(args)
    _write(report, args)
    return report


def _exit_code(report: Report) -> int:
    return int(any(row.role == "ours" and row.status in ("wrong", "failed") for row in report.rows))


def _check_options(args: argparse.Namespace) -> None:
    """What would spoil ten minutes of work is said before they are spent."""
    measuring = [
        f"--{name}" for name in ("m", "n", "k", "groups", "rows", "peers", "seed")
        if getattr(args, name) is not None
    ]  # fmt: skip
    measuring += [*args.suites, *(["--quick"] if args.quick else [])]
    measuring += ["--pdl"] if args.pdl is not None else []
    if (args.compare or args.source) and measuring:
        reads = "--compare" if args.compare else "--from"
        reject(reads, "measures nothing", f"{', '.join(measuring)} too", "Leave one of them out.")
    outputs = {name: getattr(args, name) for name in ("json", "markdown", "plot", "publish")}
    given = [f"--{name}" for name, path in outputs.items() if path is not None]
    if args.compare and (given or args.source):
        too = ", ".join(given or ["--from"])
        reject("--compare", "only prints", f"{too} too", "Leave one of them out.")
    for name, path in outputs.items():
        if path is not None:
            _check_writable(f"--{name}", path if name in ("plot", "publish") else path.parent)
    if (args.plot or args.publish) and importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "matplotlib: --plot and --publish need it; it is not installed. Run: pip install "
            '"cpgemm[plot]"'
        )


def _check_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".cpgemm-bench"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reject(option, "must be in a folder that can be written", error, "Name another.")


# -------------------------------------------------------------------------------------- measuring


def _measure(args: argparse.Namespace) -> tuple[Report, bool]:
    """The report, and whether Ctrl-C ended the run."""
    from cpgemm.bench.report import print_report

    cases, why = _choose(args)
    if why is not None and args.publish is not None:
        reject("--publish", "needs a run on a Hopper GPU", why, "Give a report: --from FILE.")
    windows, window_ms = (
        (_QUICK_WINDOWS, _QUICK_WINDOW_MS) if args.quick else (_WINDOWS, _WINDOW_MS)
    )
    pdl = (False, True) if args.pdl is None else (args.pdl,)
    seed = seed_or_fresh(args.seed)
    method = {
        "text": _METHOD, "suites": list(dict.fromkeys(case.suite for case in cases)),
        "cases": len(cases), "windows": windows, "window_ms": window_ms, "pdl": list(pdl),
        "peers": "all" if args.peers is None else list(args.peers), "without_gpu": why,
    }  # fmt: skip
    report = Report(machine.describe().as_dict(), seed, method)
    options: dict[str, Any] = {
        "seed": seed, "windows": windows, "window_ms": window_ms, "pdl": pdl
    }  # fmt: skip
    if args.peers is not None:
        options["peers"] = args.peers
    print(f"{len(cases)} cases, seed {seed}", flush=True)
    interrupted = False
    try:
        _collect(report, cases, options, args.json)
    except KeyboardInterrupt:
        interrupted = True
        print("\nInterrupted: what was measured follows.", file=sys.stderr)
    except Exception:
        if report.rows:
            print_report(report, width=_width())
        raise
    finally:  # whatever ends the run early, what was measured is kept
        if args.json is not None:
            write_report(report, args.json)
    if interrupted and args.publish is not None:
        print(f"{args.publish} is left as it was: a page is made of complete runs.")
        args.publish = None
    return report, interrupted


def _collect(
    report: Report, cases: Sequence[Case], options: dict[str, Any], json_path: Path | None
) -> None:
    """Measure into ``report``; a file asked for grows with every case, so that a kill loses one."""
    from cpgemm.bench.run import run_suites

    with _progress(len(cases)) as done:
        rows = run_suites(cases, progress=done, **options)
        try:
            for row in rows:
                if json_path is not None and report.rows and row.case != report.rows[-1].case:
                    write_report(report, json_path)
                report.add(row)
        finally:
            if hasattr(rows, "close"):
                rows.close()  # frees what it holds on the GPU before the report is made
    report.complete = True


def _choose(args: argparse.Namespace) -> tuple[tuple[Case, ...], str | None]:
    """The cases asked for that this machine can measure, and why it is not all if so."""
    sizes = {name: getattr(args, name) for name in ("m", "n", "k", "groups")}
    cases: tuple[Case, ...] = ()
    named = any(value is not None for value in sizes.values())
    if named:
        cases += single(args.suites, **sizes)
    if args.rows is not None:
        from cpgemm.bench.rows_file import read_rows

        cases += read_rows(args.rows)
    if args.suites and not named:
        cases = suites(args.suites) + cases
    chosen = bool(cases)
    cases = tuple(dict.fromkeys(cases or suites(["dense"])))
    why = machine.why_no_hopper()
    if why is None:
        return cases, None
    if not chosen:  # nothing was asked for: show everything that works here
        cases += suites(["jit"])
    kept, left_out = on_cpu(cases, any_size=named or args.rows is not None)
    print(
        f"No Hopper GPU ({why}): kernels, peers and floors cannot be timed here. Products and "
        "quantisation run on the NumPy path, jit compiles; times are this CPU's."
    )
    if left_out:
        counts = {case.suite: 0 for case in left_out}
        for case in left_out:
            counts[case.suite] += 1
        texts = ", ".join(f"{count} of {name}" for name, count in counts.items())
        print(f"Left out, too large for a CPU or in need of a GPU: {texts}.")
    if not kept:
        raise DeviceError(
            f"device: all {len(cases)} cases need a Hopper GPU; got {why}. Without one: "
            "python -m cpgemm bench jit."
        )
    return kept, why


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Done]:
    """A bar on a terminal (on stderr) and in a notebook, a line for each case in a log (stderr)."""
    from cpgemm.console import in_notebook, progress

    if sys.stderr.isatty() or in_notebook():
        with progress("measuring", total) as step:
            yield step
        return
    count = 0

    def done(name: str) -> None:
        nonlocal count
        count += 1
        print(f"{count}/{total} {name}", file=sys.stderr, flush=True)

    yield done


# ---------------------------------------------------------------------------------------- reports


def _make(report: Report, args: argparse.Namespace) -> None:
    """Print the report and write the files that were asked for."""
    from cpgemm.bench.report import print_report

    print_report(report, width=_width())
    _write(report, args)


def _write(report: Report, args: argparse.Namespace) -> None:
    from cpgemm.bench.report import markdown

    written: list[Path] = []
    if args.json is not None:
        write_report(report, args.json)
        written.append(args.json)
    if args.markdown is not None:
        write_text(args.markdown, markdown(report))
        written.append(args.markdown)
    if args.plot is not None:
        from cpgemm.bench.plots import write_plots

        written += write_plots(report, args.plot)
    if args.publish is not None:
        from cpgemm.bench.published import publish

        written += publish(report, args.publish)
    for path in written:
        print(f"written: {path}")


def _width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


# ---------------------------------------------------------------------------------------- options


def _peers(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _PEERS:
            known = ", ".join(_PEERS)
            raise argparse.ArgumentTypeError(f"must be none or some of {known}; got {name!r}")
    return tuple(contender for name in names for contender in _PEERS[name])


def _percent(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"must be a number of per cent from 0 on; got {text!r}")


def _seed(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a whole number from 0 on; got {text!r}")
