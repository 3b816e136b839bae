"""What the torture tests share: seeded damage of bytes, and limits on time and memory of single cases."""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    import numpy as np

# makes the helpers beside the tests importable
sys.path.insert(0, str(Path(__file__).parent))

DAMAGES = ("flip", "replace", "truncate", "cut", "insert", "zeros", "empty")
STATUS = Path("/proc/self/status")


class CaseTimeoutError(BaseException):
    """A case used too much processor time; no Exception, so that nothing under test can swallow it."""


@pytest.fixture(scope="session")
def damaged() -> Callable[[bytes, np.random.Generator], tuple[str, int, bytes]]:
    """Damage bytes in one of the ways of DAMAGES: the way, the first byte that changed, and the result."""

    def damage(data: bytes, rng: np.random.Generator) -> tuple[str, int, bytes]:
        kind = DAMAGES[rng.integers(len(DAMAGES))]
        # half of the damage hits the last bytes: indices and trailers are small beside the pixels
        low = max(0, len(data) - 80) if rng.integers(2) else 0
        start = int(rng.integers(low, max(low + 1, len(data))))
        stop = min(len(data), start + int(rng.integers(1, 40)))
        if kind == "flip":
            flipped = bytes([data[start] ^ 1 << int(rng.integers(8))]) if data else b""
            return kind, start, data[:start] + flipped + data[start + 1 :]
        noise = rng.bytes(stop - start)
        return {
            "replace": (kind, start, data[:start] + noise + data[stop:]),
            "truncate": (kind, start, data[:start]),
            "cut": (kind, start, data[:start] + data[stop:]),
            "insert": (kind, start, data[:start] + noise + data[start:]),
            "zeros": (kind, start, data[:start] + bytes(stop - start) + data[stop:]),
            "empty": (kind, 0, b""),
        }[kind]

    return damage


@pytest.fixture(scope="session")
def cpu_limit() -> Callable[[float], object]:
    """A context in which the process may use so many seconds of processor time, however busy the machine."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise CaseTimeoutError("used too much processor time")

    @contextmanager
    def limit(seconds: float) -> Iterator[None]:
        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    return limit


def status_bytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


class MemoryWatch:
    """Growth of the resident memory since it was made: the peak, not what is left of it."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        return status_bytes("VmHWM") - self.before


@pytest.fixture
def watch_memory() -> type[MemoryWatch]:
    if not STATUS.exists():
        pytest.skip("reads the peak of memory from /proc")
    return MemoryWatch


@pytest.fixture
def address_limit() -> Iterator[Callable[[int], None]]:
    """Allow this process so many bytes of addresses more: more is a MemoryError, even if it stays unused."""
    if not STATUS.exists():
        pytest.skip("reads the size of the process from /proc")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def allow(more_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + more_bytes, hard))

    yield allow
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
