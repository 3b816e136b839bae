"""Small configurations, samplers and comparisons for the tests of workers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ats_stream.models import AttentionNet, ModelConfig
from ats_stream.workers import (
    AttentionWeights,
    ClusterConfig,
    Item,
    PatchSampler,
    RunConfig,
    SamplerConfig,
    TrainerConfig,
    Visit,
)
from ats_stream.workers.trainer import TrainJob

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive

MODEL = ModelConfig(num_classes=2, attention_width=4, feature_width=8)
SAMPLER = SamplerConfig(num_patches=4, patch_px=48, prior_label="foreground", seed=3)
# what clocks say differs between runs that are otherwise the same
CLOCK_NUMBERS = {"seconds", "images_per_s", "wait_share", "sampler_s"}


def run_config(**trainer: Any) -> RunConfig:
    """A run of 2 steps an epoch over the archive, the last batch filled up by one."""
    given = {"num_epochs": 3, "batch_size": 4, "lr": 3e-3, "entropy_weight": 0.01, "seed": 5, **trainer}
    return RunConfig(model=MODEL, sampler=SAMPLER, trainer=TrainerConfig(**given), classes=("0", "1"))


def table(archive: Archive) -> tuple[list[str], list[int]]:
    """Slides and class numbers of an archive."""
    return [row.slide for row in archive], [archive.class_index(row) for row in archive]


def make_job(archive: Archive, run_dir: Path, config: RunConfig, **cluster: Any) -> TrainJob:
    """All that a rank needs to know to train on the archive."""
    slides, labels = table(archive)
    rows = {
        split: tuple(i for i, row in enumerate(archive) if row.split == split) for split in ("train", "val")
    }
    return TrainJob(
        run_dir=str(run_dir),
        config=config,
        cluster=ClusterConfig(**cluster),
        slides=slides,
        labels=labels,
        train_rows=rows["train"],
        val_rows=rows["val"],
    )


def make_sampler(archive: Archive, model: ModelConfig = MODEL, **changed: Any) -> PatchSampler:
    """A sampler over the archive."""
    return PatchSampler(*table(archive), model, dataclasses.replace(SAMPLER, **changed))


def attention(seed: int = 0, model: ModelConfig = MODEL) -> AttentionNet:
    """An attention network with weights of its own, sharp enough for draws to depend on them."""
    generator = torch.Generator().manual_seed(seed)
    net = AttentionNet(model)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def weights(seed: int = 0, model: ModelConfig = MODEL) -> AttentionWeights:
    """The weights of :func:`attention`."""
    return AttentionWeights.of({name: t.numpy() for name, t in attention(seed, model).state_dict().items()})


def visit(image: int, *, epoch: int = 0, step: int = 0) -> Visit:
    """A visit as a plan would make it."""
    return Visit(image=image, step=step, stream_id=(epoch << 32) + image, version=0, share=1.0)


def assert_same_item(one: Item, other: Item) -> None:
    """Field by field and bit for bit; only the clock may differ."""
    for field in dataclasses.fields(Item):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert a.shape == b.shape, field.name
            assert a.tobytes() == b.tobytes(), field.name
        elif field.name != "seconds":
            assert a == b, field.name


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the metrics without the numbers that clocks make."""
    return [{k: v for k, v in record.items() if k not in CLOCK_NUMBERS} for record in records]
