"""Show what pyramids and slides hold: size, pixel size, channels, labels, levels, bytes on disk.

ats-stream info pyramids/*.ome.zarr slides/a.svs
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from ats_stream.io import Pyramid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream info``."""
    from ats_stream.commands.options import add_storage_options

    parser.add_argument("places", nargs="+", metavar="IMAGE", help="OME-Zarr folder or URL, or slide file")
    add_storage_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a description of each image; one that cannot be read is reported and the rest goes on."""
    from ats_stream.commands.options import storage_options_from
    from ats_stream.errors import AtsStreamError
    from ats_stream.io.remote import shown

    storage_options = storage_options_from(arguments)
    code = 0
    for place in arguments.places:
        try:
            print(describe(storage_options.open(place), shown(place)), flush=True)
        except AtsStreamError as error:
            print(f"ats-stream: error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
    return {"images": len(arguments.places), "exit_code": code}


def describe(pyramid: Pyramid, place: str) -> str:
    """Some lines about a pyramid or a slide, for a terminal."""
    top = pyramid.levels[0]
    kind = "slide" if Path(place).is_file() and Path(place).suffix != ".zip" else "OME-Zarr pyramid"
    facts = {
        "size": size_text(top.shape, top.dtype),
        "pixel size": pixel_text(top.pixel_size_um),
        "channels": ", ".join(channel.label for channel in pyramid.channels) or f"{top.shape[0]}, not named",
        "labels": ", ".join(pyramid.label_names) or "none",
        "pictures": ", ".join(pyramid.associated_names),
        **_words(pyramid.metadata),
        "on disk": _disk_text(Path(place)),
    }
    axes = ", ".join(pyramid.axes)
    levels = [("level", f"shape ({axes})", "downsample", "um per pixel", "chunk")]
    for level in pyramid.levels:
        downsample = " x ".join(f"{f:.4g}" for f in dict.fromkeys(level.downsample))
        size = pixel_text(level.pixel_size_um).removesuffix(" um")
        levels.append((str(level.index), times(level.shape), downsample, size, times(level.chunk_shape)))
    return "\n".join([f"{pyramid.name}: {kind} {place}", *_facts(facts), *_columns(levels)])


def size_text(shape: Sequence[int], dtype: Any) -> str:
    """Width x height (or all space axes, the last first), what that is in pixels, and as bytes.

    >>> size_text((3, 2967, 2220), "uint8")
    '2220 x 2967 px, 6.59 megapixels, uint8'
    """
    pixels = math.prod(shape[1:])
    count = f"{pixels / 1e9:.3g} gigapixels" if pixels >= 1e9 else f"{pixels / 1e6:.3g} megapixels"
    return f"{times(tuple(shape[1:])[::-1])} px, {count}, {dtype}"


def pixel_text(sizes: Sequence[float] | None) -> str:
    """Micrometres per pixel, once if all axes agree.

    >>> pixel_text((0.499, 0.499)), pixel_text((2.0, 0.5)), pixel_text(None)
    ('0.499 um', '2 x 0.5 um', 'unknown')
    """
    known = dict.fromkeys(f"{um:.4g}" for um in sizes or () if not math.isnan(um))
    return f"{' x '.join(known)} um" if known else "unknown"


def times(numbers: Sequence[int]) -> str:
    """Numbers with crosses between them."""
    return " x ".join(str(n) for n in numbers)


def _words(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {
        name.replace("_", " "): f"{value:g}x" if name == "objective_power" else str(value)
        for name, value in sorted(metadata.items())
    }


def _facts(facts: Mapping[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [f"  {name:<{width}}  {value}" for name, value in facts.items() if value]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _disk_text(folder: Path) -> str:
    if folder.is_file():
        return f"{folder.stat().st_size / 1e6:.1f} MB"
    if not folder.is_dir():
        return ""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return f"{sum(sizes) / 1e6:.1f} MB in {len(sizes)} files"
