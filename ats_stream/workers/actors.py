"""The Ray actor around a sampler. Kept in a module of its own because importing it imports Ray."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import ray
import torch

from ats_stream.errors import ClusterError
from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.handover import Neighbour, unpickled
from ats_stream.workers.protocol import AttentionWeights
from ats_stream.workers.ray_executor import VIEWS_AHEAD
from ats_stream.workers.sampler import PatchSampler

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ats_stream.io import StorageOptions
    from ats_stream.models import ModelConfig
    from ats_stream.workers.plan import Visit
    from ats_stream.workers.protocol import Item
    from ats_stream.workers.sampler import SamplerConfig, View

VERSIONS_KEPT = 4
"""Versions of the attention that a sampler holds: calls for two may be under way at once."""
READS_AHEAD = 4
"""Views that are read ahead at a time."""


@ray.remote
class SamplerActor:
    """A :class:`PatchSampler` behind remote calls, of which several may wait for storage at a time.

    Slide, label and pixel size come with each call: a table in the object store would have to outlive every
    restart. What a call needs comes pickled, as bytes, which Ray passes on as they are.
    """

    def __init__(self, model: ModelConfig, config: SamplerConfig, storage_options: StorageOptions) -> None:
        keep_freed_memory()
        # a share of a GPU was asked for exactly if Ray names one here, whatever this process can see
        context = ray.get_runtime_context()
        has_gpu = bool(context.get_accelerator_ids().get("GPU"))
        self._blind = has_gpu and not torch.cuda.is_available()
        device = torch.device("cuda" if has_gpu and not self._blind else "cpu")
        self._slides: dict[int, str] = {}
        self._labels: dict[int, int] = {}
        self._pixel_sizes: dict[int, float | None] = {}
        self._sampler = PatchSampler(
            self._slides,
            self._labels,
            model,
            config,
            storage_options,
            device,
            pixel_sizes=self._pixel_sizes,
        )
        self._neighbour = Neighbour(context.get_node_id())
        self._lock = threading.Lock()
        self._versions: OrderedDict[str, AttentionWeights] = OrderedDict()
        self._ahead: OrderedDict[int, Future[View]] = OrderedDict()
        self._readers = ThreadPoolExecutor(READS_AHEAD, thread_name_prefix="ats-ahead")

    def answer(self, order: bytes, weights: tuple[Any, ...] = ()) -> bytes | Item | None:
        """One item: as a parcel where its rank can reach it, else itself; None if the weights are missing.

        The weights lie beside the rank, and their reference comes, inside a tuple so that Ray hands it over
        as it is, with calls that may have come too far for that. ClusterError if this actor has a GPU that
        torch cannot use.
        """
        visit, slide, label, pixel_size_um, key, kept, place = unpickled(order)
        if self._blind:
            raise ClusterError("a sampler was given a share of a GPU, and torch sees none there")
        self._slides[visit.image], self._labels[visit.image] = slide, label
        self._pixel_sizes[visit.image] = pixel_size_um
        version = self._version(key, kept, weights)
        if version is None:
            return None
        item = self.sample(visit, version)
        parcel = None if place is None else self._neighbour.put(item, place)
        return item if parcel is None else parcel

    def sample(self, visit: Visit, weights: AttentionWeights) -> Item:
        """The item of a visit."""
        with self._lock:
            ahead = self._ahead.pop(visit.image, None)
        # what went wrong ahead of time goes wrong again
        view = None if ahead is None or ahead.exception() is not None else ahead.result()
        return self._sampler.sample(visit, weights, view)

    def read_ahead(self, orders: bytes) -> None:
        """Begin to read the views of some images (number, slide, pixel size), for calls that will come."""
        for image, slide, pixel_size_um in unpickled(orders):
            self._slides[image], self._pixel_sizes[image] = slide, pixel_size_um
            with self._lock:
                if image not in self._ahead:
                    self._ahead[image] = self._readers.submit(self._sampler.read_view, image)
                while len(self._ahead) > VIEWS_AHEAD:
                    self._ahead.popitem(last=False)[1].cancel()

    def come_to_rest(self) -> None:
        """Wait until nothing is read ahead any more."""
        with self._lock:
            under_way = list(self._ahead.values())
        wait(under_way)

    def _version(
        self, key: str, kept: tuple[Any, ...] | None, weights: tuple[Any, ...]
    ) -> AttentionWeights | None:
        with self._lock:
            if key in self._versions:
                return self._versions[key]
        found = self._neighbour.get(*kept) if kept is not None else None
        # a place may have been lent to others since
        if found is not None and AttentionWeights.of(found).key == key:
            version = AttentionWeights(key, found)
        elif weights:
            version = ray.get(weights[0])
        else:
            return None
        with self._lock:
            self._versions[key] = version
            while len(self._versions) > VERSIONS_KEPT:
                self._versions.popitem(last=False)
        return version
