"""The memory of this process and all below it, at its highest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

INTERVAL_S = 0.5


def tree_bytes(process: psutil.Process) -> int:
    """Memory of a process and its descendants: pages shared between them count once where the system tells.

    On Linux the proportional set size, elsewhere the unique set size, or the resident one.
    """
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            full = one.memory_full_info()
            total += getattr(full, "pss", 0) or getattr(full, "uss", 0) or full.rss
        except psutil.Error:
            continue  # it ended meanwhile, or belongs to somebody else
    return total


class PeakMemory:
    """Watches the process tree while the context is open; ``peak_bytes`` is the most seen so far."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_bytes(process))
            if self._stop.wait(INTERVAL_S):
                return
