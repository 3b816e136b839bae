"""How many ranks a run can have with the nodes that are there: a pure function of what they offer.

Any number of ranks that divides the batch computes the same steps, so a run that lost a node goes on with
fewer, and with more again when there is room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.workers.config import ClusterConfig

_UNITS = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True, kw_only=True)
class RankNeeds:
    """What Ray sets aside for a rank, and for each of its samplers, which may run on any node."""

    rank: Mapping[str, float]
    sampler: Mapping[str, float]
    num_samplers: int
    """Samplers of each rank."""

    @classmethod
    def of(cls, cluster: ClusterConfig) -> RankNeeds:
        """The needs of a run."""
        gpu = {"GPU": cluster.gpus_per_rank} if cluster.use_gpu else {}
        shared = {"GPU": cluster.gpus_per_sampler} if cluster.gpus_per_sampler else {}
        return cls(
            rank={"CPU": cluster.cpus_per_rank, **gpu},
            sampler={"CPU": cluster.cpus_per_sampler, **shared},
            num_samplers=cluster.samplers_per_rank,
        )


def world_sizes(batch_size: int, least: int, most: int) -> list[int]:
    """Numbers of ranks from ``most`` down to ``least`` that divide the batch.

    >>> world_sizes(12, 2, 8)
    [6, 4, 3, 2]
    """
    return [size for size in range(most, least - 1, -1) if batch_size % size == 0]


def largest_world(sizes: Sequence[int], nodes: Sequence[Mapping[str, float]], needs: RankNeeds) -> int | None:
    """The first of some numbers of ranks, the largest first, that the nodes have room for; None if for none.

    A rank and a sampler each fit into one node; which node is free.

    >>> needs = RankNeeds(rank={"CPU": 2}, sampler={"CPU": 1}, num_samplers=2)
    >>> largest_world([4, 2, 1], [{"CPU": 5}, {"CPU": 3}], needs)
    2
    >>> largest_world([4, 2, 1], [{"CPU": 5}], needs)
    1
    """
    room = _samplers_beside(max(sizes, default=0), nodes, needs)
    return next((size for size in sizes if room[size] >= size * needs.num_samplers), None)


def _samplers_beside(most: int, nodes: Sequence[Mapping[str, float]], needs: RankNeeds) -> list[int]:
    """How many samplers fit at most beside 0, 1, ... ``most`` ranks; -1 where the ranks do not fit."""
    best = [0] + [-1] * most
    plenty = most * needs.num_samplers  # more are of no use
    for node in nodes:
        # by ranks on this node
        here: list[int] = []
        while len(here) <= most and (left := _left(node, needs.rank, len(here))) is not None:
            here.append(_times(left, needs.sampler, plenty))
        best = [
            max((best[n - k] + here[k] for k in range(min(n + 1, len(here))) if best[n - k] >= 0), default=-1)
            for n in range(most + 1)
        ]
    return best


def _left(node: Mapping[str, float], need: Mapping[str, float], times: int) -> dict[str, int] | None:
    """What a node has left beside so many ranks, in units; None if that is too many."""
    left = {name: round(value * _UNITS) for name, value in node.items()}
    for name, value in need.items():
        left[name] = left.get(name, 0) - times * round(value * _UNITS)
    return None if min(left.values(), default=0) < 0 else left


def _times(left: Mapping[str, int], need: Mapping[str, float], most: int) -> int:
    """How often a need fits into what is left, ``most`` at most."""
    units = {name: round(value * _UNITS) for name, value in need.items()}
    return min([left.get(name, 0) // value for name, value in units.items() if value] + [most])


class WorldChoice:
    """Chooses the number of ranks of a run, again and again as nodes come and go.

    What did not start although it should have fitted (others use the nodes) is not tried again until the
    nodes have changed or :attr:`RETRY_S` are over.
    """

    RETRY_S = 300.0

    def __init__(self, batch_size: int, cluster: ClusterConfig) -> None:
        self.sizes = world_sizes(batch_size, cluster.least_ranks, cluster.num_ranks)
        self.needs = RankNeeds.of(cluster)
        self._refused: tuple[int, frozenset[str], float] | None = None

    def largest(self, nodes: Mapping[str, Mapping[str, float]], now_s: float) -> int | None:
        """The largest number of ranks with the nodes given by name; None if there is room for none."""
        sizes = self.sizes
        if self._refused is not None:
            refused, names, until_s = self._refused
            if names == frozenset(nodes) and now_s < until_s:
                sizes = [size for size in sizes if size < refused]
        return largest_world(sizes, list(nodes.values()), self.needs)

    def refuse(self, size: int, nodes: Mapping[str, Mapping[str, float]], now_s: float) -> None:
        """Remember that so many ranks did not start."""
        self._refused = size, frozenset(nodes), now_s + self.RETRY_S
