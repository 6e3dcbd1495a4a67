"""``python -m cpgemm tune``: time the candidates for shapes, keep the winners, check the model."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from cpgemm.console import counted, positive, print_table
from cpgemm.errors import ArgumentError, reject
from cpgemm.problem import GemmProblem
from cpgemm.random_data import seed_or_fresh

__all__ = ["add_parser", "run"]

INTERRUPTED = 130  # exit code after Ctrl-C


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``tune`` to the subparsers of ``python -m cpgemm``."""
    text = "time the candidate kernels for your shapes and keep the winners"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune", help=text, description=f"{text[0].upper()}{text[1:]}. See docs/tuning.md."
    )
    parser.set_defaults(handler=run)
    what = parser.add_argument_group("what to tune")
    what.add_argument("sizes", nargs="*", type=positive, metavar="M N K", help="one shape or more")
    what.add_argument("--m", type=_rows, metavar="M,M,...", help="these rows with every --nk")
    what.add_argument("--nk", type=_layers, metavar="NxK,...", help="layers, such as 7168x16384")
    what.add_argument("--rows", type=Path, metavar="FILE", help="the dense cases of a rows file")
    what.add_argument("--suite", choices=("dense",), help="the cases of a suite of bench")
    what.add_argument("--out-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    what.add_argument("--accumulate", action="store_true", help="with a C operand")
    how = parser.add_argument_group("how")
    how.add_argument("--best", type=positive, metavar="N", help="only the model's N first choices")
    how.add_argument("--rounds", type=positive, metavar="R", help="windows for each kernel (7)")
    how.add_argument("--seed", type=int, help="of data, order, shapes (default: a fresh one)")
    how.add_argument("--dry-run", action="store_true", help="list the candidates, time nothing")
    how.add_argument("--file", type=Path, help="keep the winners here, not in the cache folder")
    check = parser.add_argument_group("the cost model")
    check.add_argument(
        "--check-model", type=positive, metavar="COUNT",
        help="time all candidates on COUNT random shapes and say how good the model's choices are; "
        "nothing is kept",
    )  # fmt: skip
    check.add_argument(
        "--time-limit", type=positive, metavar="SECONDS", help="begin no further shape then"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the options say.

    The exit code: 0 done; 1 a kernel's result is wrong; 130 interrupted.  Raises ``ArgumentError``
    for options that say nothing, ``DeviceError`` where there is no Hopper GPU to time on.
    """
    problems = _problems(args)
    if args.check_model is not None:
        if problems or args.best or args.file or args.dry_run:
            reject(
                "--check-model", "draws shapes of its own and keeps nothing",
                "shapes, --best, --file or --dry-run too", "Leave those out.",
            )  # fmt: skip
        return _check_model(args)
    for option in ("json", "time_limit"):
        if getattr(args, option) is not None:
            name = "--" + option.replace("_", "-")
            reject(name, "belongs to --check-model", "it without", "Leave it out.")
    if not problems:
        reject("M N K", "one shape at least must be given", "none", "Or --m and --nk, --suite.")
    return _dry_run(args, problems) if args.dry_run else _tune(args, problems)


# --------------------------------------------------------------------------------------- the shapes


def _rows(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _layers(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.lower().split(","):
        n, cross, k = part.partition("x")
        if not cross:
            raise argparse.ArgumentTypeError(f"must be NxK, such as 4096x7168; got {part!r}")
        found.append((positive(n), positive(k)))
    return found


def _problems(args: argparse.Namespace) -> list[GemmProblem]:
    """All shapes that the options name, each once."""
    if len(args.sizes) % 3:
        reject("M N K", "must be three numbers a shape", args.sizes, "Add the missing ones.")
    if (args.m is None) != (args.nk is None):
        given, lacking = ("--m", "--nk") if args.nk is None else ("--nk", "--m")
        reject(given, f"needs {lacking} too", "it alone", f"Add {lacking}.")
    sizes = iter(args.sizes)
    shapes: list[tuple[int, int, int]] = list(zip(sizes, sizes, sizes, strict=True))
    shapes += [(m, n, k) for n, k in args.nk or () for m in args.m]
    if args.rows is not None:
        from cpgemm.bench.rows_file import read_rows

        cases = read_rows(args.rows)
        if others := sorted({case.suite for case in cases} - {"dense"}):
            raise ArgumentError(
                f"--rows: only dense cases can be tuned; got {', '.join(others)} in {args.rows}. "
                "Grouped kernels choose on the device."
            )
        shapes += [(case.m, case.n, case.k) for case in cases]
    if args.suite is not None:
        from cpgemm.bench.cases import suite

        shapes += [(case.m, case.n, case.k) for case in suite(args.suite)]
    return list(
        dict.fromkeys(GemmProblem(*shape, args.out_dtype, args.accumulate) for shape in shapes)
    )


# ----------------------------------------------------------------------------------------- the work


def _dry_run(args: argparse.Namespace, problems: list[GemmProblem]) -> int:
    from cpgemm.plan import current_machine
    from cpgemm.trials import candidates
    from cpgemm.tuned import path_for

    machine = current_machine()
    rows = [
        (f"{p.m}x{p.n}x{p.k}", config.name, f"{us:.1f}")
        for p in problems
        for config, us in candidates(p, machine, args.best)
    ]
    print_table(("M x N x K", "candidate, the model's choice first", "us"), rows, numbers=("us",))
    print(
        f"\n{counted(len(problems), 'shape')}, {counted(len(rows), 'candidate')}; predicted for "
        f"{machine.name}, nothing was timed. Winners would go to {path_for(machine, args.file)}."
    )
    return 0


def _tune(args: argparse.Namespace, problems: list[GemmProblem]) -> int:
    from cpgemm import settings, tuning
    from cpgemm.plan import current_machine
    from cpgemm.trials import GpuTrials
    from cpgemm.tuned import path_for

    tuning.require_hopper()
    seed, machine = seed_or_fresh(args.seed), current_machine()
    path = path_for(machine, args.file)
    print(f"{counted(len(problems), 'shape')} on {machine.name}, seed {seed}", flush=True)
    result: tuning.TuneResult | None = None
    interrupted = False
    try:
        for result in tuning.tune_problems(  # noqa: B007 - the last one is printed
            GpuTrials(problems, machine, seed=seed), problems, machine, seed=seed,
            best=args.best, rounds=args.rounds or tuning.ROUNDS, path=path,
        ):  # fmt: skip
            pass
    except KeyboardInterrupt:
        interrupted = True
        print("\nInterrupted: what was measured follows.", file=sys.stderr)
    if result is not None:
        result.print()
        if not settings.tuned():
            print("CPGEMM_TUNED is 0: the cost model goes on choosing.")
        elif path != path_for(machine):
            print(f"Used where CPGEMM_TUNED is {path}.")
    return INTERRUPTED if interrupted else int(result is not None and bool(result.wrong))


def _check_model(args: argparse.Namespace) -> int:
    from cpgemm import model_check, tuning
    from cpgemm.console import progress
    from cpgemm.plan import current_machine
    from cpgemm.trials import GpuTrials

    tuning.require_hopper()
    seed, machine = seed_or_fresh(args.seed), current_machine()
    problems = model_check.random_problems(
        args.check_model, seed=seed, out_dtype=args.out_dtype, accumulate=args.accumulate
    )
    check = model_check.ModelCheck(seed, machine, args.rounds or model_check.ROUNDS)
    print(f"{len(problems)} random shapes on {machine.name}, seed {seed}", flush=True)
    interrupted = False
    try:
        with progress("checking", len(problems)) as done:
            model_check.check_model(
                GpuTrials(problems, machine, seed=seed), problems, check,
                limit_s=args.time_limit or math.inf, done=done,
            )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
        print("\nInterrupted: what was measured follows.", file=sys.stderr)
    finally:  # whatever ends the run early, what was measured is kept
        if args.json is not None and check.contests:
            check.write(args.json)
    if check.contests:
        check.print()
    if len(check.contests) < len(problems):
        print(f"{len(problems) - len(check.contests)} shapes were left out.")
    if args.json is not None and check.contests:
        print(f"figures: {args.json}")
    return INTERRUPTED if interrupted else int(bool(check.wrong))
