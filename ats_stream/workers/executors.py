"""Who computes items: this process, or Ray actors. Both give the same items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ats_stream.errors import InputError
from ats_stream.workers.hedging import DEFAULT_HEDGE_AFTER_S
from ats_stream.workers.pixel_size import NO_SIZES
from ats_stream.workers.ray_executor import RayExecutor
from ats_stream.workers.sampler import PatchSampler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.io import StorageOptions
    from ats_stream.models import ModelConfig
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import AttentionWeights, Item
    from ats_stream.workers.sampler import SamplerConfig


class Pending(Protocol):
    """An item that was asked for."""

    def result(self) -> Item:
        """Wait for the item."""


class Executor(Protocol):
    """Computes items in any order and at any time between ``submit`` and ``result``."""

    def submit(self, visit: Visit, weights: AttentionWeights) -> Pending:
        """Ask for an item."""

    def read_ahead(self, visits: Sequence[Visit]) -> None:
        """Say what will be asked for once its weights are there, each visit once."""

    def close(self) -> None:
        """Give back what the executor holds; items still pending are lost."""


class SerialExecutor:
    """Computes each item in this process when it is waited for: the reference."""

    def __init__(self, sampler: PatchSampler) -> None:
        self.sampler = sampler

    def submit(self, visit: Visit, weights: AttentionWeights) -> Pending:
        """Remember the visit."""
        return _Deferred(self.sampler, visit, weights)

    def read_ahead(self, visits: Sequence[Visit]) -> None:
        """Nothing can be done meanwhile."""

    def close(self) -> None:
        """Nothing to give back."""


class _Deferred:
    def __init__(self, sampler: PatchSampler, visit: Visit, weights: AttentionWeights) -> None:
        self._call = (sampler, visit, weights)

    def result(self) -> Item:
        sampler, visit, weights = self._call
        return sampler.sample(visit, weights)


def make_executor(
    kind: str,
    slides: Sequence[str],
    labels: Sequence[int],
    model: ModelConfig,
    config: SamplerConfig,
    *,
    num_samplers: int = 1,
    cpus_per_sampler: float = 1.0,
    gpus_per_sampler: float = 0.0,
    hedge_after_s: float = DEFAULT_HEDGE_AFTER_S,
    near: bool = False,
    storage_options: StorageOptions | Mapping[str, Any] | None = None,
    pixel_sizes: Mapping[int, float | None] = NO_SIZES,
) -> Executor:
    """An executor by name: ``serial`` computes in this process, ``ray`` in ``num_samplers`` actors.

    What only :class:`RayExecutor` takes is for it alone; the rest is as for :class:`PatchSampler`.
    """
    if kind == "serial":
        return SerialExecutor(
            PatchSampler(slides, labels, model, config, storage_options, pixel_sizes=pixel_sizes)
        )
    if kind == "ray":
        return RayExecutor(
            slides,
            labels,
            model,
            config,
            num_samplers=num_samplers,
            cpus_per_sampler=cpus_per_sampler,
            gpus_per_sampler=gpus_per_sampler,
            hedge_after_s=hedge_after_s,
            near=near,
            storage_options=storage_options,
            pixel_sizes=pixel_sizes,
        )
    raise InputError(f"executor must be serial or ray, got {kind!r}")
