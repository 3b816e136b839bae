"""The simulation against what can be computed by hand, and its measuring once for real."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulate import Cluster, Simulation, Times, simulate, sweep
from simulate_check import QUICK, run

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

EVEN = Times(sampler_cpu_s=[0.02], step_s=[0.05])


def elapsed(times: Times, **cluster: Any) -> float:
    return Simulation(times, Cluster(**cluster)).run().elapsed_s


@pytest.mark.parametrize("samplers", [1, 2, 4])
def test_without_lag_sampling_and_training_take_turns(samplers: int) -> None:
    # 4 items a step, then the step
    wanted = 50 * (4 / samplers * 0.02 + 0.05)
    assert elapsed(EVEN, samplers_per_rank=samplers, lag=0) == pytest.approx(wanted)


@pytest.mark.parametrize(("samplers", "per_step_s"), [(1, 4 * 0.02), (2, 0.05), (4, 0.05)])
def test_with_lag_the_slower_side_sets_the_pace(samplers: int, per_step_s: float) -> None:
    # what differs is the first fill and the last step
    assert elapsed(EVEN, samplers_per_rank=samplers, lag=1) == pytest.approx(50 * per_step_s, abs=0.1)


def test_a_window_of_one_sampler_call_at_a_time_undoes_the_overlap() -> None:
    # while a step computes, one item is made; the three others of the next step come after it
    alone = elapsed(EVEN, samplers_per_rank=4, lag=1, window=1)
    assert alone == pytest.approx(0.02 + 49 * (0.05 + 3 * 0.02) + 3 * 0.02 + 0.05, abs=1e-6)


def test_waiting_for_storage_takes_no_core_and_computing_does() -> None:
    waiting = Times(sampler_cpu_s=[0.0], sampler_io_s=[0.02], step_s=[0.05])
    assert elapsed(waiting, samplers_per_rank=4, lag=0, cores=1) == pytest.approx(50 * (0.02 + 0.05))
    assert elapsed(EVEN, samplers_per_rank=4, lag=0, cores=1) == pytest.approx(50 * (4 * 0.02 + 0.05))
    # one core for all, however they overlap: the sum of the work
    assert elapsed(EVEN, samplers_per_rank=4, lag=1, cores=1) == pytest.approx(50 * (4 * 0.02 + 0.05))


def test_deliveries_cost_what_they_cost() -> None:
    costly = Times(sampler_cpu_s=[0.02], step_s=[0.05], delivery_s=0.001)
    # all deliveries but the last fall into the time in which the sampler makes the next item
    wanted = 50 * (4 * 0.02 + 0.001 + 0.05)
    assert elapsed(costly, samplers_per_rank=1, lag=0) == pytest.approx(wanted)


def test_cores_that_crowd_each_other_are_slower_only_together() -> None:
    crowded = Times(sampler_cpu_s=[0.02], step_s=[0.05], crowded=1.5)
    # two samplers at once, then the step alone
    wanted = 50 * (2 * 0.02 * 1.5 + 0.05)
    # a pair starts and ends its turns together but for the first turn of each
    assert elapsed(crowded, samplers_per_rank=2, lag=0, cores=2) == pytest.approx(wanted, rel=0.02)
    assert elapsed(crowded, samplers_per_rank=1, lag=0, cores=2) == pytest.approx(50 * (4 * 0.02 + 0.05))


def test_even_ranks_are_as_fast_as_one_and_gradients_cost_their_round() -> None:
    one = elapsed(EVEN, samplers_per_rank=2, lag=1)
    assert elapsed(EVEN, samplers_per_rank=2, lag=1, num_ranks=8) == pytest.approx(one + 50 * 3 * 50e-6)
    cluster = Cluster(num_ranks=8, num_parameters=10_000_000)
    assert cluster.reduce_s == pytest.approx(2 * 7 / 8 * 4e7 / 1.25e9 + 3 * 50e-6)
    assert Cluster(num_ranks=1, num_parameters=10_000_000).reduce_s == 0


def test_a_step_lasts_as_long_as_its_slowest_rank() -> None:
    times = Times(sampler_cpu_s=[0.0], step_s=list(np.random.default_rng(0).exponential(0.05, 1000)))
    shares = simulate(times, Cluster(num_ranks=16, num_steps=400, lag=1))
    # of 16 exponential times the longest is on average their mean times the 16th harmonic number
    wanted = 1 / sum(1 / k for k in range(1, 17))
    assert shares["efficiency"] == pytest.approx(wanted, rel=0.1)
    assert shares["barrier_share"] == pytest.approx(1 - wanted, rel=0.1)
    assert simulate(times, Cluster(num_ranks=1, num_steps=400, lag=1))["efficiency"] == pytest.approx(1)


@pytest.mark.parametrize(("lag", "interval", "window"), [(0, 1, 16), (2, 1, 3), (3, 2, 64)])
def test_nothing_is_drawn_with_a_version_that_does_not_exist_yet(
    lag: int, interval: int, window: int
) -> None:
    rng = np.random.default_rng(1)
    times = Times(sampler_cpu_s=list(rng.random(50)), step_s=list(rng.random(50)))
    cluster = Cluster(
        num_ranks=3, samplers_per_rank=2, lag=lag, publish_interval=interval, window=window, num_steps=30
    )
    simulation = Simulation(times, cluster, trace=True)
    published: list[float] = [0.0]  # when each version came
    barrier = simulation.barrier

    def watched() -> Any:
        yield from barrier()
        if len(published) <= simulation.version:
            published.append(simulation.env.now)

    simulation.barrier = watched  # type: ignore[method-assign]  # only looks on
    outcome = simulation.run()
    assert len(outcome.starts) == outcome.num_items == 3 * 30 * 4  # each item once
    assert all(start_s >= published[version] for start_s, _, version in outcome.starts)
    assert {step for _, step, _ in outcome.starts} == set(range(30))


def test_the_same_seed_is_the_same_run_and_lag_and_window_never_hurt() -> None:
    rng = np.random.default_rng(2)
    times = Times(sampler_cpu_s=list(rng.random(50)), step_s=list(rng.random(50)))
    base = Cluster(samplers_per_rank=2, num_steps=40)
    assert simulate(times, base) == simulate(times, base)
    rows = sweep(times, times, ranks=[2], lags=[0, 1, 2], windows=[4, 16], base=base)
    assert [(row["lag"], row["window"]) for row in rows] == [(0, 16), (1, 16), (2, 16), (2, 4)]
    by_lag = [row["efficiency"] for row in rows[:3]]
    assert all(more >= less - 1e-9 for less, more in itertools.pairwise(by_lag))
    assert rows[3]["efficiency"] <= rows[2]["efficiency"] + 1e-9


@pytest.mark.torture
def test_measuring_predicting_and_running_once(digits: Any, tmp_path: Path, ray_local: ModuleType) -> None:
    found: Any = run(QUICK, digits, tmp_path)
    times = Times(**found["times"])
    assert len(times.sampler_cpu_s) >= QUICK.num_steps
    assert min(times.sampler_cpu_s) > 0
    assert len(times.step_s) == QUICK.num_steps
    assert times.crowded >= 1
    assert times.delivery_s > 0
    rows = found["check"]
    assert [(row["place"], row["lag"], row["samplers"]) for row in rows] == [
        (place, 2, samplers) for place in ("folder", "latency") for samplers in (1, 2)
    ]
    assert all(row["real"]["images_per_s"] > 0 and row["predicted_over_real"] > 0 for row in rows)
    # waiting 5 ms for each answer shows in what was measured there
    far = found["latency_times"]
    assert np.mean(far["sampler_io_s"]) + np.mean(far["sampler_cpu_s"]) > np.mean(times.sampler_cpu_s)
