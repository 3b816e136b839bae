"""Train an attention model on an archive of pyramids or slides.

  ats-stream train archive.csv --out runs/first --prior tissue --patch-px 96 --patches 16

ARCHIVE is a CSV table with the columns slide (path of a pyramid, or of a slide with levels of its own,
which is read in place), label, and split: train, val, and others, such as test, that are left alone; columns
that it may have besides stand under "the table" below. From each image the model reads a level of low
resolution whole (--view-downsample 32: the one about 1/32 as wide) and --patches patches of full resolution,
drawn from its own attention. A small image needs a finer view, such as --view-downsample 8.

The run folder receives config.yaml, metrics.jsonl, ledger.jsonl (every visit to an image), checkpoints/ and
tensorboard/. The same command again takes an interrupted run up at its last checkpoint. SIGTERM saves the run
after the step under way and ends it with exit code 75: the same command goes on from there, with the numbers
of a run that was never stopped.

  ats-stream train archive.csv --out runs/two-ranks --executor ray --ranks 2

does the same in two training processes, each with processes of its own that read and draw; --lag 1 and
more lets these run ahead of training.

In the lines printed, sampled mass is the share of the attention that lies on the drawn patches, waiting the
share of the time that training waited for patches, and, with --lag, staleness by how many steps the attention
that drew was behind and effective the share of the patches that this leaves worth drawing. ETA is the time
that is left if all goes on as before.

An image that cannot be read ends the run by its name. With --on-bad-image skip it is left out, told and noted
in metrics.jsonl and ledger.jsonl, and the run ends only when more than --max-bad of the images are like that.

  ats-stream train archive.csv --out runs/third --config runs/first/config.yaml --lr 3e-4

takes every setting from a file, such as that of another run, except those given as options.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import Self

    from ats_stream.io import Archive, ArchiveRow, Level, Pyramid, StorageOptions
    from ats_stream.workers import ClusterConfig, RunConfig, TrainerConfig
    from ats_stream.workers.metrics import Record
    from ats_stream.workers.progress import Progress

USAGE = "ARCHIVE --out RUN [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream train``."""
    parser.add_argument("archive", metavar="ARCHIVE", help="CSV table with columns slide, label, split")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder, made or taken up")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What a run is and where it computes: all that :func:`read_run` reads besides the archive."""
    from ats_stream.commands.config_file import add_config_option
    from ats_stream.commands.options import add_column_options, add_ray_options, add_storage_options
    from ats_stream.commands.train_options import (
        add_model_options,
        add_sampler_options,
        add_trainer_options,
    )

    add_config_option(parser)
    add_sampler_options(parser)
    add_model_options(parser)
    add_trainer_options(parser)
    add_column_options(parser)
    add_storage_options(parser)
    add_ray_options(parser, ranks=True)


@dataclass(frozen=True, kw_only=True)
class AskedRun:
    """A run as the arguments ask for it."""

    archive: Archive
    view: Level
    """The low-resolution view of the first image that is trained on."""
    config: RunConfig
    cluster: ClusterConfig
    storage_options: StorageOptions


def read_run(arguments: argparse.Namespace) -> AskedRun:
    """The archive, and the configurations that the arguments and the first image make."""
    from ats_stream.commands.config_file import apply_config_file
    from ats_stream.commands.options import archive_from, cluster_from, config_from, storage_options_from
    from ats_stream.models import ModelConfig
    from ats_stream.workers import RunConfig, SamplerConfig, TrainerConfig
    from ats_stream.workers.pixel_size import level_0_um
    from ats_stream.workers.sampler import read_levels
    from ats_stream.workers.tasks import TASKS

    classes = apply_config_file(arguments)
    # what the options alone decide is checked before any file is opened
    trainer = config_from(arguments, TrainerConfig)
    sampler = config_from(arguments, SamplerConfig)
    cluster = cluster_from(arguments)
    config_from(arguments, ModelConfig, num_classes=2)
    storage_options = storage_options_from(arguments)
    archive = _folded(archive_from(arguments, arguments.archive), arguments, trainer)
    outputs = classes or TASKS[trainer.task].outputs(archive)
    row, first = _first(archive.split(trainer.train_split), trainer, storage_options)
    full = first.levels[0]
    if not hasattr(arguments, "pixel_size_um"):
        size_um = sampler.of_image(row.pixel_size_um).assumed_pixel_um or level_0_um(first) or 0.0
        # six digits: sizes of one scanner differ behind them
        sampler = replace(sampler, pixel_size_um=float(f"{size_um:.6g}"))
    model = config_from(
        arguments,
        ModelConfig,
        num_classes=len(outputs),
        num_channels=full.shape[0],
        max_value=_max_value(full.dtype),
    )
    config = RunConfig(model=model, sampler=sampler, trainer=trainer, classes=outputs)
    _, view = read_levels(first, sampler.of_image(row.pixel_size_um))
    return AskedRun(
        archive=archive, view=view, config=config, cluster=cluster, storage_options=storage_options
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, with a line for each epoch."""
    from ats_stream.commands.options import check_out
    from ats_stream.workers import train
    from ats_stream.workers.checkpoint import latest_checkpoint
    from ats_stream.workers.preemption import StopRequest
    from ats_stream.workers.tasks import TASKS

    stop = StopRequest()
    check_out(Path(arguments.out), empty=False)
    asked = read_run(arguments)
    archive, config = asked.archive, asked.config
    trainer = config.trainer
    print(describe(archive, config, asked.view), flush=True)
    before = latest_checkpoint(Path(arguments.out))
    if before is not None:
        print(f"going on from {before}", flush=True)
    with EpochLines(trainer.num_epochs) as lines, stop.on_sigterm():
        result = train(
            archive,
            arguments.out,
            config,
            asked.cluster,
            on_record=lines.on_record,
            on_step=lines.on_step,
            stop=stop,
            storage_options=asked.storage_options,
        )
    name = TASKS[trainer.task].score
    scores = [record[name] for record in result.metrics if record["phase"] == "val"]
    score = f", validation {name} {scores[-1]:.3f}" if scores else ""
    note = " (it was done before)" if before == result.checkpoint else ""
    num_epochs = max(record["epoch"] for record in result.metrics)
    epochs = f"{num_epochs} epoch{'s' * (num_epochs != 1)}"
    if num_epochs < trainer.num_epochs:
        epochs += f" of {trainer.num_epochs}, the last {trainer.patience} no better,"
    skipped = result.skipped
    left_out = f", {len(skipped)} image{'s' * (len(skipped) != 1)} left out" if skipped else ""
    print(f"{result.run_dir}: {epochs} done{note}{score}{left_out}; {result.checkpoint}")
    return {
        "run": str(result.run_dir.absolute()),
        "checkpoint": str(result.checkpoint.absolute()),
        f"val_{name}": scores[-1] if scores else None,
        **({"skipped": {one.slide: one.reason for one in skipped}} if skipped else {}),
    }


def _first(
    rows: Archive, trainer: TrainerConfig, storage_options: StorageOptions
) -> tuple[ArchiveRow, Pyramid]:
    """The first image, or, where bad ones are left out, the first that can be opened."""
    from ats_stream.errors import SlideError
    from ats_stream.workers.quarantine import FAIL

    for row in rows:
        try:
            return row, storage_options.open(row.slide)
        except SlideError:
            if trainer.on_bad_image == FAIL:
                raise
    raise SlideError(rows[0].slide, "cannot be opened, nor can any other image of its split")


def _folded(archive: Archive, arguments: argparse.Namespace, trainer: TrainerConfig) -> Archive:
    """The archive with the fold that was asked for as its validation split."""
    from ats_stream.errors import InputError
    from ats_stream.io.folds import fold_archive

    if arguments.folds is None and arguments.fold is None:
        return archive
    if arguments.folds is None or arguments.fold is None:
        raise InputError("--folds and --fold go together")
    return fold_archive(
        archive,
        arguments.folds,
        arguments.fold,
        train_split=trainer.train_split,
        val_split=trainer.val_split,
        seed=trainer.seed,
    )


def _max_value(dtype: Any) -> float:
    """The pixel value that counts as 1: the largest of an unsigned type, else 1."""
    import numpy as np

    return float(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else 1.0


def describe(archive: Archive, config: RunConfig, view: Level) -> str:
    """What a run is going to do, in two lines."""
    splits = [row.split for row in archive.rows]
    trainer, sampler = config.trainer, config.sampler
    counts = f"{splits.count(trainer.train_split)} images of split {trainer.train_split!r}"
    if trainer.val_split in splits:
        counts += f", validation on {splits.count(trainer.val_split)} of {trainer.val_split!r}"
    outputs = ", ".join(config.classes)
    what = f"classes {outputs}" if trainer.task in ("classification", "multilabel") else trainer.task
    size = " x ".join(str(n) for n in view.shape[:0:-1])
    within = f" within {sampler.prior_label}" if sampler.prior_label else ""
    return (
        f"training on {counts}; {what}\n"
        f"of the first: view {size} px at 1/{max(view.downsample):g}, "
        f"{sampler.num_patches} patches of {sampler.patch_px} px drawn{within} ({sampler.scheme})"
    )


class EpochLines:
    """Prints each epoch as a line, under which a bar shows the steps if standard error is a terminal."""

    def __init__(self, num_epochs: int) -> None:
        from tqdm import tqdm

        self.num_epochs = num_epochs
        self._progress: Progress | None = None
        self._bar = tqdm(
            disable=not sys.stderr.isatty(),
            leave=False,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_step(self, progress: Progress) -> None:
        """Move the bar."""
        self._progress = progress
        if self._bar.total != progress.num_steps:
            self._bar.reset(progress.num_steps)
        self._bar.set_postfix_str(f"{_speed(vars(progress))}, {_eta(progress)}", refresh=False)
        self._bar.update(progress.step - self._bar.n)

    def on_record(self, record: Record) -> None:
        """Print one record."""
        from ats_stream.workers.metrics import SKIPPED

        if record["phase"] == SKIPPED:
            line = f"left out, cannot be read: {record['slide']}: {record['reason']}"
        elif record["phase"] == "train":
            line = (
                f"epoch {record['epoch']:>3}/{self.num_epochs}  {_scores(record)}  "
                f"sampled mass {record['sampled_mass']:.2%}  {_speed(record)}"
            )
            if self._progress is not None and record["epoch"] < self.num_epochs:
                line += f", {_eta(self._progress)}"
        else:
            line = f"{'validation':>13}  {_scores(record)}"
        self._bar.clear()
        print(line, flush=True)
        self._bar.refresh()


def _speed(numbers: Mapping[str, Any]) -> str:
    """Speed, waiting, and with stale attention how stale it was and what that cost.

    >>> _speed({"images_per_s": 12.34, "wait_share": 0.031, "staleness": 0.0, "effective_share": 1.0})
    '12.3 images/s, waiting 3%'
    >>> _speed({"images_per_s": 9.0, "wait_share": 0.0, "staleness": 1.0, "effective_share": 0.97})
    '9.0 images/s, waiting 0%, staleness 1.0, effective 97%'
    """
    text = f"{numbers['images_per_s']:.1f} images/s, waiting {numbers['wait_share']:.0%}"
    if not numbers["staleness"]:
        return text
    return f"{text}, staleness {numbers['staleness']:.1f}, effective {numbers['effective_share']:.0%}"


def _eta(progress: Progress) -> str:
    """The time that is left: minutes and seconds, with hours before them if need be."""
    minutes, seconds = divmod(round(progress.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    return "ETA " + (f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}")


def _scores(record: Record) -> str:
    """Loss, and what else tells how good it is."""
    names = ("loss", "accuracy", "auroc", "mae", "r2", "concordance")
    return "  ".join(f"{name} {record[name]:.3f}" for name in names if name in record)
