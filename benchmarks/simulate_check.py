"""Measure what the simulation replays, and hold its predictions to real runs with 1, 2 and 4 samplers.

    python benchmarks/simulate_check.py              # minutes; writes benchmarks/results/simulation.json
    python benchmarks/simulate_check.py --quick      # a small version, for the tests

Two stores of the same images: a folder, and a server on this machine that waits before it answers, as object
storage does. For each, one after the other: what one sampler takes for an item, processor and waiting apart,
and what ordering and taking it costs the rank, while nobody trains; how much slower two samplers at once are;
and what a step takes with items at hand. From these the simulation, with as many cores as there are, predicts
training with 1, 2 and 4 samplers, lag 0 and 2; then these trainings run, for real, under Ray. No prediction
uses a number from a training. The machine must be quiet: each real run says what share of it others took.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
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
from ats_stream.workers.ranks import Alone
from ats_stream.workers.ray_executor import ITEMS_AT_ONCE, RayExecutor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.workers.protocol import Item

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


@dataclass(frozen=True)
class Sampled:
    """What samplers did while nobody trained."""

    seconds: list[float]
    """Time of each item."""
    cpu_s: float
    """Processor time for an item, of the samplers and of the server of images, if there is one."""
    rank_cpu_s: float
    """Processor time of this process for an item."""
    items: list[Item]
    """Those of the last step."""


def sample_alone(setting: Setting, *, samplers: int) -> Sampled:
    """Go through the images with new attention at each step, as training has it, but no training."""
    # one item at a time, or those that wait for others would count as waiting for storage
    executor = setting.executor(samplers, items_at_once=1)
    model = PatchClassifier(setting.config.model)
    # two rounds over the images, in which they are opened and their views read, then what counts
    warm_up = 2 * setting.plan(lag=None, num_steps=1).steps_per_epoch
    # far enough behind that the window is always full
    plan = setting.plan(lag=WINDOW // ITEMS_PER_STEP + 1, num_steps=warm_up + setting.num_steps)
    stream = Stream(plan, executor, window=WINDOW)
    stream.publish(0, model.attention)
    seconds: list[float] = []
    items: list[Item] = []
    start_s = start_rank_s = 0.0
    for number in range(warm_up + setting.num_steps):
        if number == warm_up:
            start_s, start_rank_s = processor_s(*SAMPLING), time.process_time()
        items = stream.next_step()
        with torch.no_grad():
            next(model.attention.parameters()).mul_(1.0001)
        stream.publish(stream.step, model.attention)
        if number >= warm_up:
            seconds += [item.seconds for item in items]
    cpu_s, rank_cpu_s = processor_s(*SAMPLING) - start_s, time.process_time() - start_rank_s
    executor.close()
    return Sampled(seconds, cpu_s / len(seconds), rank_cpu_s / len(seconds), items)


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


def step_times(setting: Setting, items: Sequence[Item]) -> list[float]:
    """Processor time of a rank for each step with items at hand."""
    learner = setting.learner()
    for _ in range(WARM_UP_STEPS):
        learner.step(items)
    seconds = []
    for _ in range(setting.num_steps):
        start_s = time.process_time()
        learner.step(items)
        seconds.append(time.process_time() - start_s)
    return seconds


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


def measured_times(near: Setting, far: Setting) -> dict[str, Times]:
    """What the simulation needs to know of both places."""
    alone, pair, distant = (
        sample_alone(near, samplers=1),
        sample_alone(near, samplers=2),
        sample_alone(far, samplers=1),
    )
    common = {
        "step_s": step_times(near, alone.items),
        "delivery_s": alone.rank_cpu_s,
        "crowded": max(1.0, pair.cpu_s / alone.cpu_s),
    }
    # items differ in time as measured; on average each takes the processor time that was measured
    scale = alone.cpu_s / float(np.mean(alone.seconds))
    view_s = view_times(far)
    in_order = distant.cpu_s + float(np.mean(view_s))
    waits = [max(0.0, seconds - in_order) for seconds in distant.seconds]
    return {
        "folder": Times(sampler_cpu_s=[scale * seconds for seconds in alone.seconds], **common),
        "latency": Times(sampler_cpu_s=[distant.cpu_s], sampler_io_s=waits, view_io_s=view_s, **common),
    }


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


def others_s() -> float:
    """Processor time so far of all that is not this process and those below it."""
    machine = psutil.cpu_times()
    return machine.user + machine.nice + machine.system - processor_s() - time.process_time()


def check(size: Size, near: Setting, far: Setting) -> dict[str, object]:
    """Times, predictions and real runs of both places."""
    times = measured_times(near, far)
    rows = []
    for place, setting in (("folder", near), ("latency", far)):
        for lag in size.lags:
            for samplers in size.samplers:
                predicted = simulate(
                    times[place],
                    Cluster(
                        samplers_per_rank=samplers,
                        window=WINDOW,
                        items_per_rank=ITEMS_PER_STEP,
                        lag=lag,
                        num_steps=max(60, setting.num_steps),
                        cores=os.cpu_count(),
                    ),
                )
                real = real_run(setting, samplers=samplers, lag=lag)
                row = {
                    "place": place,
                    "lag": lag,
                    "samplers": samplers,
                    "real": real,
                    "predicted": {name: predicted[name] for name in real if name in predicted},
                    "predicted_over_real": predicted["images_per_s"] / real["images_per_s"],
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
    return {"times": asdict(times["folder"]), "latency_times": asdict(times["latency"]), "check": rows}


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
