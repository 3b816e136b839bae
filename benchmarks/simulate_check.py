"""Measure what the simulation replays, and hold its predictions to real runs with 1, 2 and 4 samplers.

    python benchmarks/simulate_check.py              # minutes; writes benchmarks/results/simulation.json
    python benchmarks/simulate_check.py --quick      # a small version, for the tests

Two stores of the same images: a folder, and a server on this machine that waits before it answers, as object
storage does. For each, alone on the machine and one after the other: a sampler's time for an item, what a
call costs besides (one sampler, nobody trains), and a rank's time for a step with items at hand. From these
the simulation, with as many cores as there are, predicts training with 1, 2 and 4 samplers, lag 0 and 2; then
these trainings run, for real, under Ray. No prediction uses a number from a training.
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
import torch
from latency_server import latency_server
from machine import describe_machine
from simulate import RESULTS, Cluster, Times, simulate

from ats_stream.demo.digits import DigitsConfig, build_archive
from ats_stream.io import read_archive
from ats_stream.models import ModelConfig, PatchClassifier
from ats_stream.workers import Plan, RunConfig, SamplerConfig, Stream, TrainerConfig
from ats_stream.workers.cluster import ray_cluster
from ats_stream.workers.config import ClusterConfig
from ats_stream.workers.executors import RayExecutor, make_executor
from ats_stream.workers.learner import Learner
from ats_stream.workers.ranks import Alone

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

    def executor(self, samplers: int) -> RayExecutor:
        """Samplers as Ray actors."""
        made = make_executor(
            "ray",
            self.slides,
            self.labels,
            self.config.model,
            self.config.sampler,
            num_samplers=samplers,
            cpus_per_sampler=0.1,
        )
        assert isinstance(made, RayExecutor)
        return made

    def learner(self) -> Learner:
        """What a rank trains."""
        return Learner(
            self.config,
            Alone(),
            num_steps=1000,
            target_RT=torch.tensor(self.labels)[:, None].float(),
            weight_R=torch.ones(len(self.labels)),
        )


def sampler_times(setting: Setting) -> tuple[list[float], float, list[Item]]:
    """Seconds of one sampler for each item, what each call costs besides, and some items; nobody trains."""
    executor = setting.executor(1)
    # lag None: nothing waits for training
    plan = setting.plan(lag=None, num_steps=WARM_UP_STEPS + setting.num_steps)
    stream = Stream(plan, executor, window=WINDOW)
    stream.publish(0, PatchClassifier(setting.config.model).attention)
    # the first round over the images opens them and reads their views
    warm_up = max(WARM_UP_STEPS, plan.steps_per_epoch)
    for _ in range(min(warm_up, plan.num_steps - 1)):
        items = stream.next_step()
    seconds: list[float] = []
    start_s = time.perf_counter()
    while stream.step < plan.num_steps:
        items = stream.next_step()
        seconds += [item.seconds for item in items]
    elapsed_s = time.perf_counter() - start_s
    executor.close()
    return seconds, max(0.0, elapsed_s / len(seconds) - float(np.mean(seconds))), items


def rank_times(setting: Setting, items: Sequence[Item]) -> tuple[list[float], float]:
    """Seconds of a rank for each step with items at hand, and for taking an item that is ready."""
    import ray

    learner = setting.learner()
    for _ in range(WARM_UP_STEPS):
        learner.step(items)
    seconds = []
    for _ in range(setting.num_steps):
        start_s = time.perf_counter()
        learner.step(items)
        seconds.append(time.perf_counter() - start_s)
    references = [ray.put(item) for item in items]
    start_s = time.perf_counter()
    for reference in references:
        ray.get(reference)
    return seconds, (time.perf_counter() - start_s) / len(references)


def real_run(setting: Setting, *, samplers: int, lag: int) -> dict[str, float]:
    """Speed and share of waiting of a real training, without its first steps."""
    executor = setting.executor(samplers)
    learner = setting.learner()
    plan = setting.plan(lag=lag, num_steps=WARM_UP_STEPS + setting.num_steps + 2 * len(setting.slides))
    stream = Stream(plan, executor, window=WINDOW)
    stream.publish(0, learner.model.attention)
    # every sampler opens the images it meets; two rounds over them leave few that it has not met
    warm_up = WARM_UP_STEPS + 2 * plan.steps_per_epoch
    wait_s = start_s = 0.0
    for number in range(warm_up + setting.num_steps):
        if number == warm_up:
            wait_s, start_s = 0.0, time.perf_counter()
        before_s = time.perf_counter()
        items = stream.next_step()
        wait_s += time.perf_counter() - before_s
        learner.step(items)
        stream.publish(stream.step, learner.model.attention)
    elapsed_s = time.perf_counter() - start_s
    executor.close()
    images = setting.num_steps * ITEMS_PER_STEP
    return {"images_per_s": images / elapsed_s, "wait_share": wait_s / elapsed_s}


def check(size: Size, near: Setting, far: Setting) -> dict[str, object]:
    """Times, predictions and real runs of both places."""
    near_s, call_s, items = sampler_times(near)
    far_s, _, _ = sampler_times(far)
    step_s, delivery_s = rank_times(near, items)
    # what the far place takes longer is waiting, for which no core is needed
    io_s = [max(0.0, seconds - float(np.mean(near_s))) for seconds in far_s]
    common = {"step_s": step_s, "sampler_call_s": call_s, "delivery_s": delivery_s}
    times = {
        "folder": Times(sampler_cpu_s=near_s, **common),
        "latency": Times(sampler_cpu_s=[float(np.mean(near_s))], sampler_io_s=io_s, **common),
    }
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
                    "predicted": {name: predicted[name] for name in real},
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
