"""The stream's order, window and versions, on an executor of fakes that finish when they like."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODEL, assert_same_item, attention, make_sampler, table
from torch import nn

from ats_stream.errors import SlideError
from ats_stream.workers import AttentionWeights, Plan, Stream, Visit
from ats_stream.workers.executors import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io import Archive


class Order(tuple[Visit, str]):
    """What a fake item holds: the visit, and the key of the weights."""

    num_bytes = 1


class Recorder:
    """An executor whose items are (visit, key of the weights). Items finish in a random order, some fail."""

    def __init__(self, *, seed: int = 0, fail_at: int | None = None) -> None:
        self.random = random.Random(seed)
        self.fail_at = fail_at
        self.submitted: list[Order] = []
        self.told: list[Visit] = []
        self.unfinished: list[Answer] = []
        self.in_flight = 0
        self.most_in_flight = 0

    def submit(self, visit: Visit, weights: AttentionWeights) -> Answer:
        answer = Answer(self, Order((visit, weights.key)), fails=len(self.submitted) == self.fail_at)
        self.submitted.append(answer.order)
        self.unfinished.append(answer)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return answer

    def read_ahead(self, visits: Sequence[Visit]) -> None:
        self.told += visits

    def close(self) -> None:
        self.unfinished.clear()


class Answer:
    def __init__(self, executor: Recorder, order: Order, *, fails: bool) -> None:
        self.executor, self.order, self.fails, self.is_done = executor, order, fails, False

    def result(self) -> Any:
        while not self.is_done:  # others finish before, in any order
            waiting = self.executor.unfinished
            waiting.pop(self.executor.random.randrange(len(waiting))).is_done = True
        self.executor.in_flight -= 1
        if self.fails:
            raise SlideError(f"slide {self.order[0].image}", "torn")
        return self.order


def net(version: int) -> nn.Module:
    """A module whose only weight tells the version."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, version)
    return module


def key_of(version: int) -> str:
    return AttentionWeights.of({"weight": torch.full((1, 1), float(version)).numpy()}).key


def run(stream: Stream, *, steps: int | None = None) -> list[list[Any]]:
    """Train as a trainer does: take a step's items, then publish the next version."""
    if stream.step == 0:
        stream.publish(0, net(0))
    done = []
    end = stream.plan.num_steps if steps is None else stream.step + steps
    while stream.step < end:
        done.append(stream.next_step())
        stream.publish(stream.step, net(stream.step))
    return done


def expected(plan: Plan, *, rank: int = 0, world_size: int = 1, start: int = 0) -> list[list[Order]]:
    steps = range(start, plan.num_steps)
    return [
        [(v, key_of(plan.version_of(step))) for v in plan.visits_of_rank(step, rank, world_size)]
        for step in steps
    ]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        images=tuple(range(draw(st.integers(1, 7)))),
        batch_size=draw(st.sampled_from([2, 4, 6])),
        num_epochs=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 99)),
        lag=draw(st.none() | st.integers(0, 4)),
        publish_interval=draw(st.integers(1, 3)),
    )


@given(plans(), st.integers(1, 20), st.integers(0, 99), st.sampled_from([1, 2]))
def test_items_come_in_the_plans_order_with_the_plans_versions(
    plan: Plan, window: int, seed: int, world_size: int
) -> None:
    for rank in range(world_size):
        executor = Recorder(seed=seed)
        stream = Stream(plan, executor, rank=rank, world_size=world_size, window=window)
        wanted = expected(plan, rank=rank, world_size=world_size)
        assert run(stream) == wanted
        assert executor.submitted == [order for step in wanted for order in step]  # nothing twice or too much
        in_order = iter(visit for step in wanted for visit, _ in step)
        assert all(visit in in_order for visit in executor.told)  # each once, in the order that they come in
        assert executor.most_in_flight <= window
        assert executor.in_flight == 0


@given(plans(), st.integers(1, 20), st.data())
def test_a_stream_cut_anywhere_goes_on_as_if_it_had_not_been(
    plan: Plan, window: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, plan.num_steps))
    first = Stream(plan, Recorder(), window=window)
    before = run(first, steps=cut)
    second = Stream(plan, Recorder(seed=1), start_step=cut, window=1)
    second.restore(first.versions)
    after = []
    while second.step < plan.num_steps:
        after.append(second.next_step())
        second.publish(second.step, net(second.step))
    assert before + after == expected(plan)


@given(plans())
def test_only_versions_that_steps_to_come_may_ask_for_are_kept(plan: Plan) -> None:
    stream = Stream(plan, Recorder())
    stream.publish(0, net(0))
    while stream.step < plan.num_steps:
        to_come = range(stream.step, stream.step + plan.num_steps + 20)
        needed = {plan.version_of(step) for step in to_come}
        assert set(stream.versions) == {version for version in needed if version <= stream.step}
        stream.next_step()
        stream.publish(stream.step, net(stream.step))


@given(plans(), st.integers(1, 9))
def test_looking_ahead_changes_nothing(plan: Plan, window: int) -> None:
    stream = Stream(plan, Recorder(), window=window)
    stream.publish(0, net(0))
    done = []
    while stream.step < plan.num_steps:
        seen = stream.look_ahead()
        assert seen is stream.look_ahead()
        done.append(stream.next_step())
        assert seen is None or seen is done[-1]
        # before the version that this step makes: the next items are there exactly if they do not wait for it
        has_next = stream.step < plan.num_steps
        can_look = has_next and plan.version_of(stream.step) != stream.step
        assert (stream.look_ahead() is not None) == can_look
        stream.publish(stream.step, net(stream.step))
    assert done == expected(plan)
    assert stream.look_ahead() is None


def test_an_error_ahead_is_kept_until_its_step() -> None:
    plan = Plan(images=(0, 1, 2, 3), batch_size=2, num_epochs=1, seed=0, lag=1)
    stream = Stream(plan, Recorder(fail_at=2), window=4)
    stream.publish(0, net(0))
    first = stream.next_step()
    assert len(first) == 2
    assert stream.look_ahead() is None
    stream.publish(1, net(1))
    with pytest.raises(SlideError, match="torn"):
        stream.next_step()


def test_the_window_fills_as_far_as_versions_are_there() -> None:
    plan = Plan(images=tuple(range(8)), batch_size=2, num_epochs=3, seed=0, lag=2)
    executor = Recorder()
    stream = Stream(plan, executor, window=16)
    stream.publish(0, net(0))
    stream.next_step()
    assert len(executor.submitted) == 6  # steps 0, 1 and 2 draw with version 0; step 3 waits for version 1
    stream.publish(1, net(1))
    stream.next_step()
    assert len(executor.submitted) == 8


def test_without_lag_each_step_waits_for_the_version_before_it() -> None:
    plan = Plan(images=tuple(range(8)), batch_size=2, num_epochs=1, seed=0)
    executor = Recorder()
    stream = Stream(plan, executor)
    stream.publish(0, net(0))
    stream.next_step()
    assert len(executor.submitted) == 2
    with pytest.raises(ValueError, match="version 1 of the attention was not published"):
        stream.next_step()
    stream.publish(1, net(1))
    assert stream.next_step() == expected(plan)[1]


def test_a_stream_that_never_updates_is_an_iterator_that_keeps_its_window_full() -> None:
    plan = Plan(images=tuple(range(5)), batch_size=1, num_epochs=2, seed=0, lag=None)
    executor = Recorder()
    stream = Stream(plan, executor, window=3)
    stream.publish(0, net(7))
    seen = []
    for number, item in enumerate(stream, start=1):
        assert len(executor.submitted) == min(10, number + 3)
        seen.append(item)
    assert [visit for visit, _ in seen] == [v for step in range(10) for v in plan.visits(step)]
    assert {key for _, key in seen} == {key_of(7)}
    assert list(stream) == []


@pytest.mark.parametrize("fail_at", [0, 3, 9])
def test_an_error_surfaces_at_its_own_item(fail_at: int) -> None:
    plan = Plan(images=tuple(range(10)), batch_size=1, num_epochs=1, seed=0, lag=None)
    stream = Stream(plan, Recorder(fail_at=fail_at), window=4)
    stream.publish(0, net(0))
    for step in range(fail_at):
        assert stream.next_step()[0][0] == plan.visits(step)[0]
    with pytest.raises(SlideError, match=f"slide {plan.visits(fail_at)[0].image}: torn"):
        stream.next_step()


class Weigher(Recorder):
    """Items of sizes of their own; measures what is on order, and what has come of a step not handed out."""

    stream: Stream

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.most_bytes = 0

    def submit(self, visit: Visit, weights: AttentionWeights) -> Answer:
        answer = super().submit(visit, weights)
        answer.order.num_bytes = self.sizes[visit.image]
        waiting = [ordered.visit.image for ordered in self.stream._pending] + [visit.image]
        held_bytes = sum(self.sizes[image] for image in waiting) + self.stream._held_bytes
        self.most_bytes = max(self.most_bytes, held_bytes)
        return answer


@given(
    st.lists(st.integers(1, 100), min_size=8, max_size=8),
    st.integers(1, 3000),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.none() | st.integers(0, 3),
)
def test_bytes_on_order_stay_within_their_bound(
    sizes: list[int], window_bytes: int, batch_size: int, looks_ahead: bool, lag: int | None
) -> None:
    sizes = sorted(sizes, reverse=True)  # none is larger than those that came before
    plan = Plan(images=tuple(range(8)), batch_size=batch_size, num_epochs=2, seed=0, shuffle=False, lag=lag)
    executor = Weigher(sizes)
    executor.stream = stream = Stream(plan, executor, window=99, window_bytes=window_bytes)
    stream.publish(0, net(0))
    done = []
    while stream.step < plan.num_steps:
        done.append(stream.next_step())
        stream.publish(stream.step, net(stream.step))
        if looks_ahead:
            stream.look_ahead()
    assert done == expected(plan)
    # a step's items in any case, beside those that have come of the step before
    assert executor.most_bytes <= max(window_bytes, 2 * batch_size * sizes[0])


def test_the_window_of_bytes_opens_as_sizes_are_known_and_closes_for_large_items() -> None:
    plan = Plan(images=tuple(range(200)), batch_size=1, num_epochs=1, seed=0, shuffle=False, lag=None)
    executor = Weigher([10] * 50 + [100] + [10] * 149)
    executor.stream = stream = Stream(plan, executor, window=8, window_bytes=60)
    stream.publish(0, net(0))
    on_order = []
    for step in range(199):
        stream.next_step()
        on_order.append(len(executor.submitted) - step - 1)
    assert on_order[:50] == [6] * 50
    assert on_order[50:114] == [5, 4, 3, 2] + [1] * 60  # the large one is among the last 64
    assert on_order[114:190] == [6] * 76


def test_published_weights_do_not_follow_the_network() -> None:
    plan = Plan(images=(0,), batch_size=1, num_epochs=1, seed=0)
    stream = Stream(plan, Recorder())
    network = net(0)
    stream.publish(0, network)
    nn.init.constant_(network.weight, 5.0)
    assert stream.next_step()[0][1] == key_of(0)


def test_a_window_of_nothing_is_refused() -> None:
    plan = Plan(images=(0,), batch_size=1, num_epochs=1, seed=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Stream(plan, Recorder(), window=0)
    with pytest.raises(ValueError, match="window_bytes must be at least 1, got 0"):
        Stream(plan, Recorder(), window_bytes=0)


def test_the_serial_executor_gives_the_samplers_items(archive: Archive) -> None:
    plan = Plan(images=(1, 2, 4), batch_size=2, num_epochs=2, seed=0, lag=1)
    stream = Stream(plan, SerialExecutor(make_sampler(archive)))
    slides, labels = table(archive)
    stream.publish(0, attention(0))
    while stream.step < plan.num_steps:
        step = stream.step
        version = plan.version_of(step)
        arrays = {name: t.numpy() for name, t in attention(version).state_dict().items()}
        for item, wanted in zip(stream.next_step(), plan.visits(step), strict=True):
            assert item.visit == wanted
            assert (item.slide, item.label) == (slides[wanted.image], labels[wanted.image])
            assert_same_item(item, make_sampler(archive, MODEL).sample(wanted, AttentionWeights.of(arrays)))
        stream.publish(stream.step, attention(stream.step))


def test_keys_of_weights_tell_contents_apart() -> None:
    one = torch.arange(6.0).numpy()
    same = [{"a": one, "b": one}, {"b": one.copy(), "a": one[::1]}]
    others = [
        {"a": one},
        {"a": one, "c": one},
        {"a": one.reshape(2, 3), "b": one},
        {"a": one.astype("float64"), "b": one},
        {"a": one + 1, "b": one},
    ]
    assert len({AttentionWeights.of(arrays).key for arrays in same}) == 1
    assert len({AttentionWeights.of(arrays).key for arrays in [same[0], *others]}) == 1 + len(others)
