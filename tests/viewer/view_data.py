"""A picture whose quarters differ, patches on it, and what finds them; made up, so every pixel is known."""

from __future__ import annotations

from typing import Any

import numpy as np

TOKEN = "a-token"
HEIGHT, WIDTH = 1100, 1500
PIXEL_UM = 0.5
MAP_PX = 50
# [left, top, side] of the drawn patches, and what each counts for
PATCHES = ((100, 200, 120, 0.5), (1000, 300, 120, 0.3), (700, 900, 120, 0.2))


def quadrants() -> np.ndarray[Any, Any]:
    """An RGB picture (C, y, x) of four plain quarters: red, green, blue, white; no two are alike."""
    image = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    top, left = HEIGHT // 2, WIDTH // 2
    image[0, :top, :left] = image[1, :top, left:] = image[2, top:, :left] = 200
    image[:, top:, left:] = 240
    return image


def feature(left: float, top: float, side: float, share: float) -> dict[str, Any]:
    ring = [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "detection", "measurements": {"weight": 1.0, "share": share}},
    }
