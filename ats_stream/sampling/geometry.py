"""Where a cell of the attention map lies in the image, and where its patch begins.

Coordinates are continuous: pixel p covers [p, p + 1). The centre of map cell s is

    (offset + stride (s + 1/2)) scale            scale = image size / low-resolution size

in high-resolution pixels; offset and stride are in pixels of the low-resolution view and come from the
network.

Shapes: B rows, N draws, D axes of space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.sampling.checks import holds

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Place of an attention map in the low-resolution view it comes from; one value per axis of space."""

    offset: tuple[float, ...]
    """Pixels of the view before the first cell's own stretch."""
    stride: tuple[float, ...]
    """Pixels of the view from one cell to the next."""
    input_shape: tuple[int, ...]
    """Size of the view in pixels."""
    map_shape: tuple[int, ...]
    """Size of the map in cells."""
    receptive_field: tuple[int, ...]
    """Pixels of the view that a cell sees."""

    def __post_init__(self) -> None:
        lengths = {len(self.offset), len(self.stride), len(self.input_shape), len(self.map_shape)}
        if len(lengths | {len(self.receptive_field)}) != 1 or not 1 <= len(self.offset) <= 3:
            raise InputError(f"a geometry needs one value for each of 1 to 3 axes, got {self}")
        if min(self.stride) <= 0 or min(self.input_shape) < 1 or min(self.map_shape) < 1:
            raise InputError(f"a geometry needs positive strides and sizes, got {self}")


def geometry_from_receptive_field(
    receptive_field: int, map_shape: Sequence[int], input_shape: Sequence[int]
) -> Geometry:
    """Geometry of a network described by one number.

    0 stands for a "same"-padded network: the map covers the view evenly. A positive number stands for valid
    (unpadded) convolutions that together see ``receptive_field`` pixels, followed by pooling without
    padding: they eat ``receptive_field - 1`` pixels, and the stride is the whole number of those left per
    cell. :func:`ats_stream.sampling.geometry_of` reads any network exactly. Raises InputError if nothing is
    left.

    >>> geometry_from_receptive_field(9, (35,), (288,)).stride
    (8.0,)
    """
    maps, inputs = tuple(map_shape), tuple(input_shape)
    if receptive_field < 0 or len(maps) != len(inputs):
        raise InputError(f"receptive field {receptive_field} cannot relate map {maps} to view {inputs}")
    if receptive_field == 0:
        stride = tuple(size / cells for size, cells in zip(inputs, maps, strict=True))
    else:
        stride = tuple(
            float((size - receptive_field + 1) // cells) for size, cells in zip(inputs, maps, strict=True)
        )
    if min(stride) <= 0:
        raise InputError(
            f"receptive field {receptive_field} leaves no stride between map {maps} and view {inputs}"
        )
    return Geometry(
        offset=(max(receptive_field - 1, 0) / 2,) * len(maps),
        stride=stride,
        input_shape=inputs,
        map_shape=maps,
        receptive_field=(max(receptive_field, 1),) * len(maps),
    )


def patch_offsets(
    index_BN: Tensor,
    map_shape: Sequence[int],
    image_shape: Sequence[int],
    patch_size: Sequence[int],
    *,
    geometry: Geometry | None = None,
) -> Tensor:
    """First pixel (B, N, D) int64 of the patches at flat (row-major) positions, in high-resolution pixels.

    The patch is centred on its cell and starts at round-half-even(centre - size / 2); it may reach over any
    border of the image. Without ``geometry`` the map covers the image evenly. Raises InputError if the
    shapes do not fit or an index lies outside the map.

    >>> patch_offsets(torch.tensor([[0, 3]]), (2, 2), (100, 100), (50, 50)).tolist()
    [[[0, 0], [50, 50]]]
    """
    maps, images, sizes = tuple(map_shape), tuple(image_shape), tuple(patch_size)
    if geometry is None:
        geometry = geometry_from_receptive_field(0, maps, images)
    if not len(maps) == len(images) == len(sizes) or geometry.map_shape != maps:
        raise InputError(f"map {maps}, image {images}, patch {sizes} and {geometry} do not fit together")
    if min(sizes) < 1 or min(images) < 1:
        raise InputError(f"patch {sizes} and image {images} must be at least 1 pixel wide")
    num_positions = math.prod(maps)
    if index_BN.dtype != torch.int64 or not holds((index_BN >= 0) & (index_BN < num_positions)):
        raise InputError(
            f"positions must be int64 in [0, {num_positions}) for map {maps}, got {index_BN.dtype}"
        )
    starts = []
    for axis, cell in enumerate(unravel_index(index_BN, maps)):
        scale = images[axis] / geometry.input_shape[axis]
        centre = (geometry.offset[axis] + geometry.stride[axis] * (cell.double() + 0.5)) * scale
        starts.append((centre - sizes[axis] / 2).round().long())  # torch rounds half to even
    return torch.stack(starts, dim=-1)


def unravel_index(index: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Coordinates of flat row-major positions, one tensor per axis.

    >>> [int(axis) for axis in unravel_index(torch.tensor(7), (2, 5))]
    [1, 2]
    """
    coordinates = []
    for size in reversed(shape):
        coordinates.append(index % size)
        index = index // size
    return coordinates[::-1]
