"""What was found of one thing, and what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """How a finding counts."""

    OK = "ok"
    NOTE = "note"
    """Something optional is absent or could be better."""
    BAD = "bad"
    """Something will fail."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    >>> print(Finding(State.BAD, "zarr", "2.18.3 is installed, >=3.1 is needed", "pip install 'zarr>=3.1'"))
    bad   zarr: 2.18.3 is installed, >=3.1 is needed
          -> pip install 'zarr>=3.1'
    """

    state: State
    subject: str
    said: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""

    def __str__(self) -> str:
        line = f"{self.state.value:<5} {self.subject}: {self.said}"
        return f"{line}\n      -> {self.advice}" if self.advice else line
