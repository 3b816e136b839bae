"""A device for the feeder whose copies happen as late as they may: memory that is reused too early shows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Event:
    """What has to run before it is over."""

    def __init__(self, work: list[Callable[[], object]]) -> None:
        self.work = work

    def finish(self) -> None:
        while self.work:
            self.work.pop(0)()


class LazyCopies:
    """Copies run when somebody waits for them, and not before. ``log`` tells what was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self.log.append(f"pin {num_bytes}")
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def begin(self, pinned: torch.Tensor) -> tuple[torch.Tensor, Event]:
        self.log.append("begin")
        copy = torch.full_like(pinned, 0xEE)
        return copy, Event([partial(copy.copy_, pinned)])

    def mark(self) -> Event:
        self.log.append("mark")
        return Event([])

    def wait(self, event: Event) -> None:
        self.log.append("wait")
        event.finish()

    def follow(self, event: Event, copy: torch.Tensor) -> None:
        self.log.append("follow")
        event.finish()
