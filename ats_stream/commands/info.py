"""Show what pyramids and slides hold: size, pixel size, channels, labels, levels and how they are stored.

  ats-stream info pyramids/*.ome.zarr slides/a.svs s3://bucket/b.ome.zarr
  ats-stream info slides/a.svs --thumbnail a.png

In a terminal that shows pictures (kitty, Ghostty, Konsole, iTerm2, WezTerm, mintty) a thumbnail comes with
it; elsewhere --thumbnail draws one of coloured half blocks.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import AtsStreamError, InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from ats_stream.io import Pyramid
    from ats_stream.io.describe import LevelStorage, Storage

USAGE = "IMAGE [IMAGE ...] [options]"
THUMBNAIL_PX = 256
MAX_COLUMNS = 64
# unasked, no more pixels are read
MAX_UNASKED_PX = 16 << 20
PICTURE = ".png"
ASKED = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream info``."""
    from ats_stream.commands.options import add_storage_options

    parser.add_argument("places", nargs="*", metavar="IMAGE", help="OME-Zarr folder, zip, URL, or slide file")
    parser.add_argument(
        "--thumbnail",
        nargs="?",
        const=ASKED,
        metavar="FILE.png",
        help="save the thumbnail; without a file, show it in any terminal",
    )
    parser.add_argument("--no-thumbnail", action="store_true", help="show none in any terminal")
    add_storage_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a description of each image; one that cannot be read is reported and the rest goes on."""
    from ats_stream.commands.options import storage_options_from

    storage_options = storage_options_from(arguments)
    places, wanted = list(arguments.places), arguments.thumbnail
    if wanted not in (None, ASKED) and not wanted.lower().endswith(PICTURE):
        places.insert(0, wanted)  # `--thumbnail IMAGE` names no file
        wanted = ASKED
    if not places:
        raise InputError("info needs an image")
    if wanted not in (None, ASKED) and len(places) > 1:
        raise InputError(f"--thumbnail {wanted} is one file, got {len(places)} images")
    code = 0
    for place in places:
        try:
            pyramid = storage_options.open(place)
            print(describe(pyramid, place), flush=True)
            if not arguments.no_thumbnail:
                _show(pyramid, wanted)
        except AtsStreamError as error:
            print(f"ats-stream: error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
    return {"images": len(places), "exit_code": code}


def describe(pyramid: Pyramid, place: str) -> str:
    """Some lines about a pyramid or a slide, for a terminal."""
    from ats_stream.io.describe import storage_of

    top, storage = pyramid.levels[0], storage_of(pyramid)
    is_file = "://" not in place and Path(place).is_file() and Path(place).suffix != ".zip"
    facts = {
        "size": size_text(top.shape, top.dtype),
        "pixel size": pixel_text(top.pixel_size_um),
        "channels": ", ".join(channel.label for channel in pyramid.channels) or f"{top.shape[0]}, not named",
        "labels": ", ".join(pyramid.label_names) or "none",
        "pictures": ", ".join(pyramid.associated_names),
        **_words(pyramid.metadata),
        "stored": _stored_text(place, storage),
    }
    title = f"{pyramid.name}: {'slide' if is_file else 'OME-Zarr pyramid'} {pyramid.slide}"
    return "\n".join([title, *_facts(facts), *_columns(_table(pyramid, storage.levels))])


def _table(pyramid: Pyramid, storage: Sequence[LevelStorage]) -> list[tuple[str, ...]]:
    """The levels, one a row; columns of which nothing is known are left out."""
    axes = ", ".join(pyramid.axes)
    rows = [("level", f"shape ({axes})", "downsample", "um per pixel", "chunk", "shard", "codec", "stored")]
    for level, stored in zip(pyramid.levels, storage, strict=True):
        objects = f"{stored.num_objects} object{'s' if stored.num_objects != 1 else ''}"
        rows.append(
            (
                str(level.index),
                times(level.shape),
                " x ".join(f"{f:.4g}" for f in dict.fromkeys(level.downsample)),
                pixel_text(level.pixel_size_um).removesuffix(" um"),
                times(level.chunk_shape),
                times(stored.shard_shape) if stored.shard_shape else "",
                stored.codec,
                "" if stored.num_bytes is None else f"{bytes_text(stored.num_bytes)} in {objects}",
            )
        )
    known = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in known) for row in rows]


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


def bytes_text(num_bytes: int) -> str:
    """Bytes in the largest unit of which there is one.

    >>> bytes_text(999), bytes_text(1_500), bytes_text(2_000_000_000)
    ('999 B', '1.5 kB', '2.0 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


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


def _stored_text(place: str, storage: Storage) -> str:
    """Bytes and number of files or objects; empty where they cannot be listed."""
    if storage.num_bytes is not None:
        what = "objects" if "://" in place else "files"
        return f"{bytes_text(storage.num_bytes)} in {storage.num_objects} {what}"
    return bytes_text(Path(place).stat().st_size) if "://" not in place and Path(place).is_file() else ""


def _show(pyramid: Pyramid, wanted: str | None) -> None:
    """Save the thumbnail, or show it where it can be seen."""
    from ats_stream.report.terminal import half_blocks, inline, png_of, protocol_of

    protocol = protocol_of(os.environ) if sys.stdout.isatty() else None
    smallest = min(math.prod(level.shape[-2:]) for level in pyramid.levels)
    if wanted is None and (protocol is None or smallest > MAX_UNASKED_PX):
        return
    from ats_stream.files import write_atomic
    from ats_stream.report.colour import to_rgb

    rgb = to_rgb(pyramid.thumbnail(THUMBNAIL_PX).transpose(1, 2, 0))
    if wanted not in (None, ASKED):
        assert wanted is not None
        write_atomic(wanted, png_of(rgb))
    elif protocol is not None:
        print(inline(rgb, protocol), flush=True)
    else:
        text = half_blocks(rgb, min(MAX_COLUMNS, shutil.get_terminal_size().columns))
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
