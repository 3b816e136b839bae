"""A cluster of several nodes on this machine, training on it as a user starts it, and what kills parts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ats_stream.workers import RunConfig
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.ledger import check_ledger, read_ledger
from ats_stream.workers.metrics import read_metrics
from ats_stream.workers.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

NUM_EPOCHS = 10
STEPS_PER_EPOCH = 2
NUM_STEPS = NUM_EPOCHS * STEPS_PER_EPOCH
NUM_IMAGES = 7
OPTIONS = (
    *("--epochs", str(NUM_EPOCHS), "--batch-size", "4", "--lag", "1", "--seed", "5", "--lr", "1e-3"),
    *("--patches", "4", "--patch-px", "48", "--prior", "foreground", "--checkpoint-interval", "3"),
    *("--attention-width", "4", "--feature-width", "8"),
)
RANK, SAMPLER, CONTROLLER = "ray::RayTrainWorker", "ray::SamplerActor", "ray::TrainController"
CPUS_PER_SAMPLER = 0.25
DEADLINE_S = 120.0
POLL_S = 0.05
PAUSE = threading.Event()  # never set
RUN_TIMEOUT_S = 400.0
# a node that is gone is noticed within 2 s instead of 15
FAST_DEATH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
# each report waits for the next of these checks: it paces the epochs, so that kills come before the end
PACE = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
NODE_BYTES = 80 << 20  # 80 MiB, of the object store


class Nodes:
    """A head without CPUs, and nodes that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": NODE_BYTES}
        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={**head, "_system_config": FAST_DEATH}
        )
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def have(self, number: int) -> None:
        """Have so many nodes besides the head."""
        while len(self._nodes) > number:
            self.kill(0)
        while len(self._nodes) < number:
            self.add()
        self._cluster.wait_for_nodes()

    def add(self) -> None:
        """One more node, of one CPU."""
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=NODE_BYTES))

    def kill(self, number: int) -> None:
        """SIGKILL to a node's Ray; its workers end as they notice."""
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)

    def workers(self, name: str) -> list[psutil.Process]:
        """The cluster's processes that run an actor, in the order of their ids."""
        found = [p for node in [self._cluster.head_node, *self._nodes] for p in _workers(node, name)]
        return sorted(found, key=lambda process: process.pid)

    def running(self, name: str, number: int = 2) -> list[psutil.Process]:
        """Wait until so many processes run an actor; after a kill its successors take a while to start."""
        deadline = time.monotonic() + DEADLINE_S
        while len(found := self.workers(name)) < number:
            assert time.monotonic() < deadline, f"{len(found)} of {number} {name} run after {DEADLINE_S:g} s"
            PAUSE.wait(POLL_S)
        return found

    def place_of(self, name: str) -> int:
        """Number of the first node on which the actor runs, once it does."""
        self.running(name)
        return next(number for number, node in enumerate(self._nodes) if _workers(node, name))

    def wait_until_idle(self) -> None:
        """Wait for the end of all ranks, samplers and controllers; AssertionError if some stay."""
        left = [process for name in (RANK, SAMPLER, CONTROLLER) for process in self.workers(name)]
        _, alive = psutil.wait_procs(left, timeout=DEADLINE_S)
        assert [process.name() for process in alive] == []

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _workers(node: Any, name: str) -> list[psutil.Process]:
    """Processes of a node that run an actor."""
    found = []
    for raylet in node.all_processes["raylet"]:
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
    return found


class Run:
    """The command, running, on a Ray of its own without nodes; its output is read line by line."""

    def __init__(self, nodes: Nodes | None, table: Path, out: Path, *options: str) -> None:
        where = () if nodes is None else ("--address", nodes.address)
        ray = ("--executor", "ray", "--cpus-per-sampler", str(CPUS_PER_SAMPLER), *where)
        words = ["train", str(table), "--out", str(out), *OPTIONS, *ray, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ats_stream.cli", *words],
            env={**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **PACE},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait_for_epoch(self, epoch: int) -> None:
        """Read until an epoch is done."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if (done := re.match(r"epoch +(\d+)/", line)) and int(done[1]) >= epoch:
                return
        raise AssertionError(f"it ended before epoch {epoch}:\n{self.text}")

    def wait_a_moment(self, seconds: float) -> None:
        """Let it go on for so long, so that a kill falls between the lines that it prints."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)

    def end(self) -> int:
        """Read to the end; its exit code."""
        rest, _ = self.process.communicate(timeout=RUN_TIMEOUT_S)
        self.lines.append(rest)
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL to the driver."""
        self.process.kill()
        self.end()

    @property
    def text(self) -> str:
        return "".join(self.lines)


def train(
    nodes: Nodes,
    table: Path,
    out: Path,
    *options: str,
    accidents: Mapping[int, Callable[[Run], None]] | None = None,
) -> Run:
    """Train to the end, with accidents after some epochs; no process may be left."""
    run = Run(nodes, table, out, *options)
    try:
        for epoch, accident in (accidents or {}).items():
            run.wait_for_epoch(epoch)
            accident(run)
        code = run.end()
    except BaseException:
        run.kill()
        raise
    assert code == 0, run.text
    nodes.wait_until_idle()
    return run


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to each; there must be some."""
    assert processes
    for process in processes:
        process.send_signal(signal.SIGKILL)


def model_of(out: Path) -> dict[str, torch.Tensor]:
    """The weights of a run that has come to its end."""
    state = load_checkpoint(find_checkpoint(out))
    assert state["step"] == NUM_STEPS
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


def farthest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two models."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def assert_same_run(out: Path, whole: Path) -> None:
    """Weights, draws and numbers of two runs are the same, bit for bit, and each visit was done once."""
    mine, wanted = model_of(out), model_of(whole)
    for name, weight in wanted.items():
        assert torch.equal(mine[name], weight), name
    numbers = [
        [{k: r[k] for k in ("phase", "step", "epoch", "loss", "accuracy")} for r in read_metrics(run)]
        for run in (out, whole)
    ]
    assert numbers[0] == numbers[1]
    assert_each_visit_once(out)


def assert_each_visit_once(out: Path) -> None:
    """By the ledger, against the plan and by counting."""
    state = load_checkpoint(find_checkpoint(out))
    trainer = RunConfig.from_dict(state["config"]).trainer
    plan = Plan(
        images=tuple(range(NUM_IMAGES)),
        batch_size=trainer.batch_size,
        num_epochs=trainer.num_epochs,
        seed=trainer.seed,
        lag=trainer.lag,
    )
    records = list(read_ledger(out))
    assert check_ledger(plan, records) == ()
    for epoch in range(1, NUM_EPOCHS + 1):
        done = sorted(r.image for r in records if r.epoch == epoch and r.share > 0)
        assert done == list(range(NUM_IMAGES))
