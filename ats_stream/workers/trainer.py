"""The training loop of one rank. It runs alone in this process, or once in each process of Ray Train.

The loop knows its neighbours only through :class:`Ranks`; everything it must remember is the global step,
the weights, the optimiser and the attention versions that steps to come still draw with.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ats_stream.errors import CheckpointError, PreemptedError
from ats_stream.files import sha256_of
from ats_stream.io import StorageOptions
from ats_stream.workers.batch import evaluate
from ats_stream.workers.best import BestModel
from ats_stream.workers.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ats_stream.workers.config import ClusterConfig, RunConfig, check_same
from ats_stream.workers.executors import make_executor
from ats_stream.workers.learner import Learner
from ats_stream.workers.ledger import FLUSH_STEPS, Ledger, keep_ledger
from ats_stream.workers.metrics import MetricsLog, Record
from ats_stream.workers.plan import Plan
from ats_stream.workers.progress import Pace
from ats_stream.workers.protocol import AttentionWeights
from ats_stream.workers.quarantine import FAIL, Quarantine, blank_item
from ats_stream.workers.stream import Stream
from ats_stream.workers.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ats_stream.workers.executors import Executor
    from ats_stream.workers.progress import Progress
    from ats_stream.workers.protocol import Item
    from ats_stream.workers.ranks import Ranks
    from ats_stream.workers.sampler import SamplerConfig
    from ats_stream.workers.stream import Substitute


CHANGEABLE = ("on_bad_image", "max_bad_share")
"""Fields of TrainerConfig with which a run may be taken up that began with others."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a rank needs to know."""

    run_dir: str
    config: RunConfig
    cluster: ClusterConfig
    slides: list[str]
    """Paths, by row of the archive table."""
    labels: list[int]
    """Class of each row."""
    train_rows: tuple[int, ...]
    val_rows: tuple[int, ...]
    targets: list[list[float]] | None = None
    """Target values of each row; None for the class."""
    loss_weights: list[float] | None = None
    """What the loss of each row counts; None for 1."""
    visit_weights: list[float] | None = None
    """How often each of ``train_rows`` is visited, in proportion; None for once an epoch."""
    pixel_sizes: dict[int, float] = field(default_factory=dict)
    """Micrometres per pixel at level 0 of the rows that the table gives it for."""

    storage_options: StorageOptions = field(default_factory=StorageOptions)
    """For the URLs among the slides; no part of the configuration, which is written down."""

    @property
    def plan(self) -> Plan:
        """All visits of the training."""
        trainer = self.config.trainer
        return Plan(
            images=self.train_rows,
            batch_size=trainer.batch_size,
            num_epochs=trainer.num_epochs,
            seed=trainer.seed,
            lag=trainer.lag,
            publish_interval=trainer.publish_interval,
            extra_patches=trainer.extra_patches,
            extra_epochs=trainer.extra_epochs,
            weights=None if self.visit_weights is None else tuple(self.visit_weights),
        )

    @property
    def targets_of_rows(self) -> torch.Tensor:
        """Target values of all rows (R, T), float32."""
        return torch.tensor([[n] for n in self.labels] if self.targets is None else self.targets).float()

    @property
    def loss_weights_of_rows(self) -> torch.Tensor:
        """Loss weights of all rows (R,), float32."""
        return torch.tensor(self.loss_weights or [1.0] * len(self.slides)).float()

    def sampler_of(self, row: int) -> SamplerConfig:
        """What a row of the table is sampled by."""
        return self.config.sampler.of_image(self.pixel_sizes.get(row))

    @property
    def archive_key(self) -> str:
        """Hash of the slides' names, labels, splits and given pixel sizes: what is visited, not where."""
        names = [Path(slide).name for slide in self.slides]
        facts: list[Any] = [names, self.labels, self.train_rows, self.val_rows]
        more: list[Any] = [self.targets, self.loss_weights, self.visit_weights]
        if self.pixel_sizes:  # tables without any keep the key that they had before there were such
            more.append(sorted(self.pixel_sizes.items()))
        return sha256_of(json.dumps(facts + more).encode())


def check_resumable(state: Mapping[str, Any], job: TrainJob) -> None:
    """Raise CheckpointError if a checkpoint belongs to another configuration or to another archive."""
    before, now = state["config"], job.config.to_dict()
    if isinstance(before.get("trainer"), dict):
        for name in CHANGEABLE:
            now["trainer"][name] = before["trainer"].get(name)
    check_same(before, now, job.run_dir)
    if state["archive"] != job.archive_key:
        raise CheckpointError(
            f"{job.run_dir}: slides, labels, splits or pixel sizes of the table have changed; "
            "use another run folder"
        )


def _substitute(job: TrainJob) -> Substitute | None:
    """What takes the place of an image that cannot be read, if the configuration wants that."""
    if job.config.trainer.on_bad_image == FAIL:
        return None
    return partial(
        blank_item,
        slides=job.slides,
        sampler=job.config.sampler,
        num_channels=job.config.model.num_channels,
    )


def train_rank(
    job: TrainJob,
    ranks: Ranks,
    on_record: Callable[[Record], None] | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> None:
    """Train from the newest checkpoint of the run folder, or from the start, to the last step.

    Raises PreemptedError, in all ranks, after a stop was asked of one of them and what was done is saved.
    """
    executor = make_executor(
        job.cluster.executor,
        job.slides,
        job.labels,
        job.config.model,
        job.config.sampler,
        num_samplers=job.cluster.samplers_per_rank,
        cpus_per_sampler=job.cluster.cpus_per_sampler,
        gpus_per_sampler=job.cluster.gpus_per_sampler,
        hedge_after_s=job.cluster.hedge_after_s,
        near=not job.cluster.spread_samplers,
        storage_options=job.storage_options,
        pixel_sizes=job.pixel_sizes,
    )
    try:
        trainer = RankTrainer(job, ranks, executor)
        trainer.resume()
        log = None
        if ranks.rank == 0:
            trainer.keep_ledger()
            log = MetricsLog(
                Path(job.run_dir), resumed_step=trainer.stream.step, on_record=on_record, on_step=on_step
            )
        try:
            trainer.run(log)
        finally:
            if log is not None:
                log.close()
    finally:
        executor.close()


class RankTrainer:
    """What learns, and the stream that feeds it, of one rank."""

    def __init__(self, job: TrainJob, ranks: Ranks, executor: Executor) -> None:
        config = job.config.trainer
        self.job, self.ranks, self.executor, self.config = job, ranks, executor, config
        self.plan = job.plan
        self.targets_RT = job.targets_of_rows
        self.learner = Learner(
            job.config,
            ranks,
            num_steps=self.plan.num_steps,
            target_RT=self.targets_RT,
            weight_R=job.loss_weights_of_rows,
        )
        self.task = self.learner.task
        self.quarantine = Quarantine(
            ranks,
            num_images=len({*job.train_rows, *job.val_rows}),
            max_share=config.max_bad_share,
        )
        self._instead = _substitute(job)
        self.ledger = Ledger(Path(job.run_dir), self.plan, ranks)
        self.best = BestModel(higher_is_better=self.task.higher_is_better)
        self.totals = Totals()
        self._saved_step = 0
        self._epoch_is_open = False  # a stop came between the last step of an epoch and the epoch's end
        self.stream = self._stream(start_step=0)
        self.stream.publish(0, self.learner.model.attention)

    def _stream(self, *, start_step: int) -> Stream:
        return Stream(
            self.plan,
            self.executor,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=start_step,
            window=self.job.cluster.window,
            window_bytes=self.job.cluster.window_bytes,
            instead=self._instead,
        )

    def resume(self) -> None:
        """Take up the newest checkpoint, if any; CheckpointError if it belongs to another configuration."""
        path = latest_checkpoint(Path(self.job.run_dir))
        if path is None:
            return
        state = load_checkpoint(path)
        check_resumable(state, self.job)
        try:
            self._restore(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: does not fit its own configuration: {reason}") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.learner.restore(state)
        self.best.restore(state["best"])
        self.quarantine.restore(state["bad_images"])
        self.stream = self._stream(start_step=state["step"])
        self.stream.restore(
            {
                version: AttentionWeights.of({name: t.numpy() for name, t in tensors.items()})
                for version, tensors in state["versions"].items()
            }
        )
        needed = self.plan.version_of(self.stream.step)
        if needed not in self.stream.versions:
            raise ValueError(f"version {needed} of the attention is not in it")
        self._saved_step = self.stream.step
        self._epoch_is_open = bool(state["totals"]) and self.stream.step % self.plan.steps_per_epoch == 0
        # they are sums over all ranks, so one rank takes them and the others begin at nothing
        first = self.ranks.rank == 0
        self.totals = Totals(state["totals"] if first else dict.fromkeys(state["totals"], 0.0))

    @property
    def _epoch(self) -> int:
        """The epoch of the step that was taken last, from 1."""
        return -(-self.stream.step // self.plan.steps_per_epoch)

    def keep_ledger(self) -> None:
        """Cut off what the ledger tells of steps after the checkpoint that was taken up."""
        keep_ledger(Path(self.job.run_dir), self.stream.step, epoch_is_open=self._epoch_is_open)

    def checkpoint(self, *, is_best: bool = False) -> None:
        """Save everything that moves (rank 0; of all but the totals the other ranks hold the same)."""
        totals = self.totals.over(self.ranks)
        self._saved_step = self.stream.step
        if self.ranks.rank:
            return
        versions = {
            version: {name: torch.from_numpy(array) for name, array in weights.arrays.items()}
            for version, weights in self.stream.versions.items()
        }
        save_checkpoint(
            Path(self.job.run_dir),
            self.stream.step,
            {
                "config": self.job.config.to_dict(),
                "archive": self.job.archive_key,
                **self.learner.state(),
                "best": self.best.state(),
                "bad_images": self.quarantine.state(),
                "versions": versions,
                "totals": totals,
            },
            is_best=is_best,
        )

    def run(self, log: MetricsLog | None) -> None:
        """Train to the last step, with metrics and a checkpoint at the end of each epoch.

        It ends earlier when validation has not got better for as many epochs as the configuration allows.
        """
        if log is not None:
            self.quarantine.on_new = lambda one: log.skipped(self.stream.step, self._epoch, one)
        interval = self.config.checkpoint_interval or self.plan.steps_per_epoch
        pace = Pace(
            first_step=self.stream.step, num_steps=self.plan.num_steps, world_size=self.ranks.world_size
        )
        if self._epoch_is_open:
            self._end_epoch(log)
        while self.stream.step < self.plan.num_steps and not self.best.is_stale(self.config.patience):
            self._leave_if_asked()
            sums = self.step()
            self.totals.add(sums)
            step = self.stream.step
            if log is not None:
                log.progress(pace.after(step, sums))
            if step % self.plan.steps_per_epoch == 0:
                self._end_epoch(log)
            elif step % interval == 0:
                self._save()
            elif step % FLUSH_STEPS == 0:
                self.ledger.flush()

    def _end_epoch(self, log: MetricsLog | None) -> None:
        """Validate, write the metrics, and save."""
        step = self.stream.step
        epoch = self._epoch
        train = self.totals.numbers(self.ranks)
        val = self.validate()
        is_best = bool(val) and self.best.is_better(val[self.task.score], step)
        if log is not None:
            log.write("train", step, {"epoch": epoch, **train, "lr": self.learner.lr})
            if val:
                log.write("val", step, {"epoch": epoch, **val})
        self.totals = Totals()
        self._save(is_best=is_best)

    def _save(self, *, is_best: bool = False) -> None:
        self.ledger.flush()
        self.checkpoint(is_best=is_best)
        self.ranks.report({"step": self.stream.step})

    def _leave_if_asked(self) -> None:
        """Save and raise PreemptedError if any rank was asked to stop; all ranks ask together."""
        if not self.ranks.must_stop():
            return
        if self._saved_step != self.stream.step:
            self._save()
        raise PreemptedError(self.job.run_dir, self.stream.step, self.plan.num_steps)

    def step(self) -> dict[str, float]:
        """One optimiser step; the sums that the metrics are made of."""
        start_s = time.perf_counter()
        step = self.stream.step
        items = self.stream.next_step()
        self.ledger.note(step, items)
        num_images = self._count(items)
        wait_s = time.perf_counter() - start_s
        sums = self.learner.step(items, num_images=num_images, meanwhile=self._stage_ahead)
        self.stream.publish(self.stream.step, self.learner.model.attention)
        if num_images is not None:
            sums["bad_visits"] = float(sum(item.bad is not None for item in items))
        return {**sums, "wait_s": wait_s, "step_s": time.perf_counter() - start_s}

    def _count(self, items: Sequence[Item]) -> int | None:
        """Images that the step is the mean of, if not as planned; what is bad is told and written at once."""
        if self._instead is None:
            return None
        known = len(self.quarantine.images)
        try:
            return self.quarantine.count(items)
        finally:
            if len(self.quarantine.images) > known:
                self.ledger.flush()

    def _stage_ahead(self) -> None:
        """Copy the next batch to the device while it trains on this one, if it can be had yet (lag > 0)."""
        if not self.learner.batches.copies_ahead:
            return
        items = self.stream.look_ahead()
        if items is not None:
            self.learner.stage(items)

    def validate(self) -> dict[str, float]:
        """The task's numbers on the validation split, with draws that are the same every time."""
        if not self.job.val_rows:
            return {}
        plan = Plan(
            images=self.job.val_rows,
            batch_size=self.config.batch_size,
            num_epochs=1,
            seed=self.config.seed,
            shuffle=False,
            lag=None,
        )
        stream = Stream(
            plan,
            self.executor,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            window=self.job.cluster.window,
            window_bytes=self.job.cluster.window_bytes,
            instead=self._instead,
        )
        model = self.learner.best_guess
        stream.publish(0, model.attention)
        outputs: list[Any] = []
        rows: list[int] = []
        bad: list[Item] = []
        for seen in evaluate(
            model, stream, self.ranks.device, before_step=self._leave_if_asked, on_bad=bad.append
        ):
            outputs.append(seen.outputs_K)
            rows.append(seen.item.visit.image)
        if self._instead is not None:
            self.ledger.note_bad(self.stream.step - 1, bad)
            self.ledger.flush()
            self.quarantine.add(bad)
        # a rank may have none
        outputs_BK = np.array(outputs, np.float32).reshape(-1, self.job.config.model.num_classes)
        all_outputs = self.ranks.collect(torch.from_numpy(outputs_BK))
        all_rows = self.ranks.collect(torch.tensor(rows, dtype=torch.int64))
        # in the order of the table, so that sums do not depend on the number of ranks
        order = all_rows.argsort()
        if not len(order):
            return {}
        return self.task.numbers(all_outputs[order], self.targets_RT[all_rows[order]])
