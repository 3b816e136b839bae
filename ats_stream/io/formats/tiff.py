"""Tiled and striped TIFF, Aperio SVS and OME-TIFF among them: levels, axes, pixel size, names of channels."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from ats_stream.errors import SlideError
from ats_stream.io.formats.openslide_source import read_associated, slide_facts
from ats_stream.io.formats.parts import FileParts, believable_sizes, describe, file_stamp
from ats_stream.io.formats.tiff_pages import check_pages
from ats_stream.io.formats.tile_source import TiffLevel, compression_name
from ats_stream.io.ngff import MICROMETRES, Channel, default_channels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

# resolution tags are often 72 or 96 dots per inch for want of better; no slide is that coarse
MAX_TAG_PIXEL_UM = 100.0
# planes that OME metadata may list; tifffile makes an entry for each of them
MAX_PLANES = 1 << 20


def read_tiff(path: Path, vendor: str | None) -> FileParts:
    """The first image of a TIFF file with all of its levels; SlideError says what is wrong with it."""
    import tifffile

    check_pages(path)
    stamp = file_stamp(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            _check_planes(tiff)
            levels = tiff.series[0].levels
            sources = tuple(TiffLevel(str(path), stamp, tiff, 0, i) for i in range(len(levels)))
            page = levels[0].keyframe
            power = aperio_value(page.description, "AppMag") if vendor == "aperio" else None
            top = sources[0]
            return FileParts(
                path=str(path),
                name=path.stem,
                axes=top.axes,
                sources=_usable_levels(sources),
                pixel_size_um=_pixel_size_um(tiff, page, top.axes),
                metadata=describe(vendor or "tiff", power, compression=compression_name(page)),
                stamp=stamp,
                channels=_channels(tiff, top),
                associated=_associated(path) if vendor == "aperio" else {},
            )
    except SlideError:
        raise
    except (ValueError, ArithmeticError, MemoryError) as error:
        raise SlideError(str(path), _line(error) or "broken TIFF") from error
    except Exception as error:  # tifffile meets what damage there is with any error
        raise SlideError(str(path), f"broken TIFF: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_planes(tiff: Any) -> None:
    """ValueError when OME metadata list more planes than any image has."""
    xml = (tiff.ome_metadata or "") if tiff.is_ome else ""
    planes = 1
    for axis in "ZCT":
        sizes = [int(n[:12]) for n in re.findall(rf"\bSize{axis}\s*=\s*[\"'](\d+)", xml)]
        planes *= max(sizes, default=1)
    if planes > MAX_PLANES:
        raise ValueError(f"OME metadata list {planes} planes, at most {MAX_PLANES} are read")


def _usable_levels(sources: tuple[TiffLevel, ...]) -> tuple[TiffLevel, ...]:
    """ValueError when the levels are not those of one image."""
    top = sources[0]
    for i, source in enumerate(sources):
        if (source.axes, source.dtype, source.shape[:-2]) != (top.axes, top.dtype, top.shape[:-2]):
            raise ValueError(
                f"broken TIFF: level {i} is {source.dtype} {source.shape}, level 0 {top.dtype} {top.shape}"
            )
        before = sources[max(0, i - 1)]
        if any(a < b for a, b in zip(before.shape, source.shape, strict=True)):
            raise ValueError(f"broken TIFF: level {i} {source.shape} is larger than the level before it")
    return sources


def _associated(path: Path) -> dict[str, Callable[[], npt.NDArray[np.uint8]]]:
    names = slide_facts(path).associated_names
    return {name: partial(read_associated, str(path), name) for name in names}


def _channels(tiff: Any, top: TiffLevel) -> tuple[Channel, ...]:
    """Names of the channels from OME-XML where it names all of them; red, green, blue for colour."""
    channels = default_channels(top.shape[0])
    if top.samples > 1 or not tiff.is_ome:
        return channels
    names = re.findall(r'<(?:\w+:)?Channel\b[^>]*?\bName="([^"]*)"', tiff.ome_metadata or "")
    if len(names) < len(channels):
        return channels
    return tuple(Channel(label=n, color=c.color) for n, c in zip(names, channels, strict=False))


def _pixel_size_um(tiff: Any, page: Any, axes: tuple[str, ...]) -> tuple[float, ...] | None:
    pair = tiff_pixel_size_um(tiff, page)
    if pair is None:
        return None
    depth = math.nan
    if tiff.is_ome:
        depth = ome_length_um(tiff.ome_metadata or "", "Z") or math.nan
    elif tiff.is_imagej:
        found = tiff.imagej_metadata or {}
        lengths = believable_sizes(found.get("spacing"), imagej_unit_um(found.get("unit")))
        depth = lengths[0] * lengths[1] if lengths is not None else math.nan
    return tuple(depth if a == "z" else math.nan for a in axes[1:-2]) + pair


def imagej_unit_um(unit: Any) -> float | None:
    r"""Micrometres of the unit that ImageJ writes, None for one that is no length.

    >>> imagej_unit_um("micron"), imagej_unit_um("\\u00B5m"), imagej_unit_um("pixel")
    (1.0, 1.0, None)
    """
    short = {"nm": "nanometer", "mm": "millimeter", "cm": "centimeter", "inch": "inch"}
    if unit in {"micron", "um", "\u00b5m", "\u03bcm", "\\u00B5m", "micrometer"}:
        return 1.0
    name = short.get(str(unit))
    return MICROMETRES[name] if name is not None else None


def aperio_value(description: str, key: str) -> str | None:
    """A value of an Aperio image description.

    >>> aperio_value("Aperio v1 |AppMag = 20|MPP = 0.499", "MPP")
    '0.499'
    """
    for part in description.split("|")[1:]:
        name, _, value = part.partition("=")
        if name.strip() == key:
            return value.strip()
    return None


def tiff_pixel_size_um(tiff: Any, page: Any) -> tuple[float, float] | None:
    """Pixel size (y, x): from Aperio's MPP, else OME's physical size, ImageJ's unit, or a believable
    resolution tag."""
    if tiff.is_svs:
        mpp = aperio_value(page.description, "MPP")
        return believable_sizes(mpp, mpp)
    if tiff.is_ome:
        return ome_pixel_size_um(tiff.ome_metadata or "")
    unit = page.tags.get("ResolutionUnit")
    if tiff.is_imagej:
        unit_um = imagej_unit_um((tiff.imagej_metadata or {}).get("unit"))
    else:
        # without the tag the unit is the inch
        unit_um = {2: 25400.0, 3: 1e4}.get(int(unit.value) if unit is not None else 2)
    tags = [page.tags.get(name) for name in ("YResolution", "XResolution")]
    if unit_um is None or any(tag is None for tag in tags):
        return None
    values = [tag.value for tag in tags]
    if any(n <= 0 or d <= 0 for n, d in values):
        return None
    pair = believable_sizes(*(unit_um * d / n for n, d in values))
    return pair if pair is not None and max(pair) <= MAX_TAG_PIXEL_UM else None


def ome_pixel_size_um(xml: str) -> tuple[float, float] | None:
    """Pixel size (y, x) of OME-XML.

    >>> ome_pixel_size_um('<Pixels PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="0.5"/>')
    (0.5, 0.5)
    """
    return believable_sizes(ome_length_um(xml, "Y"), ome_length_um(xml, "X"))


def ome_length_um(xml: str, axis: str) -> float | None:
    """Size of a pixel along one axis, None when OME-XML does not say it in a unit of length."""
    short = {"nm": "nanometer", "mm": "millimeter", "cm": "centimeter", "m": "meter"}
    size = re.search(rf'PhysicalSize{axis}="([^"]+)"', xml)
    unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', xml)
    if size is None:
        return None
    # the default unit is the micrometre, which comes with either of two mu signs
    name = short.get(unit.group(1)) if unit is not None else "micrometer"
    if name is None and unit is not None and unit.group(1) not in {"\u00b5m", "\u03bcm", "um"}:
        return None
    try:
        return float(size.group(1)) * MICROMETRES[name or "micrometer"]
    except ValueError:
        return None
