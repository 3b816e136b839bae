"""The stream of items: in the plan's order, whoever computes them and in whatever order they come."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from ats_stream.errors import AtsStreamError, SlideError
from ats_stream.workers.protocol import AttentionWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from ats_stream.workers.executors import Executor, Pending
    from ats_stream.workers.plan import Plan, Visit
    from ats_stream.workers.protocol import Item

    Substitute = Callable[[Visit, AttentionWeights, SlideError], Item]

DEFAULT_WINDOW = 16
"""Items that one rank has on order at a time: bounds the memory between samplers and trainer."""
DEFAULT_WINDOW_BYTES = 256 << 20  # 256 MiB
"""Bytes that these may come to."""
SIZES_KEPT = 64
"""Items whose sizes tell how large those to come may be."""


class _Ordered(NamedTuple):
    visit: Visit
    weights: AttentionWeights
    pending: Pending


class Stream:
    """The items of one rank, step by step.

    ``publish`` hands over each version of the attention network as training makes it; the stream orders
    items ahead as far as the window goes and as versions are there. With ``plan.lag = None`` version 0 draws
    everything and the stream is simply an iterator.

    On order are at most ``window`` items and ``window_bytes`` bytes, each item that has not come taken to be
    as large as the largest of the last that have; but one step's items always, and no more until the first of
    them has come.

    When a slide cannot be read, ``instead`` gives the item that takes its place; without it SlideError is
    raised, at the item it belongs to.
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        window: int = DEFAULT_WINDOW,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        instead: Substitute | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if window_bytes < 1:
            raise ValueError(f"window_bytes must be at least 1, got {window_bytes}")
        self.plan, self.executor = plan, executor
        self.rank, self.world_size, self.window = rank, world_size, window
        self.window_bytes = window_bytes
        self.step = start_step
        """The step whose items come next."""
        self.versions: dict[int, AttentionWeights] = {}
        """Versions of the attention that steps to come may still draw with."""
        self._instead = instead
        self._sizes: deque[int] = deque(maxlen=SIZES_KEPT)
        self._held_bytes = 0
        self._pending: deque[_Ordered] = deque()
        self._ahead: list[Item] | AtsStreamError | None = None
        self._visits = self._upcoming()
        self._waiting: deque[Visit] = deque()
        """The visits that are ordered next; of the first ``_num_told`` the executor knows."""
        self._num_told = 0

    def publish(self, version: int, attention: nn.Module) -> None:
        """Hand over the attention network after ``version`` optimiser steps, if any step draws with it."""
        fresh = {}
        if self.plan.is_published(version):
            arrays = {name: t.detach().cpu().numpy().copy() for name, t in attention.state_dict().items()}
            fresh[version] = AttentionWeights.of(arrays)
        self.restore(fresh)

    def restore(self, versions: dict[int, AttentionWeights]) -> None:
        """Hand over versions as they were taken from ``versions`` of another stream."""
        self.versions.update(versions)
        oldest = self.plan.version_of(self.step)
        self.versions = {v: w for v, w in self.versions.items() if v >= oldest}

    def next_step(self) -> list[Item]:
        """Wait for the items of the next step of this rank, in the plan's order."""
        self._order()
        if self._ahead is None and not self._pending and self._waiting:
            raise ValueError(f"version {self._waiting[0].version} of the attention was not published")
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, AtsStreamError):
            raise ahead
        items = self._collect() if ahead is None else ahead
        self.step += 1
        self._held_bytes = 0
        self._order()
        return items

    def look_ahead(self) -> list[Item] | None:
        """Wait for the items that the next :meth:`next_step` will give; None if they wait for a version.

        An error of theirs is kept until then.
        """
        if self._ahead is None:
            if self.step >= self.plan.num_steps or self.plan.version_of(self.step) not in self.versions:
                return None
            self._order()
            try:
                self._ahead = self._collect()
            except AtsStreamError as error:
                self._ahead = error
        return None if isinstance(self._ahead, AtsStreamError) else self._ahead

    def _collect(self) -> list[Item]:
        items = []
        for _ in range(self._images_per_step):
            items.append(self._result(self._pending.popleft()))
            self._sizes.append(items[-1].num_bytes)
            self._held_bytes += items[-1].num_bytes
            self._order()
        return items

    @property
    def _images_per_step(self) -> int:
        return self.plan.batch_size // self.world_size

    def _result(self, ordered: _Ordered) -> Item:
        try:
            return ordered.pending.result()
        except SlideError as error:
            if self._instead is None:
                raise
            return self._instead(ordered.visit, ordered.weights, error)

    def __iter__(self) -> Iterator[Item]:
        while self.step < self.plan.num_steps:
            yield from self.next_step()

    def _upcoming(self) -> Iterator[Visit]:
        for step in range(self.step, self.plan.num_steps):
            yield from self.plan.visits_of_rank(step, self.rank, self.world_size)

    def _has_room(self) -> bool:
        """Whether one more item may be ordered beside those on order and those that have come for a step."""
        num = len(self._pending) + 1
        if num > self.window:
            return False
        if num <= self._images_per_step:
            return True
        return bool(self._sizes) and num * max(self._sizes) + self._held_bytes <= self.window_bytes

    def _order(self) -> None:
        while self._look(1) and self._has_room():
            visit = self._waiting[0]
            weights = self.versions.get(visit.version)
            if weights is None:
                self._tell()
                break
            pending = self.executor.submit(visit, weights)
            self._pending.append(_Ordered(visit, weights, pending))
            self._waiting.popleft()
            self._num_told = max(0, self._num_told - 1)

    def _look(self, number: int) -> int:
        """How many of the next ``number`` visits there are."""
        while len(self._waiting) < number and (visit := next(self._visits, None)) is not None:
            self._waiting.append(visit)
        return min(number, len(self._waiting))

    def _tell(self) -> None:
        """Let the executor know what else the window holds as soon as there are weights for it."""
        number = self._look(self.window - len(self._pending))
        told = [self._waiting[n] for n in range(self._num_told, number)]
        self._num_told = max(self._num_told, number)
        if told:
            self.executor.read_ahead(told)
