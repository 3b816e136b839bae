"""Pictures that lie on top of an image: attention maps and masks, each placed in pixels of the image.

Shape letters: Y rows, X columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.io import open_pyramid
from ats_stream.io.ngff import parse_image, pixel_size_um
from ats_stream.io.opening import open_store
from ats_stream.io.pyramid_info import axis_downsample
from ats_stream.io.storage.documents import Metadata, attributes_of
from ats_stream.report.colour import colour_map
from ats_stream.viewer.display import PALETTE
from ats_stream.viewer.image import TiledImage, encoded
from ats_stream.viewer.tiles import TILE_PX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ats_stream.io import Level, Pyramid
    from ats_stream.io.ngff import Multiscale
    from ats_stream.viewer.tiles import Resolution

# values of a map that are looked at for its greatest
MAX_PEAK_VALUES = 64 << 20
MAX_MAPS = 8
MASK_COLOUR = (0, 158, 115)
MASK_ALPHA = 120


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a picture lies on an image, in pixels of the image's level 0."""

    left: float
    top: float
    scale_x: float
    """Pixels of the image per pixel of the picture."""
    scale_y: float


@dataclass(frozen=True)
class Overlay:
    """A map or mask over an image: its tiles as PNG with transparency."""

    label: str
    """What it is called on the page: "attention", "tissue", ..."""
    image: TiledImage
    placement: Placement
    channel: int = 0
    is_map: bool = True
    """Whether it holds shares, shown by a colour map; else classes, 0 being nothing."""

    @cached_property
    def peak(self) -> float:
        """The greatest value of a map, which is shown in full colour; 0 if there is none."""
        levels = self.image.pyramid.levels
        level = next((v for v in levels if v.shape[-2] * v.shape[-1] <= MAX_PEAK_VALUES), levels[-1])
        start = (self.channel, *(0 for _ in level.shape[1:]))
        stop = (self.channel + 1, *(1 for _ in level.shape[1:-2]), *level.shape[-2:])
        values = self.image.pyramid.read(level, start, stop)
        return float(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).max(initial=0.0))

    def tile(self, resolution: Resolution, column: int, row: int) -> bytes | None:
        """A tile; None outside. Raises SlideError when the picture cannot be read."""
        pixels = self.image.pixels(
            resolution, column, row, channels=[self.channel], at=(0,) * len(self.image.other_axes)
        )
        if pixels is None:
            return None
        rgba = map_colours(pixels[0], self.peak) if self.is_map else class_colours(pixels[0])
        return encoded(rgba, "png")


def map_colours(values_YX: NDArray[Any], peak: float) -> NDArray[np.uint8]:
    """RGBA of a map, t = sqrt(value / peak) deciding colour and cover, so that sparse maps stay visible.

    >>> map_colours(np.array([[0.0, 0.25, 1.0]]), 1.0)[0, :, 3].tolist()
    [0, 128, 255]
    """
    values = np.nan_to_num(values_YX.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    level = np.sqrt(np.clip(values / peak, 0.0, 1.0)) if peak > 0 else np.zeros(values.shape)
    alpha = np.rint(255 * level).astype(np.uint8)
    return np.concatenate([colour_map(level), alpha[..., None]], axis=-1)


def class_colours(values_YX: NDArray[Any]) -> NDArray[np.uint8]:
    """RGBA of a mask: clear where it is 0, one colour for 1, another for each class above.

    >>> class_colours(np.array([[0, 1]]))[0].tolist()
    [[0, 0, 0, 0], [0, 158, 115, 120]]
    """
    colours = np.array([(0, 0, 0), MASK_COLOUR, *PALETTE], np.uint8)
    alpha = np.array([0, *(MASK_ALPHA for _ in colours[1:])], np.uint8)
    values = values_YX.astype(np.int64)
    number = np.where(values > 0, (values - 1) % (len(colours) - 1) + 1, 0)
    return np.concatenate([colours, alpha[:, None]], axis=1)[number]


def attention_overlays(place: str, image: Pyramid, *, tile_px: int = TILE_PX) -> list[Overlay]:
    """The attention map of an image in a float OME-Zarr image, one overlay for each of its channels.

    Raises SlideError when it is no such image.
    """
    pyramid = open_pyramid(place)
    multiscale = parse_image(attributes_of(Metadata(open_store(place)), ""))
    tiled = TiledImage(pyramid, tile_px=tile_px)
    where = placed(multiscale, tiled.size, image.levels[0])
    count = min(pyramid.levels[0].shape[0], MAX_MAPS)
    labels = ["attention"] if count == 1 else [f"attention {i + 1}" for i in range(count)]
    return [Overlay(label, tiled, where, i) for i, label in enumerate(labels)]


def mask_overlays(image: Pyramid, *, tile_px: int = TILE_PX) -> list[Overlay]:
    """The label images of a pyramid, such as its tissue; SlideError when one cannot be read."""
    found = []
    for name in image.label_names:
        tiled = TiledImage(image.label(name), tile_px=tile_px)
        scale = _label_scale(tiled, image.levels[0])
        found.append(Overlay(name, tiled, scale, is_map=False))
    return found


def _label_scale(tiled: TiledImage, level: Level) -> Placement:
    """A label image covers its image; its pixels are as many of the image's as both sizes say."""
    own, theirs = tiled.pyramid.levels[0].pixel_size_um, level.pixel_size_um
    scales = []
    for axis in (-2, -1):
        stated = own[axis] / theirs[axis] if own is not None and theirs is not None else 1.0
        scales.append(axis_downsample(level.shape[axis], tiled.pyramid.levels[0].shape[axis], stated))
    return Placement(left=0.0, top=0.0, scale_x=scales[1], scale_y=scales[0])


def placed(multiscale: Multiscale, size: tuple[int, int], level: Level) -> Placement:
    """Where a map lies on an image, from the scale and translation that the map states.

    NGFF's translation is that of the centre of the first pixel: a map of pixels of size s whose first begins
    at the image's edge is shifted by (s - 1) / 2. Lengths are taken in micrometres where both have them, else
    in pixels of the image; a map that states nothing is stretched over the image.
    """
    dataset = multiscale.datasets[0]
    axes = [i for i, kind in enumerate(multiscale.axis_types) if kind == "space"][-2:]
    own_um = pixel_size_um(multiscale, dataset, axes)
    if own_um is not None and level.pixel_size_um is not None:
        per_unit = [
            um / dataset.scale[axis] / pixel_um
            for um, axis, pixel_um in zip(own_um, axes, level.pixel_size_um[-2:], strict=True)
        ]
    elif own_um is None and any(dataset.scale[axis] != 1 for axis in axes):
        per_unit = [1.0, 1.0]
    else:
        height, width = level.shape[-2:]
        return Placement(left=0.0, top=0.0, scale_x=width / size[1], scale_y=height / size[0])
    scale_y, scale_x = (dataset.scale[a] * unit for a, unit in zip(axes, per_unit, strict=True))
    first_y, first_x = (dataset.translation[a] * unit for a, unit in zip(axes, per_unit, strict=True))
    return Placement(
        left=first_x + 0.5 - scale_x / 2, top=first_y + 0.5 - scale_y / 2, scale_x=scale_x, scale_y=scale_y
    )
