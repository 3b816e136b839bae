"""Train an attention model on an archive of pyramids or slides.

  ats-stream train archive.csv --out runs/first --prior tissue --patch-px 96 --patches 16

ARCHIVE is a CSV table with the columns slide (path of a pyramid, or of a slide with levels of its own,
which is read in place), label, and split: train, val, and others, such as test, that are left alone. From
each image the model reads a level of low resolution whole (--view-downsample 32: the one about 1/32 as
wide) and --patches patches of full resolution, drawn from its own attention. A small image needs a finer
view, such as --view-downsample 8.

The run folder receives config.yaml, metrics.jsonl, checkpoints/ and tensorboard/. The same command again
takes an interrupted run up at its last checkpoint. SIGTERM saves the run after the step under way and ends it
with exit code 75: the same command goes on from there, with the numbers of a run that was never stopped.

  ats-stream train archive.csv --out runs/two-ranks --executor ray --ranks 2

does the same in two training processes, each with processes of its own that read and draw; --lag 1 and
more lets these run ahead of training.

In the lines printed, sampled mass is the share of the attention that lies on the drawn patches, and
waiting the share of the time that training waited for patches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    from ats_stream.io import Archive, Level
    from ats_stream.workers import RunConfig
    from ats_stream.workers.metrics import Record

USAGE = "ARCHIVE --out RUN [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream train``."""
    from ats_stream.commands.options import add_column_options, add_ray_options, add_storage_options

    parser.add_argument("archive", metavar="ARCHIVE", help="CSV table with columns slide, label, split")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder, made or taken up")
    _add_sampler_options(parser)
    _add_model_options(parser)
    _add_trainer_options(parser)
    add_column_options(parser)
    add_storage_options(parser)
    add_ray_options(parser, ranks=True)


def _add_sampler_options(parser: argparse.ArgumentParser) -> None:
    from ats_stream.commands.options import add_field
    from ats_stream.sampling import SCHEMES
    from ats_stream.workers import SamplerConfig

    sampler = SamplerConfig()
    group = parser.add_argument_group("what is looked at")
    add_field(group, sampler, "num_patches", "--patches", "patches drawn from each image")
    add_field(group, sampler, "patch_px", "--patch-px", "side of a patch in pixels of full resolution")
    add_field(
        group, sampler, "view_downsample", "--view-downsample", "full over low resolution; the nearest level"
    )
    group.add_argument(
        "--scheme",
        choices=SCHEMES,
        default=sampler.scheme,
        help="how positions are drawn and weighed; top is biased, for comparison (%(default)s)",
    )
    group.add_argument(
        "--prior",
        dest="prior_label",
        metavar="LABEL",
        help="draw only inside this label image, such as tissue (default: anywhere)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    from ats_stream.commands.options import add_field
    from ats_stream.models import ModelConfig
    from ats_stream.models.classifier import ATTENTION_KINDS

    model = ModelConfig(num_classes=2)
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--attention",
        choices=ATTENTION_KINDS,
        default=model.attention,
        help="uniform: no attention, for comparison (%(default)s)",
    )
    add_field(group, model, "attention_width", "--attention-width", "channels of the attention network")
    add_field(group, model, "attention_layers", "--attention-layers", "convolutions of the attention network")
    add_field(group, model, "feature_width", "--feature-width", "channels of the feature network")


def _add_trainer_options(parser: argparse.ArgumentParser) -> None:
    from ats_stream.commands.options import add_field
    from ats_stream.workers import TrainerConfig

    trainer = TrainerConfig()
    group = parser.add_argument_group("the training")
    add_field(group, trainer, "num_epochs", "--epochs", "passes over the training split")
    add_field(group, trainer, "batch_size", "--batch-size", "images in a step, over all training processes")
    add_field(group, trainer, "lr", "--lr", "learning rate of AdamW")
    add_field(group, trainer, "decay_share", "--decay-share", "last share of the steps, where it falls to 0")
    add_field(group, trainer, "weight_decay", "--weight-decay", "weight decay of AdamW")
    add_field(group, trainer, "clip_norm", "--clip-norm", "largest norm of a gradient")
    add_field(group, trainer, "entropy_weight", "--entropy-weight", "reward for attention that stays spread")
    group.add_argument(
        "--centred",
        action="store_true",
        default=argparse.SUPPRESS,
        help="take the self-centred gradient: less variance, a small bias",
    )
    add_field(group, trainer, "extra_patches", "--extra-patches", "more patches in the first epoch")
    add_field(group, trainer, "extra_epochs", "--extra-epochs", "epochs over which these dwindle to none")
    add_field(group, trainer, "lag", "--lag", "steps that drawing may run ahead of training")
    add_field(group, trainer, "publish_interval", "--publish-interval", "steps between updates of who draws")
    add_field(group, trainer, "seed", "--seed", "seed of weights, order and draws")
    add_field(
        group, trainer, "checkpoint_interval", "--checkpoint-interval", "steps; 0: at the end of each epoch"
    )
    add_field(group, trainer, "train_split", "--train-split", "split to train on")
    add_field(group, trainer, "val_split", "--val-split", "split to evaluate after each epoch, if there")
    group.add_argument(
        "--gpu",
        dest="use_gpu",
        action="store_true",
        default=argparse.SUPPRESS,
        help="train on a GPU, one for each training process",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, with a line for each epoch."""
    from ats_stream.commands.options import (
        archive_from,
        check_out,
        cluster_from,
        config_from,
        storage_options_from,
    )
    from ats_stream.models import ModelConfig
    from ats_stream.workers import RunConfig, SamplerConfig, TrainerConfig, train
    from ats_stream.workers.checkpoint import latest_checkpoint
    from ats_stream.workers.preemption import StopRequest
    from ats_stream.workers.sampler import view_level

    stop = StopRequest()
    check_out(Path(arguments.out), empty=False)
    # what the options alone decide is checked before any file is opened
    trainer = config_from(arguments, TrainerConfig)
    sampler = config_from(arguments, SamplerConfig)
    cluster = cluster_from(arguments)
    config_from(arguments, ModelConfig, num_classes=2)
    storage_options = storage_options_from(arguments)
    archive = archive_from(arguments, arguments.archive)
    first = storage_options.open(archive.split(trainer.train_split)[0].slide)
    full = first.levels[0]
    model = config_from(
        arguments,
        ModelConfig,
        num_classes=len(archive.classes),
        num_channels=full.shape[0],
        max_value=_max_value(full.dtype),
    )
    config = RunConfig(model=model, sampler=sampler, trainer=trainer, classes=archive.classes)
    print(describe(archive, config, view_level(first, sampler.view_downsample)), flush=True)
    before = latest_checkpoint(Path(arguments.out))
    if before is not None:
        print(f"going on from {before}", flush=True)
    with EpochLines(trainer.num_epochs) as lines, stop.on_sigterm():
        result = train(
            archive,
            arguments.out,
            config,
            cluster,
            on_record=lines.on_record,
            on_step=lines.on_step,
            stop=stop,
            storage_options=storage_options,
        )
    accuracies = [record["accuracy"] for record in result.metrics if record["phase"] == "val"]
    score = f", validation accuracy {accuracies[-1]:.3f}" if accuracies else ""
    note = " (it was done before)" if before == result.checkpoint else ""
    epochs = f"{trainer.num_epochs} epoch{'s' * (trainer.num_epochs != 1)}"
    print(f"{result.run_dir}: {epochs} done{note}{score}; {result.checkpoint}")
    return {
        "run": str(result.run_dir.absolute()),
        "checkpoint": str(result.checkpoint.absolute()),
        "val_accuracy": accuracies[-1] if accuracies else None,
    }


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
    size = " x ".join(str(n) for n in view.shape[:0:-1])
    within = f" within {sampler.prior_label}" if sampler.prior_label else ""
    return (
        f"training on {counts}; classes {', '.join(config.classes)}\n"
        f"of the first: view {size} px at 1/{max(view.downsample):g}, "
        f"{sampler.num_patches} patches of {sampler.patch_px} px drawn{within} ({sampler.scheme})"
    )


class EpochLines:
    """Prints each epoch as a line, under which a bar shows the steps if standard error is a terminal."""

    def __init__(self, num_epochs: int) -> None:
        from tqdm import tqdm

        self.num_epochs = num_epochs
        self._bar = tqdm(unit="step", disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_step(self, step: int, num_steps: int) -> None:
        """Move the bar."""
        if self._bar.total != num_steps:
            # what was done before a resume does not count for the speed
            self._bar.reset(num_steps)
            self._bar.initial = self._bar.n = step - 1
        self._bar.update(step - self._bar.n)

    def on_record(self, record: Record) -> None:
        """Print one record."""
        if record["phase"] == "train":
            line = (
                f"epoch {record['epoch']:>3}/{self.num_epochs}  loss {record['loss']:.3f}  "
                f"accuracy {record['accuracy']:.3f}  sampled mass {record['sampled_mass']:.2%}  "
                f"{record['images_per_s']:.1f} images/s  waiting {record['wait_share']:.0%}"
            )
        else:
            line = f"{'validation':>13}  loss {record['loss']:.3f}  accuracy {record['accuracy']:.3f}"
        self._bar.clear()
        print(line, flush=True)
        self._bar.refresh()
