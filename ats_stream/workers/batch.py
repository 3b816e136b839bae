"""Items to tensors, and what a model makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ats_stream.kernels.feeder import DeviceFeeder
from ats_stream.models import Batch
from ats_stream.sampling import effective_sample_share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from ats_stream.kernels.feeder import Staged
    from ats_stream.models import PatchClassifier, Prediction
    from ats_stream.workers.protocol import Array, Item
    from ats_stream.workers.stream import Stream


def collate(items: Sequence[Item]) -> Batch:
    """Copy the items' arrays (read-only in Ray's object store) into the tensors of a batch."""
    return Batch(
        views_CYX=[tensor_of(item.view_CYX) for item in items],
        log_priors_YX=[_log_prior(item) for item in items],
        crops_BNCPP=torch.from_numpy(np.stack([item.crops_NCPP for item in items])),
        index_BN=torch.from_numpy(np.stack([item.index_N for item in items])),
        weight_BN=torch.from_numpy(np.stack([item.weight_N for item in items])),
    )


class BatchFeeder:
    """Batches on a device, each on its way since :meth:`stage` if that was called for its items."""

    def __init__(self, device: torch.device, feeder: DeviceFeeder | None = None) -> None:
        self._feeder = DeviceFeeder(device) if feeder is None else feeder
        self._on_their_way: dict[tuple[int, ...], tuple[Batch, Staged]] = {}

    @property
    def copies_ahead(self) -> bool:
        """Whether staging early saves time."""
        return self._feeder.copies_ahead

    def stage(self, items: Sequence[Item]) -> None:
        """Begin to copy; the items must live until they are taken."""
        batch = collate(items)
        self._on_their_way[_names(items)] = batch, self._feeder.stage(batch.tensors())

    def take(self, items: Sequence[Item]) -> Batch:
        """The batch on the device."""
        if _names(items) not in self._on_their_way:
            self.stage(items)
        batch, staged = self._on_their_way.pop(_names(items))
        return batch.of(staged.take())


def _names(items: Sequence[Item]) -> tuple[int, ...]:
    return tuple(id(item) for item in items)


def log_prior_of(prior_YX: Array | None) -> Tensor | None:
    """Mask (Y, X) -> log-prior (Y, X): 0 where positions may be drawn, -inf elsewhere.

    >>> log_prior_of(np.array([[True, False]]))
    tensor([[0., -inf]])
    """
    if prior_YX is None:
        return None
    drawable_YX = tensor_of(prior_YX)
    return torch.zeros(drawable_YX.shape).masked_fill(~drawable_YX, -torch.inf)


def _log_prior(item: Item) -> Tensor | None:
    return log_prior_of(item.prior_YX)


def tensor_of(array: Array) -> Tensor:
    """A copy as a tensor: what samplers hand over is read-only."""
    return torch.from_numpy(np.array(array))


def effective_share(items: Sequence[Item], prediction: Prediction) -> Tensor:
    """Effective sample size of each draw as a share of N, (B,): 1 while the attention that drew is fresh."""
    weight_BN = torch.from_numpy(np.stack([item.weight_N for item in items]))
    q_BN = torch.from_numpy(np.stack([item.log_q_N for item in items])).exp()
    return effective_sample_share(weight_BN, q_BN, prediction.attention_BN.detach().cpu())


@dataclass(frozen=True)
class Evaluated:
    """One image seen by a model that does not change."""

    item: Item
    outputs_K: Array
    """What the head puts out (class logits, say), float32."""
    attention_N: Array
    """Attention of the drawn positions, float32."""


def evaluate(
    model: PatchClassifier,
    stream: Stream,
    device: torch.device,
    *,
    before_step: Callable[[], None] = lambda: None,
    on_bad: Callable[[Item], None] = lambda _: None,
) -> Iterator[Evaluated]:
    """Run a model over a stream; visits of share 0, which only fill a batch or are bad, are left out.

    ``before_step`` is called before each step, the same number of times in all ranks; ``on_bad`` sees what
    takes the place of images that cannot be read, if the stream lets them through.
    """
    while stream.step < stream.plan.num_steps:
        before_step()
        planned = stream.plan.visits_of_rank(stream.step, stream.rank, stream.world_size)
        items = stream.next_step()
        model.eval()
        # closed before each yield: the mode belongs to the thread, so to whoever receives what is yielded
        with torch.inference_mode():
            prediction = model(collate(items).to(device))
            outputs_BK = prediction.class_logits_BK.cpu().numpy()
            attention_BN = prediction.attention_BN.cpu().numpy()
        for item, visit in zip(items, planned, strict=True):
            if item.bad is not None and visit.share > 0:
                on_bad(item)
        for item, outputs_K, attention_N in zip(items, outputs_BK, attention_BN, strict=True):
            if item.visit.share > 0:
                yield Evaluated(item, outputs_K, attention_N)
