"""Who computes items: this process, or Ray actors. Both give the same items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ats_stream.errors import AtsStreamError, ClusterError, InputError
from ats_stream.io import StorageOptions
from ats_stream.io.remote import shown
from ats_stream.workers.sampler import PatchSampler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.models import ModelConfig
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import AttentionWeights, Item
    from ats_stream.workers.sampler import SamplerConfig

# a sampler that dies (out of memory, lost node) is started again, and the calls it owed are repeated; not for
# ever, because an image that ends its sampler each time must end the run with its name
ACTOR_RESTARTS = -1
CALL_RETRIES = 4


class Pending(Protocol):
    """An item that was asked for."""

    def result(self) -> Item:
        """Wait for the item."""


class Executor(Protocol):
    """Computes items in any order and at any time between ``submit`` and ``result``."""

    def submit(self, visit: Visit, weights: AttentionWeights) -> Pending:
        """Ask for an item."""

    def close(self) -> None:
        """Give back what the executor holds; items still pending are lost."""


class SerialExecutor:
    """Computes each item in this process when it is waited for: the reference."""

    def __init__(self, sampler: PatchSampler) -> None:
        self.sampler = sampler

    def submit(self, visit: Visit, weights: AttentionWeights) -> Pending:
        """Remember the visit."""
        return _Deferred(self.sampler, visit, weights)

    def close(self) -> None:
        """Nothing to give back."""


class _Deferred:
    def __init__(self, sampler: PatchSampler, visit: Visit, weights: AttentionWeights) -> None:
        self._call = (sampler, visit, weights)

    def result(self) -> Item:
        sampler, visit, weights = self._call
        return sampler.sample(visit, weights)


class RayExecutor:
    """A pool of sampler actors owned by this process, so that they die with it.

    Ray must be running (``ray.init``). A call goes to the actor that owes the fewest items. ``actor`` is
    another class of actors with the calls of SamplerActor.
    """

    def __init__(
        self,
        slides: Sequence[str],
        labels: Sequence[int],
        model: ModelConfig,
        config: SamplerConfig,
        *,
        num_samplers: int,
        cpus_per_sampler: float,
        gpus_per_sampler: float = 0.0,
        storage_options: StorageOptions | Mapping[str, Any] | None = None,
        actor: Any = None,
    ) -> None:
        from ats_stream.workers.actors import SamplerActor

        actors: Any = actor or SamplerActor
        options = actors.options(
            num_cpus=cpus_per_sampler,
            num_gpus=gpus_per_sampler,
            max_restarts=ACTOR_RESTARTS,
            max_task_retries=CALL_RETRIES,
        )
        self._slides, self._labels = slides, labels
        secrets = StorageOptions.of(storage_options)
        self._actors = [options.remote(model, config, secrets) for _ in range(num_samplers)]
        self._owed = [0] * num_samplers
        self._published: dict[str, Any] = {}

    def submit(self, visit: Visit, weights: AttentionWeights) -> Pending:
        """Send the visit to the actor that owes the fewest items."""
        import ray

        if weights.key not in self._published:
            # only the newest few versions can still be asked for
            self._published = dict(list(self._published.items())[-8:])
            self._published[weights.key] = ray.put(weights)
        number = min(range(len(self._actors)), key=self._owed.__getitem__)
        self._owed[number] += 1
        slide, label = self._slides[visit.image], self._labels[visit.image]
        reference = self._actors[number].sample.remote(
            visit, slide, label, weights.key, [self._published[weights.key]]
        )
        return _Remote(self, number, reference, slide)

    def close(self) -> None:
        """Let the actors end, once they are through with what is still pending.

        Nobody else holds them; killed while they owe items, Ray would tell the user so for each item.
        """
        self._actors = []

    def _done(self, number: int) -> None:
        self._owed[number] -= 1


class _Remote:
    def __init__(self, executor: RayExecutor, number: int, reference: Any, slide: str) -> None:
        self._executor, self._number, self._reference, self._slide = executor, number, reference, slide

    def result(self) -> Item:
        import ray

        try:
            item: Item = ray.get(self._reference)
        except ray.exceptions.RayTaskError as error:
            # our own error, in its own words; any other is a bug and keeps the actor's traceback
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, AtsStreamError) else error) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                f"{shown(self._slide)}: its sampler died {CALL_RETRIES + 1} times "
                "or could not be started again (out of memory, or an image that crashes the process)"
            ) from error
        finally:
            self._executor._done(self._number)
        return item


def make_executor(
    kind: str,
    slides: Sequence[str],
    labels: Sequence[int],
    model: ModelConfig,
    config: SamplerConfig,
    *,
    num_samplers: int = 1,
    cpus_per_sampler: float = 1.0,
    storage_options: StorageOptions | Mapping[str, Any] | None = None,
) -> Executor:
    """An executor by name: ``serial`` computes in this process, ``ray`` in ``num_samplers`` actors.

    ``storage_options`` are for the URLs among the slides.
    """
    if kind == "serial":
        return SerialExecutor(PatchSampler(slides, labels, model, config, storage_options))
    if kind == "ray":
        return RayExecutor(
            slides,
            labels,
            model,
            config,
            num_samplers=num_samplers,
            cpus_per_sampler=cpus_per_sampler,
            storage_options=storage_options,
        )
    raise InputError(f"executor must be serial or ray, got {kind!r}")
