"""Training with as many ranks as there is room for: after a failure with fewer, later with more again.

Ray Train can do so too, but would start any number of ranks between two bounds, also one that does not divide
the batch, counts no room for samplers, and ends the ranks in mid-epoch to grow. Here every number divides the
batch, and to grow the run is stopped as SIGTERM stops it: saved.
"""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ats_stream.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ats_stream.workers.elastic import WorldChoice
    from ats_stream.workers.preemption import StopRequest

    Nodes = Mapping[str, Mapping[str, float]]
    """Resources of each node, by the node's name."""

logger = logging.getLogger(__name__)

GROW_INTERVAL_S = 10.0
"""How often it is looked whether there is room for more ranks."""
ROOM_TIMEOUT_S = 600.0
"""How long a run waits for room for the fewest ranks it may have."""
KNOCK_TIMEOUT_S = 2.0
POLL_INTERVAL_S = 0.3


@dataclass(frozen=True)
class Stopped:
    """A fit was asked to stop, and has saved what was done."""

    step: int
    num_steps: int


@dataclass(frozen=True)
class NotStarted:
    """The ranks did not all come up in time."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A rank died or raised an error."""

    error: BaseException
    may_recur: bool
    """Whether another start would end the same way, as far as one can know."""


Outcome = Stopped | NotStarted | Failed | None
"""How a fit ended; None for the last step."""


class Fit(Protocol):
    """One start of the ranks."""

    def __call__(self, num_ranks: int, is_outgrown: Callable[[], bool]) -> Outcome:
        """Train with so many ranks; asks them to stop, saved, once ``is_outgrown()``."""


class _Room:
    """What the nodes have room for; looks no more often than every so many seconds."""

    def __init__(self, choice: WorldChoice, nodes: Callable[[], Nodes], clock: Callable[[], float]) -> None:
        self.choice, self.nodes, self.clock = choice, nodes, clock
        self._looked_s = clock()

    def now(self) -> tuple[int | None, Nodes]:
        """The largest number of ranks, None for none, and the nodes there are."""
        self._looked_s = self.clock()
        nodes = self.nodes()
        return self.choice.largest(nodes, self._looked_s), nodes

    def has_more_than(self, size: int) -> bool:
        """Whether there is room for more ranks than these."""
        if size == self.choice.sizes[0] or self.clock() - self._looked_s < GROW_INTERVAL_S:
            return False
        return (self.now()[0] or 0) > size


def fit_elastic(
    fit: Fit,
    choice: WorldChoice,
    nodes: Callable[[], Nodes],
    stop: StopRequest,
    *,
    max_failures: int,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[], None] = lambda: time.sleep(POLL_INTERVAL_S),
) -> Outcome:
    """Fit with as many ranks as there is room for, again and again, until a fit ends for good.

    Gives what the last fit ended with; Stopped(-1, -1) if a stop came while there was none. Raises
    ClusterError when there was no room for too long.
    """
    room, num_failures = _Room(choice, nodes, clock), 0
    while True:
        found = _wait(room, stop, pause)
        if found is None:
            return Stopped(-1, -1)
        size, there = found
        if size < choice.sizes[0]:
            logger.warning("training with %d of %d ranks: no room for more", size, choice.sizes[0])
        outgrown = False

        def is_outgrown(size: int = size) -> bool:
            nonlocal outgrown
            outgrown = outgrown or room.has_more_than(size)
            return outgrown

        outcome = fit(size, is_outgrown)
        if isinstance(outcome, Stopped) and outgrown and not stop.asked:
            logger.warning(
                "there is room for more than %d ranks; starting again, from step %d", size, outcome.step
            )
        elif isinstance(outcome, NotStarted):
            # others use the nodes, or a node that answered is gone
            choice.refuse(size, there, clock())
            logger.warning("%d ranks did not start: %s", size, outcome.reason)
        elif isinstance(outcome, Failed) and not outcome.may_recur and num_failures < max_failures:
            num_failures += 1
            logger.warning("%s; start %d of %d after a failure", outcome.error, num_failures, max_failures)
        else:
            return outcome


def _wait(room: _Room, stop: StopRequest, pause: Callable[[], None]) -> tuple[int, Nodes] | None:
    """A number of ranks for which there is room, and the nodes; None if a stop was asked before."""
    until_s = room.clock() + ROOM_TIMEOUT_S
    while not stop.asked:
        size, nodes = room.now()
        if size is not None:
            return size, nodes
        if room.clock() > until_s:
            raise ClusterError(
                f"training failed: for {ROOM_TIMEOUT_S:g} s the {len(nodes)} nodes of the Ray cluster had no "
                f"room for the fewest ranks, {room.choice.sizes[-1]}, and their samplers"
            )
        pause()
    return None


def nodes_that_answer() -> dict[str, dict[str, float]]:
    """Resources of the nodes of the Ray cluster at whose address somebody listens.

    Ray itself takes a while to notice that a node is gone.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray types it partly
    return {node["NodeID"]: node["Resources"] for node in nodes if _answers(node)}


def _answers(node: Mapping[str, object]) -> bool:
    address = str(node["NodeManagerAddress"]), int(str(node["NodeManagerPort"]))
    try:
        socket.create_connection(address, timeout=KNOCK_TIMEOUT_S).close()
    except OSError:
        return False
    return True
