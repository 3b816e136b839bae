"""Slides that OpenSlide reads: each level as virtual chunks, the associated images, the facts.

Used for formats whose tiles overlap or need stitching. Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io.formats.kept import Kept
from ats_stream.io.formats.parts import (
    FileParts,
    Stamp,
    believable_sizes,
    box_of,
    check_picture_size,
    describe,
    file_stamp,
    opaque,
    places_alone,
    whole_grid,
)
from ats_stream.io.layout import check_bounds
from ats_stream.io.ngff import default_channels
from ats_stream.io.sources import ChunkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ats_stream.io.sources import Place, RawChunk

Array = npt.NDArray[Any]
# a tile of 256 or 512 pixels is decoded about once, and a chunk is no more than 1 MiB in the library
CHUNK_PX = 512
# open slides hold files and memory, so a process keeps these many, over one cache of decoded tiles
MAX_OPEN_SLIDES = 64
TILE_CACHE_BYTES = 64 << 20  # 64 MiB


@dataclass(frozen=True, kw_only=True)
class SlideFacts:
    """What OpenSlide says of a slide."""

    level_shapes: tuple[tuple[int, int], ...]
    """(height, width), finest first."""
    level_downsamples: tuple[float, ...]
    properties: dict[str, str]
    associated_names: tuple[str, ...]


_open_slides: Kept[Any] = Kept(MAX_OPEN_SLIDES)
_tile_caches: Kept[Any] = Kept(1)


def _open(path: str) -> Any:
    import openslide

    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise SlideError(path, f"OpenSlide cannot open it: {_line(error)}") from error
    except OSError as error:
        raise SlideError(path, f"cannot read it: {error.strerror or error}") from error
    # one for all slides of the process, not one for each
    slide.set_cache(_tile_caches.get("tiles", partial(openslide.OpenSlideCache, TILE_CACHE_BYTES)))
    return slide


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def slide_facts(path: Path) -> SlideFacts:
    """Open a slide for its facts; SlideError when OpenSlide refuses it."""
    import openslide

    slide = _open(str(path))
    try:
        return SlideFacts(
            level_shapes=tuple((h, w) for w, h in slide.level_dimensions),
            level_downsamples=tuple(float(d) for d in slide.level_downsamples),
            properties=dict(slide.properties),
            associated_names=tuple(slide.associated_images),
        )
    except openslide.OpenSlideError as error:
        raise SlideError(str(path), f"OpenSlide cannot open it: {_line(error)}") from error
    finally:
        slide.close()


def read_openslide(path: Path, vendor: str) -> FileParts:
    """The levels of a slide through OpenSlide; SlideError when it refuses the file."""
    facts = slide_facts(path)
    stamp = file_stamp(path)
    try:
        sources = tuple(OpenSlideLevel(str(path), stamp, facts, i) for i in range(len(facts.level_shapes)))
    except ValueError as error:
        raise SlideError(str(path), str(error)) from error
    get = facts.properties.get
    return FileParts(
        path=str(path),
        name=path.stem,
        axes=("c", "y", "x"),
        sources=sources,
        pixel_size_um=believable_sizes(get("openslide.mpp-y"), get("openslide.mpp-x")),
        metadata=describe(vendor, get("openslide.objective-power")),
        stamp=stamp,
        channels=default_channels(3),
        stated_downsample=facts.level_downsamples,
        associated={n: partial(read_associated, str(path), n) for n in facts.associated_names},
        companions=partial(companion_files, path, vendor),
    )


def companion_files(path: Path, vendor: str) -> tuple[Path, ...]:
    """The other files of a slide that is more than one file: levels in DICOM, the data folder of MIRAX."""
    if vendor == "dicom":
        from ats_stream.io.formats.dicom import series_files

        found = series_files(path)
    elif vendor == "mirax" and path.with_suffix("").is_dir():
        found = tuple(file for file in sorted(path.with_suffix("").iterdir()) if file.is_file())
    else:
        found = ()
    return tuple(file for file in found if file != path)


class OpenSlideLevel:
    """One level of a slide, RGB, transparent parts filled with the slide's background colour.

    OpenSlide places a region by a pixel of level 0. Where the factor of a level is no whole number, a chunk
    may be off by up to half a pixel of level 0, as in every reading of that level through OpenSlide.
    """

    def __init__(self, path: str, stamp: Stamp, facts: SlideFacts, level: int) -> None:
        """ValueError when the level has no pixels, or more than images have."""
        self.path, self.stamp, self.level = path, stamp, level
        height, width = facts.level_shapes[level]
        if min(height, width) < 1:
            raise ValueError(f"level {level} has no pixels: {width} x {height}")
        self.downsample = facts.level_downsamples[level]
        self.shape: tuple[int, ...] = (3, height, width)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        self.chunk_shape: tuple[int, ...] = (3, min(CHUNK_PX, height), min(CHUNK_PX, width))
        self.shard_shape = whole_grid(self.shape, self.chunk_shape)
        check_bounds(self.shape, self.chunk_shape, self.chunk_shape, self.dtype)
        self.background = background_of(facts.properties.get("openslide.background-color"))
        self.fill_value = np.uint8(0)

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Hand over the places alone: OpenSlide reads and decodes in one go."""
        return places_alone(self.path, self.stamp, places)

    def decode(self, raw: RawChunk) -> Array:
        """Read a chunk, cut off at the edge of the level."""
        import openslide

        (_, y, x), (_, height, width) = box_of(self, raw.place)
        key = (self.path, self.stamp)
        try:
            slide = _open_slides.get(key, partial(_open, self.path))
        except SlideError as error:
            raise ChunkError(error.reason) from error
        corner = (round(x * self.downsample), round(y * self.downsample))
        try:
            picture = slide.read_region(corner, self.level, (width, height))
        except openslide.OpenSlideError as error:
            _open_slides.drop(key)  # after an error every further call of that slide fails
            reason = (
                f"OpenSlide cannot read rows {y} to {y + height}, columns {x} to {x + width}: {_line(error)}"
            )
            raise ChunkError(reason) from error
        return opaque(np.asarray(picture), self.background).transpose(2, 0, 1)


def read_associated(path: str, name: str) -> Array:
    """Decode one associated image (C, y, x); SlideError when it is broken or too large."""
    import openslide

    slide = _open(path)
    try:
        get = slide.properties.get
        width, height = (int(get(f"openslide.associated.{name}.{side}", 0)) for side in ("width", "height"))
        check_picture_size(path, f"associated image {name!r}", width, height)
        picture = np.asarray(slide.associated_images[name])
        background = background_of(get("openslide.background-color"))
    except (openslide.OpenSlideError, KeyError) as error:
        reason = f"OpenSlide cannot read associated image {name!r}: {_line(error)}"
        raise SlideError(path, reason) from error
    finally:
        slide.close()
    return opaque(picture, background).transpose(2, 0, 1)


def background_of(color: str | None) -> Array:
    """RGB of six hexadecimal digits; white when there are none.

    >>> background_of("FF0080").tolist(), background_of(None).tolist()
    ([255, 0, 128], [255, 255, 255])
    """
    return np.frombuffer(bytes.fromhex(color or "FFFFFF"), np.uint8)
