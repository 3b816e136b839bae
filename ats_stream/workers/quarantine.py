"""Images that cannot be read: left out by policy, counted, and told by name and reason.

A bad image still has its place in its step: a blank item of share 0, which no loss and no gradient notices.
So every rank has as many items as always, and the ranks only have to agree on how many images a step is the
mean of. Whether an image is bad is found anew at each visit, by the sampler that reads it, so neither the
executor nor a resume nor the number of ranks changes what is left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ats_stream.errors import BadImagesError
from ats_stream.io.storage.remote import shown
from ats_stream.sampling import draw
from ats_stream.workers.protocol import Item
from ats_stream.workers.ranks import collect_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ats_stream.errors import SlideError
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import AttentionWeights
    from ats_stream.workers.ranks import Ranks
    from ats_stream.workers.sampler import SamplerConfig

FAIL, SKIP = "fail", "skip"
BAD_IMAGE_POLICIES = (FAIL, SKIP)


@dataclass(frozen=True)
class BadImage:
    """An image that a run could not read."""

    image: int
    """Row of the archive table."""
    slide: str
    """Its path or URL, without credentials."""
    reason: str


def blank_item(
    visit: Visit,
    weights: AttentionWeights,
    error: SlideError,
    *,
    slides: Sequence[str],
    sampler: SamplerConfig,
    num_channels: int,
) -> Item:
    """The item of an image that could not be read: black, of one position, and of share 0."""
    num_patches = sampler.num_patches + visit.extra_patches
    drawn = draw(torch.zeros(1, 1), num_patches, scheme=sampler.scheme, map_shape=(1, 1))
    return Item(
        visit=replace(visit, share=0.0),
        slide=shown(slides[visit.image]),
        label=0,
        view_CYX=np.zeros((num_channels, 1, 1), np.uint8),
        prior_YX=None,
        index_N=drawn.index[0].numpy(),
        log_q_N=drawn.log_prob[0].numpy(),
        weight_N=drawn.weight[0].float().numpy(),
        num_drawn=0,
        offsets_ND=np.zeros((num_patches, 2), np.int64),
        crops_NCPP=np.zeros((num_patches, num_channels, sampler.patch_px, sampler.patch_px), np.uint8),
        attention_key=weights.key,
        stored_bytes=0,
        decoded_bytes=0,
        seconds=0.0,
        bad=error.reason,
    )


class Quarantine:
    """The bad images that a run has met, the same in all ranks.

    ``num_images`` are all those that the run looks at, of which the share ``max_share`` may be bad.
    """

    def __init__(self, ranks: Ranks, *, num_images: int, max_share: float) -> None:
        self._ranks, self._num_images, self._max_share = ranks, num_images, max_share
        self.images: dict[int, BadImage] = {}
        """By row of the table, in the order in which they were met."""
        self.on_new: Callable[[BadImage], None] = lambda _: None
        """Told of each of them once."""

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps."""
        return [asdict(one) for one in self.images.values()]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up what ``state`` gave."""
        self.images = {int(one["image"]): BadImage(**one) for one in state}

    def count(self, items: Sequence[Item]) -> int:
        """Images that the loss of a step is the mean of, over all ranks, which all ask together.

        Raises BadImagesError, in all ranks, when more images are bad than may be.
        """
        good = sum(item.visit.share > 0 for item in items)
        bad = [item for item in items if item.bad is not None]
        counts = torch.tensor([good, len(bad)], dtype=torch.float64)
        num_good, num_bad = self._ranks.total(counts).tolist()
        if num_bad:
            self.add(bad)
        return int(num_good)

    def add(self, items: Sequence[Item]) -> None:
        """Take in what the ranks, all together, found to be bad; BadImagesError when these are too many."""
        found = [asdict(BadImage(i.visit.image, i.slide, str(i.bad))) for i in items]
        for line in collect_lines(self._ranks, map(json.dumps, found)):
            one = BadImage(**json.loads(line))
            if one.image not in self.images:
                self.images[one.image] = one
                self.on_new(one)
        if len(self.images) > self._max_share * self._num_images:
            raise BadImagesError(
                [f"{one.slide}: {one.reason}" for one in self.images.values()],
                self._num_images,
                self._max_share,
            )
