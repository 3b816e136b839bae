"""Train a model on an archive: checks everything first, then runs here or on Ray."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.errors import ArchiveError, InputError, TargetExistsError
from ats_stream.io import StorageOptions
from ats_stream.workers.checkpoint import find_checkpoint, latest_checkpoint, load_checkpoint
from ats_stream.workers.config import CONFIG_FILE, ClusterConfig, RunConfig, check_world
from ats_stream.workers.first_look import look_at
from ats_stream.workers.loggers import Loggers, make_loggers
from ats_stream.workers.metrics import SKIPPED, Record, keep_metrics, read_metrics
from ats_stream.workers.pixel_size import given_sizes
from ats_stream.workers.preemption import StopRequest
from ats_stream.workers.quarantine import BadImage
from ats_stream.workers.ranks import Alone
from ats_stream.workers.tasks import TASKS
from ats_stream.workers.trainer import TrainJob, check_resumable, train_rank

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ats_stream.io import Archive
    from ats_stream.workers.logger_clients import RunLogger
    from ats_stream.workers.progress import Progress


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when it is done."""

    run_dir: Path
    checkpoint: Path
    """The last checkpoint."""
    metrics: list[Record]
    """All records of the run, as in metrics.jsonl."""

    @property
    def skipped(self) -> tuple[BadImage, ...]:
        """Images that could not be read and were left out, in the order in which they were met."""
        found = {
            r["image"]: BadImage(r["image"], r["slide"], r["reason"])
            for r in self.metrics
            if r.get("phase") == SKIPPED
        }
        return tuple(found.values())


def train(
    archive: Archive,
    run_dir: str | os.PathLike[str],
    config: RunConfig,
    cluster: ClusterConfig | None = None,
    *,
    on_record: Callable[[Record], None] = lambda _record: None,
    on_step: Callable[[Progress], None] = lambda _progress: None,
    stop: StopRequest | None = None,
    storage_options: StorageOptions | Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train to the last epoch; a run folder that holds a checkpoint of the same configuration is taken up.

    ``on_record`` sees each record of the metrics as it is written, ``on_step`` how far it is after each step.
    A ``stop`` that is asked ends the run between two steps, saved. ``storage_options`` are for the URLs among
    the slides and are written nowhere. Raises PreemptedError for a stop (with ranks under Ray Train also
    after a SIGTERM to one of them), ArchiveError for an empty split, InputError, ClusterError or SlideError
    for what cannot run here (before anything starts), CheckpointError for a run folder of another
    configuration, TargetExistsError for a folder that is no run, SlideError for a slide
    that cannot be read, or, where the configuration leaves these out, BadImagesError for too many of them.
    """
    cluster = cluster or ClusterConfig()
    stop = stop or StopRequest()
    run = Path(run_dir)
    check_world(config.trainer.batch_size, cluster.world_size)
    job = _job(archive, run, config, cluster, StorageOptions.of(storage_options))
    start_step = _start_step(run, job)
    device = _device(cluster)
    if start_step < job.plan.num_steps:
        look_at(job)
    loggers = make_loggers(cluster.loggers)
    if cluster.executor == "ray":
        from ats_stream.workers.cluster import fit_with_ray, ray_cluster
        from ats_stream.workers.store_room import with_room

        num, each = cluster.num_ranks, cluster.samplers_per_rank
        cpus = num * (cluster.cpus_per_rank + each * cluster.cpus_per_sampler)
        gpus = num * (cluster.use_gpu * cluster.gpus_per_rank + each * cluster.gpus_per_sampler)
        with ray_cluster(cluster, cpus_needed=cpus, gpus_needed=gpus):
            job = with_room(job)
            _prepare(run, job, start_step)
            with _logged(loggers, job, on_record) as listen:
                fit_with_ray(job, run, listen, on_step, stop)
    else:
        alone = Alone(device, stop)
        _prepare(run, job, start_step)
        with _logged(loggers, job, on_record) as listen:
            train_rank(job, alone, listen, on_step)
    return TrainResult(run, find_checkpoint(run), read_metrics(run))


@contextmanager
def _logged(
    loggers: Mapping[str, RunLogger], job: TrainJob, on_record: Callable[[Record], None]
) -> Iterator[Callable[[Record], None]]:
    """A listener to records that hands them to the loggers too."""
    run = Path(job.run_dir)
    with Loggers(loggers, run, job.config.to_dict(), read_metrics(run)) as sent:

        def listen(record: Record) -> None:
            sent.on_record(record)
            on_record(record)

        yield listen


def _job(
    archive: Archive, run: Path, config: RunConfig, cluster: ClusterConfig, storage_options: StorageOptions
) -> TrainJob:
    trainer = config.trainer
    targets = TASKS[trainer.task].targets(archive, config.classes)
    labels = [int(row[0]) if trainer.task == "classification" else 0 for row in targets]
    rows = {
        split: tuple(i for i, row in enumerate(archive.rows) if row.split == split)
        for split in (trainer.train_split, trainer.val_split)
    }
    train_rows = rows[trainer.train_split]
    if not train_rows:
        splits = sorted({row.split for row in archive.rows})
        raise ArchiveError(f"{archive.path}: no row of split {trainer.train_split!r}; there are {splits}")
    by_class = _inverse_frequency(labels, train_rows)
    visit_weights = {
        "once": None,
        "slide-weight": [archive.rows[i].weight for i in train_rows],
        "class": [by_class[labels[i]] for i in train_rows],
    }
    return TrainJob(
        run_dir=str(run.absolute()),
        config=config,
        cluster=cluster,
        slides=[str(row.slide) for row in archive.rows],
        labels=labels,
        train_rows=train_rows,
        val_rows=rows[trainer.val_split],
        targets=targets,
        loss_weights=[by_class.get(label, 1.0) for label in labels] if trainer.class_weights else None,
        visit_weights=visit_weights[trainer.visits],
        pixel_sizes=given_sizes(archive.rows),
        storage_options=storage_options,
    )


def _inverse_frequency(labels: Sequence[int], rows: Sequence[int]) -> dict[int, float]:
    """Weights of classes that make each count the same, 1 on average over the rows.

    >>> _inverse_frequency([0, 0, 0, 1], [0, 1, 2, 3])
    {0: 0.6666666666666666, 1: 2.0}
    """
    counts = Counter(labels[row] for row in rows)
    return {label: len(rows) / (len(counts) * count) for label, count in sorted(counts.items())}


def _start_step(run: Path, job: TrainJob) -> int:
    """The step from which the run folder lets the run go on; raises if it does not fit the run."""
    if run.exists() and not run.is_dir():
        raise TargetExistsError(f"{run}: exists and is not a folder")
    if run.is_dir() and any(run.iterdir()) and not (run / CONFIG_FILE).is_file():
        raise TargetExistsError(f"{run}: exists, is not empty and is not a run folder")
    newest = latest_checkpoint(run)
    if newest is None:
        return 0
    # the ranks check it too; here it costs no start of a cluster
    state = load_checkpoint(newest)
    check_resumable(state, job)
    step: int = state["step"]
    return step


def _prepare(run: Path, job: TrainJob, start_step: int) -> None:
    job.config.write(run)
    keep_metrics(run, start_step)


def _device(cluster: ClusterConfig) -> torch.device:
    """Where this process trains; with ranks of their own it does not."""
    if not cluster.use_gpu or cluster.executor == "ray":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--gpu was given, but torch sees no GPU here")
    return torch.device("cuda")
