"""Inference: a trained model over pyramids, one image after the other, the same result every time.

Shapes: K values of the head, N drawn patches (of all draws), Y X positions of the view, C channels,
P the patch's side, D space axes, F features.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ats_stream.errors import CheckpointError, InputError, SlideError
from ats_stream.io import StorageOptions
from ats_stream.io.storage.remote import shown
from ats_stream.models import PatchClassifier
from ats_stream.predictions.record import Patches, PredictionInfo, SlideRecord, standard_error
from ats_stream.workers.batch import collate, log_prior_of, tensor_of
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.config import ClusterConfig, RunConfig
from ats_stream.workers.executors import make_executor
from ats_stream.workers.pixel_size import given_sizes
from ats_stream.workers.plan import Visit
from ats_stream.workers.protocol import AttentionWeights
from ats_stream.workers.sampler import read_levels
from ats_stream.workers.tasks import TASKS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ats_stream.io import ArchiveRow
    from ats_stream.workers.executors import Executor, Pending
    from ats_stream.workers.protocol import Array, Item
    from ats_stream.workers.sampler import SamplerConfig

UNKNOWN_CLASS = -1


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a model says of one image, and what it looked at."""

    row: int
    """Number of the row, counted from 0."""
    slide: str
    name: str
    split: str
    label: str
    """Label of the table; empty if none was given."""
    classes: tuple[str, ...]
    probability_K: Array
    """Probabilities in the order of ``classes``; of other tasks, the values that the model gives. The mean
    over the draws."""
    standard_error_K: Array | None
    """Standard error of that mean, from the spread of the draws; None with one draw."""
    attention_YX: Array
    """Attention probability of every position of the view."""
    draw_N: Array
    """Which draw a patch belongs to, counted from 0."""
    attention_N: Array
    """Attention probability of the drawn positions."""
    weight_N: Array
    """R of the drawn positions, divided by the number of draws; attention * weight is what each patch counts
    for."""
    offsets_ND: Array
    """First pixel of each drawn patch, in pixels of level 0."""
    patch_px: int
    """Side of the patches in pixels of level 0."""
    crops_NCPP: Array
    """The drawn patches, as read: at level 0, or the level of the pixel size of the training."""
    features_NF: Array
    """What the feature network makes of them."""
    stored_bytes: int
    """Bytes of full resolution fetched from storage."""
    decoded_bytes: int
    """Bytes of full resolution that these decoded to."""
    full_shape: tuple[int, ...]
    """Shape (C, *space) of full resolution."""
    full_bytes: int
    """Bytes of the whole of full resolution, decoded."""
    pixel_size_um: tuple[float, ...] | None
    """Of full resolution, per space axis; None if unknown."""
    view_downsample: tuple[float, ...]
    """Pixels of full resolution per position of the view, per space axis."""
    seconds: float
    """Time that reading, attention and drawing took."""
    task: str = "classification"
    """What the model was trained to say."""
    group: str = ""
    time: float | None = None
    """As in the table."""

    @property
    def predicted(self) -> str:
        """What the model says: the most probable class, or in other tasks the classes or the number."""
        return TASKS[self.task].answer(self.probability_K.tolist(), self.classes)

    @property
    def is_right(self) -> bool | None:
        """Whether the prediction is the label; None without one, and for numbers."""
        return TASKS[self.task].is_right(self.predicted, self.label) if self.label else None

    def record(self) -> SlideRecord:
        """The line of the tables."""
        size_um = self.pixel_size_um
        return SlideRecord(
            slide=shown(self.slide),
            name=self.name,
            split=self.split,
            label=self.label,
            group=self.group,
            time=self.time,
            predicted=self.predicted,
            right=self.is_right,
            value_K=tuple(self.probability_K.tolist()),
            standard_error_K=() if self.standard_error_K is None else tuple(self.standard_error_K.tolist()),
            height=self.full_shape[-2],
            width=self.full_shape[-1],
            pixel_size_um=None if size_um is None else math.fsum(size_um) / len(size_um),
            patch_px=self.patch_px,
            patches=Patches(
                draw=tuple(self.draw_N.tolist()),
                y=tuple(self.offsets_ND[:, -2].tolist()),
                x=tuple(self.offsets_ND[:, -1].tolist()),
                attention=tuple(self.attention_N.tolist()),
                weight=tuple(self.weight_N.tolist()),
            ),
            stored_bytes=self.stored_bytes,
            decoded_bytes=self.decoded_bytes,
            full_bytes=self.full_bytes,
            seconds=self.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that nothing can be predicted of."""

    row: int
    """Number of the row, counted from 0."""
    slide: str
    name: str
    split: str
    label: str
    error: SlideError

    def record(self) -> SlideRecord:
        """The line of the tables."""
        return SlideRecord(
            slide=shown(self.slide),
            name=self.name,
            split=self.split,
            label=self.label,
            error=self.error.reason,
        )


@dataclass(frozen=True)
class Predictor:
    """A trained model with the configuration that its inputs must be read with."""

    model: PatchClassifier
    config: RunConfig

    @classmethod
    def load(cls, place: str | os.PathLike[str]) -> Predictor:
        """Build the model of a checkpoint file, or of the newest checkpoint of a run folder.

        Raises CheckpointError if there is none, or it is damaged or does not fit.
        """
        path = find_checkpoint(place)
        state = load_checkpoint(path)
        try:
            config = RunConfig.from_dict(state["config"])
            model = PatchClassifier(config.model)
            model.load_state_dict(state["average"] or state["model"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: the weights do not fit their configuration: {reason}") from error
        return cls(model.eval().requires_grad_(False), config)

    def with_pixel_size(self, um: float) -> Predictor:
        """The same model; ``um`` is the pixel size of all images at level 0, 0 for what they say themselves.

        What a row of a table gives for its image comes before it. It decides at which level a model reads
        that was trained at a known pixel size.
        """
        sampler = replace(self.config.sampler, assumed_pixel_um=um)
        return replace(self, config=replace(self.config, sampler=sampler))

    @property
    def key(self) -> str:
        """Hash of weights and configuration: predictors with the same key say the same."""
        weights = {name: t.numpy() for name, t in self.model.state_dict().items()}
        config = json.dumps(self.with_pixel_size(0.0).config.to_dict(), sort_keys=True)
        return hashlib.sha256(f"{AttentionWeights.of(weights).key} {config}".encode()).hexdigest()

    def info(
        self, rows: Sequence[ArchiveRow], *, scheme: str | None = None, draws: int = 1
    ) -> PredictionInfo:
        """All that decides what :meth:`predict_each` of these rows gives; InputError as there."""
        scheme = self._sampler(scheme, draws).scheme
        images = [
            # rows without a size keep the hash that they had before there were such
            [
                shown(r.slide),
                r.label,
                r.split,
                r.group,
                r.time,
                *([] if r.pixel_size_um is None else [r.pixel_size_um]),
            ]
            for r in rows
        ]
        return PredictionInfo(
            model=self.key,
            images=hashlib.sha256(json.dumps(images).encode()).hexdigest(),
            num_images=len(rows),
            task=self.config.trainer.task,
            outputs=self.config.classes,
            scheme=scheme,
            num_draws=draws,
            num_patches=self.config.sampler.num_patches,
            pixel_size_um=self.config.sampler.assumed_pixel_um or None,
        )

    def predict(self, rows: Sequence[ArchiveRow], *args: Any, **options: Any) -> Iterator[Predicted]:
        """What :meth:`predict_each` predicts; SlideError, naming the slide, for one that cannot be read."""
        for one in self.predict_each(rows, *args, **options):
            if isinstance(one, Unreadable):
                raise one.error
            yield one

    def predict_each(
        self,
        rows: Sequence[ArchiveRow],
        cluster: ClusterConfig | None = None,
        *,
        scheme: str | None = None,
        draws: int = 1,
        only: Iterable[int] | None = None,
        storage_options: StorageOptions | Mapping[str, Any] | None = None,
    ) -> Iterator[Predicted | Unreadable]:
        """Yield what is predicted of each row, or why nothing is, in order.

        Draws are keyed by the seed and the row's number, so they are the same every time, whichever rows
        ``only`` leaves. ``scheme`` replaces the scheme of the training (``top``: the N most probable
        positions). With more ``draws`` than one the values are the mean over independent draws, and their
        spread gives its standard error. With ``executor="ray"`` the actors of ``cluster`` read and draw; Ray
        must be running. ``storage_options`` are for the URLs among the rows. InputError for more than one
        draw with ``top``, which draws nothing.
        """
        cluster, options = cluster or ClusterConfig(), StorageOptions.of(storage_options)
        sampler = self._sampler(scheme, draws)
        class_of = {name: number for number, name in enumerate(self.config.classes)}
        executor = make_executor(
            cluster.executor,
            [row.slide for row in rows],
            [class_of.get(row.label, UNKNOWN_CLASS) for row in rows],
            self.config.model,
            sampler,
            num_samplers=cluster.num_ranks * cluster.samplers_per_rank,
            cpus_per_sampler=cluster.cpus_per_sampler,
            gpus_per_sampler=cluster.gpus_per_sampler,
            hedge_after_s=cluster.hedge_after_s,
            storage_options=options,
            pixel_sizes=given_sizes(rows),
        )
        wanted = range(len(rows)) if only is None else sorted(only)
        try:
            for number, items in _drawn(executor, self._attention(), wanted, draws, cluster.window):
                yield self._outcome(number, rows[number], items, options)
        finally:
            executor.close()

    def _sampler(self, scheme: str | None, draws: int) -> SamplerConfig:
        sampler = self.config.sampler if scheme is None else replace(self.config.sampler, scheme=scheme)
        if draws < 1 or (draws > 1 and sampler.scheme == "top"):
            raise InputError(f"draws must be at least 1, and 1 with the scheme top, got {draws}")
        return sampler

    def _outcome(
        self, number: int, row: ArchiveRow, items: Sequence[Item] | SlideError, options: StorageOptions
    ) -> Predicted | Unreadable:
        try:
            if isinstance(items, SlideError):
                raise items
            return self._predicted(number, row, items, options)
        except SlideError as error:
            return Unreadable(
                row=number, slide=row.slide, name=row.name, split=row.split, label=row.label, error=error
            )

    def _attention(self) -> AttentionWeights:
        state = self.model.attention.state_dict()
        return AttentionWeights.of({name: t.detach().numpy().copy() for name, t in state.items()})

    def _predicted(
        self, number: int, row: ArchiveRow, items: Sequence[Item], options: StorageOptions
    ) -> Predicted:
        first = items[0]
        pyramid = options.open(row.slide)
        full, sampler = pyramid.levels[0], self.config.sampler.of_image(row.pixel_size_um)
        assumed_um, (read, _) = sampler.assumed_pixel_um, read_levels(pyramid, sampler)
        offsets_ND = np.concatenate([item.offsets_ND[: item.num_drawn] for item in items])
        # closed before anything is yielded: the mode belongs to the thread, so to whoever receives that
        with torch.inference_mode():
            log_a_M = self.model.log_attention(tensor_of(first.view_CYX), log_prior_of(first.prior_YX))
            seen = [self._seen(item, log_a_M) for item in items]
            attention_YX = log_a_M.exp().reshape(first.view_CYX.shape[1:]).numpy()
        value_RK = np.stack([value_K for value_K, _, _ in seen])
        map_shape = attention_YX.shape
        return Predicted(
            row=number,
            slide=row.slide,
            name=row.name,
            split=row.split,
            label=row.label,
            group=row.group,
            time=row.time,
            classes=self.config.classes,
            probability_K=value_RK[0] if len(items) == 1 else value_RK.mean(0),
            standard_error_K=_standard_errors(value_RK),
            attention_YX=attention_YX,
            draw_N=np.repeat(np.arange(len(items)), [item.num_drawn for item in items]),
            attention_N=np.concatenate([attention_N for _, attention_N, _ in seen]),
            weight_N=np.concatenate([item.weight_N[: item.num_drawn] for item in items])
            / np.float32(len(items)),
            offsets_ND=np.rint(offsets_ND * np.array(read.downsample)).astype(np.int64),
            patch_px=round(sampler.patch_px * max(read.downsample)),
            crops_NCPP=np.concatenate([item.crops_NCPP[: item.num_drawn] for item in items]),
            features_NF=np.concatenate([features_NF for _, _, features_NF in seen]),
            stored_bytes=sum(item.stored_bytes for item in items),
            decoded_bytes=sum(item.decoded_bytes for item in items),
            full_shape=full.shape,
            full_bytes=math.prod(full.shape) * full.dtype.itemsize,
            pixel_size_um=(assumed_um,) * 2 if assumed_um else full.pixel_size_um,
            view_downsample=tuple(n / m for n, m in zip(full.shape[1:], map_shape, strict=True)),
            seconds=sum(item.seconds for item in items),
            task=self.config.trainer.task,
        )

    def _seen(self, item: Item, log_a_M: torch.Tensor) -> tuple[Array, Array, Array]:
        """Values (K,) of one draw, and attention and features of its patches."""
        prediction, features_1NF = self.model.look(collate([item]), [log_a_M])
        value_1K = TASKS[self.config.trainer.task].probability(prediction.class_logits_BK)
        num = item.num_drawn
        return value_1K[0].numpy(), prediction.attention_BN[0, :num].numpy(), features_1NF[0, :num].numpy()


def _standard_errors(value_RK: Array) -> Array | None:
    if len(value_RK) == 1:
        return None
    return np.array([standard_error(values) for values in value_RK.T.tolist()])


def _drawn(
    executor: Executor, weights: AttentionWeights, rows: Sequence[int], draws: int, window: int
) -> Iterator[tuple[int, list[Item] | SlideError]]:
    """The items of all draws of each row, or why there are none, in order; ``window`` items are on order."""
    # the stream of draws that a visit of this number has in every epoch of a training
    visits = (
        Visit(image=row, step=row, stream_id=(draw << 32) + row, version=0, share=1.0, num_draws=draws)
        for row in rows
        for draw in range(draws)
    )
    pending: deque[Pending] = deque()

    def order() -> None:
        while len(pending) < window and (visit := next(visits, None)) is not None:
            pending.append(executor.submit(visit, weights))

    for row in rows:
        found: list[Item] | SlideError = []
        for _ in range(draws):
            order()
            try:
                item = pending.popleft().result()
                if isinstance(found, list):
                    found.append(item)
            except SlideError as error:
                found = error
        order()
        yield row, found
