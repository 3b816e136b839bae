"""The options of ``ats-stream train`` that become fields of configurations."""

from __future__ import annotations

import argparse


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """How images are looked at: fields of SamplerConfig."""
    from ats_stream.commands.options import add_choice, add_field
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
        "--read-pixel-size",
        dest="pixel_size_um",
        type=float,
        default=argparse.SUPPRESS,
        metavar="UM",
        help="micrometres per pixel that patches are read at, from the level nearest to it; 0: level 0 of "
        "each image, whatever its size (default: that of level 0 of the first image)",
    )
    add_choice(
        group,
        sampler,
        "scheme",
        "--scheme",
        SCHEMES,
        "how positions are drawn and weighed; top is biased, for comparison",
    )
    group.add_argument(
        "--prior",
        dest="prior_label",
        default=argparse.SUPPRESS,
        metavar="LABEL",
        help="draw only inside this label image, such as tissue (default: anywhere)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The networks: fields of ModelConfig."""
    from ats_stream.commands.options import add_choice, add_field
    from ats_stream.models import ModelConfig
    from ats_stream.models.classifier import ATTENTION_KINDS

    model = ModelConfig(num_classes=2)
    group = parser.add_argument_group("the model")
    add_choice(
        group, model, "attention", "--attention", ATTENTION_KINDS, "uniform: no attention, for comparison"
    )
    add_field(group, model, "attention_width", "--attention-width", "channels of the attention network")
    add_field(group, model, "attention_layers", "--attention-layers", "convolutions of the attention network")
    add_field(group, model, "feature_width", "--feature-width", "channels of the feature network")


def add_trainer_options(parser: argparse.ArgumentParser) -> None:
    """How a model is trained: fields of TrainerConfig."""
    from ats_stream.commands.options import add_choice, add_field, add_switch
    from ats_stream.workers import TrainerConfig
    from ats_stream.workers.config import VISITS
    from ats_stream.workers.logger_clients import LOGGERS
    from ats_stream.workers.optimisation import PRECISIONS, SCHEDULES
    from ats_stream.workers.quarantine import BAD_IMAGE_POLICIES
    from ats_stream.workers.tasks import TASKS

    trainer = TrainerConfig()
    group = parser.add_argument_group("the training")
    add_choice(
        group,
        trainer,
        "task",
        "--task",
        TASKS,
        "what a label is: a class; classes with ';' between them; a number; 1 or 0 for an event seen or not, "
        "with the column time",
    )
    add_field(group, trainer, "num_epochs", "--epochs", "passes over the training split")
    add_field(group, trainer, "batch_size", "--batch-size", "images in a step, over all training processes")
    add_field(
        group, trainer, "accumulate", "--accumulate", "parts in which a process computes its share of it"
    )
    add_field(group, trainer, "lr", "--lr", "learning rate of AdamW")
    add_choice(group, trainer, "schedule", "--schedule", SCHEDULES, "how the learning rate falls")
    add_field(group, trainer, "warmup_share", "--warmup-share", "first share of the steps, where it rises")
    add_field(group, trainer, "decay_share", "--decay-share", "last share of the steps, where it falls to 0")
    add_field(group, trainer, "weight_decay", "--weight-decay", "weight decay of AdamW")
    add_field(group, trainer, "clip_norm", "--clip-norm", "largest norm of a gradient")
    add_choice(group, trainer, "precision", "--precision", PRECISIONS, "arithmetic of the feature network")
    add_field(
        group, trainer, "average_decay", "--average-decay", "moving average of the weights, 0.99 say; 0: none"
    )
    add_field(group, trainer, "entropy_weight", "--entropy-weight", "reward for attention that stays spread")
    add_switch(group, "centred", "--centred", "take the self-centred gradient: less variance, a small bias")
    add_switch(
        group, "class_weights", "--class-weights", "weigh the loss by the inverse frequency of classes"
    )
    add_choice(
        group,
        trainer,
        "visits",
        "--visits",
        VISITS,
        "how often an epoch visits an image: once, in proportion to the column weight, or classes alike",
    )
    add_field(group, trainer, "extra_patches", "--extra-patches", "more patches in the first epoch")
    add_field(group, trainer, "extra_epochs", "--extra-epochs", "epochs over which these dwindle to none")
    add_field(group, trainer, "lag", "--lag", "steps that drawing may run ahead of training")
    add_field(group, trainer, "publish_interval", "--publish-interval", "steps between updates of who draws")
    add_field(group, trainer, "seed", "--seed", "seed of weights, order and draws")
    add_field(
        group, trainer, "patience", "--patience", "epochs without a better validation, then stop; 0: never"
    )
    add_field(
        group, trainer, "checkpoint_interval", "--checkpoint-interval", "steps; 0: at the end of each epoch"
    )
    add_field(group, trainer, "train_split", "--train-split", "split to train on")
    add_field(group, trainer, "val_split", "--val-split", "split to evaluate after each epoch, if there")
    add_choice(
        group,
        trainer,
        "on_bad_image",
        "--on-bad-image",
        BAD_IMAGE_POLICIES,
        "what an image that cannot be read does: end the run, or be left out and told",
    )
    add_field(group, trainer, "max_bad_share", "--max-bad", "share of the images that may be left out")
    group.add_argument(
        "--folds", type=int, metavar="K", help="cut both splits into K folds, groups kept whole; needs --fold"
    )
    group.add_argument("--fold", type=int, metavar="I", help="the fold to validate on, from 0")
    add_switch(group, "use_gpu", "--gpu", "train on a GPU, one for each training process")
    group.add_argument(
        "--logger",
        dest="loggers",
        action="append",
        choices=tuple(LOGGERS),
        default=argparse.SUPPRESS,
        help="send the metrics there too, besides TensorBoard; may be repeated; needs the extra of that name",
    )
