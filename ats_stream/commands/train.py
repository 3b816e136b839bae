"""Train an attention model on an archive of pyramids.

  ats-stream train archive.csv --out runs/first --patch-px 96 --patches 16 --prior tissue

ARCHIVE is a CSV table with the columns slide (path of a pyramid), label and split (train, val, ...). The run
folder receives config.yaml, metrics.jsonl, checkpoints/ and tensorboard/. The same command again takes an
interrupted run up at its last checkpoint.

  ats-stream train archive.csv --out runs/two-ranks --executor ray --ranks 2

does the same in two training processes, each with sampler actors of its own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from ats_stream.workers.metrics import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream train``."""
    from ats_stream.commands.options import add_cluster_options, add_field
    from ats_stream.models import ModelConfig
    from ats_stream.sampling import SCHEMES
    from ats_stream.workers import SamplerConfig, TrainerConfig

    parser.add_argument("archive", metavar="ARCHIVE", help="CSV table with columns slide, label, split")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder, made or taken up")
    for column in ("slide", "label", "split"):
        parser.add_argument(
            f"--{column}-column", default=column, metavar="NAME", help=f"column of the {column} (%(default)s)"
        )
    sampler, trainer, model = SamplerConfig(), TrainerConfig(), ModelConfig(num_classes=2)
    group = parser.add_argument_group("what is looked at")
    add_field(group, sampler, "num_patches", "--patches", "patches drawn from each image")
    add_field(group, sampler, "patch_px", "--patch-px", "side of a patch at full resolution")
    add_field(group, sampler, "view_downsample", "--view-downsample", "factor of the low-resolution view")
    group.add_argument(
        "--scheme", choices=SCHEMES, default=sampler.scheme, help="how positions are drawn (%(default)s)"
    )
    group.add_argument(
        "--prior", dest="prior_label", metavar="LABEL", help="draw only inside this label image, e.g. tissue"
    )
    group = parser.add_argument_group("the model")
    add_field(group, model, "attention_width", "--attention-width", "channels of the attention network")
    add_field(group, model, "attention_layers", "--attention-layers", "convolutions of the attention network")
    add_field(group, model, "feature_width", "--feature-width", "channels of the feature network")
    group = parser.add_argument_group("the training")
    add_field(group, trainer, "num_epochs", "--epochs", "passes over the training split")
    add_field(group, trainer, "batch_size", "--batch-size", "images in a step, over all ranks")
    add_field(group, trainer, "lr", "--lr", "learning rate")
    add_field(group, trainer, "weight_decay", "--weight-decay", "weight decay of AdamW")
    add_field(group, trainer, "clip_norm", "--clip-norm", "largest norm of a gradient")
    add_field(group, trainer, "entropy_weight", "--entropy-weight", "reward for attention that stays spread")
    add_field(group, trainer, "lag", "--lag", "steps that drawing may run ahead of training")
    add_field(group, trainer, "seed", "--seed", "seed of weights, order and draws")
    add_field(group, trainer, "checkpoint_interval", "--checkpoint-interval", "steps; 0: every epoch")
    add_field(group, trainer, "train_split", "--train-split", "split to train on")
    add_field(group, trainer, "val_split", "--val-split", "split to evaluate after each epoch")
    add_cluster_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, with a line for each epoch."""
    from ats_stream.commands.options import config_from
    from ats_stream.io import open_pyramid, read_archive
    from ats_stream.models import ModelConfig
    from ats_stream.workers import ClusterConfig, RunConfig, SamplerConfig, TrainerConfig, train

    columns = {name: getattr(arguments, f"{name}_column") for name in ("slide", "label", "split")}
    archive = read_archive(arguments.archive, columns=columns)
    trainer = config_from(arguments, TrainerConfig)
    first = open_pyramid(archive.split(trainer.train_split)[0].slide).levels[0]
    config = RunConfig(
        model=config_from(
            arguments,
            ModelConfig,
            num_classes=len(archive.classes),
            num_channels=first.shape[0],
            max_value=_max_value(first.dtype),
        ),
        sampler=config_from(arguments, SamplerConfig),
        trainer=trainer,
        classes=archive.classes,
    )
    cluster = config_from(arguments, ClusterConfig)
    show = EpochLines(trainer.num_epochs)
    result = train(archive, arguments.out, config, cluster, on_record=show)
    print(f"run folder {result.run_dir}, last checkpoint {result.checkpoint.name}")
    best = [record["accuracy"] for record in result.metrics if record["phase"] == "val"]
    return {
        "run": str(result.run_dir),
        "checkpoint": str(result.checkpoint),
        "val_accuracy": best[-1] if best else None,
    }


def _max_value(dtype: Any) -> float:
    """The pixel value that counts as 1: the largest of an unsigned type, else 1."""
    import numpy as np

    return float(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else 1.0


@dataclasses.dataclass
class EpochLines:
    """Prints each epoch as a line when its records come in."""

    num_epochs: int

    def __call__(self, record: Record) -> None:
        """Print one record."""
        if record["phase"] == "train":
            print(
                f"epoch {record['epoch']:>3}/{self.num_epochs}  loss {record['loss']:.3f}  "
                f"accuracy {record['accuracy']:.3f}  sampled mass {record['sampled_mass']:.2f}  "
                f"{record['images_per_s']:.0f} images/s  waiting {record['wait_share']:.0%}",
                flush=True,
            )
        else:
            numbers = f"val loss {record['loss']:.3f}  accuracy {record['accuracy']:.3f}"
            print(f"{'':15}{numbers}", flush=True)
