"""What is known of one slide after a prediction, without its pixels: a line of the tables.

Shape letters: K values of the head, P drawn patches (of all draws).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

PROBABILITY_TASKS = ("classification", "multilabel")


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The drawn patches of a slide, in the order of drawing; all lists have one entry a patch."""

    draw: tuple[int, ...] = ()
    """Which draw, counted from 0."""
    y: tuple[int, ...] = ()
    """First row, in pixels of level 0; may lie outside of the image."""
    x: tuple[int, ...] = ()
    """First column."""
    attention: tuple[float, ...] = ()
    """Attention probability of the position."""
    weight: tuple[float, ...] = ()
    """R of the draw, divided by the number of draws: attention * weight is what the patch counts for."""

    @property
    def counts_for(self) -> tuple[float, ...]:
        """What each patch counts for, attention * weight."""
        return tuple(a * w for a, w in zip(self.attention, self.weight, strict=True))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """One slide: what was predicted and read of it, or why nothing was."""

    slide: str
    """Path or URL, without logins and queries."""
    name: str
    """Name of its files in the folder of the prediction."""
    label: str = ""
    split: str = ""
    group: str = ""
    time: float | None = None
    """Time until the event, of survival tables."""
    error: str = ""
    """Why there is no prediction; empty when there is one."""
    predicted: str = ""
    """The most probable class, the classes above 1/2, or the number."""
    right: bool | None = None
    """Whether that is the label; None without a label, and for numbers."""
    value_K: tuple[float, ...] = ()
    """Probabilities, or of other tasks what the model gives; the mean over the draws."""
    standard_error_K: tuple[float, ...] = ()
    """Of that mean, from the spread of the draws; empty with one draw."""
    height: int = 0
    """Rows of level 0."""
    width: int = 0
    pixel_size_um: float | None = None
    """Of level 0, the mean of both axes; None when the slide does not say."""
    patch_px: int = 0
    """Side of the patches in pixels of level 0."""
    patches: Patches = dataclasses.field(default_factory=Patches)
    stored_bytes: int = 0
    """Bytes of patches fetched from storage."""
    decoded_bytes: int = 0
    """Bytes that these decoded to."""
    full_bytes: int = 0
    """Bytes of all of level 0, decoded."""
    seconds: float = 0.0
    """Time that reading, attention and drawing took."""

    @property
    def is_bad(self) -> bool:
        """Whether there is no prediction."""
        return bool(self.error)

    @property
    def read_share(self) -> float:
        """Share of level 0 that was decoded."""
        return self.decoded_bytes / self.full_bytes if self.full_bytes else 0.0

    def to_json(self) -> bytes:
        """One JSON object; :meth:`from_json` gives an equal record."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The reverse of :meth:`to_json`; ValueError, KeyError or TypeError for anything else."""
        return cls.from_dict(json.loads(data))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A record from plain values; lists become tuples."""
        given = dict(values)
        patches = {name: tuple(entries) for name, entries in given["patches"].items()}
        for name in ("value_K", "standard_error_K"):
            given[name] = tuple(given[name])
        return cls(**{**given, "patches": Patches(**patches)})


@dataclass(frozen=True, kw_only=True)
class PredictionInfo:
    """What a whole prediction is: decides its numbers, and is the same for all of its slides."""

    model: str
    """Hash of the model's weights and configuration."""
    images: str
    """Hash of the slides, in order, with their labels and the pixel sizes that the table gives."""
    num_images: int
    task: str
    outputs: tuple[str, ...]
    """Classes, or the name of the number."""
    scheme: str
    """How positions were drawn."""
    num_draws: int
    num_patches: int
    """Patches of a draw."""
    pixel_size_um: float | None = None
    """Pixel size that all slides were taken to have, but for those that the table gives one; None for their
    own."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "outputs": list(self.outputs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reverse; KeyError or TypeError for fields that are missing or unknown."""
        return cls(**{**values, "outputs": tuple(values["outputs"])})

    @property
    def has_probabilities(self) -> bool:
        """Whether values are probabilities."""
        return self.task in PROBABILITY_TASKS

    def value_columns(self) -> tuple[str, ...]:
        """Names of the columns of the values.

        >>> info = PredictionInfo(model="", images="", num_images=0, task="classification", outputs=("a",),
        ...                       scheme="top", num_draws=1, num_patches=4)
        >>> info.value_columns(), info.error_columns()
        (('p_a',), ('se_a',))
        """
        prefix = "p_" if self.has_probabilities else ""
        return tuple(f"{prefix}{name}" for name in self.outputs)

    def error_columns(self) -> tuple[str, ...]:
        """Names of the columns of their standard errors."""
        return tuple(f"se_{name}" for name in self.outputs)


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of at least two values.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
