"""Ask the training processes of this machine to save their run and end, and wait until they have.

python jobs/stop.py --timeout-s 120

For hooks that run before a machine is taken away, such as preStop of Kubernetes. Drivers and ranks of this
user get SIGTERM; the command ends with 0 when none of them is left, with 1 when time is up.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

# the title that Ray gives the processes of Ray Train's ranks
RANK_TITLE = "ray::RayTrainWorker"


def is_training(words: Sequence[str]) -> bool:
    """Whether a command line is that of a driver or of a rank.

    >>> is_training(["python", "/opt/ats-stream/jobs/train.py", "a.csv"])
    True
    >>> is_training(["/bin/sh", "-c", "python jobs/train.py a.csv"])
    False
    """
    if not words:
        return False
    if words[0].startswith(RANK_TITLE):
        return True
    if not PurePath(words[0]).name.startswith("python"):
        return False
    # a script that pip installed is run by python too, with its path as the first argument
    first, *rest = [PurePath(word) for word in words[1:]] or [PurePath()]
    if first.name == "ats-stream" or (first.name == "-m" and rest and rest.pop(0).name == "ats_stream.cli"):
        return bool(rest) and rest[0].name == "train"
    return first.parts[-2:] == ("jobs", "train.py")


def training_processes() -> list[psutil.Process]:
    """The training processes of this user."""
    user = psutil.Process().username()
    found = []
    for process in psutil.process_iter():
        try:
            if is_training(process.cmdline()) and process.username() == user:
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile, or is none of ours
    return found


def stop(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Send SIGTERM to the processes; returns those that are left after that time."""
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(processes, timeout=timeout_s)
    return list(left)


def main(argv: Sequence[str] | None = None) -> int:
    """Stop what trains here; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timeout-s", type=float, default=120.0, help="how long to wait (%(default)g)")
    arguments = parser.parse_args(argv)
    processes = training_processes()
    left = stop(processes, arguments.timeout_s)
    print(f"{len(processes)} training processes asked to stop, {len(left)} of them still there")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
