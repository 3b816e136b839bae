"""The Ray actor around a sampler. Kept in a module of its own because importing it imports Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import torch

from ats_stream.errors import ClusterError
from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.sampler import PatchSampler

if TYPE_CHECKING:
    from ats_stream.io import StorageOptions
    from ats_stream.models import ModelConfig
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import AttentionWeights, Item
    from ats_stream.workers.sampler import SamplerConfig


@ray.remote
class SamplerActor:
    """A :class:`PatchSampler` behind remote calls.

    The weights' reference comes inside a list, so that Ray hands it over as a reference and an actor fetches
    weights only when their key is new to it. Slide and label come with each call: a table in the object store
    would have to outlive every restart.
    """

    def __init__(self, model: ModelConfig, config: SamplerConfig, storage_options: StorageOptions) -> None:
        keep_freed_memory()
        # a share of a GPU was asked for exactly if Ray names one here, whatever this process can see
        has_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        self._blind = has_gpu and not torch.cuda.is_available()
        device = torch.device("cuda" if has_gpu and not self._blind else "cpu")
        self._slides: dict[int, str] = {}
        self._labels: dict[int, int] = {}
        self._sampler = PatchSampler(self._slides, self._labels, model, config, storage_options, device)
        self._weights: AttentionWeights | None = None

    def sample(self, visit: Visit, slide: str, label: int, key: str, weights: list[Any]) -> Item:
        """One item; ClusterError if this actor has a GPU that torch cannot use."""
        if self._blind:
            raise ClusterError("a sampler was given a share of a GPU, and torch sees none there")
        self._slides[visit.image], self._labels[visit.image] = slide, label
        if self._weights is None or self._weights.key != key:
            self._weights = ray.get(weights[0])
        return self._sampler.sample(visit, self._weights)
