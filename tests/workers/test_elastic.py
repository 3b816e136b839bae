"""How many ranks have room, by enumeration; what a run does as nodes come and go, on fits that are fakes."""

from __future__ import annotations

import itertools
import logging
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import ClusterError
from ats_stream.workers import ClusterConfig, elastic_fit
from ats_stream.workers.elastic import RankNeeds, WorldChoice, largest_world, world_sizes
from ats_stream.workers.elastic_fit import Failed, NotStarted, Stopped, fit_elastic
from ats_stream.workers.preemption import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ats_stream.workers.elastic_fit import Nodes, Outcome


def fits(size: int, nodes: Sequence[dict[str, float]], needs: RankNeeds) -> bool:
    """By trying every way to spread the ranks over the nodes; amounts are whole numbers."""
    for counts in itertools.product(range(size + 1), repeat=len(nodes)):
        left = [
            {name: node.get(name, 0) - count * needs.rank.get(name, 0) for name in ("CPU", "GPU")}
            for node, count in zip(nodes, counts, strict=True)
        ]
        if sum(counts) == size and all(value >= 0 for node in left for value in node.values()):
            room = sum(int(node["CPU"] // needs.sampler["CPU"]) for node in left)
            if room >= size * needs.num_samplers:
                return True
    return False


NODES = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(0, 7)}, optional={"GPU": st.integers(0, 2)}), max_size=3
)
NEEDS = st.builds(
    lambda cpus, gpus, sampler, number: RankNeeds(
        rank={"CPU": cpus, **({"GPU": 1} if gpus else {})}, sampler={"CPU": sampler}, num_samplers=number
    ),
    *(st.integers(0, 3), st.booleans(), st.integers(1, 2), st.integers(1, 3)),
)


@given(NODES, NEEDS, st.sampled_from([[4, 3, 2, 1], [4, 2], [3, 1]]))
def test_the_largest_number_that_fits_is_found(nodes: Any, needs: RankNeeds, sizes: list[int]) -> None:
    wanted = next((size for size in sizes if fits(size, nodes, needs)), None)
    assert largest_world(sizes, nodes, needs) == wanted


def test_shares_of_a_cpu_add_up_as_ray_adds_them() -> None:
    needs = RankNeeds(rank={"CPU": 0.1}, sampler={"CPU": 0.1}, num_samplers=2)
    assert largest_world([1], [{"CPU": 0.3}], needs) == 1  # .3 - .1 is less than .2 in floating point
    assert largest_world([1], [{"CPU": 0.2999}], needs) is None
    free = RankNeeds(rank={"CPU": 0.0}, sampler={"CPU": 0.0}, num_samplers=2)
    assert largest_world([64], [{"CPU": 0.0}], free) == 64


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_every_number_of_ranks_divides_the_batch(batch_size: int, least: int, most: int) -> None:
    sizes = world_sizes(batch_size, least, most)
    assert sizes == sorted((n for n in range(least, most + 1) if batch_size % n == 0), reverse=True)


def cluster(**given: Any) -> ClusterConfig:
    return ClusterConfig(executor="ray", max_failures=2, **{"num_ranks": 4, "min_ranks": 1, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_ranks": -1}, "min_ranks must not be negative, got -1"),
        ({"min_ranks": 5}, "min_ranks must be at most 4, all ranks, got 5"),
        ({"max_failures": 0}, "max_failures must be at least 1 where fewer ranks may go on, got 0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**{"num_ranks": 4, "min_ranks": 1, "max_failures": 2, **given})


# --- a run as nodes come and go

CPUS_OF_A_RANK = 2  # one for itself and one for its sampler


class World:
    """Nodes with room for so many ranks each, a clock that runs only here, and fits that follow a script."""

    def __init__(
        self, nodes: dict[str, int], script: list[Callable[[World, Callable[[], bool]], Outcome]]
    ) -> None:
        self.ranks, self.script = nodes, script
        self.now_s = 0.0
        self.sizes: list[int] = []
        self.stop = StopRequest()
        self.pauses: list[Callable[[], None]] = []

    def nodes(self) -> Nodes:
        return {name: {"CPU": float(CPUS_OF_A_RANK * ranks)} for name, ranks in self.ranks.items()}

    def fit(self, num_ranks: int, is_outgrown: Callable[[], bool]) -> Outcome:
        self.sizes.append(num_ranks)
        assert not is_outgrown()
        return self.script.pop(0)(self, is_outgrown)

    def pause(self) -> None:
        self.now_s += 1
        if self.pauses:
            self.pauses.pop(0)()

    def run(self, batch_size: int = 12, **given: Any) -> Outcome:
        outcome = fit_elastic(
            self.fit,
            WorldChoice(batch_size, cluster(**given)),
            self.nodes,
            self.stop,
            max_failures=2,
            clock=lambda: self.now_s,
            pause=self.pause,
        )
        assert self.script == []
        return outcome


def ends(_world: World, _is_outgrown: Callable[[], bool]) -> Outcome:
    return None


def fails(**left: int) -> Callable[[World, Callable[[], bool]], Outcome]:
    """A rank dies; these nodes are left."""

    def fit(world: World, _is_outgrown: Callable[[], bool]) -> Outcome:
        world.ranks = left
        return Failed(ClusterError("a rank died"), may_recur=False)

    return fit


def not_started(_world: World, _is_outgrown: Callable[[], bool]) -> Outcome:
    return NotStarted("too slow")


def grows(**then: int) -> Callable[[World, Callable[[], bool]], Outcome]:
    """Nodes come; the run stops once it is told that there is room for more."""

    def fit(world: World, is_outgrown: Callable[[], bool]) -> Outcome:
        world.ranks = then
        assert not is_outgrown()  # it does not look all the time
        world.now_s += elastic_fit.GROW_INTERVAL_S
        assert is_outgrown()
        assert is_outgrown()  # and stays with it
        return Stopped(7, 9)

    return fit


def test_it_goes_on_with_fewer_and_grows_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World({"a": 2, "b": 2}, [fails(a=2), grows(a=2, b=1), fails(a=1, b=1), grows(a=9), ends])
    with caplog.at_level(logging.WARNING):
        assert world.run() is None
    assert world.sizes == [4, 2, 3, 2, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "a rank died; start 1 of 2 after a failure",
        "training with 2 of 4 ranks: no room for more",
        "there is room for more than 2 ranks; starting again, from step 7",
        "training with 3 of 4 ranks: no room for more",
        "a rank died; start 2 of 2 after a failure",
        "training with 2 of 4 ranks: no room for more",
        "there is room for more than 2 ranks; starting again, from step 7",
    ]


def test_a_number_that_does_not_divide_the_batch_is_left_out() -> None:
    world = World({"a": 3}, [ends])
    assert world.run(batch_size=4) is None
    assert world.sizes == [2]


def test_failures_beyond_the_limit_and_such_as_would_recur_are_final() -> None:
    world = World({"a": 4}, [fails(a=4)] * 3)
    outcome = world.run()
    assert isinstance(outcome, Failed)
    assert str(outcome.error) == "a rank died"
    bad = Failed(ValueError("no such slide"), may_recur=True)
    world = World({"a": 4}, [lambda *_: bad])
    assert world.run() is bad


def test_what_does_not_start_is_tried_with_fewer_and_later_again() -> None:
    def waits(world: World, is_outgrown: Callable[[], bool]) -> Outcome:
        world.now_s += WorldChoice.RETRY_S - 1
        assert not is_outgrown()
        world.now_s += elastic_fit.GROW_INTERVAL_S
        assert is_outgrown()
        return Stopped(1, 9)

    world = World({"a": 4}, [not_started, not_started, waits, ends])
    assert world.run() is None
    assert world.sizes == [4, 3, 2, 4]
    # other nodes, another chance
    world = World({"a": 4}, [not_started, grows(a=2, b=2), ends])
    assert world.run() is None
    assert world.sizes == [4, 3, 4]


def test_it_waits_for_room_but_not_for_ever() -> None:
    world = World({}, [ends])
    world.pauses = [lambda: None, lambda: world.ranks.update(a=1)]
    assert world.run() is None
    assert world.sizes == [1]
    world = World({"a": 1, "b": 0}, [])
    with pytest.raises(
        ClusterError, match="for 600 s the 2 nodes of the Ray cluster had no room for the few"
    ):
        world.run(min_ranks=2)
    assert world.now_s == pytest.approx(elastic_fit.ROOM_TIMEOUT_S, abs=2)


def test_a_stop_is_a_stop_wherever_it_comes() -> None:
    world = World({}, [])
    world.pauses = [world.stop.ask]
    assert world.run() == Stopped(-1, -1)

    def is_stopped(world: World, _is_outgrown: Callable[[], bool]) -> Outcome:
        return Stopped(3, 9)

    # a rank was asked, not the run
    assert World({"a": 1}, [is_stopped]).run() == Stopped(3, 9)

    def grows_and_is_stopped(world: World, is_outgrown: Callable[[], bool]) -> Outcome:
        world.stop.ask()
        return grows(a=2)(world, is_outgrown)

    assert World({"a": 1}, [grows_and_is_stopped]).run() == Stopped(7, 9)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server


def test_nodes_at_which_nobody_listens_do_not_count(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    port = listener.getsockname()[1]
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        gone = other.getsockname()[1]
    there = [("a", True, port), ("b", True, gone), ("c", False, port)]
    nodes = [
        {
            "NodeID": n,
            "Alive": alive,
            "NodeManagerAddress": "127.0.0.1",
            "NodeManagerPort": at,
            "Resources": {n: 1.0},
        }
        for n, alive, at in there
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert elastic_fit.nodes_that_answer() == {"a": {"a": 1.0}}
