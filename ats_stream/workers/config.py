"""The configuration of a training run, and how it is kept with the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ats_stream.errors import CheckpointError, InputError
from ats_stream.files import write_atomic
from ats_stream.models import ModelConfig
from ats_stream.workers.hedging import DEFAULT_HEDGE_AFTER_S
from ats_stream.workers.logger_clients import LOGGERS
from ats_stream.workers.optimisation import PRECISIONS, SCHEDULES
from ats_stream.workers.quarantine import BAD_IMAGE_POLICIES, FAIL
from ats_stream.workers.sampler import SamplerConfig
from ats_stream.workers.stream import DEFAULT_WINDOW, DEFAULT_WINDOW_BYTES
from ats_stream.workers.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

EXECUTORS = ("serial", "ray")
CONFIG_FILE = "config.yaml"
VISITS = ("once", "slide-weight", "class")


_CHOICES: dict[str, Collection[str]] = {
    "task": TASKS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "visits": VISITS,
    "on_bad_image": BAD_IMAGE_POLICIES,
}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a model is trained. What changes the result; where it runs is :class:`ClusterConfig`."""

    task: str = "classification"
    """What the labels are: ``classification``, ``multilabel``, ``regression`` or ``survival``."""
    num_epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 8
    """Images in a step, over all ranks; the number of ranks divides it."""
    lr: float = 1e-3
    """Learning rate of AdamW at the start."""
    schedule: str = "linear"
    """How the learning rate falls at the end: ``linear``, ``cosine``, or ``constant``, not at all."""
    warmup_share: float = 0.0
    """First share of the steps in which the learning rate rises linearly."""
    decay_share: float = 0.4
    """Last share of the steps in which the learning rate falls to 0."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of a step."""
    precision: str = "float32"
    """Of the feature network: ``float32``, ``bfloat16``, or ``float16``, which needs a GPU."""
    accumulate: int = 1
    """Parts in which each rank computes its share of a step, to hold less in memory at a time."""
    average_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is validated and kept; 0 for none."""
    visits: str = "once"
    """How often an epoch visits an image: ``once``; in proportion to the column ``weight``
    (``slide-weight``); or each class equally often (``class``)."""
    class_weights: bool = False
    """Whether the loss of an image is weighed by the inverse frequency of its class."""
    patience: int = 0
    """Epochs without a better validation after which training ends; 0 for never."""
    entropy_weight: float = 0.0
    """Weight of the attention's entropy, which is rewarded; keeps attention from collapsing early."""
    lag: int = 0
    """Steps by which the attention that draws is behind; 1 and more overlap drawing with training."""
    publish_interval: int = 1
    """Steps between versions of the attention that draw."""
    extra_patches: int = 0
    """Patches drawn in the first epoch beyond the sampler's number; they shorten the search for a start."""
    extra_epochs: int = 0
    """Epochs over which the extra patches dwindle to none."""
    seed: int = 0
    """Seed of the initial weights, of the order and of the draws."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 for one at the end of each epoch."""
    train_split: str = "train"
    """Split of the archive table that is trained on."""
    val_split: str = "val"
    """Split that is evaluated after each epoch; none if the table has no such rows."""
    on_bad_image: str = FAIL
    """What an image that cannot be read does: ``fail`` ends the run, ``skip`` leaves the image out."""
    max_bad_share: float = 0.05
    """Share of the images that may be left out; more end the run."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("num_epochs", "batch_size", "publish_interval", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        counts = ("lag", "checkpoint_interval", "extra_patches", "extra_epochs", "patience")
        for name in ("weight_decay", "entropy_weight", *counts):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if bool(self.extra_patches) != bool(self.extra_epochs):
            given = f"{self.extra_patches} and {self.extra_epochs}"
            raise ValueError(f"extra_patches and extra_epochs go together, got {given}")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("decay_share", "warmup_share", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must lie in [0, 1), got {self.average_decay}")
        if TASKS[self.task].needs_whole_batch and self.accumulate > 1:
            raise ValueError(f"accumulate must be 1 for {self.task}, whose loss needs all images of a step")
        if self.task != "classification" and (self.class_weights or self.visits == "class"):
            raise ValueError(f"class_weights and visits=class need classes, got the task {self.task}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where a run computes; changing it between two runs of one folder is fine."""

    executor: str = "serial"
    """``serial``: all in this process. ``ray``: ranks under Ray Train, each with its own sampler actors."""
    num_ranks: int = 2
    """Training processes (``ray`` only)."""
    min_ranks: int = 0
    """As few ranks as a run may go on with when nodes are lost; it grows again when there is room. The number
    at work always divides the batch. 0: always ``num_ranks``."""
    samplers_per_rank: int = 1
    """Sampler actors of each rank (``ray`` only)."""
    cpus_per_rank: float = 1.0
    """CPUs that Ray sets aside for a rank."""
    cpus_per_sampler: float = 1.0
    """CPUs that Ray sets aside for a sampler."""
    use_gpu: bool = False
    """Whether each rank gets a GPU (backend nccl instead of gloo)."""
    gpus_per_rank: float = 1.0
    """GPUs that Ray sets aside for a rank with ``use_gpu``; less than 1 leaves room for its samplers, and
    must be more than a half, or two ranks would share a GPU."""
    gpus_per_sampler: float = 0.0
    """GPUs that Ray sets aside for a sampler, whose attention then runs there; 0: on its CPU."""
    spread_samplers: bool = False
    """Whether Ray may put samplers on any node, rather than on their rank's while that has room."""
    hedge_after_s: float = DEFAULT_HEDGE_AFTER_S
    """Seconds after which an item that takes much longer than its peers is asked of another sampler as well;
    0: never."""
    threads_per_rank: int = 1
    """Threads of torch in each rank; a serial run uses as many as there are cores."""
    window: int = DEFAULT_WINDOW
    """Items that a rank has on order at a time."""
    window_bytes: int = DEFAULT_WINDOW_BYTES
    """Bytes that these may come to; one step's items are on order in any case."""
    max_failures: int = 0
    """How often the ranks are started again, from the last checkpoint, after one has died."""
    address: str | None = None
    """Address of the Ray cluster; by default $RAY_ADDRESS, else a cluster of this machine is started."""
    object_store_bytes: int = 256 << 20  # 256 MiB
    """Object store of a cluster started here."""
    loggers: tuple[str, ...] = ()
    """Where the metrics go besides TensorBoard: ``mlflow``, ``wandb``."""

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in LOGGERS:
                raise ValueError(f"loggers must be among {', '.join(LOGGERS)}, got {name!r}")
        object.__setattr__(self, "loggers", tuple(dict.fromkeys(self.loggers)))
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")
        for name in ("num_ranks", "samplers_per_rank", "threads_per_rank", "window", "window_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.5 < self.gpus_per_rank <= 1:
            raise ValueError(f"gpus_per_rank must lie in (0.5, 1], got {self.gpus_per_rank}")
        if self.gpus_per_rank < 1 and not self.use_gpu:
            raise ValueError(f"gpus_per_rank is for use_gpu, got {self.gpus_per_rank} without")
        for name in (
            "cpus_per_rank",
            "cpus_per_sampler",
            "gpus_per_sampler",
            "hedge_after_s",
            "max_failures",
            "min_ranks",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.min_ranks > self.num_ranks:
            raise ValueError(f"min_ranks must be at most {self.num_ranks}, all ranks, got {self.min_ranks}")
        if self.min_ranks and not self.max_failures:
            raise ValueError("max_failures must be at least 1 where fewer ranks may go on, got 0")

    @property
    def least_ranks(self) -> int:
        """As few ranks as the run may have."""
        return self.min_ranks or self.num_ranks

    @property
    def world_size(self) -> int:
        """Training processes."""
        return self.num_ranks if self.executor == "ray" else 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides the result of a run."""

    model: ModelConfig
    sampler: SamplerConfig
    trainer: TrainerConfig
    classes: tuple[str, ...]
    """What the model's outputs mean: labels of the archive table, or the name of the number."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists."""
        return {**dataclasses.asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The reverse of ``to_dict``; CheckpointError for fields unknown, missing or out of range."""
        try:
            return cls(
                model=ModelConfig(**values["model"]),
                sampler=SamplerConfig(**values["sampler"]),
                trainer=TrainerConfig(**values["trainer"]),
                classes=tuple(values["classes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the run's configuration does not fit this version: {error}") from error

    def write(self, run_dir: Path) -> None:
        """Keep the configuration with the run."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        write_atomic(run_dir / CONFIG_FILE, text.encode())


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError naming the first field in which two configurations differ."""
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            check_same(old, value, f"{where}: {name}" if where else name)
        elif old != value:
            raise CheckpointError(f"{where}: {name} was {old!r} and is now {value!r}; use another run folder")


def check_world(batch_size: int, world_size: int) -> None:
    """Raise InputError unless the batch splits evenly over the ranks."""
    if batch_size % world_size:
        raise InputError(f"batch_size {batch_size} does not split evenly over {world_size} ranks")
