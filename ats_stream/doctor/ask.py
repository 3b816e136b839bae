"""Run probes in another process, and go on behind one that does not come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 180.0  # for all words of one process; torch and Ray on a cold disk take a minute


@dataclass(frozen=True)
class Answer:
    """What came of one probe."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why there are no facts; empty if there are."""


def ask(words: Sequence[str], *, timeout_s: float = _TIMEOUT_S) -> dict[str, Answer]:
    """Probe every word; one that ends or stops the process is told so, and those behind it asked again.

    >>> ask(["json", "no_such_module_here"])["no_such_module_here"].error
    "ModuleNotFoundError: No module named 'no_such_module_here'"
    """
    answers: dict[str, Answer] = {}
    while waiting := [word for word in words if word not in answers]:
        lines, ending = _run(waiting, timeout_s)
        open_word = waiting[0]  # died before the first: nothing more will come of trying again
        for line in lines:
            if "begin" in line:
                open_word = line["begin"]
            else:
                answers[line["end"]] = Answer(line.get("facts", {}), line.get("error", ""))
        if open_word not in answers:
            answers[open_word] = Answer(error=ending)
    return answers


def _run(words: Sequence[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """The lines that a process wrote before its end, and what to say of that end."""
    command = [sys.executable, "-m", "ats_stream.doctor.probe", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            written, _ = process.communicate(timeout=timeout_s)
            ending = _ending(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            written, _ = process.communicate()
            ending = f"did not come back within {timeout_s:.0f} s"
    lines = [line for line in written.decode("ascii", "replace").splitlines() if line.endswith("}")]
    return [json.loads(line) for line in lines], ending


def _ending(code: int) -> str:
    """How a process ended that should have gone on.

    >>> _ending(-11), _ending(3)
    ('ends Python by SIGSEGV', 'ends Python with exit code 3')
    """
    if code < 0:
        return f"ends Python by {signal.Signals(-code).name}"
    return f"ends Python with exit code {code}"
