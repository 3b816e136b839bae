"""Slide, picture and video files as pyramids, read in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ats_stream.errors import SlideError
from ats_stream.io.pyramid import Pyramid
from ats_stream.io.pyramid_info import Level, PyramidInfo, axis_downsample

if TYPE_CHECKING:
    import os

    from ats_stream.io.formats.parts import FileParts

# formats that OpenSlide knows and whose levels are plain tiles of a TIFF
PLAIN_TIFF_VENDORS = frozenset({"aperio", "generic-tiff"})


def file_parts(path: str | os.PathLike[str]) -> FileParts:
    """Find out what a file is and read its facts; SlideError, naming the file, says why it cannot be read."""
    import openslide

    from ats_stream.io.formats.openslide_source import read_openslide
    from ats_stream.io.formats.picture_source import read_picture
    from ats_stream.io.formats.tiff import read_tiff
    from ats_stream.io.formats.tiff_pages import is_tiff
    from ats_stream.io.formats.video import is_video, read_video

    path = Path(path)
    if not path.exists():
        raise SlideError(str(path), "no such file")
    if not path.is_file():
        raise SlideError(str(path), "not a file")
    try:
        with path.open("rb"):
            pass  # OpenSlide would call a file that may not be read an unknown format
        vendor = openslide.OpenSlide.detect_format(str(path))
        if vendor is not None and vendor not in PLAIN_TIFF_VENDORS:
            return read_openslide(path, vendor)
        if is_tiff(path):
            return read_tiff(path, vendor)
        if is_video(path):
            return read_video(path)
        return read_picture(path)
    except OSError as error:
        raise SlideError(str(path), f"cannot read it: {error.strerror or error}") from error


def pyramid_of(parts: FileParts, *, cache_bytes: int, num_threads: int) -> Pyramid:
    """The pyramid of a file."""
    top = parts.sources[0].shape[1:]
    levels = []
    for index, source in enumerate(parts.sources):
        stated = parts.stated_downsample[index] if parts.stated_downsample else 0.0
        factors = tuple(
            axis_downsample(full, size, stated) for full, size in zip(top, source.shape[1:], strict=True)
        )
        sizes = None
        if parts.pixel_size_um is not None:
            sizes = tuple(s * f for s, f in zip(parts.pixel_size_um, factors, strict=True))
        levels.append(
            Level(
                index=index,
                shape=source.shape,
                dtype=source.dtype,
                downsample=factors,
                pixel_size_um=sizes,
                chunk_shape=source.chunk_shape,
            )
        )
    info = PyramidInfo(
        slide=parts.path,
        name=parts.name,
        axes=parts.axes,
        channels=parts.channels,
        levels=tuple(levels),
        metadata=parts.metadata,
        associated=parts.associated,
    )
    return Pyramid(info, parts.sources, cache_bytes=cache_bytes, num_threads=num_threads)


def open_file(path: str | os.PathLike[str], *, cache_bytes: int, num_threads: int) -> Pyramid:
    """Open a slide, picture or video file in place."""
    return pyramid_of(file_parts(path), cache_bytes=cache_bytes, num_threads=num_threads)
