"""The Ray actor around a sampler. Kept in a module of its own because importing it imports Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.sampler import PatchSampler

if TYPE_CHECKING:
    from ats_stream.models import ModelConfig
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import AttentionWeights, Item
    from ats_stream.workers.sampler import SamplerConfig


@ray.remote
class SamplerActor:
    """A :class:`PatchSampler` behind remote calls.

    References come inside lists, so that Ray hands them over as references and an actor fetches weights only
    when their key is new to it.
    """

    def __init__(self, table: list[Any], model: ModelConfig, config: SamplerConfig) -> None:
        keep_freed_memory()
        slides, labels = ray.get(table[0])
        self._sampler = PatchSampler(slides, labels, model, config)
        self._weights: AttentionWeights | None = None

    def sample(self, visit: Visit, key: str, weights: list[Any]) -> Item:
        """One item."""
        if self._weights is None or self._weights.key != key:
            self._weights = ray.get(weights[0])
        return self._sampler.sample(visit, self._weights)
