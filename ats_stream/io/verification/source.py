"""Verifying a store against the slide that it was made from: size, pixel size, and some pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ats_stream.errors import SlideError
from ats_stream.io.verification.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ats_stream.io.conversion.manifest import Manifest
    from ats_stream.io.pyramid import Pyramid

NUM_PATCHES = 16
PATCH_PX = 128
# files state pixel sizes as text, or as pixels per centimetre in fractions
SIZE_TOLERANCE = 1e-3


def find_source(given: str | None, target: str, manifest: Manifest | None) -> str | None:
    """The slide of a store: the one given, one of the manifest's name in the folder given, or beside it.

    SlideError when one was given and is not there.
    """
    if given is not None and ("://" in given or not Path(given).is_dir() or _is_image(Path(given))):
        return given
    if manifest is not None:
        folder = Path(given) if given is not None else Path(target).parent
        place = folder / manifest.header.source.name
        is_name = manifest.header.source.name == place.name
        if "://" not in target and is_name and (place.is_file() or _is_image(place)):
            return str(place)
    if given is not None:
        wanted = "no manifest names it" if manifest is None else f"no {manifest.header.source.name} in it"
        raise SlideError(given, f"the source of {target} is not there: {wanted}")
    return None


def _is_image(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zattrs"))


def check_source(pyramid: Pyramid, source: Pyramid) -> Iterator[Finding]:
    """How level 0 differs from its source."""
    level, from_level = pyramid.levels[0], source.levels[0]
    if (level.shape, level.dtype) != (from_level.shape, from_level.dtype):
        found = f"is {level.dtype} {level.shape}, the source {from_level.dtype} {from_level.shape}"
        yield Finding("0", found)
        return
    if not _same_size(level.pixel_size_um, from_level.pixel_size_um):
        yield Finding(
            "zarr.json",
            f"pixel size {_text(level.pixel_size_um)}, the source states {_text(from_level.pixel_size_um)}",
        )
    size = tuple(min(PATCH_PX, n) for n in level.shape[1:])
    rng = np.random.default_rng(0)
    offsets = np.stack(
        [rng.integers(0, n - s + 1, NUM_PATCHES) for n, s in zip(level.shape[1:], size, strict=True)], axis=1
    )
    try:
        ours = pyramid.read_patches(0, offsets, size)
    except SlideError:
        return  # it is a finding already
    theirs = source.read_patches(0, offsets, size)
    differ = [
        n
        for n in range(NUM_PATCHES)
        if not np.array_equal(ours[n], theirs[n], equal_nan=ours.dtype.kind == "f")
    ]
    if differ:
        first = tuple(offsets[differ[0]].tolist())
        yield Finding(
            "0", f"{len(differ)} of {NUM_PATCHES} patches differ from the source, the first at {first}"
        )


def _same_size(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> bool:
    """Whether pixel sizes agree; where the source states none, anything does."""
    if theirs is None:
        return True
    if ours is None:
        return all(math.isnan(size) for size in theirs)
    return all(
        math.isnan(b) or math.isclose(a, b, rel_tol=SIZE_TOLERANCE) for a, b in zip(ours, theirs, strict=True)
    )


def _text(sizes: Sequence[float] | None) -> str:
    return "unknown" if sizes is None else f"{' x '.join(f'{um:.6g}' for um in sizes)} um"
