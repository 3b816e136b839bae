"""The drawn patches as GeoJSON, as QuPath reads it (File > Import objects): detections with measurements.

Coordinates are pixels of level 0, x first, as QuPath has them.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ats_stream.predictions.record import SlideRecord

CLASS_NAME = "attention patch"
COLOUR = [0, 229, 255]
_NAMESPACE = uuid.UUID("a4c5e0f6-3c1b-5b5e-9d0a-6f1a7a2b9c10")


def patches_geojson(record: SlideRecord) -> bytes:
    """A FeatureCollection with a square for each drawn patch; equal records give equal bytes.

    The measurements are attention, weight and share (of the sum of attention * weight). Patches are ordered
    by share, the greatest first, and named after their place in that order.
    """
    counts = record.patches.counts_for
    total = sum(counts) or 1.0
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    features = [_feature(record, i, rank, counts[i] / total) for rank, i in enumerate(order, start=1)]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def _feature(record: SlideRecord, i: int, rank: int, share: float) -> dict[str, Any]:
    patches, side = record.patches, record.patch_px
    top, left = patches.y[i], patches.x[i]
    ring = [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, f"{record.name}/{i}")),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "detection",
            "name": f"patch {rank}",
            "classification": {"name": CLASS_NAME, "color": COLOUR},
            "measurements": {
                "attention": patches.attention[i],
                "weight": patches.weight[i],
                "share": share,
                "draw": patches.draw[i],
            },
        },
    }
