"""What the page is told of an image, as plain values for JSON: sizes, names, places; no path."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ats_stream.report.colour import ANCHORS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.viewer.image import TiledImage
    from ats_stream.viewer.overlays import Overlay
    from ats_stream.viewer.patches import Patch
    from ats_stream.viewer.targets import Shown


def describe_image(shown: Shown, *, tile_format: str) -> dict[str, Any]:
    """An image and everything that can be chosen; lengths in pixels of level 0, pixel sizes in um."""
    image = shown.image
    height, width = image.size
    display = image.display
    return {
        "name": shown.name,
        "width": width,
        "height": height,
        "pixelSizeUm": _pixel_size(image),
        "format": tile_format,
        "isColour": display.is_colour,
        "channels": [
            {"label": c.label, "color": "#" + bytes(c.color).hex(), "shown": i in display.shown}
            for i, c in enumerate(display.channels)
        ],
        "axes": [
            {"name": name, "length": length, "at": at}
            for (name, length), at in zip(image.other_axes, image.middle, strict=True)
        ],
        "resolutions": describe_resolutions(image),
        "overlays": [_overlay(overlay) for overlay in shown.overlays],
        "numPatches": len(shown.patches),
        "facts": [{"name": name, "value": value} for name, value in shown.facts.items()],
        "problems": list(shown.problems),
    }


def describe_resolutions(
    image: TiledImage, *, scale_x: float = 1.0, scale_y: float = 1.0
) -> list[dict[str, Any]]:
    """The resolutions of tiles, coarsest first; a pixel of the finest is ``scale_x`` by ``scale_y``."""
    return [
        {
            "width": r.width,
            "height": r.height,
            "columns": r.num_columns,
            "rows": r.num_rows,
            "tile": r.tile_px,
            "scaleX": r.downsample[1] * scale_x,
            "scaleY": r.downsample[0] * scale_y,
        }
        for r in image.resolutions
    ]


def describe_patches(patches: Sequence[Patch]) -> list[dict[str, Any]]:
    """The patches in their order: box [left, top, width, height], weight and name."""
    return [{"box": [p.left, p.top, p.width, p.height], "weight": p.weight, "name": p.name} for p in patches]


def gradient() -> list[str]:
    """The colours of maps from nothing to the peak, evenly apart.

    >>> gradient()[0], gradient()[-1]
    ('#000004', '#fcffa4')
    """
    return ["#" + bytes(int(value) for value in anchor).hex() for anchor in ANCHORS]


def _overlay(overlay: Overlay) -> dict[str, Any]:
    where = overlay.placement
    return {
        "label": overlay.label,
        "isMap": overlay.is_map,
        "peak": overlay.peak if overlay.is_map else 1,
        "gradient": gradient() if overlay.is_map else None,
        "left": where.left,
        "top": where.top,
        "resolutions": describe_resolutions(overlay.image, scale_x=where.scale_x, scale_y=where.scale_y),
    }


def _pixel_size(image: TiledImage) -> float | None:
    """Along x, which the scale bar lies on; None when it is unknown."""
    sizes = image.pyramid.levels[0].pixel_size_um
    return None if sizes is None or math.isnan(sizes[-1]) else sizes[-1]
