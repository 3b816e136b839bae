"""Verifying the pixels of one image of a store: chunks have to decode, and levels to go together."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from ats_stream.io.parallel import in_threads
from ats_stream.io.sources import StoreSource
from ats_stream.io.verification.levels import (
    BadChunk,
    Box,
    Difference,
    Rule,
    compare,
    plan_boxes,
    read_box,
    value_range_of,
    whole_factors,
)
from ats_stream.io.verification.report import Finding

# of JPEG: below, tiles differ by more than Rule.JPEG allows
LEAST_QUALITY = 20

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from ats_stream.io.pyramid import Pyramid


def rule_for(prefix: str, pyramid: Pyramid, level: int, profile: str | None) -> Rule:
    """How a level has to follow from the one above it; ``profile`` is the manifest's, None without one."""
    if "labels" in prefix.split("/"):
        return Rule.LARGEST if profile is not None else Rule.KNOWN_VALUES
    if profile is None:
        return Rule.RESAMPLED
    source = pyramid.sources[level]
    jpeg = source.layout.decoder.jpeg if isinstance(source, StoreSource) else None
    if jpeg is None:
        return Rule.EXACT
    # of what is copied no quality is known
    return Rule.JPEG if (jpeg.level or 0) >= LEAST_QUALITY else Rule.RESAMPLED


def check_pixels(
    prefix: str,
    pyramid: Pyramid,
    profile: str | None,
    known: Collection[str],
    num_threads: int,
    advance: Callable[[int], Any],
) -> Iterator[Finding]:
    """What is wrong with the levels of the image at a prefix of the store.

    What follows from objects that are ``known`` to be damaged is left out. ``advance`` is called with bytes
    of pixels that were looked at.
    """
    value_range = value_range_of(pyramid)
    for i, level in enumerate(pyramid.levels):
        rule = rule_for(prefix, pyramid, i + 1, profile) if i + 1 < len(pyramid.levels) else None
        coarse = pyramid.levels[i + 1] if rule is not None else level
        if rule in (Rule.EXACT, Rule.LARGEST) and not _is_halved(level.shape, coarse.shape):
            yield Finding(
                _folder(pyramid, i + 1), f"its shape {coarse.shape} is not half of {level.shape}, rounded up"
            )
            rule, coarse = None, level
        boxes = plan_boxes(
            level.shape, coarse.shape, level.chunk_shape, coarse.chunk_shape, level.dtype.itemsize
        )
        differences: list[Difference] = []
        bad: dict[str, list[BadChunk]] = {}
        check = _box_check(pyramid, i, rule, value_range, known)
        for box, difference, chunks in in_threads(check, boxes, num_threads):
            if difference is not None:
                differences.append(difference)
            for chunk in chunks:
                bad.setdefault(_key(pyramid, chunk.level, chunk.place), []).append(chunk)
            advance(math.prod(b - a for a, b in zip(box.start, box.stop, strict=True)) * level.dtype.itemsize)
        for key, one in sorted(bad.items()):
            if key not in known:
                more = f"; and {len(one) - 1} more chunks" if len(one) > 1 else ""
                yield Finding(key, f"{one[0].reason}{more}")
        if rule is not None and differences:
            yield Finding(_folder(pyramid, i + 1), _describe(rule, differences))


def _box_check(
    pyramid: Pyramid, i: int, rule: Rule | None, value_range: float, known: Collection[str]
) -> Callable[[Box], tuple[Box, Difference | None, list[BadChunk]]]:
    def check(box: Box) -> tuple[Box, Difference | None, list[BadChunk]]:
        fine = read_box(pyramid, i, box.start, box.stop)
        if isinstance(fine, list):
            return box, None, fine
        if rule is None:
            return box, None, []
        parts = ((i, box.start, box.stop), (i + 1, box.coarse_start, box.coarse_stop))
        if known and any(key in known for part in parts for key in _keys(pyramid, *part)):
            return box, None, []
        coarse = read_box(pyramid, i + 1, box.coarse_start, box.coarse_stop)
        if isinstance(coarse, list):
            return box, None, []  # told in its own turn
        return box, compare(rule, fine, coarse, box, value_range), []

    return check


def _describe(rule: Rule, differences: Sequence[Difference]) -> str:
    num = sum(one.num_px for one in differences)
    if rule in (Rule.EXACT, Rule.LARGEST, Rule.KNOWN_VALUES):
        what, worst = "values", min(differences, key=lambda one: one.first)
    else:
        what, worst = "tiles of 32 pixels", max(differences, key=lambda one: one.largest)
    return f"{num} {what} are not {rule.value}, one at {worst.first}, off by {worst.largest:.3g}"


def _folder(pyramid: Pyramid, level: int) -> str:
    return str(getattr(pyramid.sources[level], "prefix", f"{level}/")).rstrip("/")


def _key(pyramid: Pyramid, level: int, place: Sequence[int]) -> str:
    """The object that holds a chunk."""
    source = pyramid.sources[level]
    if not isinstance(source, StoreSource):
        return _folder(pyramid, level)
    index = [p * c // s for p, c, s in zip(place, source.chunk_shape, source.shard_shape, strict=True)]
    return source.prefix + source.layout.key(source.axes.stored(index))


def _keys(pyramid: Pyramid, level: int, start: Sequence[int], stop: Sequence[int]) -> Iterator[str]:
    """The objects that hold a box."""
    source = pyramid.sources[level]
    shard, chunk = source.shard_shape, source.chunk_shape
    shards = [range(a // s, -(-b // s)) for a, b, s in zip(start, stop, shard, strict=True)]
    for place in itertools.product(*shards):
        yield _key(pyramid, level, [p * (s // c) for p, s, c in zip(place, shard, chunk, strict=True)])


def _is_halved(fine: Sequence[int], coarse: Sequence[int]) -> bool:
    factors = whole_factors(fine, coarse)
    return factors is not None and max(factors) == 2
