"""SIGTERM: the machine is wanted back, so the run is saved before the process ends.

A signal does nothing but set a mark, which training reads between steps.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class StopRequest:
    """Whether this process was asked to end.

    >>> stop = StopRequest()
    >>> with stop.on_sigterm():
    ...     signal.raise_signal(signal.SIGTERM)
    >>> stop.asked
    True
    """

    def __init__(self) -> None:
        # a plain mark and no lock: a signal may interrupt the main thread anywhere, also while it reads this
        self.asked = False

    def ask(self) -> None:
        """Ask, as SIGTERM does."""
        self.asked = True

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Take SIGTERM for a request as long as this is open; outside the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)
        self.take_sigterm()
        try:
            yield
        finally:
            # None stands for a handler that was not set from Python and cannot be put back
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def take_sigterm(self) -> None:
        """Take SIGTERM for a request from now on, in a process that is all ours; in the main thread alone."""
        signal.signal(signal.SIGTERM, lambda _number, _frame: self.ask())


@contextmanager
def keep_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back after code that sets one of its own (``ray.init`` does).

    A process that had none keeps the new one: Ray's ends what Ray has started.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    yield
    if in_main and callable(before):
        signal.signal(signal.SIGTERM, before)
