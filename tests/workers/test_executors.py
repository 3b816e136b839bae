"""Items of Ray actors are those of the serial executor, bit for bit, also when actors die."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from tiny import MODEL, SAMPLER, assert_same_item, attention, make_sampler, table, visit, weights

from ats_stream.errors import InputError, SlideError
from ats_stream.workers import AttentionWeights, Item, Plan, Stream, Visit
from ats_stream.workers import ray_executor as ray_executor_module
from ats_stream.workers.executors import Executor, SerialExecutor, make_executor
from ats_stream.workers.ray_executor import RayExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from ats_stream.io import Archive


def make_plan(*, lag: int | None, batch_size: int = 4, num_epochs: int = 2) -> Plan:
    return Plan(images=tuple(range(10)), batch_size=batch_size, num_epochs=num_epochs, seed=1, lag=lag)


def run(
    plan: Plan, executor: Executor, *, window: int = 16, before_step: Callable[[int], None] = lambda _: None
) -> list[Item]:
    """All items, with a network that changes at every step."""
    stream = Stream(plan, executor, window=window)
    stream.publish(0, attention(0))
    items = []
    while stream.step < plan.num_steps:
        before_step(stream.step)
        items += stream.next_step()
        stream.publish(stream.step, attention(stream.step))
    return items


def ray_executor(archive: Archive, num_samplers: int, **given: Any) -> RayExecutor:
    return RayExecutor(
        *table(archive), MODEL, SAMPLER, num_samplers=num_samplers, cpus_per_sampler=0.1, **given
    )


@pytest.fixture(scope="module")
def serial(archive: Archive) -> dict[int | None, list[Item]]:
    """The reference, by lag."""
    sampler = make_sampler(archive)
    return {lag: run(make_plan(lag=lag), SerialExecutor(sampler)) for lag in (0, 1, 4, None)}


@pytest.fixture(scope="module", params=[1, 2, 3])
def pool(request: pytest.FixtureRequest, archive: Archive, ray_local: ModuleType) -> Iterator[RayExecutor]:
    executor = ray_executor(archive, request.param)
    yield executor
    executor.close()


def test_the_lag_matters(serial: dict[int | None, list[Item]]) -> None:
    keys = {lag: [item.attention_key for item in items] for lag, items in serial.items()}
    assert len({tuple(k) for k in keys.values()}) == 4
    assert len(set(keys[0])) == 6  # a version for each step
    draws = {lag: [item.index_N.tolist() for item in items] for lag, items in serial.items()}
    assert draws[0] != draws[1] != draws[4] != draws[None]


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1, 4, None])
@pytest.mark.parametrize("window", [2, 16])
def test_actors_give_the_items_of_the_serial_executor(
    pool: RayExecutor, serial: dict[int | None, list[Item]], lag: int | None, window: int
) -> None:
    for mine, reference in zip(run(make_plan(lag=lag), pool, window=window), serial[lag], strict=True):
        assert_same_item(mine, reference)


MAX_DELAY_S = 0.05


def delayed_actor(ray: ModuleType, seed: int) -> Any:
    """A sampler that waits before each item as (seed, visit) decide, and tells when it was done."""
    from ats_stream.workers.actors import SamplerActor

    sampler: Any = SamplerActor

    class DelayedActor(sampler.__ray_metadata__.modified_class):  # type: ignore[misc]  # known to Ray alone
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.done: list[tuple[float, int]] = []

        def sample(self, visit: Visit, weights: AttentionWeights) -> Item:
            # nobody sets the event: the wait is the delay itself, and no order depends on its length
            delay_s = MAX_DELAY_S * random.Random(f"{seed} {visit.stream_id}").random()
            threading.Event().wait(delay_s)
            item: Item = super().sample(visit, weights)
            self.done.append((time.monotonic(), visit.stream_id))
            return item

        def order(self) -> list[tuple[float, int]]:
            return self.done

    return ray.remote(DelayedActor)


@pytest.mark.slow
@pytest.mark.parametrize("num_samplers", [2, 3])
def test_delays_change_the_order_of_work_and_no_item(
    archive: Archive, ray_local: ModuleType, serial: dict[int | None, list[Item]], num_samplers: int
) -> None:
    actor = delayed_actor(ray_local, seed=num_samplers)
    executor = RayExecutor(
        *table(archive), MODEL, SAMPLER, num_samplers=num_samplers, cpus_per_sampler=0.1, actor=actor
    )
    try:
        for lag in (0, 1, 4):
            began_s = time.monotonic()
            items = run(make_plan(lag=lag), executor)
            for mine, reference in zip(items, serial[lag], strict=True):
                assert_same_item(mine, reference)
        parts = ray_local.get([actor.order.remote() for actor in executor._actors])
        done = sorted(done for part in parts for done in part if done[0] > began_s)
        asked = [item.visit.stream_id for item in items]
        # an item may have been asked for twice; they did overtake each other
        assert asked != list(dict.fromkeys(stream_id for _, stream_id in done))
    finally:
        executor.close()


def pids(ray: ModuleType, executor: RayExecutor) -> list[int]:
    """Process ids of the samplers."""
    ids: list[Any] = [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in executor._actors]
    found: list[int] = ray.get(ids)
    return found


@pytest.mark.slow
def test_samplers_killed_in_mid_stream_change_nothing(
    archive: Archive, ray_local: ModuleType, serial: dict[int | None, list[Item]]
) -> None:
    executor = ray_executor(archive, 2)
    first = pids(ray_local, executor)
    killed: list[int] = []

    def kill(step: int) -> None:
        # one after another; the second time both at once, while the window is full
        victims = {1: first[:1], 3: pids(ray_local, executor)}.get(step, []) if step in (1, 3) else []
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    try:
        items = run(make_plan(lag=1), executor, before_step=kill)
        assert len(killed) == 3
        assert not set(pids(ray_local, executor)) & set(killed)
    finally:
        executor.close()
    for mine, reference in zip(items, serial[1], strict=True):
        assert_same_item(mine, reference)


@pytest.mark.slow
def test_an_error_in_an_actor_arrives_as_it_was_raised_and_the_actor_lives_on(
    archive: Archive, ray_local: ModuleType, serial: dict[int | None, list[Item]]
) -> None:
    slides, labels = table(archive)
    gone = [*slides[:9], "/nowhere/gone.ome.zarr", *slides[10:]]
    executor = RayExecutor(gone, labels, MODEL, SAMPLER, num_samplers=1, cpus_per_sampler=0.1)
    plan = Plan(images=(8, 9, 7), batch_size=1, num_epochs=1, seed=0, shuffle=False, lag=None)
    try:
        stream = Stream(plan, executor)
        stream.publish(0, attention(0))
        assert stream.next_step()[0].slide == slides[8]
        with pytest.raises(SlideError) as caught:
            stream.next_step()
        assert type(caught.value) is SlideError
        assert (caught.value.slide, caught.value.reason) == (
            "/nowhere/gone.ome.zarr",
            "no such file or folder",
        )
        assert str(caught.value) == "/nowhere/gone.ome.zarr: no such file or folder"
        assert caught.value.__suppress_context__
        sound = executor.submit(plan.visits(2)[0], weights(0)).result()
        assert_same_item(sound, make_sampler(archive).sample(plan.visits(2)[0], weights(0)))
    finally:
        executor.close()


class Deadly:
    """Ends the process that unpickles it, as an image that crashes its reader would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


@pytest.mark.slow
def test_an_item_that_ends_its_sampler_each_time_ends_the_stream_by_name(
    archive: Archive, ray_local: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor_module, "CALL_RETRIES", 0)  # each start of an actor takes seconds
    executor = ray_executor(archive, 1)
    deadly: Any = Deadly()
    try:
        pending = executor.submit(make_plan(lag=None).visits(0)[0], AttentionWeights("deadly", {"w": deadly}))
        slide = table(archive)[0][make_plan(lag=None).visits(0)[0].image]
        with pytest.raises(SlideError, match=r"ome\.zarr: ended its sampler 3 times") as caught:
            pending.result()
        assert str(caught.value).startswith(slide)
        assert "\n" not in str(caught.value)
    finally:
        executor.close()


@pytest.mark.slow
def test_closing_ends_the_actors_without_a_word(
    archive: Archive, ray_local: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    executor = ray_executor(archive, 2)
    processes = [psutil.Process(pid) for pid in pids(ray_local, executor)]
    plan = make_plan(lag=None)
    pending = [executor.submit(visit, weights(0)) for step in range(4) for visit in plan.visits(step)]
    pending[0].result()
    executor.close()
    _, left = psutil.wait_procs(processes, timeout=30)
    assert left == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_an_image_stays_with_the_sampler_that_has_it_unless_that_is_behind(
    archive: Archive, ray_local: ModuleType
) -> None:
    executor = ray_executor(archive, 3)
    pending: list[Any] = []

    def asked(image: int) -> int:
        pending.append(executor.submit(visit(image), weights(0)))
        return int(pending[-1]._calls[0].number)

    def come() -> None:
        for remote in pending:
            remote.result()
        pending.clear()

    try:
        assert [asked(image) for image in (0, 1, 2)] == [0, 1, 2]
        come()
        assert [asked(image) for image in (2, 1, 0)] == [2, 1, 0]
        come()
        # one item more than others owe is made up for by what is at hand, two are not
        assert [asked(image) for image in (2, 2, 2)] == [2, 2, 0]
        assert [asked(image) for image in (2, 3)] == [0, 1]
        come()
        executor.read_ahead([visit(1)])
        assert asked(1) == 1
        come()
    finally:
        executor.close()


def test_executors_are_made_by_name(archive: Archive) -> None:
    serial = make_executor("serial", *table(archive), MODEL, SAMPLER)
    assert isinstance(serial, SerialExecutor)
    serial.close()
    with pytest.raises(InputError, match="executor must be serial or ray, got 'dask'"):
        make_executor("dask", *table(archive), MODEL, SAMPLER)


# --- samplers that are late

HEDGE_AFTER_S = 1.0  # more than a sound sampler takes for one of these images on a busy machine


def stuck_in(executor: RayExecutor, number: int, fifo: str) -> Any:
    """Hold all calls of a sampler up until somebody writes into the pipe, whose opening waits for that."""

    def hold(actor: Any) -> None:
        with actor._lock:
            Path(fifo).read_text()

    return executor._actors[number].__ray_call__.remote(hold)


@pytest.mark.slow
def test_items_of_a_sampler_that_is_stuck_are_asked_of_another(
    archive: Archive, ray_local: ModuleType, serial: dict[int | None, list[Item]], tmp_path: Path
) -> None:
    fifo = str(tmp_path / "held")
    os.mkfifo(fifo)
    executor = ray_executor(archive, 3, hedge_after_s=HEDGE_AFTER_S)
    held: list[Any] = []

    def hold(step: int) -> None:
        if step == 4:  # enough have come to tell what is late
            held.append(stuck_in(executor, 0, fifo))

    try:
        items = run(make_plan(lag=1), executor, before_step=hold)
        # the stuck one still owes what nobody waits for any more, so it is asked last
        assert executor.num_hedged >= 1
        owed = [call for call in executor._late if call.number == 0]
        assert owed
        again = run(make_plan(lag=1), executor)
        assert [call for call in executor._late if call.number == 0] == owed
        Path(fifo).write_text("go on")
        ray_local.get(held)
        for call in executor._late:  # they come all the same, and are the same
            parcel = ray_local.get(call.reference)
            item = executor._shelf.take(parcel, call.place)
            wanted = [one for one in serial[1] if one.visit == item.visit]
            assert_same_item(item, wanted[0])
        executor._take_late()
        assert (executor._late, executor._open) == ([], [set(), set(), set()])
    finally:
        executor.close()
    for found in (items, again):
        for mine, reference in zip(found, serial[1], strict=True):
            assert_same_item(mine, reference)


@pytest.mark.slow
def test_a_bad_image_is_the_same_error_from_a_second_sampler(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    fifo = str(tmp_path / "held")
    os.mkfifo(fifo)
    slides, labels = table(archive)
    gone = [*slides[:9], "/nowhere/gone.ome.zarr"]
    executor = RayExecutor(
        gone,
        labels,
        MODEL,
        SAMPLER,
        num_samplers=2,
        cpus_per_sampler=0.1,
        hedge_after_s=HEDGE_AFTER_S,
        near=True,
    )
    visits = [visit(number) for number in range(10)]
    try:
        for one in visits[:8]:
            executor.submit(one, weights(0)).result()
        held = stuck_in(executor, 0, fifo)
        pending = executor.submit(visits[9], weights(0))
        with pytest.raises(SlideError, match="gone"):
            pending.result()
        assert [call.number for call in executor._late] == [0]
        Path(fifo).write_text("go on")
        ray_local.get(held)
    finally:
        executor.close()
