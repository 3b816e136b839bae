"""The command line: ``ats-stream COMMAND ...``. Commands live in ats_stream.commands, one module each."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ats_stream import __version__
from ats_stream.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    AtsStreamError,
    InputError,
    PreemptedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMANDS = {
    "preprocess": "convert slides to OME-Zarr pyramids",
    "verify": "verify that pyramids are whole",
    "info": "show what pyramids and slides hold",
    "plan": "say what a training takes before it runs",
    "train": "train an attention model on an archive of pyramids",
    "predict": "run a trained model over pyramids and draw what it looked at",
    "report": "put a training or predictions on one page",
    "view": "look at pyramids, slides and predictions in a browser",
    "doctor": "say whether this installation works, and what to do",
    "demo": "convert a real slide, train on large images, write a report",
}

_DESCRIPTION = """\
Attention sampling for gigapixel images: read a low-resolution view whole and, at full resolution, only the
patches that a learned attention map draws.
"""

_EPILOG = """\
from slides to predictions:
  ats-stream preprocess slides/*.svs --out pyramids
  ats-stream verify pyramids
  ats-stream info pyramids/*.ome.zarr
  ats-stream train archive.csv --out runs/first --prior tissue
  ats-stream predict runs/first archive.csv --split test --out predictions
  ats-stream report runs/first predictions
  ats-stream view --predictions predictions --open

archive.csv names each pyramid, its label and its split:
  slide,label,split
  pyramids/a.ome.zarr,tumor,train
  pyramids/b.ome.zarr,normal,val

'ats-stream demo' shows all of it on real data; 'ats-stream doctor' looks the installation over.
'ats-stream COMMAND --help' explains a command.
exit codes: 0 done, 1 failed, 2 wrong input, 75 resumable (training was saved after SIGTERM: the same command
goes on), 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, and takes options in full: a beginning may mean another one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit with code 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, as the help tells them."""
    code = _guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))
    if argv is None and code == EXIT_INTERRUPTED:
        _leave_at_once(code)
    return code


def run_job(name: str, argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Run one command as a job: the same arguments, and a last line of JSON with the result."""

    def run() -> int:
        parser = Parser(prog=f"jobs/{name}.py", formatter_class=argparse.RawDescriptionHelpFormatter)
        _add_command(parser, name)
        parser.set_defaults(print_json=True, **defaults)
        arguments = parser.parse_args(argv)
        _check_out_of_job(Path.cwd(), arguments.out)
        return _run(arguments)

    code = _guarded(run)
    if argv is None and code == EXIT_INTERRUPTED:
        _leave_at_once(code)
    return code


def _main(arguments: list[str]) -> int:
    parser = Parser(
        prog="ats-stream",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    # only the command that runs is imported, so that --help and info stay quick
    wanted = next((word for word in arguments if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == wanted:
            _add_command(sub, name)
    if not arguments:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    return _run(parser.parse_args(arguments))


def _add_command(parser: argparse.ArgumentParser, name: str) -> None:
    """The description and arguments of a command, and what its configurations' fields are called here."""
    module = importlib.import_module(f"ats_stream.commands.{name}")
    parser.description = module.__doc__
    if hasattr(module, "USAGE"):
        parser.usage = f"%(prog)s {module.USAGE}"
    module.add_arguments(parser)
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    parser.set_defaults(run=module.run, flags=flags)


def _run(arguments: argparse.Namespace) -> int:
    """Call the command; a result may carry the exit code of work that was done in part."""
    result: dict[str, Any] = arguments.run(arguments)
    code = int(result.pop("exit_code", 0))
    if getattr(arguments, "print_json", False):
        print(json.dumps(result), flush=True)
    return code


def _guarded(action: Callable[[], int]) -> int:
    """Errors become one line on stderr and an exit code; only what is a bug keeps its traceback."""
    try:
        code = action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except PreemptedError as error:
        return _complain(_one_line(error), error.exit_code)
    except AtsStreamError as error:
        return _complain(f"error: {_one_line(error)}", error.exit_code)
    except BrokenPipeError:
        # the reader of a pipe has gone; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"error: {where}{error.strerror or _one_line(error)}", EXIT_FAILED)
    except MemoryError as error:
        return _complain(f"error: out of memory: {_one_line(error)}", EXIT_FAILED)
    except ValueError as error:
        if not _is_from_config(error):
            raise
        return _complain(f"error: {_one_line(error)}", EXIT_USAGE)
    return code


def _complain(line: str, code: int) -> int:
    print(f"ats-stream: {line}", file=sys.stderr, flush=True)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _is_from_config(error: ValueError) -> bool:
    """Whether a configuration refused one of its fields; any other ValueError is a bug."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_name == "__post_init__"


def _leave_at_once(code: int) -> None:
    """End here: threads of Ray may still wait, and hold or crash the interpreter while it is taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_out_of_job(cwd: Path, out: str) -> None:
    """A submitted job runs in a copy of the working directory that Ray deletes, results and all.

    >>> _check_out_of_job(Path("/ray/_ray_pkg_12ab"), "a")
    Traceback (most recent call last):
    ats_stream.errors.InputError: --out a: give a job an absolute path, Ray deletes its working directory
    """
    is_safe = "://" in out or Path(out).is_absolute()
    if any(part.startswith("_ray_pkg_") for part in cwd.parts) and not is_safe:
        raise InputError(f"--out {out}: give a job an absolute path, Ray deletes its working directory")


if __name__ == "__main__":
    sys.exit(main())
