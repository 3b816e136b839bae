"""Moves of an image that a lazy source can make too: patches of the moved image, read from the unmoved one.

A move acts on the last axes of a tensor, which are the axes of space, and counts them from the end (-1 is the
last), so that images (C, *space), maps (*map) and patches (N, C, *size) are all moved by the same call.

Shapes: N patches, C channels, D axes of space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.sampling.patches import as_integer, image_shape, inside_image, on_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.sampling.patches import PatchSource

Sizes = tuple[int, ...]


class Move(Protocol):
    """One step from an image to the moved image."""

    def image(self, x: Tensor) -> Tensor:
        """Move a whole image or map."""

    def space(self, space: Sizes) -> Sizes:
        """Size of the moved image."""

    def request(self, offsets_ND: Tensor, size: Sizes, space: Sizes) -> tuple[Tensor, Sizes]:
        """Where in the image of size ``space`` the pixels of patches of the moved image lie."""

    def patches(self, patches: Tensor) -> Tensor:
        """Turn what lies there into the patches of the moved image."""

    def outside(self, fill: float) -> float:
        """Value of pixels outside the image, where the caller wants ``fill`` outside the moved one."""


@dataclass(frozen=True)
class Flip:
    """Mirror some axes."""

    axes: tuple[int, ...]

    def image(self, x: Tensor) -> Tensor:
        """Mirror the image."""
        return on_bits(lambda bits: bits.flip(self.axes), x)

    def space(self, space: Sizes) -> Sizes:
        """Keep the size."""
        return space

    def request(self, offsets_ND: Tensor, size: Sizes, space: Sizes) -> tuple[Tensor, Sizes]:
        """Count the offsets from the far end."""
        offsets_ND = offsets_ND.clone()
        for axis in self.axes:
            offsets_ND[:, axis] = space[axis] - size[axis] - offsets_ND[:, axis]
        return offsets_ND, size

    def patches(self, patches: Tensor) -> Tensor:
        """Mirror each patch."""
        return self.image(patches)

    def outside(self, fill: float) -> float:
        """Keep the caller's fill."""
        return fill


@dataclass(frozen=True)
class Transpose:
    """Exchange two axes."""

    first: int
    second: int

    def image(self, x: Tensor) -> Tensor:
        """Transpose the image."""
        return x.transpose(self.first, self.second)

    def space(self, space: Sizes) -> Sizes:
        """Exchange the two sizes."""
        return tuple(space[axis] for axis in self._order(len(space)))

    def request(self, offsets_ND: Tensor, size: Sizes, space: Sizes) -> tuple[Tensor, Sizes]:
        """Exchange the two axes of offsets and size."""
        return offsets_ND[:, self._order(len(space))], self.space(size)

    def patches(self, patches: Tensor) -> Tensor:
        """Transpose each patch."""
        return self.image(patches)

    def outside(self, fill: float) -> float:
        """Keep the caller's fill."""
        return fill

    def _order(self, num_axes: int) -> list[int]:
        order = list(range(num_axes))
        order[self.first], order[self.second] = order[self.second], order[self.first]
        return order


@dataclass(frozen=True)
class Pan:
    """Shift the content by whole pixels inside a frame that stays; what was outside comes in as ``fill``."""

    shift: tuple[int, ...]
    """Pixels per axis of space, positive towards the end of the axis."""
    fill: float = 0.0

    def image(self, x: Tensor) -> Tensor:
        """Shift the image."""
        kept: list[slice | Any] = [...]
        target: list[slice | Any] = [...]
        for shift, length in zip(self.shift, x.shape[-len(self.shift) :], strict=True):
            kept.append(slice(max(-shift, 0), max(length - max(shift, 0), 0)))
            target.append(slice(max(shift, 0), max(length - max(-shift, 0), 0)))
        moved = torch.full_like(x, self.fill)
        moved[tuple(target)] = x[tuple(kept)]
        return moved

    def space(self, space: Sizes) -> Sizes:
        """Keep the size."""
        return space

    def request(self, offsets_ND: Tensor, size: Sizes, space: Sizes) -> tuple[Tensor, Sizes]:
        """Shift the offsets back."""
        del space
        return offsets_ND - offsets_ND.new_tensor(self.shift), size

    def patches(self, patches: Tensor) -> Tensor:
        """Leave the patches as they were read."""
        return patches

    def outside(self, fill: float) -> float:
        """Take the move's own fill."""
        del fill
        return self.fill


@dataclass(frozen=True)
class Intensity:
    """``gain * x + offset * max_value``; integer pixels are rounded half to even and kept in their range."""

    gain: float
    offset: float
    max_value: float = 1.0
    """The value that counts as 1 in floating-point images; integers count from their type's largest one."""

    def image(self, x: Tensor) -> Tensor:
        """Change each pixel; the dtype stays."""
        if x.is_floating_point():
            return x * self.gain + self.offset * self.max_value
        limits = torch.iinfo(x.dtype)
        exact = torch.float32 if limits.bits <= 16 else torch.float64
        changed = x.to(exact) * self.gain + self.offset * limits.max
        return changed.round().clamp(limits.min, limits.max).to(x.dtype)

    def space(self, space: Sizes) -> Sizes:
        """Keep the size."""
        return space

    def request(self, offsets_ND: Tensor, size: Sizes, space: Sizes) -> tuple[Tensor, Sizes]:
        """Look at the same place."""
        del space
        return offsets_ND, size

    def patches(self, patches: Tensor) -> Tensor:
        """Change each pixel."""
        return self.image(patches)

    def outside(self, fill: float) -> float:
        """Keep the caller's fill."""
        return fill


def quarter_turns(number: int, first: int, second: int) -> list[Move]:
    """The moves of ``torch.rot90(x, number, (first, second))``, in their order."""
    turns: dict[int, list[Move]] = {
        0: [],
        1: [Transpose(first, second), Flip((first,))],
        2: [Flip((first, second))],
        3: [Transpose(first, second), Flip((second,))],
    }
    return turns[number % 4]


@dataclass(frozen=True)
class TransformedLevel:
    """The one resolution of a transformed source."""

    shape: tuple[int, ...]
    """(C, *space)."""


class TransformedSource:
    """A lazy source seen through a move: nothing is read before patches are asked for.

    ``read_patches`` gives, bit for bit, the patches of the moved image. Only the full resolution is there.

    Raises InputError when another level is asked for.
    """

    def __init__(self, source: PatchSource, move: Move) -> None:
        self.source = source
        self.move = move
        num_channels = source.levels[0].shape[0]
        self._space = image_shape(source)
        self._moved_space = move.space(self._space)
        self.levels: Sequence[TransformedLevel] = (TransformedLevel((num_channels, *self._moved_space)),)

    def read_patches(self, level: int, offsets: Any, size: Sequence[int], *, fill: float = 0) -> Tensor:
        """Return a tensor (N, C, *size) for int64 offsets (N, D); pixels outside the image are ``fill``."""
        if level != 0:
            raise InputError(f"a transformed source has level 0 alone, got {level}")
        offsets_ND, sizes = torch.as_tensor(offsets), tuple(size)
        there_ND, sizes_there = self.move.request(offsets_ND, sizes, self._space)
        outside = as_integer(self.move.outside(fill))
        read = self.source.read_patches(0, there_ND.cpu().numpy(), sizes_there, fill=outside)
        patches = self.move.patches(torch.as_tensor(read))
        inside = inside_image(offsets_ND, sizes, self._moved_space).to(patches.device)
        if bool(inside.all()):
            return patches
        return torch.where(inside[:, None], patches, patches.new_full((), fill))
