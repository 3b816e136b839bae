"""The plan of a run, held to its promises by search over small plans."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.workers import Plan, Visit


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        images=tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))),
        batch_size=draw(st.integers(1, 12)),
        num_epochs=draw(st.integers(1, 4)),
        seed=draw(st.integers(-(2**63), 2**64)),
        shuffle=draw(st.booleans()),
        lag=draw(st.none() | st.integers(0, 5)),
        publish_interval=draw(st.integers(1, 4)),
        extra_patches=draw(st.integers(0, 9)),
        extra_epochs=draw(st.integers(0, 4)),
    )


def all_steps(plan: Plan) -> list[tuple[Visit, ...]]:
    return [plan.visits(step) for step in range(plan.num_steps)]


@given(plans())
def test_every_epoch_visits_every_image_exactly_once(plan: Plan) -> None:
    steps = all_steps(plan)
    for epoch in range(plan.num_epochs):
        part = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        real = [visit.image for visits in part for visit in visits if visit.share > 0]
        assert Counter(real) == Counter(plan.images)
        assert real == plan.order(epoch).tolist()


@given(plans())
def test_steps_are_full_batches_whose_shares_are_equal_and_sum_to_one(plan: Plan) -> None:
    for step, visits in enumerate(all_steps(plan)):
        assert len(visits) == plan.batch_size
        shares = [visit.share for visit in visits if visit.share > 0]
        assert set(shares) == {1 / len(shares)}
        assert sum(Fraction(1, round(1 / share)) for share in shares) == 1
        # what fills up stands behind what counts, so only the last batches of epochs can hold it
        assert [visit.share > 0 for visit in visits] == sorted((v.share > 0 for v in visits), reverse=True)
        assert len(shares) == plan.batch_size or (step + 1) % plan.steps_per_epoch == 0
        assert {visit.step for visit in visits} == {step}


@given(plans())
def test_filling_visits_look_at_the_images_and_draws_that_the_epoch_has_anyway(plan: Plan) -> None:
    for visits in all_steps(plan):
        for visit in visits:
            epoch = visit.step // plan.steps_per_epoch
            assert visit.image in plan.images
            assert visit.stream_id == (epoch << 32) + visit.image


@given(plans())
def test_stream_ids_tell_all_real_visits_apart(plan: Plan) -> None:
    ids = [visit.stream_id for visits in all_steps(plan) for visit in visits if visit.share > 0]
    assert len(set(ids)) == len(ids) == plan.num_epochs * len(plan.images)


@given(plans())
def test_ranks_partition_each_step_in_order(plan: Plan) -> None:
    for step in range(plan.num_steps):
        for world_size in range(1, plan.batch_size + 1):
            if plan.batch_size % world_size:
                with pytest.raises(ValueError, match=f"{world_size} does not divide the batch"):
                    plan.visits_of_rank(step, 0, world_size)
                continue
            parts = [plan.visits_of_rank(step, rank, world_size) for rank in range(world_size)]
            assert {len(part) for part in parts} == {plan.batch_size // world_size}
            assert tuple(visit for part in parts for visit in part) == plan.visits(step)


@given(plans())
def test_versions_rise_with_the_step_and_are_published_before_it(plan: Plan) -> None:
    versions = [plan.version_of(step) for step in range(plan.num_steps + 1)]
    assert versions == sorted(versions)
    for step, version in enumerate(versions):
        assert 0 <= version <= step
        assert plan.is_published(version)
        if plan.lag is None:
            assert version == 0
        elif step >= plan.lag:
            # as old as the lag asks for, and no older than the next publication
            assert plan.lag <= step - version < plan.lag + plan.publish_interval
    for step in range(plan.num_steps):
        assert {visit.version for visit in plan.visits(step)} == {versions[step]}


@given(plans())
def test_only_versions_that_some_step_can_ask_for_are_published(plan: Plan) -> None:
    far = (plan.lag or 0) + plan.num_steps + plan.publish_interval + 1
    asked = {plan.version_of(step) for step in range(far)}
    published = {version for version in range(plan.num_steps + 1) if plan.is_published(version)}
    assert published == {version for version in asked if version <= plan.num_steps}


@given(plans(), st.none() | st.integers(0, 5), st.integers(1, 4))
def test_lag_changes_versions_and_nothing_else(plan: Plan, lag: int | None, interval: int) -> None:
    other = dataclasses.replace(plan, lag=lag, publish_interval=interval)
    for visits, theirs in zip(all_steps(plan), all_steps(other), strict=True):
        assert [dataclasses.replace(v, version=0) for v in visits] == [
            dataclasses.replace(v, version=0) for v in theirs
        ]


@given(plans())
def test_a_step_depends_on_nothing_that_was_asked_before(plan: Plan) -> None:
    forwards = all_steps(plan)
    fresh = dataclasses.replace(plan)
    backwards = [fresh.visits(step) for step in reversed(range(plan.num_steps))]
    assert backwards[::-1] == forwards


@given(plans())
def test_more_epochs_do_not_change_the_first_ones(plan: Plan) -> None:
    longer = dataclasses.replace(plan, num_epochs=plan.num_epochs + 1)
    assert all_steps(longer)[: plan.num_steps] == all_steps(plan)


def test_order_is_that_of_the_table_without_shuffling_and_differs_by_epoch_and_seed_with_it() -> None:
    images = tuple(range(100, 140))
    plan = Plan(images=images, batch_size=1, num_epochs=2, seed=0, shuffle=False)
    assert plan.order(0).tolist() == plan.order(1).tolist() == list(images)
    orders = [
        dataclasses.replace(plan, shuffle=True, seed=seed).order(epoch).tolist()
        for seed in (0, 1, -1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert all(sorted(order) == list(images) for order in orders)


def test_all_orders_of_three_images_are_equally_likely() -> None:
    plan = Plan(images=(0, 1, 2), batch_size=3, num_epochs=1, seed=0)
    counts = Counter(tuple(plan.order(epoch).tolist()) for epoch in range(600))
    assert len(counts) == 6
    # chi-square with 5 degrees of freedom exceeds 20.5 once in a thousand; the seed is fixed
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5
    assert np.sum(list(counts.values())) == 600


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": ()}, "images is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_epochs": -1}, "num_epochs must be at least 1, got -1"),
        ({"publish_interval": 0}, "publish_interval must be at least 1, got 0"),
        ({"lag": -1}, "lag must be at least 0, got -1"),
    ],
)
def test_impossible_plans_are_refused(changed: dict[str, Any], message: str) -> None:
    given = {"images": (0,), "batch_size": 1, "num_epochs": 1, "seed": 0, **changed}
    with pytest.raises(ValueError, match=message):
        Plan(**given)


@given(plans())
def test_extra_patches_fall_from_epoch_to_epoch_and_are_alike_within_one(plan: Plan) -> None:
    per_epoch = []
    for epoch in range(plan.num_epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        (extra,) = {visit.extra_patches for step in steps for visit in plan.visits(step)}
        per_epoch.append(extra)
    assert per_epoch == sorted(per_epoch, reverse=True)
    assert per_epoch[0] == (plan.extra_patches if plan.extra_epochs else 0)
    assert not any(per_epoch[plan.extra_epochs :])


@given(plans(), st.data())
def test_steps_asked_for_in_any_order_are_those_of_a_fresh_plan(plan: Plan, data: st.DataObject) -> None:
    for step in data.draw(st.lists(st.integers(0, plan.num_steps - 1), max_size=9)):
        assert plan.visits(step) == dataclasses.replace(plan).visits(step)
    assert plan == dataclasses.replace(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("weighted", [False, True])
def test_an_epochs_order_is_made_once_for_all_its_steps(
    monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    asked: list[int] = []
    order = Plan.order
    monkeypatch.setattr(Plan, "order", lambda self, epoch: asked.append(epoch) or order(self, epoch))
    weights = tuple(1.0 + n % 3 for n in range(100)) if weighted else None
    plan = Plan(images=tuple(range(100)), batch_size=4, num_epochs=4, seed=0, weights=weights)
    for step in range(75):
        plan.visits(step)  # as the ledger
        plan.visits(step + 20)  # as a stream that runs ahead
    assert asked == [0, 1, 2, 3]
    assert len(plan._epochs) == 2
