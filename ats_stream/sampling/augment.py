"""Random augmentations that act alike on the low-resolution view, the full-resolution image and the prior.

A lazy image is not read: its source is wrapped, and answers with the pixels of the moved image.

Shapes: B rows, D axes of space.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.sampling.patches import (
    HighResolution,
    PatchSource,
    check_high_resolution,
    check_view,
    image_shape,
)
from ats_stream.sampling.philox import Noise, unit_from_words
from ats_stream.sampling.streams import Seeded
from ats_stream.sampling.transforms import Flip, Intensity, Move, Pan, TransformedSource, quarter_turns

Images = tuple[Tensor, HighResolution, Tensor | None]
Uniforms = Callable[[int], list[list[float]]]

_PURPOSE = 0xFFFFFFE0  # beside those of a draw, so that an equal seed gives other numbers; and the next one


class Augmentation(Seeded):
    """Base of the augmentations: (x_low, x_high, log_prior=None) -> the same three, augmented row by row.

    It acts in training alone. What a row becomes depends on the seed, the step (a buffer that advances with
    each call), the rank and the row, on nothing else; all augmentations take noise of their own.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)

    def forward(self, x_low: Tensor, x_high: HighResolution, log_prior: Tensor | None = None) -> Images:
        """Return view (B, C, *view), image (B, C, *space) or B sources, and prior (B, *map) or None.

        Raises InputError if the shapes do not fit.
        """
        num_axes = check_view(x_low)
        check_high_resolution(x_high, len(x_low), num_axes)
        if log_prior is not None and (log_prior.ndim <= num_axes or len(log_prior) != len(x_low)):
            expected = f"(B, *map) with B = {len(x_low)} and {num_axes} axes"
            raise InputError(f"log_prior must be {expected}, got {tuple(log_prior.shape)}")
        if not self.training:
            return x_low, x_high, log_prior
        noise = Noise(seed=int(self.seed), stream_ids=self.next_streams(len(x_low)))
        return self.augment((x_low, x_high, log_prior), _uniforms(noise))

    @abstractmethod
    def augment(self, images: Images, uniforms: Uniforms) -> Images:
        """Augment with ``uniforms(k)``: for each row the next k of its numbers in (0, 1)."""


class Compose(Augmentation):
    """One augmentation after the other, with the noise of this module; each takes numbers of its own."""

    def __init__(self, *augmentations: Augmentation, seed: int = 0) -> None:
        super().__init__(seed)
        self.augmentations = nn.ModuleList(augmentations)

    def augment(self, images: Images, uniforms: Uniforms) -> Images:
        """Augment in the order given."""
        for augmentation in self.augmentations:
            assert isinstance(augmentation, Augmentation)
            images = augmentation.augment(images, uniforms)
        return images


class RandomIntensity(Augmentation):
    """``gain * x + offset`` on both resolutions, one gain and offset per row.

    Args:
        gain: interval of the gain.
        offset: interval of the offset, as a share of the largest value: ``max_value`` in floating-point
            images, the largest value of the type in images of integers, which are rounded and clamped.
        p: probability that a row is changed at all.
        max_value: the value that counts as 1 in floating-point images.
        seed: key of the noise.
    """

    def __init__(
        self,
        gain: tuple[float, float] = (0.8, 1.2),
        offset: tuple[float, float] = (-0.1, 0.1),
        p: float = 0.8,
        *,
        max_value: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for name, (low, high) in (("gain", gain), ("offset", offset)):
            if not -math.inf < low <= high < math.inf:
                raise InputError(f"{name} must be an interval (low, high), got {(low, high)}")
        self.gain, self.offset, self.max_value = gain, offset, max_value
        self.p = _check_probability(p)

    def augment(self, images: Images, uniforms: Uniforms) -> Images:
        """Change brightness and contrast; the prior stays."""
        low, high, prior = images
        moves: list[list[Move]] = []
        for use, gain, offset in uniforms(3):
            change = Intensity(_between(self.gain, gain), _between(self.offset, offset), self.max_value)
            moves.append([change] if use < self.p else [])
        return _each(low, moves), _each_image(high, moves), prior


class RandomPan(Augmentation):
    """Shift the content inside its frame by whole pixels of the view, and the image by as much.

    The shift is a whole number of pixels at both resolutions, so they stay aligned. Where the view is a level
    of a pyramid (ceil(size / 2^k)) a pixel of the view is 2^k of the image; elsewhere it is size / view
    pixels, and shifts are multiples of the denominator of that (of 3 view pixels for a view of 180 and an
    image of 1500). What comes in from outside is ``fill`` in both; in the prior nothing can be drawn there.
    A row whose prior would have no drawable position left stays where it is.

    Args:
        pixels: largest shift in pixels of the view, either way, or one for each axis.
        p: probability that a row is shifted at all.
        fill: value of the pixels that come in.
        map_stride: pixels of the view per cell of the prior; without it view / map, if that is whole.
        seed: key of the noise.

    Raises InputError, when called, if no shift within ``pixels`` is whole at all resolutions.
    """

    def __init__(
        self,
        pixels: int | Sequence[int],
        p: float = 0.8,
        *,
        fill: float = 0.0,
        map_stride: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.pixels = pixels if isinstance(pixels, int) else tuple(pixels)
        if min((self.pixels,) if isinstance(self.pixels, int) else self.pixels) < 0:
            raise InputError(f"pixels must be at least 0 on every axis, got {pixels}")
        if map_stride is not None and map_stride < 1:
            raise InputError(f"map_stride must be at least 1, got {map_stride}")
        self.p, self.fill, self.map_stride = _check_probability(p), fill, map_stride

    def augment(self, images: Images, uniforms: Uniforms) -> Images:
        """Shift view, image and prior."""
        low, high, prior = images
        view = tuple(low.shape[2:])
        most = (self.pixels,) * len(view) if isinstance(self.pixels, int) else self.pixels
        if len(most) != len(view):
            raise InputError(f"pixels {most} must have one value for each of the {len(view)} axes")
        cell = (1,) * len(view) if prior is None else self._cell(view, tuple(prior.shape[-len(view) :]))
        low_moves: list[list[Move]] = []
        high_moves: list[list[Move]] = []
        prior_moves: list[list[Move]] = []
        for row, (use, *where) in enumerate(uniforms(1 + len(view))):
            space = tuple(high.shape[2:]) if isinstance(high, Tensor) else image_shape(high[row])
            pairs = [_shift(*sizes) for sizes in zip(where, most, view, space, cell, strict=True)]
            shift, scaled = (tuple(values) for values in zip(*pairs, strict=True))
            prior_move = Pan(tuple(one // size for one, size in zip(shift, cell, strict=True)), -math.inf)
            emptied = prior is not None and not bool((prior_move.image(prior[row]) > -math.inf).any())
            shifted = use < self.p and not emptied
            low_moves.append([Pan(shift, self.fill)] if shifted else [])
            high_moves.append([Pan(scaled, self.fill)] if shifted else [])
            prior_moves.append([prior_move] if shifted else [])
        moved_prior = None if prior is None else _each(prior, prior_moves)
        return _each(low, low_moves), _each_image(high, high_moves), moved_prior

    def _cell(self, view: tuple[int, ...], maps: tuple[int, ...]) -> tuple[int, ...]:
        if self.map_stride is not None:
            return (self.map_stride,) * len(view)
        if any(size % cells for size, cells in zip(view, maps, strict=True)):
            raise InputError(f"a prior {maps} over a view {view} needs map_stride, the view pixels per cell")
        return tuple(size // cells for size, cells in zip(view, maps, strict=True))


class RandomFlip(Augmentation):
    """Mirror view, image and prior along each of ``axes`` with probability ``p``.

    ``axes`` counts axes of space, 0 the first; all of them without it.
    """

    def __init__(self, axes: Sequence[int] | None = None, p: float = 0.5, *, seed: int = 0) -> None:
        super().__init__(seed)
        self.axes = None if axes is None else tuple(axes)
        self.p = _check_probability(p)

    def augment(self, images: Images, uniforms: Uniforms) -> Images:
        """Mirror all three."""
        num_axes = images[0].ndim - 2
        axes = _from_end(range(num_axes) if self.axes is None else self.axes, num_axes)
        moves: list[list[Move]] = []
        for row in uniforms(len(axes)):
            chosen = tuple(axis for axis, u in zip(axes, row, strict=True) if u < self.p)
            moves.append([Flip(chosen)] if chosen else [])
        return _each_of_all(images, moves)


class RandomQuarterTurn(Augmentation):
    """Turn view, image and prior by 0 to 3 quarters in the plane of two axes of space (by default the last).

    Where the view, the prior or a batch of images in one tensor is not square in that plane, a quarter turn
    would not fit the batch, and rows are turned by 0 or 2 quarters.
    """

    def __init__(self, axes: tuple[int, int] = (-2, -1), *, seed: int = 0) -> None:
        super().__init__(seed)
        self.axes = axes

    def augment(self, images: Images, uniforms: Uniforms) -> Images:
        """Turn all three."""
        num_axes = images[0].ndim - 2
        first, second = _from_end(self.axes, num_axes)
        square = all(
            one.shape[first] == one.shape[second] for one in images if isinstance(one, Tensor)
        )  # sources may be of any shape: each row of a list keeps its own
        turns = (0, 1, 2, 3) if square else (0, 2)
        chosen = [turns[int(u * len(turns))] for (u,) in uniforms(1)]
        return _each_of_all(images, [quarter_turns(number, first, second) for number in chosen])


def _uniforms(noise: Noise) -> Uniforms:
    taken = 0

    def uniforms(number: int) -> list[list[float]]:
        nonlocal taken
        first, taken = taken, taken + number
        high, low = (noise.range_words(first, taken, purpose) for purpose in (_PURPOSE, _PURPOSE + 1))
        rows: list[list[float]] = unit_from_words(high, low).tolist()
        return rows

    return uniforms


def _each(x: Tensor, moves: Sequence[Sequence[Move]]) -> Tensor:
    rows = list(x)
    for row, steps in enumerate(moves):
        for move in steps:
            rows[row] = move.image(rows[row])
    return torch.stack(rows)


def _each_image(x_high: HighResolution, moves: Sequence[Sequence[Move]]) -> HighResolution:
    if isinstance(x_high, Tensor):
        return _each(x_high, moves)
    sources: list[PatchSource] = list(x_high)
    for row, steps in enumerate(moves):
        for move in steps:
            sources[row] = TransformedSource(sources[row], move)
    return sources


def _each_of_all(images: Images, moves: Sequence[Sequence[Move]]) -> Images:
    low, high, prior = images
    return _each(low, moves), _each_image(high, moves), None if prior is None else _each(prior, moves)


def _shift(u: float, most: int, view: int, space: int, cell: int) -> tuple[int, int]:
    """Shift of up to ``most`` view pixels, for u in (0, 1), in pixels of the view and of the image."""
    step, step_high = _common_step(view, space, cell)
    num_steps = most // step
    if most > 0 and num_steps == 0:
        sizes = f"a view of {view} and an image of {space} pixels"
        raise InputError(
            f"no shift of up to {most} view pixels is whole in {sizes}: shifts there are multiples of {step}"
        )
    chosen = int(u * (2 * num_steps + 1)) - num_steps
    return chosen * step, chosen * step_high


def _common_step(view: int, space: int, cell: int) -> tuple[int, int]:
    """Smallest shift, in view and in image pixels, that is whole in view, image and cells of the prior.

    >>> _common_step(180, 1500, 1), _common_step(186, 2967, 1), _common_step(64, 256, 8)
    ((3, 25), (1, 16), (8, 32))
    """
    scale = Fraction(space, view)
    halvings = 1 << max(math.ceil(scale) - 1, 0).bit_length()
    if scale.denominator > 1 and -(-space // halvings) == view:
        scale = Fraction(halvings)
    step = math.lcm(scale.denominator, cell)
    return step, int(step * scale)


def _from_end(axes: Sequence[int], num_axes: int) -> tuple[int, ...]:
    """Axes of space counted from the end.

    >>> _from_end((0, -1), 3)
    (-3, -1)
    """
    counted = tuple(axis - num_axes if axis >= 0 else axis for axis in axes)
    if len(set(counted)) != len(counted) or not all(-num_axes <= axis < 0 for axis in counted):
        raise InputError(f"axes {tuple(axes)} must be different ones of {num_axes} axes of space")
    return counted


def _between(interval: tuple[float, float], u: float) -> float:
    return interval[0] + (interval[1] - interval[0]) * u


def _check_probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise InputError(f"p must be a probability, got {p}")
    return p
