"""``python -m cpgemm``: the command line.  Handlers import what they need when they are chosen."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpgemm.errors import ArgumentError, CpgemmError

if TYPE_CHECKING:
    from cpgemm.render import KernelSource

__all__ = ["add_explain_arguments", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 not understood."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.handler is None:
        parser.print_help()
        return 0
    try:
        code = int(args.handler(args) or 0)
        sys.stdout.flush()
        return code
    except ArgumentError as error:
        print(f"cpgemm: {error}", file=sys.stderr)
        return 2
    except CpgemmError as error:
        print(f"cpgemm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of a pipe has enough.  Python would complain once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cpgemm: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    import cpgemm
    from cpgemm.console import positive

    parser = argparse.ArgumentParser(
        prog="python -m cpgemm",
        description="FP8 matrix multiplication with fine-grained scales on NVIDIA Hopper.",
    )
    parser.add_argument("--version", action="version", version=f"cpgemm {cpgemm.__version__}")
    parser.set_defaults(handler=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    demo = command("demo", "quantise and multiply real-sized layers, compare and time them")
    from cpgemm.demo import add_arguments

    add_arguments(demo)
    demo.set_defaults(handler=_demo)

    doctor = command("doctor", "what this machine has, what works, how to mend the rest")
    doctor.set_defaults(handler=_doctor)

    build = command("compile", "compile kernels ahead of time; no GPU needed")
    build.add_argument("names", nargs="*", metavar="NAME", help="kernels (see: render --list)")
    build.add_argument("--all", action="store_true", help="the whole set")
    build.add_argument("--arch", default="sm_90a", help="(default: %(default)s)")
    build.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    build.add_argument("--jobs", type=positive, metavar="N", help="processes (default: all cores)")
    build.add_argument(
        "--force", "--no-cache", action="store_true", help="compile even what the cache has"
    )
    build.set_defaults(handler=_compile)

    show = command("render", "print the CUDA source of a kernel")
    show.add_argument("name", nargs="?", metavar="NAME")
    show.add_argument("--list", action="store_true", help="print the names of all kernels")
    show.set_defaults(handler=_render)

    explain = command("explain", "which kernel a shape gets, why, and the time to expect")
    add_explain_arguments(explain)
    explain.set_defaults(handler=_explain)

    from cpgemm import tune_cli
    from cpgemm.bench import cli

    tune_cli.add_parser(commands)
    cli.add_parser(commands)
    return parser


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``explain``."""
    from cpgemm.console import positive

    for name in ("m", "n", "k"):
        parser.add_argument(name, type=positive, metavar=name.upper())
    parser.add_argument("--out-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--accumulate", action="store_true", help="with a C operand")


def _demo(args: argparse.Namespace) -> int:
    from cpgemm import demo

    return int(demo.main(args) or 0)


def _doctor(_args: argparse.Namespace) -> int:
    from cpgemm import doctor

    return doctor.run()


def _compile(args: argparse.Namespace) -> int:
    from cpgemm import compile_all

    if args.all == bool(args.names):
        raise ArgumentError(
            f"compile: give --all or the names of kernels; got "
            f"{'both' if args.all else 'neither'}. Names: python -m cpgemm render --list."
        )
    sources = _sources()
    if args.names:
        sources = [_find(name, sources) for name in dict.fromkeys(args.names)]
    return compile_all.run(
        sources, arch=args.arch, json_path=args.json, jobs=args.jobs, force=args.force
    )


def _render(args: argparse.Namespace) -> int:
    sources = _sources()
    if args.list == (args.name is not None):
        raise ArgumentError(
            f"render: give the name of one kernel or --list; got "
            f"{'both' if args.list else 'neither'}."
        )
    if args.list:
        print("\n".join(source.name for source in sources))
    else:
        print(_find(args.name, sources).text, end="")
    return 0


def _explain(args: argparse.Namespace) -> int:
    import cpgemm
    from cpgemm.plan import current_machine

    text = cpgemm.explain(
        args.m, args.n, args.k, out_dtype=args.out_dtype, accumulate=args.accumulate,
        machine=current_machine(),
    )  # fmt: skip
    print(text)
    return 0


def _sources() -> list[KernelSource]:
    from cpgemm import kernels

    return list(kernels.all_sources())


def _find(name: str, sources: Sequence[KernelSource]) -> KernelSource:
    from cpgemm.render import find_source

    return find_source(name, sources, argument="NAME")


if __name__ == "__main__":
    sys.exit(main())
