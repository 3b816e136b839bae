"""Who computes items: this process, or Ray actors. Both give the same items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ats_stream.errors import AtsStreamError, ClusterError, InputError
from ats_stream.io import StorageOptions
from ats_stream.io.storage.remote import shown
from ats_stream.workers.hedging import DEFAULT_HEDGE_AFTER_S, Patience
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

    Ray must be running (``ray.init``). A call goes to the actor that owes the fewest items. An item that
    takes much longer than its peers, and at least ``hedge_after_s`` (0: never), is asked of another actor as
    well and the first answer taken; actors that owe such a late answer are the last to be asked. With
    ``near`` actors are put on this process's node while it has room. ``actor`` is another class of actors
    with the calls of SamplerActor.
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
        hedge_after_s: float = DEFAULT_HEDGE_AFTER_S,
        near: bool = False,
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
            scheduling_strategy=_near_this_process() if near else None,
        )
        self._slides, self._labels = slides, labels
        secrets = StorageOptions.of(storage_options)
        self._actors = [options.remote(model, config, secrets) for _ in range(num_samplers)]
        self._owed = [0] * num_samplers
        self._late: list[_Call] = []
        self._patience = Patience(after_s=hedge_after_s if num_samplers > 1 else 0.0)
        self._published: dict[str, Any] = {}
        self.num_hedged = 0
        """Items that were asked of a second actor."""

    def submit(self, visit: Visit, weights: AttentionWeights) -> Pending:
        """Send the visit to the actor that owes the fewest items."""
        import ray

        if weights.key not in self._published:
            # only the newest few versions can still be asked for
            self._published = dict(list(self._published.items())[-8:])
            self._published[weights.key] = ray.put(weights)
        remote = _Remote(self, visit, weights.key, self._published[weights.key], self._slides[visit.image])
        remote.ask()
        return remote

    def close(self) -> None:
        """Let the actors end, once they are through with what is still pending.

        Nobody else holds them; killed while they owe items, Ray would tell the user so for each item.
        """
        self._actors, self._late = [], []

    def _send(self, visit: Visit, key: str, weights: Any, *, but: Sequence[_Call]) -> _Call:
        """Ask an actor that was not asked yet, one without late answers if there is any."""
        self._take_late()
        late, asked = {call.number for call in self._late}, {call.number for call in but}
        free = [number for number in range(len(self._actors)) if number not in asked]
        number = min(free, key=lambda n: (n in late, self._owed[n]))
        self._owed[number] += 1
        slide, label = self._slides[visit.image], self._labels[visit.image]
        return _Call(number, self._actors[number].sample.remote(visit, slide, label, key, [weights]))

    def _take_late(self) -> None:
        """Let go of late answers that have come."""
        import ray

        if self._late:
            references = [call.reference for call in self._late]
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
            for call in [call for call in self._late if call.reference in ready]:
                self._late.remove(call)
                self._owed[call.number] -= 1

    def _limit_s(self, call: _Call) -> float | None:
        """How long a call is waited for: not at all if its actor is stuck with one before it."""
        limit_s = self._patience.limit_s
        self._take_late()
        return 0.0 if limit_s is not None and any(c.number == call.number for c in self._late) else limit_s

    def _done(self, calls: Sequence[_Call], answered: _Call, seconds: float | None) -> None:
        """Note who answered, and who still owes an answer that nobody waits for."""
        self._owed[answered.number] -= 1
        self._late += [call for call in calls if call is not answered]
        if seconds is not None:
            self._patience.note(seconds)


class _Call(NamedTuple):
    number: int
    """Of the actor."""
    reference: Any


class _Remote:
    """An item asked of an actor, and of a second one if the first is late."""

    def __init__(self, executor: RayExecutor, visit: Visit, key: str, weights: Any, slide: str) -> None:
        self._executor, self._order, self._slide = executor, (visit, key, weights), slide
        self._calls: list[_Call] = []

    def ask(self) -> None:
        """Ask one more actor."""
        self._calls.append(self._executor._send(*self._order, but=self._calls))

    def result(self) -> Item:
        import ray

        limit_s = self._executor._limit_s(self._calls[0])
        if limit_s is not None and not ray.wait([self._calls[0].reference], timeout=limit_s)[0]:
            self.ask()
            self._executor.num_hedged += 1
        answered, seconds = self._first(), None
        try:
            item: Item = ray.get(answered.reference)
            seconds = item.seconds
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
            self._executor._done(self._calls, answered, seconds)
        return item

    def _first(self) -> _Call:
        """The call that is answered first; one whose actor has died for good only if the other has too."""
        import ray

        waiting = list(self._calls)
        while len(waiting) > 1:
            [reference], _ = ray.wait([call.reference for call in waiting], num_returns=1)
            answered = next(call for call in waiting if call.reference == reference)
            if not _has_died(reference):
                return answered
            waiting.remove(answered)
        return waiting[0]


def _has_died(reference: Any) -> bool:
    """Whether an answer that has come is the death of its actor."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayActorError:
        return True
    except ray.exceptions.RayError:
        return False
    return False


def _near_this_process() -> Any:
    """Puts actors on the node of this process, and elsewhere when it has no room: Ray itself would wait."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)


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
) -> Executor:
    """An executor by name: ``serial`` computes in this process, ``ray`` in ``num_samplers`` actors.

    What only :class:`RayExecutor` takes is for it alone. ``storage_options`` are for the URLs among the
    slides.
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
            gpus_per_sampler=gpus_per_sampler,
            hedge_after_s=hedge_after_s,
            near=near,
            storage_options=storage_options,
        )
    raise InputError(f"executor must be serial or ray, got {kind!r}")
