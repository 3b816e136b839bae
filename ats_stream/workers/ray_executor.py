"""Items computed by Ray actors: the same as in one process, whoever computes them, is late, or dies."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from ats_stream.errors import AtsStreamError, ClusterError, SlideError
from ats_stream.io import StorageOptions
from ats_stream.io.storage.remote import shown
from ats_stream.workers.handover import Place, Shelf
from ats_stream.workers.hedging import DEFAULT_HEDGE_AFTER_S, Patience
from ats_stream.workers.pixel_size import NO_SIZES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.models import ModelConfig
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import AttentionWeights, Item
    from ats_stream.workers.sampler import SamplerConfig

# a sampler that dies (out of memory, lost node) is started again, and the calls it owed are repeated; not for
# ever: an image may end its sampler each time, and takes those with it that were asked of the same one
ACTOR_RESTARTS = -1
CALL_RETRIES = 2
TRIES_ALONE = 2
"""How often an item is asked for once more, of a sampler that does nothing else, until it is to blame."""
ITEMS_AT_ONCE = 4
"""Items that a sampler has under way: while one waits for storage, others compute."""
VIEWS_AHEAD = 16
"""Views that a sampler has read ahead, which wait for the weights that draw from them."""
VERSIONS_KEPT = 8
MAX_AHEAD = 1024
VIEW_BYTES = 64 << 20  # 64 MiB
"""Room for the view in what a call lends; of memory, only what is written to is taken."""
WIDEST_PIXEL_BYTES = 2


class RayExecutor:
    """A pool of sampler actors owned by this process, so that they die with it.

    Ray must be running (``ray.init``). A call goes to the actor that owes the fewest items, or to the one
    that met the image last, and so has it open and its view at hand, if that owes at most one more; each has
    up to ``items_at_once`` under way. An item that takes much longer than its peers, and at least
    ``hedge_after_s`` (0: never), is asked of another actor as well and the first answer taken; actors that
    owe such a late answer are the last to be asked. With ``near`` actors are put on this process's node while
    it has room; their answers come through memory that they share with it. ``actor`` is another class of
    actors with the calls of SamplerActor. ``pixel_sizes`` are as for PatchSampler.
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
        items_at_once: int = ITEMS_AT_ONCE,
        storage_options: StorageOptions | Mapping[str, Any] | None = None,
        actor: Any = None,
        pixel_sizes: Mapping[int, float | None] = NO_SIZES,
    ) -> None:
        import ray

        from ats_stream.workers.actors import SamplerActor

        actors: Any = actor or SamplerActor
        options = actors.options(
            num_cpus=cpus_per_sampler,
            num_gpus=gpus_per_sampler,
            max_restarts=ACTOR_RESTARTS,
            max_task_retries=CALL_RETRIES,
            max_concurrency=items_at_once,
            # what Ray notes down of each call for its dashboard costs as much as the call
            enable_task_events=False,
            scheduling_strategy=_near_this_process() if near else None,
        )
        self._slides, self._labels, self._pixel_sizes = slides, labels, pixel_sizes
        secrets = StorageOptions.of(storage_options)
        self._actors = [options.remote(model, config, secrets) for _ in range(num_samplers)]
        crops = config.num_patches * model.num_channels * config.patch_px**2 * WIDEST_PIXEL_BYTES
        self._shelf = Shelf.if_possible(ray.get_runtime_context().get_node_id(), crops + VIEW_BYTES)
        self._open: list[set[_Call]] = [set() for _ in range(num_samplers)]
        """Calls of each actor that were not answered yet, as far as is known."""
        self._reaches = [False] * num_samplers
        """Actors that were seen to write to the shelf."""
        self._late: list[_Call] = []
        self._abandoned: list[_Call] = []
        """Calls whose items nobody waits for any more, without being late."""
        self._ahead: OrderedDict[Visit, int] = OrderedDict()
        """Which actor reads the view of a visit that cannot be asked for yet."""
        self._last_ahead: list[Any] = [None] * num_samplers
        self._met: dict[int, int] = {}
        """Which actor was last asked for an image."""
        self._deadly: dict[int, SlideError] = {}
        """Images that end their samplers: met again, they are not tried again."""
        self._patience = Patience(after_s=hedge_after_s if num_samplers > 1 else 0.0)
        self._published: OrderedDict[str, _Published] = OrderedDict()
        self.num_hedged = 0
        """Items that were asked of a second actor."""

    def submit(self, visit: Visit, weights: AttentionWeights) -> _Remote:
        """Send the visit to the actor that reads its view, has it, or owes the fewest items."""
        if weights.key not in self._published:
            # only the newest few versions can still be asked for
            while len(self._published) >= VERSIONS_KEPT:
                self._published.popitem(last=False)[1].withdraw(self._shelf)
            self._published[weights.key] = _Published(weights, self._shelf)
        remote = _Remote(self, visit, self._published[weights.key])
        number = self._ahead.pop(visit, None)
        if visit.image not in self._deadly:
            remote.ask(number)
        return remote

    def read_ahead(self, visits: Sequence[Visit]) -> None:
        """Have the views of visits read whose weights are not there yet."""
        by_actor: dict[int, list[tuple[int, str, float | None]]] = {}
        self._take_late()
        for visit in (one for one in visits if one.image not in self._deadly):
            number = self._choose(visit.image, ahead=Counter(self._ahead.values()))
            self._ahead[visit] = self._met[visit.image] = number
            while len(self._ahead) > MAX_AHEAD:
                self._ahead.popitem(last=False)
            image = (visit.image, self._slides[visit.image], self._pixel_sizes.get(visit.image))
            by_actor.setdefault(number, []).append(image)
        for number, images in by_actor.items():
            # not repeated: what is lost here is read when it is sampled
            call = self._actors[number].read_ahead.options(max_task_retries=0)
            self._last_ahead[number] = call.remote(pickle.dumps(images))

    def close(self) -> None:
        """Let the actors end, once they are through with what is still pending.

        Nobody else holds them; killed while they owe items, Ray would tell the user so for each item.
        """
        self._actors, self._late, self._abandoned = [], [], []

    def _choose(
        self,
        image: int,
        *,
        but: Sequence[_Call] = (),
        rather: int | None = None,
        ahead: Mapping[int, int] | None = None,
    ) -> int:
        """An actor that was not asked yet, one without late answers if there is any.

        ``ahead`` says what each reads for calls to come.
        """
        late, met = {call.number for call in self._late}, self._met.get(image)
        asked = {call.number for call in but}
        if rather is not None and rather not in late | asked:
            return rather

        def cost(number: int) -> tuple[bool, int, bool]:
            owed = len(self._open[number]) + (ahead or {}).get(number, 0)
            return number in late, owed - (number == met), number != met

        return min((number for number in range(len(self._actors)) if number not in asked), key=cost)

    def _send(
        self,
        visit: Visit,
        published: _Published,
        *,
        number: int,
        retries: int | None = None,
    ) -> _Call:
        """Ask an actor."""
        place = None if self._shelf is None else self._shelf.lend()
        slide, label = self._slides[visit.image], self._labels[visit.image]
        pixel_size_um = self._pixel_sizes.get(visit.image)
        order = (visit, slide, label, pixel_size_um, published.weights.key, published.kept, place)
        answer = self._actors[number].answer
        if retries is not None:
            answer = answer.options(max_task_retries=retries)
        near = self._reaches[number] and published.kept is not None
        reference = answer.remote(pickle.dumps(order), *([] if near else [(published.reference(),)]))
        call = _Call(number, reference, place)
        self._open[number].add(call)
        self._met[visit.image] = number
        return call

    def _take_late(self) -> None:
        """Let go of late answers that have come."""
        import ray

        calls = self._late + self._abandoned
        if calls:
            references = [call.reference for call in calls]
            found, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
            ready = set(found)
            for call in calls:
                if call.reference in ready:
                    self._settle(call, is_over=_is_over(_error_of(call.reference)))
            self._late = [call for call in self._late if call.reference not in ready]
            self._abandoned = [call for call in self._abandoned if call.reference not in ready]

    def _limit_s(self, call: _Call) -> float | None:
        """How long a call is waited for: not at all if its actor is stuck with one before it."""
        limit_s = self._patience.limit_s
        self._take_late()
        return 0.0 if limit_s is not None and any(c.number == call.number for c in self._late) else limit_s

    def _settle(self, call: _Call, *, is_over: bool = True) -> None:
        """A call was answered; its place is free unless its actor may still be at it."""
        self._open[call.number].discard(call)
        if call.place is not None and self._shelf is not None and is_over:
            self._shelf.give_back(call.place)

    def _received(self, call: _Call, timeout_s: float | None = None) -> Item | None:
        """The item that a call was answered with, or None where weights were missing; errors as they came."""
        import ray

        try:
            answer: bytes | Item | None = ray.get(call.reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise
        except ray.exceptions.RayError as error:
            self._settle(call, is_over=_is_over(error))
            raise
        if isinstance(answer, bytes):
            assert self._shelf is not None
            assert call.place is not None
            self._open[call.number].discard(call)
            self._reaches[call.number] = True
            item: Item = self._shelf.take(answer, call.place)
            return item
        self._settle(call)
        if answer is None:
            self._reaches[call.number] = False
        return answer

    def _alone(self, visit: Visit, published: _Published) -> Item:
        """Ask once more for an item whose samplers died, of one that does nothing else meanwhile."""
        import ray

        slide = self._slides[visit.image]
        self._take_late()
        number = self._choose(visit.image)
        for _ in range(TRIES_ALONE):
            self._wait_until_idle(number, slide)
            # it may have been started again elsewhere
            self._reaches[number] = False
            call = self._send(visit, published, number=number, retries=0)
            try:
                item = self._received(call)
            except ray.exceptions.RayActorError:
                continue
            assert item is not None  # it had the reference
            return item
        num = CALL_RETRIES + 1 + TRIES_ALONE
        reason = f"ended its sampler {num} times (out of memory, or an image that crashes the process)"
        self._deadly[visit.image] = SlideError(shown(slide), reason)
        raise self._deadly[visit.image]

    def _wait_until_idle(self, number: int, slide: str) -> None:
        """Wait until an actor is through with all that was asked of it, and runs."""
        import ray

        waiting = [call.reference for call in self._open[number]]
        waiting += [self._last_ahead[number]] if self._last_ahead[number] is not None else []
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), fetch_local=False)
        try:
            ray.get(self._actors[number].come_to_rest.options(max_task_retries=-1).remote())
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"{shown(slide)}: its sampler died and could not be started again") from error


class _Call(NamedTuple):
    number: int
    """Of the actor."""
    reference: Any
    place: Place | None


class _Published:
    """A version of the attention: on the shelf, and in Ray's object store once an actor is far away."""

    def __init__(self, weights: AttentionWeights, shelf: Shelf | None) -> None:
        self.weights = weights
        self.kept: tuple[bytes, Place] | None = None
        self._reference: Any = None
        place = shelf.lend() if shelf is not None else None
        if shelf is not None and place is not None:
            parcel = shelf.put(dict(weights.arrays), place)
            if parcel is None:
                shelf.give_back(place)
            else:
                self.kept = parcel, place

    def reference(self) -> Any:
        """For Ray to hand over."""
        import ray

        if self._reference is None:
            self._reference = ray.put(self.weights)
        return self._reference

    def withdraw(self, shelf: Shelf | None) -> None:
        """Nobody asks for it any more."""
        if shelf is not None and self.kept is not None:
            shelf.give_back(self.kept[1])
            self.kept = None


class _Remote:
    """An item asked of an actor, and of a second one if the first is late."""

    def __init__(self, executor: RayExecutor, visit: Visit, published: _Published) -> None:
        self._executor, self._visit, self._published = executor, visit, published
        self._calls: list[_Call] = []

    def ask(self, rather: int | None = None) -> None:
        """Ask one more actor, the one that is named unless it is late."""
        self._executor._take_late()
        number = self._executor._choose(self._visit.image, but=self._calls, rather=rather)
        self._calls.append(self._executor._send(self._visit, self._published, number=number))

    def __del__(self) -> None:
        self._executor._abandoned += self._calls

    def result(self) -> Item:
        """Wait for the item."""
        import ray

        if self._visit.image in self._executor._deadly:
            raise self._executor._deadly[self._visit.image]
        try:
            item = self._answered(self._executor._limit_s(self._calls[0]))
        except ray.exceptions.GetTimeoutError:
            self.ask()
            self._executor.num_hedged += 1
            item = self._answered()
        while item is None:
            item = self._answered()
        self._executor._patience.note(item.seconds)
        return item

    def _answered(self, timeout_s: float | None = None) -> Item | None:
        """What the first call is answered with; None if the weights did not reach, and it was asked again.

        Of a single call, GetTimeoutError after ``timeout_s``.
        """
        import ray

        answered = self._first()
        others = [call for call in self._calls if call is not answered]
        try:
            item = self._executor._received(answered, timeout_s)
        except ray.exceptions.RayTaskError as error:
            self._leave(others)
            # our own error, in its own words; any other is a bug and keeps the actor's traceback
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, AtsStreamError) else error) from None
        except ray.exceptions.RayActorError:
            self._leave(others)
            return self._executor._alone(self._visit, self._published)
        self._leave(others)
        if item is None:
            self.ask(answered.number)
        return item

    def _leave(self, late: Sequence[_Call]) -> None:
        """Nothing is waited for any more."""
        self._executor._late += late
        self._calls = []

    def _first(self) -> _Call:
        """The call that is answered first; one whose actor has died for good only if the other has too."""
        import ray

        waiting = list(self._calls)
        while len(waiting) > 1:
            [reference], _ = ray.wait([call.reference for call in waiting], num_returns=1)
            answered = next(call for call in waiting if call.reference == reference)
            if not _has_died(_error_of(reference)):
                return answered
            waiting.remove(answered)
        return waiting[0]


def _is_over(error: Exception | None) -> bool:
    """Whether an actor is through with a call that came back with an error or, None, without."""
    import ray

    return not isinstance(error, ray.exceptions.ActorUnavailableError)


def _has_died(error: Exception | None) -> bool:
    """Whether a call came back with the death of its actor."""
    import ray

    return isinstance(error, ray.exceptions.RayActorError)


def _error_of(reference: Any) -> Exception | None:
    """The error that a call has come back with, None for an answer."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        failed: Exception = error
        return failed
    return None


def _near_this_process() -> Any:
    """Puts actors on the node of this process, and elsewhere when it has no room: Ray itself would wait."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
