"""Look at some images of an archive, so that a run can be sized: shapes, compression, times measured here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING

import torch

from ats_stream.errors import SlideError
from ats_stream.io import StorageOptions
from ats_stream.models import PatchClassifier
from ats_stream.workers.batch import collate
from ats_stream.workers.pixel_size import given_sizes
from ats_stream.workers.plan import Visit
from ats_stream.workers.protocol import AttentionWeights
from ats_stream.workers.sampler import PatchSampler, read_levels, read_prior
from ats_stream.workers.sizing import ImageFacts, expected_chunks, touched_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io import ArchiveRow, Pyramid
    from ats_stream.workers.config import RunConfig
    from ats_stream.workers.protocol import Item
    from ats_stream.workers.sampler import SamplerConfig

VISITS = 3
"""Times that each image is sampled: the first opens it and reads its view, the others are timed."""
TIMED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found."""

    images: tuple[ImageFacts, ...]
    num_parameters: int
    sampler_s: float
    """Time of a sampler for one image, its view in memory."""
    reading_s: float
    """The part of it that fetches and decodes the patches."""
    rank_s: float | None
    """Time of a rank on this machine's CPU for one image of a training step; None if it was not asked for."""


def probe(
    rows: Sequence[ArchiveRow],
    config: RunConfig,
    *,
    images_per_rank: int,
    on_cpu: bool,
    storage_options: StorageOptions | None = None,
) -> Probe:
    """Sample each image with an attention network that has not learned, and train for some steps on them.

    Raises SlideError for an image that cannot be read or drawn from.
    """
    model = PatchClassifier(config.model)
    arrays = {name: t.detach().numpy() for name, t in model.attention.state_dict().items()}
    storage = StorageOptions.of(storage_options)
    sampler = PatchSampler(
        [row.slide for row in rows],
        [0] * len(rows),
        config.model,
        config.sampler,
        storage,
        pixel_sizes=given_sizes(rows),
    )
    weights = AttentionWeights.of(arrays)
    facts, items, seconds, reading_s = [], [], [], []
    for image, row in enumerate(rows):
        visits = [
            Visit(image=image, step=0, stream_id=(epoch << 32) + image, version=0, share=1.0)
            for epoch in range(VISITS)
        ]
        found = [sampler.sample(visit, weights) for visit in visits]
        own = config.sampler.of_image(row.pixel_size_um)
        facts.append(_facts(storage.open(row.slide), own, found))
        items.append(found[-1])
        seconds.append(median(item.seconds for item in found[1:]))
        reading_s.append(_reading_s(storage.open(row.slide), own, found[1:]))
    batch = [items[number % len(items)] for number in range(images_per_rank)]
    return Probe(
        images=tuple(facts),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sampler_s=mean(seconds),
        reading_s=min(mean(reading_s), mean(seconds)),
        rank_s=_step_s(model, batch) / images_per_rank if on_cpu else None,
    )


def _facts(pyramid: Pyramid, sampler: SamplerConfig, items: Sequence[Item]) -> ImageFacts:
    full, level = read_levels(pyramid, sampler)
    pyramid.read(level)
    view_stored = pyramid.read_stats(level).stored_bytes
    prior, label = None, sampler.prior_label
    if label is not None:
        prior = read_prior(pyramid, label, level.shape[1:], cache_bytes=0)
        view_stored += pyramid.label(label).read_stats(0).stored_bytes
    channels, *chunk_shape = full.chunk_shape
    counts_K = touched_counts(full.shape[1:], chunk_shape, level.shape[1:], sampler.patch_px, prior)
    num_drawable = int(prior.sum()) if prior is not None else level.shape[1] * level.shape[2]
    decoded = sum(item.decoded_bytes for item in items)
    if not decoded:
        raise SlideError(pyramid.slide, "no chunk lies under the patches drawn")
    whole_pixels = -(-full.shape[0] // channels) * channels
    return ImageFacts(
        view_shape=(level.shape[0], level.shape[1], level.shape[2]),
        pixel_bytes=full.dtype.itemsize,
        has_prior=prior is not None,
        num_chunks=expected_chunks(
            counts_K,
            num_drawable,
            sampler.num_patches,
            replace=sampler.scheme == "with_replacement",
        ),
        chunk_bytes=whole_pixels * chunk_shape[0] * chunk_shape[1] * full.dtype.itemsize,
        stored_share=sum(item.stored_bytes for item in items) / decoded,
        view_stored_bytes=view_stored,
    )


def _reading_s(pyramid: Pyramid, sampler: SamplerConfig, items: Sequence[Item]) -> float:
    full, _ = read_levels(pyramid, sampler)
    times = []
    for item in items:
        start_s = time.perf_counter()
        pyramid.read_patches(full, item.offsets_ND, item.crops_NCPP.shape[2:])
        times.append(time.perf_counter() - start_s)
    return median(times)


def _step_s(model: PatchClassifier, items: Sequence[Item]) -> float:
    """The fastest of some training steps on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimiser = torch.optim.AdamW(model.parameters())
    times = []
    try:
        for _ in range(TIMED_STEPS):
            start_s = time.perf_counter()
            prediction = model(collate(items))
            optimiser.zero_grad()
            # any loss will do: what takes time is below it
            loss = prediction.class_logits_BK.square().sum() + prediction.entropy_B.sum()
            loss.backward()
            optimiser.step()
            times.append(time.perf_counter() - start_s)
    finally:
        torch.set_num_threads(threads)
    return min(times)
