"""Ways of an item from two processes that make it to the one that trains, each behind the same few calls.

What makes an item is the same in all: ``PatchSampler.sample`` with uniform attention, or a copy of patches
that lie in memory. Who takes it copies its patches into a batch and lets it go. Every engine is made in a
process of its own; those on Ray join the cluster whose address they are given.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from machine import mib, peak_bytes

from ats_stream.models import ModelConfig, PatchClassifier
from ats_stream.workers import AttentionWeights, Item, PatchSampler, Plan, SamplerConfig, Stream, Visit
from ats_stream.workers.ray_executor import RayExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Array = npt.NDArray[Any]
NUM_PRODUCERS = 2
WINDOW = 16
MODEL = ModelConfig(num_classes=2, attention="uniform")


def attention_weights() -> AttentionWeights:
    """Version 0 of the attention, which draws everything."""
    attention = PatchClassifier(MODEL).attention
    return AttentionWeights.of({name: t.numpy() for name, t in attention.state_dict().items()})


def visits(num_images: int, num_items: int) -> list[Visit]:
    """What each epoch asks for: item n is drawn by stream n, in all engines."""
    return [Visit(image=n % num_images, step=n, stream_id=n, version=0, share=1.0) for n in range(num_items)]


class Canned:
    """Gives the same patches for every visit, each time a new copy: what is left is the way of an item."""

    def __init__(self, config: SamplerConfig) -> None:
        rng = np.random.default_rng(0)
        n, shape = config.num_patches, (config.num_patches, MODEL.num_channels, *(config.patch_px,) * 2)
        self._item = Item(
            visit=visits(1, 1)[0],
            slide="canned",
            label=0,
            view_CYX=np.zeros((MODEL.num_channels, 64, 64), np.uint8),
            prior_YX=None,
            index_N=np.arange(n),
            log_q_N=np.zeros(n, np.float32),
            weight_N=np.ones(n, np.float32),
            num_drawn=n,
            offsets_ND=np.zeros((n, 2), np.int64),
            crops_NCPP=rng.integers(0, 256, shape, np.uint8),
            attention_key="",
            stored_bytes=0,
            decoded_bytes=0,
            seconds=0.0,
        )

    def sample(self, visit: Visit, _weights: AttentionWeights | None) -> Item:
        return replace(self._item, visit=visit, crops_NCPP=self._item.crops_NCPP.copy())


def canned_actor() -> Any:
    """The package's sampler actor, whose items :class:`Canned` makes."""
    import ray

    from ats_stream.workers.actors import SamplerActor

    sampler: Any = SamplerActor

    class CannedActor(sampler.__ray_metadata__.modified_class):  # type: ignore[misc]  # known to Ray alone
        def __init__(self, model: ModelConfig, config: SamplerConfig, storage_options: Any) -> None:
            super().__init__(model, config, storage_options)
            self._canned = Canned(config)

        def sample(self, visit: Visit, _weights: AttentionWeights) -> Item:
            return self._canned.sample(visit, None)

    return ray.remote(CannedActor)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is made, and where."""

    config: SamplerConfig
    slides: tuple[str, ...] = ()
    """Images to read; none for :class:`Canned` items."""
    address: str = ""
    """Of the Ray cluster."""

    @property
    def num_images(self) -> int:
        return len(self.slides) or 1

    def sampler(self) -> PatchSampler | Canned:
        if not self.slides:
            return Canned(self.config)
        return PatchSampler(self.slides, [0] * len(self.slides), MODEL, self.config)


def plan_of(work: Work, num_items: int) -> Plan:
    """The same visits as steps of one item each."""
    images = tuple(n % work.num_images for n in range(num_items))
    return Plan(images=images, batch_size=1, num_epochs=1, seed=0, shuffle=False, lag=None)


class Engine:
    """``epoch`` takes so many items; the first call warms up."""

    producers: tuple[str, ...] = ()
    """How the titles of the processes that make items begin; none where they are children of this one."""

    def __init__(self, work: Work) -> None:
        config = work.config
        self.work = work
        shape = (config.num_patches, MODEL.num_channels, config.patch_px, config.patch_px)
        self._batch_NCPP = np.zeros(shape, np.uint8)
        self._epochs = 0

    def items(self, epoch: int, num_items: int) -> Iterator[Array]:
        """The patches of each item, in order."""
        raise NotImplementedError

    def epoch(self, num_items: int) -> dict[str, float]:
        """Take all items of an epoch; their number, a sum of their pixels, and the time it took."""
        start_s, taken, total = time.perf_counter(), 0, 0
        for crops_NCPP in self.items(self._epochs, num_items):
            np.copyto(self._batch_NCPP, crops_NCPP)
            taken += 1
            total += int(self._batch_NCPP[:, :, 0, 0].sum())
        self._epochs += 1
        return {"wall_s": time.perf_counter() - start_s, "items": taken, "sum": total}

    def memory(self) -> dict[str, float]:
        """Peak memory of this process."""
        return {"peak_mib": mib(peak_bytes())}

    def close(self) -> None:
        """Give back what is held."""


class InOneProcess(Engine):
    """Nothing travels: items are made where they are taken."""

    def items(self, _epoch: int, num_items: int) -> Iterator[Array]:
        sampler, weights = self.work.sampler(), attention_weights()
        for visit in visits(self.work.num_images, num_items):
            yield sampler.sample(visit, weights).crops_NCPP


class TwoCopies(Engine):
    """The least that two processes do to pass patches on: one copies them out, the other in."""

    def items(self, _epoch: int, num_items: int) -> Iterator[Array]:
        source = np.ones_like(self._batch_NCPP)
        for _ in range(num_items):
            yield source.copy()


class OnRay(Engine):
    """Joins the cluster."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        import ray

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(address=work.address, log_to_driver=False, logging_level="ERROR")
        self.ray = ray

    def close(self) -> None:
        self.ray.shutdown()


class AtsStream(OnRay):
    """The package's stream and its sampler actors."""

    producers = ("ray::SamplerActor", "ray::CannedActor")

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        slides = work.slides or ("canned",)
        self._executor = RayExecutor(
            slides,
            [0] * len(slides),
            MODEL,
            work.config,
            num_samplers=NUM_PRODUCERS,
            cpus_per_sampler=0.1,
            actor=None if work.slides else canned_actor(),
        )
        self._attention = PatchClassifier(MODEL).attention

    def items(self, _epoch: int, num_items: int) -> Iterator[Array]:
        stream = Stream(plan_of(self.work, num_items), self._executor, window=WINDOW)
        stream.publish(0, self._attention)
        for item in stream:
            yield item.crops_NCPP

    def close(self) -> None:
        self._executor.close()
        super().close()


class Producer:
    """A sampler behind the calls of a plain actor, and of a map of Ray Data."""

    def __init__(self, work: Work) -> None:
        self._sampler, self._num_images = work.sampler(), work.num_images
        self._weights = attention_weights()

    def make(self, visit: Visit) -> Item:
        return self._sampler.sample(visit, self._weights)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["id"])
        visit = Visit(image=number % self._num_images, step=0, stream_id=number, version=0, share=1.0)
        return {"crops": self.make(visit).crops_NCPP}


class BareWindow(OnRay):
    """As little as can be around actor calls: a queue of references, in order, actors in turns."""

    producers = ("ray::Producer",)

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        actor = self.ray.remote(Producer)
        self._actors = [actor.options(num_cpus=0.1).remote(self.work) for _ in range(NUM_PRODUCERS)]

    def items(self, _epoch: int, num_items: int) -> Iterator[Array]:
        waiting: deque[Any] = deque()
        for number, visit in enumerate(visits(self.work.num_images, num_items)):
            if len(waiting) == WINDOW:
                yield self.ray.get(waiting.popleft()).crops_NCPP
            waiting.append(self._actors[number % NUM_PRODUCERS].make.remote(visit))
        while waiting:
            yield self.ray.get(waiting.popleft()).crops_NCPP


class RayData(OnRay):
    """A pool of actors and ``streaming_split``, an execution for each epoch."""

    producers = ("ray::MapWorker",)

    def items(self, epoch: int, num_items: int) -> Iterator[Array]:
        if epoch == 0:
            self._split(num_items)
        for batch in self._iterator.iter_batches(batch_size=1, prefetch_batches=WINDOW):
            yield batch["crops"][0]

    def _split(self, num_items: int) -> None:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.range(num_items, override_num_blocks=num_items)
        made = rows.map(
            Producer,
            fn_constructor_args=(self.work,),
            compute=ray.data.ActorPoolStrategy(size=NUM_PRODUCERS),
            num_cpus=0.1,
        )
        (self._iterator,) = made.streaming_split(1)


class TorchLoader(Engine):
    """``DataLoader`` with worker processes that stay, its tensors in shared memory."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._loader: Any = None

    def items(self, _epoch: int, num_items: int) -> Iterator[Array]:
        from torch.utils.data import DataLoader

        if self._loader is None:
            self._loader = DataLoader(
                Images(self.work, num_items),
                batch_size=None,
                num_workers=NUM_PRODUCERS,
                prefetch_factor=WINDOW // NUM_PRODUCERS,
                persistent_workers=True,
            )
        for crops_NCPP in self._loader:
            yield crops_NCPP.numpy()

    def close(self) -> None:
        self._loader = None


class Images:
    """A dataset of torch: item n is what the producers make of it."""

    def __init__(self, work: Work, num_items: int) -> None:
        self._work, self._num_items = work, num_items
        self._producer: Producer | None = None

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, number: int) -> Any:
        import torch

        if self._producer is None:
            self._producer = Producer(self._work)
        return torch.from_numpy(self._producer({"id": number})["crops"])


ENGINES: dict[str, Callable[..., Engine]] = {
    "ats-stream": AtsStream,
    "bare window": BareWindow,
    "Ray Data": RayData,
    "DataLoader": TorchLoader,
    "in one process": InOneProcess,
    "two copies": TwoCopies,
}
