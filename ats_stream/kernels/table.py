"""Where the pixels of a batch lie: decoded chunks of one shape, anywhere in one piece of memory.

Shapes: L elements of the memory, T chunks, I images, C channels, D axes of space (one to three).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

PIXEL_TYPES = (torch.uint8, torch.uint16, torch.float32)
MAX_SIDE = (1 << 30) - 1
"""Pixels of an image, a chunk or a patch along one axis: positions stay within 32 bits."""
MAX_ENTRIES = (1 << 31) - 1
NUM_COLUMNS = 7
"""First entry in ``starts_T``; size along z, y, x; chunks along z, y, x. Missing axes count 1."""
NUM_AXES = 3
_PARTS = (0, slice(1, 4), slice(4, 7))


@dataclass(frozen=True, kw_only=True)
class ChunkTable:
    """Images as tables of chunks; :meth:`of_chunks` and :meth:`of_images` make them and check every number.

    An image of size ``space`` has ceil(C / Cc) * prod(ceil(space / chunk_shape)) chunks, by channel, then z,
    y, x. Chunks at the far edges are stored whole.
    """

    pixels_L: torch.Tensor
    """All memory, of one of :data:`PIXEL_TYPES`."""
    starts_T: torch.Tensor
    """int64, first element of each chunk; negative for one that is absent: its pixels are ``absent``."""
    images_I7: torch.Tensor
    """int64, see :data:`NUM_COLUMNS`."""
    chunk_shape: tuple[int, ...]
    """(D,) pixels."""
    num_channels: int
    """C of an image."""
    chunk_channels: int
    """Cc of a chunk, which divides C."""
    is_interleaved: bool
    """Whether the channels of a pixel lie side by side: (*chunk_shape, Cc), not (Cc, *chunk_shape)."""
    absent: float = 0.0
    """Value of the pixels of chunks that are not stored."""

    @classmethod
    def of_chunks(
        cls,
        pixels_L: torch.Tensor,
        starts: Sequence[int] | torch.Tensor,
        spaces: Sequence[Sequence[int]],
        chunk_shape: Sequence[int],
        *,
        num_channels: int,
        chunk_channels: int | None = None,
        is_interleaved: bool = False,
        absent: float = 0.0,
    ) -> ChunkTable:
        """Make a table of images of sizes ``spaces``, I of (D,); ``starts`` names their chunks in order.

        ``chunk_channels`` is by default ``num_channels``. The table stays on the CPU until :meth:`to`;
        ``pixels_L`` may be anywhere. Raises InputError for a chunk that reaches over the memory, a number of
        chunks that is not that of the images, and sizes out of range.

        >>> pixels = torch.arange(8, dtype=torch.uint8)  # two chunks of 4, an image of 6 pixels
        >>> table = ChunkTable.of_chunks(pixels, [4, 0], [(6,)], (4,), num_channels=1)
        >>> table.images_I7.tolist()
        [[0, 1, 1, 6, 1, 1, 2]]
        """
        if not isinstance(pixels_L, torch.Tensor) or pixels_L.ndim != 1:
            raise InputError("pixels_L must be a tensor of one dimension")
        chunk_channels = num_channels if chunk_channels is None else chunk_channels
        starts_T = torch.as_tensor(starts, dtype=torch.int64, device="cpu")
        rows, first = [], 0
        for space in spaces:
            if len(space) != len(chunk_shape):
                raise InputError(
                    f"an image of {tuple(space)} pixels does not fit chunks of {tuple(chunk_shape)}"
                )
            _check_sides("image", space)
            _check_sides("chunk", chunk_shape)
            num_chunks = [-(-size // side) for size, side in zip(space, chunk_shape, strict=True)]
            missing = [1] * (NUM_AXES - len(space))
            rows.append([first, *missing, *space, *missing, *num_chunks])
            first += math.prod(num_chunks) * -(-num_channels // max(chunk_channels, 1))
        table = cls(
            pixels_L=pixels_L,
            starts_T=starts_T,
            images_I7=torch.tensor(rows, dtype=torch.int64).view(-1, NUM_COLUMNS),
            chunk_shape=tuple(chunk_shape),
            num_channels=num_channels,
            chunk_channels=chunk_channels,
            is_interleaved=is_interleaved,
            absent=absent,
        )
        if first != len(starts_T):
            raise InputError(f"the images have {first} chunks, but {len(starts_T)} starts are given")
        table.check_layout()
        table.check_values()
        return table

    @classmethod
    def of_images(cls, images: torch.Tensor, *, is_interleaved: bool = False) -> ChunkTable:
        """Make a table of the images of one tensor, each a chunk: (I, C, *space), or (I, *space, C).

        The table lies on the device of the images, whose memory is used as it is.
        """
        if not isinstance(images, torch.Tensor) or not 3 <= images.ndim <= 5 or 0 in images.shape:
            got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise InputError(f"images must be a tensor (I, C, *space) with 1 to 3 axes of space, got {got}")
        if not images.is_contiguous():
            raise InputError(f"images have strides {images.stride()}, expected a contiguous tensor")
        num_images = len(images)
        channels = images.shape[-1] if is_interleaved else images.shape[1]
        space = tuple(images.shape[1:-1] if is_interleaved else images.shape[2:])
        _check_sides("image", space)
        missing = [1] * (NUM_AXES - len(space))
        image_I = torch.arange(num_images, device=images.device)
        sizes = torch.tensor([*missing, *space, 1, 1, 1], dtype=torch.int64, device=images.device)
        table = cls(
            pixels_L=images.view(-1),
            starts_T=image_I * (images.numel() // num_images),
            images_I7=torch.cat([image_I[:, None], sizes.expand(num_images, -1)], dim=1),
            chunk_shape=space,
            num_channels=channels,
            chunk_channels=channels,
            is_interleaved=is_interleaved,
        )
        table.check_layout()
        return table

    @property
    def num_chunk_elements(self) -> int:
        """Elements of a chunk."""
        return self.chunk_channels * math.prod(self.chunk_shape)

    @property
    def next_element(self) -> tuple[int, int, int, int]:
        """Elements of a chunk from one channel, z, y, x to the next."""
        _, y, x = three(self.chunk_shape)
        if self.is_interleaved:
            step = self.chunk_channels
            return 1, y * x * step, x * step, step
        return self.num_chunk_elements // self.chunk_channels, y * x, x, 1

    def to(self, device: torch.device, *, with_pixels: bool = True) -> ChunkTable:
        """Copy to a device; without the pixels, which then must be memory that the device can read."""
        return replace(
            self,
            pixels_L=self.pixels_L.to(device, non_blocking=True) if with_pixels else self.pixels_L,
            starts_T=self.starts_T.to(device, non_blocking=True),
            images_I7=self.images_I7.to(device, non_blocking=True),
        )

    def check_layout(self) -> None:
        """Raise InputError for types and shapes that the kernels do not take; reads no element."""
        if self.pixels_L.dtype not in PIXEL_TYPES:
            listed = ", ".join(str(dtype) for dtype in PIXEL_TYPES)
            raise InputError(f"pixels are {self.pixels_L.dtype}, expected one of {listed}")
        if not 1 <= len(self.chunk_shape) <= NUM_AXES:
            raise InputError(f"chunk_shape {self.chunk_shape} must have one to three axes")
        _check_sides("chunk", self.chunk_shape)
        if self.num_channels < 1 or self.chunk_channels < 1 or self.num_channels % self.chunk_channels:
            raise InputError(
                f"{self.chunk_channels} channels of a chunk must divide {self.num_channels} of an image"
            )
        if math.prod(self.chunk_shape[1:]) * self.chunk_channels > MAX_ENTRIES:
            raise InputError(f"a plane of a chunk of {self.chunk_shape} has more than {MAX_ENTRIES} elements")
        for name, value, ndim in (
            ("pixels_L", self.pixels_L, 1),
            ("starts_T", self.starts_T, 1),
            ("images_I7", self.images_I7, 2),
        ):
            if value.ndim != ndim or value.layout != torch.strided or not value.is_contiguous():
                raise InputError(
                    f"{name} has shape {tuple(value.shape)}, expected {ndim} contiguous dimensions"
                )
            if name != "pixels_L" and value.dtype != torch.int64:
                raise InputError(f"{name} is {value.dtype}, expected torch.int64")
            if not 1 <= len(value) <= MAX_ENTRIES and name != "pixels_L":
                raise InputError(f"{name} has {len(value)} rows, expected 1 to {MAX_ENTRIES}")
        if self.images_I7.shape[1] != NUM_COLUMNS:
            raise InputError(f"images_I7 has {self.images_I7.shape[1]} columns, expected {NUM_COLUMNS}")

    def check_values(self) -> None:
        """Raise InputError for a chunk outside the memory or an image outside the table; reads the table."""
        last = self.starts_T.max().item() + self.num_chunk_elements
        if self.starts_T.max() >= 0 and last > len(self.pixels_L):
            raise InputError(
                f"a chunk of {self.num_chunk_elements} elements ends at {last}, but there are"
                f" {len(self.pixels_L)} pixels"
            )
        first_I, space_I3, grid_I3 = (self.images_I7[:, columns] for columns in _PARTS)
        missing = [1] * (NUM_AXES - len(self.chunk_shape))
        chunk_3 = torch.tensor([*missing, *self.chunk_shape])
        parts = self.num_channels // self.chunk_channels
        fits = bool(((space_I3 >= 1) & (space_I3 <= MAX_SIDE)).all()) and bool(
            (grid_I3 == (space_I3 + chunk_3 - 1) // chunk_3).all()
        )
        ends_I = first_I + grid_I3.double().prod(dim=1) * parts
        if not fits or bool((first_I < 0).any()) or bool((ends_I > len(self.starts_T)).any()):
            raise InputError(f"images_I7 does not fit {len(self.starts_T)} chunks of {self.chunk_shape}")


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Sizes along z, y, x, where missing axes count 1.

    >>> three((5, 7))
    (1, 5, 7)
    """
    z, y, x = (*[1] * (NUM_AXES - len(sizes)), *sizes)
    return z, y, x


def _check_sides(name: str, sides: Sequence[int]) -> None:
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise InputError(f"sides of the {name}, {tuple(sides)}, must be from 1 to {MAX_SIDE} pixels")
