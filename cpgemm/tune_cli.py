"""``python -m cpgemm tune``: time the candidates for shapes, keep the winners, check the model."""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any

from cpgemm.console import positive
from cpgemm.errors import DeviceError, reject

__all__ = ["add_parser", "run"]

_CHECK_ROUNDS, _CHECK_WINDOW_MS = 7, 5.0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``tune`` to the subparsers of ``python -m cpgemm``."""
    text = "time the candidate kernels for your shapes and remember the winners"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune", help=text, description=f"{text[0].upper()}{text[1:]}. See docs/tuning.md."
    )
    parser.set_defaults(handler=run)
    how = parser.add_argument_group("how")
    how.add_argument("--out-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    how.add_argument("--accumulate", action="store_true", help="with a C operand")
    how.add_argument("--rounds", type=positive, metavar="R", help="windows of each kernel")
    how.add_argument("--seed", type=int, help="of data, order, shapes (default: a fresh one)")
    check = parser.add_argument_group("the cost model")
    check.add_argument(
        "--check-model", type=positive, metavar="COUNT",
        help="time all candidates on COUNT random shapes and say how good the model's choices are; "
        "nothing is remembered",
    )  # fmt: skip
    check.add_argument(
        "--time-limit", type=positive, metavar="SECONDS", help="begin no further shape then"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the options say; the exit code: 0 done, 1 a kernel's result is wrong."""
    if args.check_model is None:
        reject("--check-model", "must be given", "none", "Give a number of shapes.")
    return _check_model(args)


def _seed(args: argparse.Namespace) -> int:
    return random.SystemRandom().randrange(2**32) if args.seed is None else int(args.seed)


def _require_gpu() -> None:
    from cpgemm.machine import why_no_hopper

    why = why_no_hopper()
    if why is not None:
        raise DeviceError(
            f"tune: timing kernels needs a Hopper GPU; got {why}. Without one, nothing can be "
            "timed and nothing is written; --dry-run lists the candidates."
        )


def _check_model(args: argparse.Namespace) -> int:
    from cpgemm.console import progress
    from cpgemm.gemm import current_machine
    from cpgemm.model_check import ModelCheck, check_model, random_problems
    from cpgemm.trials import GpuTrials

    _require_gpu()
    seed, machine = _seed(args), current_machine()
    problems = random_problems(
        args.check_model, seed=seed, out_dtype=args.out_dtype, accumulate=args.accumulate
    )
    rounds = args.rounds or _CHECK_ROUNDS
    check = ModelCheck(seed, machine, rounds, _CHECK_WINDOW_MS)
    print(f"{len(problems)} random shapes on {machine.name}, seed {seed}", flush=True)
    interrupted = False
    try:
        with progress("checking", len(problems)) as done:
            check_model(
                GpuTrials(problems, machine, seed=seed), problems, machine, seed=seed,
                rounds=rounds, window_ms=_CHECK_WINDOW_MS, limit_s=args.time_limit or math.inf,
                done=done, into=check,
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
    return 130 if interrupted else int(bool(check.wrong))
