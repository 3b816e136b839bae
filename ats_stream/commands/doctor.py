"""Say whether this installation can do its work, and what to do where it cannot.

  ats-stream doctor
  ats-stream doctor --json        the same for programs, one line

Looks at Python, the packages and their versions, GPU, CuPy, codecs, object stores, caches, disks and shared
memory. Packages are tried in another process, so a broken one is found and not run into. Nothing is changed,
nothing is sent, no credential is shown. Lines begin with
  ok     works
  note   optional, or could be better
  bad    will fail; what to do follows
The exit code is 1 if anything is bad.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ats_stream import __version__
from ats_stream.errors import EXIT_FAILED

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream doctor``."""
    parser.add_argument("--json", dest="print_json", action="store_true", help="print one line of JSON")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print each finding as it comes."""
    from ats_stream.doctor import State, examine

    if not arguments.print_json:
        print(f"ats-stream {__version__}", flush=True)
    findings = []
    for finding in examine():
        findings.append(finding)
        if not arguments.print_json:
            print(finding, flush=True)
    num_bad = sum(finding.state == State.BAD for finding in findings)
    if not arguments.print_json:
        print(f"{num_bad} bad" if num_bad else "all that is needed works")
    return {
        "version": __version__,
        "findings": [asdict(finding) for finding in findings],
        "bad": num_bad,
        "exit_code": EXIT_FAILED if num_bad else 0,
    }
