"""Plain pictures (PNG, JPEG, JPEG 2000 and whatever else Pillow opens) as images of one level.

A picture is decoded as a whole and shown in virtual chunks; a process keeps the pictures read last.
"""

from __future__ import annotations

import struct
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io.formats.kept import Kept
from ats_stream.io.formats.parts import (
    FileParts,
    Stamp,
    box_of,
    check_picture_size,
    describe,
    file_stamp,
    places_alone,
    whole_grid,
)
from ats_stream.io.ngff import default_channels
from ats_stream.io.sources import ChunkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ats_stream.io.sources import Place, RawChunk

Array = npt.NDArray[Any]
CHUNK_PX = 512
KEPT_BYTES = 256 << 20  # 256 MiB
_pictures: Kept[Array] = Kept(KEPT_BYTES, lambda picture: picture.nbytes)


def read_picture(path: Path) -> FileParts:
    """A picture file as an image of one level; SlideError when it is none, broken, or too large."""
    stamp = file_stamp(path)
    key = (str(path), stamp)
    # decoded once here: shape and dtype are those of the pixels, and a broken picture shows at once
    picture_CYX = _pictures.get(key, partial(_decode, path))
    source = PictureSource(str(path), stamp, picture_CYX.shape, picture_CYX.dtype)
    return FileParts(
        path=str(path),
        name=path.stem,
        axes=("c", "y", "x"),
        sources=(source,),
        pixel_size_um=None,
        metadata=describe(_kind(path), None),
        stamp=stamp,
        channels=default_channels(source.shape[0]),
    )


class PictureSource:
    """Chunks of a picture that is decoded as a whole."""

    def __init__(self, path: str, stamp: Stamp, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.stamp, self.shape, self.dtype = path, stamp, shape, dtype
        self.chunk_shape = (shape[0], *(min(CHUNK_PX, n) for n in shape[1:]))
        self.shard_shape = whole_grid(self.shape, self.chunk_shape)
        self.fill_value = dtype.type(0)

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Hand over the places alone."""
        return places_alone(self.path, self.stamp, places)

    def decode(self, raw: RawChunk) -> Array:
        """A view of the picture, cut off at the edge."""
        try:
            picture_CYX = _pictures.get((self.path, self.stamp), partial(_decode, Path(self.path)))
        except SlideError as error:
            raise ChunkError(error.reason) from error
        start, size = box_of(self, raw.place)
        return picture_CYX[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


def _kind(path: Path) -> str:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as picture:
            return str(picture.format).lower()


def _decode(path: Path) -> Array:
    """Pixels (C, y, x): one channel for grey, three for colour; 16 bits stay 16 bits."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # a picture within the bound of this module is no bomb
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                check_picture_size(str(path), "the picture", picture.width, picture.height)
                deep = _decode_deep(path, str(picture.format))
                if deep is not None:
                    return deep
                kind = "L" if picture.mode in {"1", "L", "I;16", "I", "F"} else "RGB"
                pixels = np.asarray(picture if picture.mode == "I;16" else picture.convert(kind))
    except UnidentifiedImageError as error:
        raise SlideError(str(path), "not a slide: neither OpenSlide, tifffile nor Pillow knows it") from error
    except Image.DecompressionBombError as error:
        raise SlideError(str(path), f"the picture is too large to be read whole: {error}") from error
    except SlideError:
        raise
    except Exception as error:  # decoders of many formats raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SlideError(str(path), f"broken picture: {reason}") from error
    image_CYX = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(image_CYX)


def _decode_deep(path: Path, kind: str) -> Array | None:
    """Colour of 16 bits per channel, which Pillow would cut to 8; None for every other picture."""
    data = path.read_bytes()
    if kind == "PNG":
        depth, color = struct.unpack_from("BB", data, 24)
        pixels = imagecodecs.png_decode(data) if depth == 16 and color in (2, 6) else None
    elif kind == "JPEG2000":
        pixels = imagecodecs.jpeg2k_decode(data)
        pixels = None if pixels.itemsize == 1 or pixels.ndim != 3 else pixels
    else:
        return None
    return None if pixels is None else np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))
