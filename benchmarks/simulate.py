"""Training with samplers as a discrete-event simulation that replays measured times for any number of ranks.

    python benchmarks/simulate.py --write      # 1 to 1,024 ranks, from the times in results/simulation.json
    python benchmarks/simulate.py --ranks 1 64 --lags 0 1 4 --windows 4 16 --samplers 2

What is simulated is what ats_stream.workers does: each rank keeps up to ``window`` items on order, in the
plan's order, as far as the versions of the attention that draw them exist; an item goes to the rank's sampler
that owes the fewest, which has several under way: one computes, the others wait for storage. Which of them
has met an image before is left out: all images count as open. A step takes its
items in order, computes, and ends when all ranks have, after the gradients went round; then the next version
exists. Views of what else the window holds are read before. Times are drawn, seeded, from those that were
measured, so two runs that differ in lag or window alone see the same times. ``simulate_check.py`` measures
the times and holds the simulation to real runs.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from ats_stream.workers.plan import Plan
from ats_stream.workers.ray_executor import ITEMS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

RESULTS = Path(__file__).parent / "results" / "simulation.json"
# what a core gives one process before the next one has its turn; smaller changes nothing that can be seen
QUANTUM_S = 0.002
# 10 Gbit/s, and what one message takes
LINK_BYTES_PER_S = 1.25e9
MESSAGE_S = 50e-6


@dataclass(frozen=True, kw_only=True)
class Times:
    """Measured seconds. Of the lists one is drawn for each item and each step."""

    sampler_cpu_s: Sequence[float]
    """A sampler's computing for one item."""
    step_s: Sequence[float]
    """A rank's computing for one step, its items at hand."""
    sampler_io_s: Sequence[float] = (0.0,)
    """A sampler's waiting for storage for one item, which takes no core."""
    view_io_s: Sequence[float] = (0.0,)
    """A sampler's waiting for the view of an image, which may come before the attention that draws on it."""
    delivery_s: float = 0.0
    """What ordering and taking an item costs the rank."""
    crowded: float = 1.0
    """How much longer computing takes while other cores are busy too: they share caches, or more."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Who computes."""

    num_ranks: int = 1
    samplers_per_rank: int = 1
    items_at_once: int = ITEMS_AT_ONCE
    """Items that a sampler has under way; one of them computes."""
    window: int = 16
    items_per_rank: int = 4
    """Items of each rank in a step."""
    lag: int = 0
    publish_interval: int = 1
    num_steps: int = 50
    cores: int | None = None
    """Cores that all processes share; None for one each."""
    num_parameters: int = 0
    """Of the model, whose gradients go round."""

    @property
    def reduce_s(self) -> float:
        """Time of a ring of all ranks for the gradients: there and back, in float32."""
        ranks = self.num_ranks
        if ranks == 1:
            return 0.0
        pieces = 2 * (ranks - 1)
        return pieces * (4 * self.num_parameters / ranks / LINK_BYTES_PER_S) + np.log2(ranks) * MESSAGE_S


@dataclass
class Outcome:
    """Sums over ranks and steps, in seconds, and the elapsed time."""

    elapsed_s: float = 0.0
    wait_s: float = 0.0
    """Waiting for items."""
    barrier_s: float = 0.0
    """Waiting for other ranks."""
    compute_s: float = 0.0
    num_items: int = 0
    starts: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, step, step that the attention must have) of each item as its sampler begins it, if asked for."""

    def shares(self, cluster: Cluster) -> dict[str, float]:
        """Speed, and where the time of ranks goes."""
        whole = self.elapsed_s * cluster.num_ranks
        return {
            "images_per_s": self.num_items / self.elapsed_s,
            "efficiency": self.compute_s / whole,
            "wait_share": self.wait_s / whole,
            "barrier_share": self.barrier_s / whole,
        }


class Simulation:
    """One run."""

    def __init__(self, times: Times, cluster: Cluster, *, seed: int = 0, trace: bool = False) -> None:
        self.times, self.cluster, self.trace = times, cluster, trace
        self.env = simpy.Environment()
        self.cores = simpy.Resource(self.env, cluster.cores) if cluster.cores else None
        per_step = cluster.num_ranks * cluster.items_per_rank
        self.plan = Plan(
            images=tuple(range(per_step)),
            batch_size=per_step,
            num_epochs=cluster.num_steps,
            seed=seed,
            lag=cluster.lag,
            publish_interval=cluster.publish_interval,
        )
        self.seed = seed
        self.outcome = Outcome()
        self.version = 0
        """Optimiser steps done: the attention of this version exists."""
        self._arrived = 0
        self._all_arrived = self.env.event()

    def run(self) -> Outcome:
        """Simulate to the last step."""
        ranks = [self.env.process(Rank(self, number).run()) for number in range(self.cluster.num_ranks)]
        self.env.run(simpy.AllOf(self.env, ranks))
        self.outcome.elapsed_s = self.env.now
        return self.outcome

    def compute(self, seconds: float) -> Generator[Any, Any, None]:
        """Hold a core for so long, in turns with the others."""
        if self.cores is None:
            yield self.env.timeout(seconds)
            return
        while seconds > 0:
            with self.cores.request() as core:
                yield core
                slower = self.times.crowded if self.cores.count > 1 else 1.0
                yield self.env.timeout(min(seconds, QUANTUM_S) * slower)
            seconds -= QUANTUM_S

    def barrier(self) -> Generator[Any, Any, None]:
        """Wait for all ranks and for the gradients; then the next version exists."""
        self._arrived += 1
        reached = self._all_arrived
        if self._arrived < self.cluster.num_ranks:
            yield reached
            return
        yield self.env.timeout(self.cluster.reduce_s)
        self._arrived, self._all_arrived = 0, self.env.event()
        self.version += 1
        reached.succeed()

    def version_exists(self, version: int) -> bool:
        """Whether items drawn with it may be ordered."""
        return version <= self.version


class Rank:
    """A rank with its samplers and its window."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self.simulation, self.env = simulation, simulation.env
        cluster, times = simulation.cluster, simulation.times
        rng = np.random.default_rng([simulation.seed, number])
        num_items = cluster.num_steps * cluster.items_per_rank
        self._cpu_s = rng.choice(times.sampler_cpu_s, num_items)
        self._io_s = rng.choice(times.sampler_io_s, num_items)
        self._step_s = rng.choice(times.step_s, cluster.num_steps)
        self._owed = [0] * cluster.samplers_per_rank
        self._queues = [simpy.Store(self.env) for _ in self._owed]
        self._view_io_s = rng.choice(times.view_io_s, num_items)
        self._computing = [simpy.Resource(self.env, 1) for _ in self._owed]
        for sampler in range(cluster.samplers_per_rank):
            for _ in range(cluster.items_at_once):
                self.env.process(self._sampler(sampler))
        self._views: dict[int, simpy.Event] = {}
        """Views that are read, or being read, of items that no attention exists for yet."""
        self._pending: deque[simpy.Event] = deque()
        self._ordered = 0

    def run(self) -> Generator[Any, Any, None]:
        """All steps."""
        simulation, outcome, cluster = self.simulation, self.simulation.outcome, self.simulation.cluster
        for step in range(cluster.num_steps):
            self._order()
            for _ in range(cluster.items_per_rank):
                start_s = self.env.now
                sampler = yield self._pending.popleft()
                outcome.wait_s += self.env.now - start_s
                yield from simulation.compute(simulation.times.delivery_s)
                self._owed[sampler] -= 1
                self._order()
            start_s = self.env.now
            yield from simulation.compute(self._step_s[step])
            outcome.compute_s += self.env.now - start_s
            start_s = self.env.now
            yield from simulation.barrier()
            outcome.barrier_s += self.env.now - start_s
            outcome.num_items += cluster.items_per_rank

    def _order(self) -> None:
        """Order ahead as far as the window and the versions go, as ats_stream.workers.stream does."""
        cluster, plan = self.simulation.cluster, self.simulation.plan
        while len(self._pending) < cluster.window and self._ordered < len(self._cpu_s):
            step = self._ordered // cluster.items_per_rank
            if not self.simulation.version_exists(plan.version_of(step)):
                self._read_ahead()
                break
            sampler = min(range(len(self._owed)), key=self._owed.__getitem__)
            self._owed[sampler] += 1
            done = self.env.event()
            self._queues[sampler].put((self._ordered, done))
            self._pending.append(done)
            self._ordered += 1

    def _read_ahead(self) -> None:
        """Begin to read the views of what else the window holds."""
        end = min(self._ordered + self.simulation.cluster.window - len(self._pending), len(self._cpu_s))
        for number in range(self._ordered, end):
            if number not in self._views:
                self._views[number] = self.env.timeout(self._view_io_s[number])

    def _sampler(self, sampler: int) -> Generator[Any, Any, None]:
        simulation, cluster = self.simulation, self.simulation.cluster
        while True:
            number, done = yield self._queues[sampler].get()
            if simulation.trace:
                step = number // cluster.items_per_rank
                simulation.outcome.starts.append((self.env.now, step, simulation.plan.version_of(step)))
            yield self._views.pop(number, None) or self.env.timeout(self._view_io_s[number])
            yield self.env.timeout(self._io_s[number])
            with self._computing[sampler].request() as turn:
                yield turn
                yield from simulation.compute(self._cpu_s[number])
            done.succeed(sampler)


def simulate(times: Times, cluster: Cluster, *, seed: int = 0) -> dict[str, float]:
    """Speed and shares of one run."""
    return Simulation(times, cluster, seed=seed).run().shares(cluster)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--samplers", type=int, default=4, help="of each rank (%(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--times", type=Path, default=RESULTS, help="JSON of simulate_check.py (%(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the table in the file of the times")
    arguments = parser.parse_args()
    content = json.loads(arguments.times.read_text())
    found = sweep(
        Times(**content["times"]),
        Times(**content["times_in_turns"]),
        ranks=arguments.ranks,
        lags=arguments.lags,
        windows=arguments.windows,
        base=Cluster(
            samplers_per_rank=arguments.samplers,
            num_steps=arguments.steps,
            items_per_rank=content["items_per_rank"],
            num_parameters=content["num_parameters"],
        ),
    )
    for row in found:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    if arguments.write:
        arguments.times.write_text(json.dumps({**content, "sweep": found}, indent=1) + "\n")


def sweep(
    times: Times,
    times_in_turns: Times,
    *,
    ranks: Sequence[int],
    lags: Sequence[int],
    windows: Sequence[int],
    base: Cluster,
) -> list[dict[str, float]]:
    """Every lag at the widest window, and every window at the longest lag, for each number of ranks.

    ``times_in_turns`` are those of lag 0.
    """
    rows = []
    for num_ranks in ranks:
        pairs = dict.fromkeys([*((lag, max(windows)) for lag in lags), *((max(lags), w) for w in windows)])
        for lag, window in pairs:
            cluster = Cluster(**{**vars(base), "num_ranks": num_ranks, "lag": lag, "window": window})
            shares = simulate(times if lag else times_in_turns, cluster)
            rows.append({"ranks": num_ranks, "lag": lag, "window": window, **shares})
    return rows


if __name__ == "__main__":
    main()
