"""Trying again what failed for a passing reason."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ats_stream.io.storage.store_error import StoreError, TransientError

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")
NEVER = threading.Event()


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and after how long, a failed request is repeated."""

    max_retries: int = 4
    """Tries after the first one."""
    first_delay_s: float = 0.1
    """Wait before the second try; it doubles with each further one."""
    max_delay_s: float = 5.0
    """No wait is longer."""

    def delay_s(self, attempt: int, share: float) -> float:
        """Wait after a failed attempt, counted from 0; ``share`` in [0, 1) spreads clients apart.

        >>> [round(RetryPolicy().delay_s(attempt, 0.5), 3) for attempt in (0, 1, 9)]
        [0.075, 0.15, 3.75]
        """
        return min(self.max_delay_s, self.first_delay_s * 2.0**attempt) * (0.5 + share / 2)


def with_retries(action: Callable[[], Value], policy: RetryPolicy, stop: threading.Event = NEVER) -> Value:
    """The result of ``action``, repeated while it raises TransientError; StoreError when tries run out.

    Once ``stop`` is set nothing is tried any more.
    """
    for attempt in range(policy.max_retries + 1):
        if stop.is_set():
            break
        try:
            return action()
        except TransientError as error:
            if attempt == policy.max_retries:
                tries = f" ({attempt + 1} tries)" if attempt else ""
                raise StoreError(f"{error}{tries}") from error
            stop.wait(policy.delay_s(attempt, os.urandom(1)[0] / 256))
    raise StoreError("reading was stopped")
