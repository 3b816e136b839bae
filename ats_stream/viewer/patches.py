"""The drawn patches of an image, out of the GeoJSON that a prediction leaves for QuPath."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_FILE_BYTES = 64 << 20
MAX_PATCHES = 100_000
# the share of the sum that a patch counts for says more than its weight alone
WEIGHTS = ("share", "weight")


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A rectangle in pixels of level 0, and what it counts for."""

    left: float
    top: float
    width: float
    height: float
    weight: float | None
    name: str = ""


def read_patches(path: Path) -> tuple[Patch, ...]:
    """The patches of a GeoJSON file, the heaviest first, those without a weight last; equal ones as stored.

    A patch is the rectangle around a Polygon, in pixels of level 0; its weight is the measurement ``share``,
    else ``weight`` (case does not matter), else its only measurement. Raises InputError, naming the file, for
    anything else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {size} bytes, expected a list of patches of {MAX_FILE_BYTES} at most")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no GeoJSON: {error}") from error
    features = document.get("features") if isinstance(document, dict) else document
    if not isinstance(features, list) or len(features) > MAX_PATCHES:
        raise InputError(f"{path}: expected a FeatureCollection of at most {MAX_PATCHES} patches")
    patches = []
    for number, feature in enumerate(features):
        try:
            patches.append(_patch(feature))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: feature {number} is no patch: {error!r}") from error
    return tuple(sorted(patches, key=lambda p: math.inf if p.weight is None else -p.weight))


def _patch(feature: Any) -> Patch:
    geometry = feature["geometry"]
    if geometry["type"] != "Polygon":
        raise ValueError(f"geometry {geometry['type']!r}, expected Polygon")
    xs, ys = zip(*((float(point[0]), float(point[1])) for point in geometry["coordinates"][0]), strict=True)
    if not all(map(math.isfinite, (*xs, *ys))):
        raise ValueError("coordinates are not finite")
    properties = feature.get("properties") or {}
    return Patch(
        left=min(xs),
        top=min(ys),
        width=max(xs) - min(xs),
        height=max(ys) - min(ys),
        weight=_weight(properties),
        name=str(properties.get("name") or ""),
    )


def _weight(properties: Mapping[str, Any]) -> float | None:
    """The measurement that says most; QuPath writes a mapping, older ones a list."""
    given = properties.get("measurements") or {}
    if isinstance(given, list):
        given = {str(one["name"]): one["value"] for one in given}
    named = {str(name).lower(): value for name, value in given.items()}
    alone = next(iter(named.values())) if len(named) == 1 else None
    value = next((named[name] for name in WEIGHTS if name in named), alone)
    if value is None:
        return None
    weight = float(value)
    return weight if math.isfinite(weight) else None
