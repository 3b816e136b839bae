"""The JPEG chunk codec of zarr stores: its configuration, decoding, encoding; without zarr-python.

The configuration is the one of imagecodecs: ``tables`` (base64) are the tables that abbreviated tiles of a
slide share, ``colorspace_jpeg`` and ``colorspace_data`` name the colours in the data and of the pixels,
``level`` (quality) and ``subsampling`` tell how chunks are written. Colours are names: with some of the
numbers that stand for them elsewhere, the decoder returns nothing and says nothing.
Shape letters: Y rows, X columns, S samples.
"""

from __future__ import annotations

import base64
import binascii
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from ats_stream.io.formats.image_header import JPEG_END, jpeg_size

if TYPE_CHECKING:
    from collections.abc import Mapping

WRITTEN_NAME = "imagecodecs_jpeg"
# "jpeg" is a name that zarr-extensions proposes
NAMES = frozenset({WRITTEN_NAME, "jpeg"})
COLORSPACES = frozenset({"GRAYSCALE", "RGB", "YCBCR", "CMYK", "YCCK"})
SUBSAMPLINGS = frozenset({"444", "422", "420", "411", "440"})
DEFAULT_QUALITY = 90
MAX_TABLES_BYTES = 1 << 16
# an end marker may be followed by a little padding
_END_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class JpegFormat:
    """How chunks (Y, X) or (Y, X, S) of bytes are stored as JPEG."""

    tables: bytes | None = None
    """Quantisation and Huffman tables that the chunks leave out, as a JPEG stream of tables alone."""
    colorspace_jpeg: str | None = None
    """Colours of the compressed data; None for what the data say."""
    colorspace_data: str | None = None
    """Colours of the pixels; None for RGB, or grey for one sample."""
    level: int | None = None
    """Quality, 1 to 100, of what is written."""
    subsampling: str | None = None
    """Sampling of colour in what is written: 444, 422, 420, 411 or 440."""

    def __post_init__(self) -> None:
        for name in ("colorspace_jpeg", "colorspace_data"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or value.upper() not in COLORSPACES):
                raise ValueError(f"{name} must be one of {', '.join(sorted(COLORSPACES))}, got {value!r}")
        if self.level is not None and (type(self.level) is not int or not 1 <= self.level <= 100):
            raise ValueError(f"level must be 1 to 100, got {self.level!r}")
        if self.subsampling is not None and self.subsampling not in SUBSAMPLINGS:
            raise ValueError(
                f"subsampling must be one of {', '.join(sorted(SUBSAMPLINGS))}, got {self.subsampling!r}"
            )
        if self.tables is not None and not (
            self.tables[:2] == b"\xff\xd8" and len(self.tables) <= MAX_TABLES_BYTES
        ):
            raise ValueError("tables must be a JPEG stream of tables")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> JpegFormat:
        """Read the codec's configuration; ValueError for what would change pixels and is not known here.

        >>> JpegFormat.from_config({"level": 80, "tables": None, "optimize": True})
        JpegFormat(tables=None, colorspace_jpeg=None, colorspace_data=None, level=80, subsampling=None)
        """
        if config.get("header") is not None:
            raise ValueError("a JPEG header in the codec's configuration is not supported")
        tables = config.get("tables")
        try:
            return cls(
                tables=None if tables is None else base64.b64decode(tables, validate=True),
                colorspace_jpeg=config.get("colorspace_jpeg"),
                colorspace_data=config.get("colorspace_data"),
                level=config.get("level", config.get("quality")),
                subsampling=config.get("subsampling"),
            )
        except (binascii.Error, TypeError) as error:
            raise ValueError(f"broken configuration of the JPEG codec: {error}") from error

    def to_config(self) -> dict[str, Any]:
        """The configuration, without what is not set."""
        given = {
            "tables": None if self.tables is None else base64.b64encode(self.tables).decode(),
            "colorspace_jpeg": self.colorspace_jpeg,
            "colorspace_data": self.colorspace_data,
            "level": self.level,
            "subsampling": self.subsampling,
        }
        return {name: value for name, value in given.items() if value is not None}

    def decode(self, data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Pixels of a chunk (Y, X) or (Y, X, S); ValueError when the data are not a chunk of this shape."""
        height, width, samples = image_shape(shape)
        found = jpeg_size(data)
        if found != (height, width, samples):
            raise ValueError(f"JPEG data of {found}, expected {(height, width, samples)}")
        # decoders fill what is missing with grey and report nothing
        if JPEG_END not in data[-_END_BYTES:]:
            raise ValueError("the JPEG data do not end as they must")
        try:
            pixels = imagecodecs.jpeg8_decode(
                data,
                tables=self.tables,
                colorspace=self.colorspace_jpeg,
                outcolorspace=self.colorspace_data,
                out=memory_for(height, width, samples),
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"jpeg cannot decode {len(data)} bytes: {error}") from error
        decoded: npt.NDArray[np.uint8] = pixels
        if decoded.size != height * width * samples or decoded.dtype != np.uint8:
            raise ValueError(f"JPEG data decode to {decoded.dtype} {decoded.shape}, expected {shape}")
        return decoded.reshape(shape)

    def encode(self, chunk: npt.NDArray[Any]) -> bytes:
        """A chunk (Y, X) or (Y, X, S) of bytes as JPEG data, always whole: with its own tables."""
        height, width, samples = image_shape(chunk.shape)
        if chunk.dtype != np.uint8:
            raise ValueError(f"JPEG takes uint8, got {chunk.dtype}")
        pixels = np.ascontiguousarray(chunk).reshape((height, width, samples)[: 3 if samples > 1 else 2])
        return bytes(
            imagecodecs.jpeg8_encode(
                pixels,
                level=DEFAULT_QUALITY if self.level is None else self.level,
                colorspace=self.colorspace_data,
                outcolorspace=self.colorspace_jpeg,
                subsampling=self.subsampling,
            )
        )


def memory_for(height: int, width: int, samples: int) -> npt.NDArray[np.uint8]:
    """New memory for pixels (Y, X) or (Y, X, S) that libjpeg-turbo fills fast.

    Where rows begin at multiples of 32 bytes, it stores them past the caches, from which they are read next:
    decoding alone then takes 1.4 times as long.
    """
    nbytes = height * width * samples
    memory = np.empty(nbytes + 32, np.uint8)
    first = (16 - memory.__array_interface__["data"][0]) % 32
    return memory[first : first + nbytes].reshape((height, width, samples)[: 3 if samples > 1 else 2])


@functools.lru_cache(256)
def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(Y, X, S) of a stored chunk, whose leading axes of length 1 do not count; ValueError for any other.

    >>> image_shape((64, 32, 3)), image_shape((1, 64, 32)), image_shape((1, 64, 32, 1))
    ((64, 32, 3), (64, 32, 1), (64, 32, 1))
    """
    *lead, height, width, samples = shape if len(shape) > 2 and shape[-1] in (1, 3, 4) else (*shape, 1)
    if len(shape) < 2 or any(n != 1 for n in lead):
        raise ValueError(f"a chunk {shape} is no picture (y, x) or (y, x, samples)")
    return height, width, samples
