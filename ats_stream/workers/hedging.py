"""How long a sampler may take for an item before another one is asked for it as well."""

from __future__ import annotations

from collections import deque
from statistics import median

DEFAULT_HEDGE_AFTER_S = 5.0
"""Seconds that are always waited before another sampler is asked."""
HEDGE_FACTOR = 4.0
"""How many times longer than its peers an item takes that is worth asking for again."""
NUM_PEERS = 64
MIN_PEERS = 8
"""Items that must have come before any can be late: the first ones wait for their sampler to start."""


class Patience:
    """The longest that an answer is waited for: some times the median of the last ones, at least a floor.

    >>> patience = Patience(after_s=1.0)
    >>> patience.limit_s is None
    True
    >>> for _ in range(8):
    ...     patience.note(0.5)
    >>> patience.limit_s
    2.0
    >>> Patience(after_s=0.0).limit_s is None
    True
    """

    def __init__(self, *, after_s: float) -> None:
        self._after_s = after_s
        self._seconds: deque[float] = deque(maxlen=NUM_PEERS)

    def note(self, seconds: float) -> None:
        """Take in how long a sampler took for an item."""
        self._seconds.append(seconds)

    @property
    def limit_s(self) -> float | None:
        """Seconds; None for as long as it takes."""
        if not self._after_s or len(self._seconds) < MIN_PEERS:
            return None
        return max(self._after_s, HEDGE_FACTOR * median(self._seconds))
