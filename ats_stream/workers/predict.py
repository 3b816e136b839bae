"""Inference: a trained model over pyramids, one image after the other, the same result every time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.errors import CheckpointError
from ats_stream.io import StorageOptions
from ats_stream.models import PatchClassifier
from ats_stream.workers.batch import evaluate, log_prior_of
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.config import ClusterConfig, RunConfig
from ats_stream.workers.executors import make_executor
from ats_stream.workers.plan import Plan
from ats_stream.workers.stream import Stream
from ats_stream.workers.tasks import TASKS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from ats_stream.io import ArchiveRow
    from ats_stream.workers.protocol import Array

UNKNOWN_CLASS = -1


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a model says of one image, and what it looked at."""

    slide: str
    name: str
    split: str
    label: str
    """Label of the table; empty if none was given."""
    classes: tuple[str, ...]
    probability_K: Array
    """Probabilities in the order of ``classes``; of other tasks, the values that the model gives."""
    attention_YX: Array
    """Attention probability of every position of the view."""
    attention_N: Array
    """Attention probability of the drawn positions."""
    weight_N: Array
    """R of the drawn positions; attention * weight is what each patch counts for."""
    offsets_ND: Array
    """First pixel of each drawn patch at full resolution."""
    crops_NCPP: Array
    """The drawn patches."""
    stored_bytes: int
    """Bytes of full resolution fetched from storage."""
    decoded_bytes: int
    """Bytes of full resolution that these decoded to."""
    full_shape: tuple[int, ...]
    """Shape (C, *space) of full resolution."""
    full_bytes: int
    """Bytes of the whole of full resolution, decoded."""
    seconds: float
    """Time that reading, attention and drawing took."""
    task: str = "classification"
    """What the model was trained to say."""

    @property
    def predicted(self) -> str:
        """What the model says: the most probable class, or in other tasks the classes or the number."""
        return TASKS[self.task].answer(self.probability_K.tolist(), self.classes)

    @property
    def is_right(self) -> bool | None:
        """Whether the prediction is the label; None without one, and for numbers."""
        return TASKS[self.task].is_right(self.predicted, self.label) if self.label else None


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

    def predict(
        self,
        rows: Sequence[ArchiveRow],
        cluster: ClusterConfig | None = None,
        *,
        scheme: str | None = None,
        storage_options: StorageOptions | Mapping[str, Any] | None = None,
    ) -> Iterator[Predicted]:
        """Yield one prediction for each row, in order.

        Draws are keyed by the seed and the row's number, so they are the same every time. ``scheme`` replaces
        the scheme of the training (``top``: the N most probable positions). With ``executor="ray"`` the
        actors of ``cluster`` read and draw; Ray must be running. ``storage_options`` are for the URLs among
        the rows. Raises SlideError, naming the slide, for one
        that cannot be read.
        """
        cluster, options = cluster or ClusterConfig(), StorageOptions.of(storage_options)
        task = TASKS[self.config.trainer.task]
        class_of = {name: number for number, name in enumerate(self.config.classes)}
        sampler = self.config.sampler if scheme is None else replace(self.config.sampler, scheme=scheme)
        executor = make_executor(
            cluster.executor,
            [row.slide for row in rows],
            [class_of.get(row.label, UNKNOWN_CLASS) for row in rows],
            self.config.model,
            sampler,
            num_samplers=cluster.num_ranks * cluster.samplers_per_rank,
            cpus_per_sampler=cluster.cpus_per_sampler,
            storage_options=options,
        )
        plan = Plan(
            images=tuple(range(len(rows))), batch_size=1, num_epochs=1, seed=0, shuffle=False, lag=None
        )
        try:
            stream = Stream(plan, executor, window=cluster.window)
            stream.publish(0, self.model.attention)
            for seen in evaluate(self.model, stream, torch.device("cpu")):
                item, row = seen.item, rows[seen.item.visit.image]
                num = item.num_drawn
                with torch.inference_mode():
                    view = torch.from_numpy(item.view_CYX.copy())
                    log_a_M = self.model.log_attention(view, log_prior_of(item.prior_YX))
                full = options.open(row.slide).levels[0]
                yield Predicted(
                    slide=row.slide,
                    name=row.name,
                    split=row.split,
                    label=row.label,
                    classes=self.config.classes,
                    probability_K=task.probability(torch.from_numpy(seen.outputs_K)[None])[0].numpy(),
                    attention_YX=log_a_M.exp().reshape(view.shape[1:]).numpy(),
                    attention_N=seen.attention_N[:num],
                    weight_N=item.weight_N[:num],
                    offsets_ND=item.offsets_ND[:num],
                    crops_NCPP=item.crops_NCPP[:num],
                    stored_bytes=item.stored_bytes,
                    decoded_bytes=item.decoded_bytes,
                    full_shape=full.shape,
                    full_bytes=math.prod(full.shape) * full.dtype.itemsize,
                    seconds=item.seconds,
                    task=self.config.trainer.task,
                )
        finally:
            executor.close()
