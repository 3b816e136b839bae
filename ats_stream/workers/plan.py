"""Who looks at what, when, and with which version of the attention: a pure function of the step.

Nothing here depends on timing, on the number of workers, or on what has run before, so a run can be cut
anywhere and go on, and any executor delivers the same items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

KEPT_EPOCHS = 2
"""Epochs whose order a plan keeps."""


@dataclass(frozen=True)
class Visit:
    """One look at one image."""

    image: int
    """Row of the archive table."""
    step: int
    """Global step that the visit belongs to."""
    stream_id: int
    """Key of the visit's random draws together with the seed: one for each (epoch, image)."""
    version: int
    """Which weights of the attention draw: those after this many optimiser steps."""
    share: float
    """Weight of the image in the step's loss; 0 for a visit that only fills the last batch of an epoch."""
    extra_patches: int = 0
    """Patches drawn beyond the sampler's own number."""
    num_draws: int = 0
    """Visits of this image at this step, where it is met at no other: its view is read and its attention
    computed once for all of them, and nothing of it is kept afterwards. 0: others may follow at any time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps of a run.

    An epoch visits every image once, in an order drawn from (seed, epoch). Its last batch is filled up from
    the front of the same order with visits of share 0, so the global batch is constant and every world size
    that divides it computes the same step.

    >>> plan = Plan(images=(7, 8, 9), batch_size=2, num_epochs=1, seed=0, shuffle=False)
    >>> [[(v.image, v.share) for v in plan.visits(step)] for step in range(plan.num_steps)]
    [[(7, 0.5), (8, 0.5)], [(9, 1.0), (7, 0.0)]]
    """

    images: tuple[int, ...]
    """Rows of the archive table that are visited."""
    batch_size: int
    """Images in a step, over all ranks."""
    num_epochs: int
    """Passes over the images."""
    seed: int
    """Seed of the order."""
    shuffle: bool = True
    """Whether each epoch has an order of its own; otherwise that of ``images``."""
    lag: int | None = 0
    """Steps by which the attention that draws is older than the one that trains; None: never updated."""
    publish_interval: int = 1
    """Steps between versions of the attention that may draw."""
    extra_patches: int = 0
    """Patches drawn in the first epoch beyond the sampler's own number."""
    extra_epochs: int = 0
    """Epochs over which the extra patches dwindle to none."""
    weights: tuple[float, ...] | None = None
    """How often each image is visited, in proportion; None for once an epoch."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images is empty: nothing to visit")
        for name in ("batch_size", "num_epochs", "publish_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lag is not None and self.lag < 0:
            raise ValueError(f"lag must be at least 0, got {self.lag}")
        if self.weights is not None and (len(self.weights) != len(self.images) or min(self.weights) <= 0):
            raise ValueError(f"weights must be {len(self.images)} positive numbers, got {self.weights}")
        for name in ("extra_patches", "extra_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every image once."""
        return -(-len(self.images) // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.num_epochs

    def version_of(self, step: int) -> int:
        """The version of the attention that draws the items of a step: a function of the step alone.

        >>> plan = Plan(images=(0,), batch_size=1, num_epochs=9, seed=0, lag=2, publish_interval=3)
        >>> [plan.version_of(step) for step in range(9)]
        [0, 0, 0, 0, 0, 3, 3, 3, 6]
        """
        if self.lag is None:
            return 0
        return max(0, step - self.lag) // self.publish_interval * self.publish_interval

    def is_published(self, version: int) -> bool:
        """Whether any step draws with this version."""
        return version == 0 or (self.lag is not None and version % self.publish_interval == 0)

    def extra_patches_of(self, epoch: int) -> int:
        """Patches beyond the sampler's own number in an epoch: they fall linearly, rounded up.

        >>> plan = Plan(images=(0,), batch_size=1, num_epochs=9, seed=0, extra_patches=24, extra_epochs=4)
        >>> [plan.extra_patches_of(epoch) for epoch in range(6)]
        [24, 18, 12, 6, 0, 0]
        """
        if epoch >= self.extra_epochs:
            return 0
        return -(-self.extra_patches * (self.extra_epochs - epoch) // self.extra_epochs)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Rows of the archive table in the order in which an epoch visits them.

        With ``weights`` an image of share w is visited floor(n w) or ceil(n w) times, n w on average
        (systematic sampling), n being the number of images.

        >>> plan = Plan(images=(5, 6), batch_size=1, num_epochs=1, seed=0, weights=(3.0, 1.0))
        >>> [sorted(plan.order(epoch).tolist()) for epoch in range(4)]
        [[5, 5], [5, 5], [5, 6], [5, 5]]
        """
        images = np.asarray(self.images, dtype=np.int64)
        key = np.array([self.seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        if self.weights is not None:
            images = np.sort(images[self._resampled(generator)])
        return generator.permutation(images) if self.shuffle else images

    def _resampled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """As many numbers of images as there are images, in proportion to the weights."""
        # in an order of their own: neighbours would otherwise compete for the same visits in every epoch
        order = generator.permutation(len(self.images))
        edges = np.cumsum(np.asarray(self.weights, np.float64)[order])
        ticks = (np.arange(len(order)) + generator.random()) * (edges[-1] / len(order))
        found: npt.NDArray[np.int64] = order[np.searchsorted(edges[:-1], ticks, side="right")]
        return found

    def visits(self, step: int) -> tuple[Visit, ...]:
        """The visits of one step, ``batch_size`` of them, over all ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order, repeats = self._epoch(epoch)
        slots = np.arange(step_in_epoch * self.batch_size, (step_in_epoch + 1) * self.batch_size)
        num_real = int((slots < len(order)).sum())
        return tuple(
            Visit(
                image=int(order[slot % len(order)]),
                step=step,
                stream_id=(epoch << 32)
                + int(repeats[slot % len(order)]) * self._num_rows
                + int(order[slot % len(order)]),
                version=self.version_of(step),
                share=1.0 / num_real if slot < len(order) else 0.0,
                extra_patches=self.extra_patches_of(epoch),
            )
            for slot in slots
        )

    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Order of an epoch, and how often each image came before in it.

        A step asks for as many entries as it has images, so the last epochs asked for are kept: a stream that
        runs ahead, and the ledger, stand in two at a time.
        """
        if epoch not in self._epochs:
            order = self.order(epoch)
            repeats = _earlier_visits(order) if self.weights is not None else np.zeros_like(order)
            while len(self._epochs) >= KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = order, repeats
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        return {}

    @cached_property
    def _num_rows(self) -> int:
        return max(self.images) + 1

    def visits_of_rank(self, step: int, rank: int, world_size: int) -> tuple[Visit, ...]:
        """The part of a step that one rank trains on; ValueError if ranks do not divide the batch."""
        if self.batch_size % world_size:
            raise ValueError(f"world size {world_size} does not divide the batch of {self.batch_size}")
        per_rank = self.batch_size // world_size
        return self.visits(step)[rank * per_rank : (rank + 1) * per_rank]


def _earlier_visits(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each image stands further ahead in an order.

    >>> _earlier_visits(np.array([7, 3, 7, 7, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    by_image = np.argsort(order, kind="stable")
    _, first, counts = np.unique(order[by_image], return_index=True, return_counts=True)
    earlier = np.empty_like(order)
    earlier[by_image] = np.arange(len(order)) - np.repeat(first, counts)
    return earlier
