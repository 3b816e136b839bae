"""Measure what the simulation replays, and hold its predictions to real runs with 1, 2 and 4 samplers.

    python benchmarks/simulate_check.py              # minutes; writes benchmarks/results/simulation.json
    python benchmarks/simulate_check.py --quick      # a small version, for the tests

Two stores of the same images: a folder, and a server on this machine that waits before it answers, as object
storage does. For each, one after the other: what one sampler takes for an item, processor and waiting apart,
and what ordering and taking it costs the rank, while nobody trains; how much slower two samplers at once are;
and what a step takes with items at hand. For lag 0 the same again with sampling and steps in turns, as they
are there: a sampler that rested while the rank computed, and a rank that rested while samplers did, find
their caches cold. From these the simulation, with as many cores as there are, predicts training with 1, 2
and 4 samplers, lag 0 and 2; then these trainings run, for real, under Ray.

A machine that others use too changes its speed within minutes. So a few steps with the same items are made
before and after whatever is measured, and processor times are compared in units of these; of each training
the run is taken that others disturbed least, with what share of the cores they had.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from latency_server import latency_server
from machine import describe_machine
from simulate import RESULTS, Cluster, Times, simulate

from ats_stream.demo.digits import DigitsConfig, build_archive
from ats_stream.io import read_archive
from ats_stream.models import ModelConfig, PatchClassifier
from ats_stream.workers import PatchSampler, Plan, RunConfig, SamplerConfig, Stream, TrainerConfig
from ats_stream.workers.cluster import ray_cluster
from ats_stream.workers.config import ClusterConfig
from ats_stream.workers.learner import Learner
from ats_stream.workers.protocol import AttentionWeights
from ats_stream.workers.ranks import Alone
from ats_stream.workers.ray_executor import ITEMS_AT_ONCE, RayExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator

ITEMS_PER_STEP = 8
WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    side_px: int
    num_images: int
    num_steps: int
    """Steps of each real training, after the warm-up."""
    feature_width: int
    latency_ms: int
    samplers: tuple[int, ...] = (1, 2, 4)
    lags: tuple[int, ...] = (0, 2)


FULL = Size(side_px=4096, num_images=32, num_steps=40, feature_width=32, latency_ms=30)
QUICK = Size(
    side_px=1024, num_images=8, num_steps=4, feature_width=8, latency_ms=5, samplers=(1, 2), lags=(2,)
)
WARM_UP_STEPS = 3
GAUGE_STEPS = 8
# a training is run again while others had a larger share of the cores than this, so often
QUIET_SHARE = 0.02
MAX_RUNS = 4


@dataclass(frozen=True)
class Setting:
    """Images at one place, and how they are looked at."""

    slides: list[str]
    labels: list[int]
    config: RunConfig
    num_steps: int

    def plan(self, *, lag: int | None, num_steps: int) -> Plan:
        """So many steps, by rounds over the images."""
        per_epoch = -(-len(self.slides) // ITEMS_PER_STEP)
        return Plan(
            images=tuple(range(len(self.slides))),
            batch_size=ITEMS_PER_STEP,
            num_epochs=-(-num_steps // per_epoch),
            seed=0,
            lag=lag,
        )

    def executor(self, samplers: int, *, items_at_once: int = ITEMS_AT_ONCE) -> RayExecutor:
        """Samplers as Ray actors."""
        return RayExecutor(
            self.slides,
            self.labels,
            self.config.model,
            self.config.sampler,
            num_samplers=samplers,
            cpus_per_sampler=0.1,
            items_at_once=items_at_once,
        )

    def learner(self) -> Learner:
        """What a rank trains."""
        return Learner(
            self.config,
            Alone(),
            num_steps=1000,
            target_RT=torch.tensor(self.labels)[:, None].float(),
            weight_R=torch.ones(len(self.labels)),
        )


class Gauge:
    """How fast the machine is at the moment: processor time of a step with always the same items."""

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        sampler = PatchSampler(setting.slides, setting.labels, config.model, config.sampler)
        arrays = {k: v.numpy() for k, v in PatchClassifier(config.model).attention.state_dict().items()}
        weights = AttentionWeights.of(arrays)
        self._items = [sampler.sample(v, weights) for v in setting.plan(lag=None, num_steps=1).visits(0)]
        self._learner = setting.learner()

    def step_times(self, number: int = GAUGE_STEPS) -> list[float]:
        """Seconds of so many steps, after the first few."""
        seconds = []
        for _ in range(WARM_UP_STEPS + number):
            start_s = time.process_time()
            self._learner.step(self._items)
            seconds.append(time.process_time() - start_s)
        return seconds[WARM_UP_STEPS:]

    @contextmanager
    def around(self) -> Iterator[list[float]]:
        """A list that holds the step's time, when the block is left: the shorter one of before and after."""
        found: list[float] = []
        before_s = np.median(self.step_times())
        yield found
        # what disturbs half a second of measuring may be over in the minute beside it
        found.append(float(min(before_s, np.median(self.step_times()))))


@dataclass(frozen=True)
class Sampled:
    """What samplers did while nobody trained, or in turns with steps; processor times in units of a step."""

    seconds: list[float]
    """Time of each item, not in these units."""
    cpu_s: float
    """Processor time for an item, of the samplers and of the server of images, if there is one."""
    rank_cpu_s: float
    """Processor time of this process for ordering and taking an item."""
    step_s: list[float]
    """Processor time of each step, if there were steps."""
    unit_s: float


def sample_alone(setting: Setting, gauge: Gauge, *, samplers: int, in_turns: bool) -> Sampled:
    """Go through the images with new attention at each step, as training has it, but no training.

    ``in_turns``: with a step, whose weights nobody samples with, after which alone the next items may begin.
    """
    # one item at a time, or those that wait for others would count as waiting for storage
    executor = setting.executor(samplers, items_at_once=1)
    model, learner = PatchClassifier(setting.config.model), setting.learner()
    # two rounds over the images, in which they are opened and their views read, then what counts
    warm_up = 2 * setting.plan(lag=None, num_steps=1).steps_per_epoch
    # without turns far enough behind that the window is always full
    lag = 0 if in_turns else WINDOW // ITEMS_PER_STEP + 1
    plan = setting.plan(lag=lag, num_steps=warm_up + setting.num_steps)
    stream = Stream(plan, executor, window=WINDOW)
    stream.publish(0, model.attention)
    seconds: list[float] = []
    step_s: list[float] = []
    start_s = start_rank_s = 0.0
    with gauge.around() as unit:
        for number in range(warm_up + setting.num_steps):
            if number == warm_up:
                start_s, start_rank_s = processor_s(*SAMPLING), time.process_time()
            items = stream.next_step()
            before_s = time.process_time()
            if in_turns:
                learner.step(items)
            this_step_s = time.process_time() - before_s
            with torch.no_grad():
                next(model.attention.parameters()).mul_(1.0001)
            stream.publish(stream.step, model.attention)
            if number >= warm_up:
                seconds += [item.seconds for item in items]
                step_s.append(this_step_s)
        cpu_s = processor_s(*SAMPLING) - start_s
        rank_cpu_s = time.process_time() - start_rank_s - sum(step_s)
        executor.close()
    unit_s, num = unit[0], len(seconds)
    units = [one / unit_s for one in step_s]
    return Sampled(seconds, cpu_s / num / unit_s, rank_cpu_s / num / unit_s, units, unit_s)


SAMPLING = ("SamplerActor", "latency_server")


def processor_s(*names: str) -> float:
    """Processor time so far of the processes below this one that have one of the names, or of all of them."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            words = " ".join(process.cmdline())
            if not names or any(name in words for name in names):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def view_times(setting: Setting) -> list[float]:
    """Time that each view takes which this process has kept: what is asked of the storage each time."""
    config = setting.config
    sampler = PatchSampler(setting.slides, setting.labels, config.model, config.sampler)
    seconds = []
    for image in range(len(setting.slides)):
        sampler.read_view(image)
        start_s = time.perf_counter()
        sampler.read_view(image)
        seconds.append(time.perf_counter() - start_s)
    return seconds


def measured_times(near: Setting, far: Setting, gauge: Gauge, *, in_turns: bool) -> dict[str, Times]:
    """What the simulation needs to know of both places, for lag 0 (``in_turns``) or for more.

    Processor times in units of a step: see :func:`at_speed`.
    """
    alone, pair, distant = (
        sample_alone(near, gauge, samplers=1, in_turns=in_turns),
        sample_alone(near, gauge, samplers=2, in_turns=in_turns),
        sample_alone(far, gauge, samplers=1, in_turns=in_turns),
    )
    at_hand = gauge.step_times(near.num_steps)
    common = {
        "step_s": alone.step_s if in_turns else [one / float(np.mean(at_hand)) for one in at_hand],
        "delivery_s": alone.rank_cpu_s,
        "crowded": max(1.0, pair.cpu_s / alone.cpu_s),
    }
    # items differ in time as measured; on average each takes the processor time that was measured
    scale = alone.cpu_s / float(np.mean(alone.seconds))
    view_s = view_times(far)
    in_order = distant.cpu_s * distant.unit_s + float(np.mean(view_s))
    waits = [max(0.0, seconds - in_order) for seconds in distant.seconds]
    return {
        "folder": Times(sampler_cpu_s=[scale * seconds for seconds in alone.seconds], **common),
        "latency": Times(sampler_cpu_s=[distant.cpu_s], sampler_io_s=waits, view_io_s=view_s, **common),
    }


def at_speed(times: Times, unit_s: float) -> Times:
    """Seconds on a machine that takes so long for the gauge's step; waiting for storage is what it is."""
    return replace(
        times,
        sampler_cpu_s=[unit_s * one for one in times.sampler_cpu_s],
        step_s=[unit_s * one for one in times.step_s],
        delivery_s=unit_s * times.delivery_s,
    )


def real_run(setting: Setting, *, samplers: int, lag: int) -> dict[str, float]:
    """Speed and share of waiting of a real training, and what others had of the cores."""
    executor = setting.executor(samplers)
    learner = setting.learner()
    plan = setting.plan(lag=lag, num_steps=WARM_UP_STEPS + setting.num_steps + 2 * len(setting.slides))
    stream = Stream(plan, executor, window=WINDOW)
    stream.publish(0, learner.model.attention)
    # every sampler opens the images it meets; two rounds over them leave few that it has not met
    warm_up = WARM_UP_STEPS + 2 * plan.steps_per_epoch
    wait_s = start_s = start_others_s = 0.0
    for number in range(warm_up + setting.num_steps):
        if number == warm_up:
            wait_s, start_s, start_others_s = 0.0, time.perf_counter(), others_s()
        before_s = time.perf_counter()
        items = stream.next_step()
        wait_s += time.perf_counter() - before_s
        learner.step(items)
        stream.publish(stream.step, learner.model.attention)
    elapsed_s, others = time.perf_counter() - start_s, others_s() - start_others_s
    executor.close()
    images = setting.num_steps * ITEMS_PER_STEP
    return {
        "images_per_s": images / elapsed_s,
        "wait_share": wait_s / elapsed_s,
        "others_share": others / elapsed_s / (os.cpu_count() or 1),
    }


def quiet_run(setting: Setting, gauge: Gauge, *, samplers: int, lag: int) -> tuple[dict[str, float], float]:
    """The run of a few that others disturbed least, and the gauge's step; the first that they hardly did."""
    runs = []
    for _ in range(MAX_RUNS):
        with gauge.around() as unit:
            real = real_run(setting, samplers=samplers, lag=lag)
        runs.append((real, unit[0]))
        if real["others_share"] < QUIET_SHARE:
            break
    return min(runs, key=lambda run: run[0]["others_share"])


def others_s() -> float:
    """Processor time so far of all but this process and those below it, and of the host's other guests."""
    machine = psutil.cpu_times()
    whole = machine.user + machine.nice + machine.system + getattr(machine, "steal", 0.0)
    return float(whole - processor_s() - time.process_time())


def check(size: Size, near: Setting, far: Setting) -> dict[str, object]:
    """Times, predictions and real runs of both places."""
    gauge = Gauge(near)
    times = {lagging: measured_times(near, far, gauge, in_turns=not lagging) for lagging in (True, False)}
    rows = []
    unit_s: list[float] = []
    for place, setting in (("folder", near), ("latency", far)):
        for lag in size.lags:
            for samplers in size.samplers:
                real, step_s = quiet_run(setting, gauge, samplers=samplers, lag=lag)
                unit_s.append(step_s)
                cluster = Cluster(
                    samplers_per_rank=samplers,
                    window=WINDOW,
                    items_per_rank=ITEMS_PER_STEP,
                    lag=lag,
                    num_steps=max(60, setting.num_steps),
                    cores=os.cpu_count(),
                )
                predicted = simulate(at_speed(times[lag > 0][place], step_s), cluster)
                row = {
                    "place": place,
                    "lag": lag,
                    "samplers": samplers,
                    "step_s": step_s,
                    "real": real,
                    "predicted": {name: predicted[name] for name in real if name in predicted},
                    "predicted_over_real": predicted["images_per_s"] / real["images_per_s"],
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
    usual_s = float(np.median(unit_s))
    found = {
        f"{where}times{how}": asdict(at_speed(times[lagging][place], usual_s))
        for where, place in (("", "folder"), ("latency_", "latency"))
        for how, lagging in (("", True), ("_in_turns", False))
    }
    return {**found, "check": rows}


def run(size: Size, digits: tuple[np.ndarray, np.ndarray], folder: Path) -> dict[str, object]:
    """Build the images, measure, predict, compare."""
    torch.set_num_threads(1)
    table = build_archive(
        folder,
        digits,
        DigitsConfig(num_train=size.num_images, num_val=1, num_test=1, side_px=size.side_px),
    )
    archive = read_archive(table)
    rows = [row for row in archive if row.split == "train"]
    config = RunConfig(
        model=ModelConfig(num_classes=len(archive.classes), feature_width=size.feature_width),
        sampler=SamplerConfig(num_patches=12, patch_px=64),
        trainer=TrainerConfig(batch_size=ITEMS_PER_STEP),
        classes=archive.classes,
    )
    labels = [archive.class_index(row) for row in rows]
    slides = [str(row.slide) for row in rows]
    near = Setting(slides, labels, config, size.num_steps)
    with (
        latency_server(folder, size.latency_ms) as url,
        ray_cluster(ClusterConfig(executor="ray"), cpus_needed=1),
    ):
        urls = [f"{url}/{Path(slide).relative_to(folder)}" for slide in slides]
        found = check(size, near, Setting(urls, labels, config, size.num_steps))
    return {
        "machine": describe_machine(),
        "size": asdict(size),
        "items_per_rank": ITEMS_PER_STEP,
        "window": WINDOW,
        "num_parameters": sum(p.numel() for p in PatchClassifier(config.model).parameters()),
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version, written nowhere")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    from ats_stream.demo.assets import fetch_digits

    with tempfile.TemporaryDirectory(prefix="ats-simulate-") as folder:
        found = run(QUICK if arguments.quick else FULL, fetch_digits(), Path(folder))
    if not arguments.quick:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
