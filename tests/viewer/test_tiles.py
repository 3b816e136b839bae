"""Tiles: every pixel of every level in exactly one, gaps filled by exact means, nothing outside."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ats_stream.io import Level, open_pyramid
from ats_stream.io.reduce import halve
from ats_stream.viewer.image import TiledImage
from ats_stream.viewer.tiles import MAX_FACTOR, resolutions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def level(index: int, height: int, width: int, factor: float) -> Level:
    return Level(
        index=index,
        shape=(3, height, width),
        dtype=np.dtype(np.uint8),
        downsample=(factor, factor),
        pixel_size_um=None,
        chunk_shape=(3, 64, 64),
    )


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factors=st.lists(st.sampled_from([2, 3, 4, 8]), max_size=3),
    tile=st.sampled_from([64, 100, 512]),
)
def test_tiles_cover_each_level_once_and_sizes_shrink(
    height: int, width: int, factors: list[int], tile: int
) -> None:
    levels, factor = [level(0, height, width, 1)], 1
    for index, step in enumerate(factors, start=1):
        factor *= step
        levels.append(level(index, -(-height // factor), -(-width // factor), factor))
    found = resolutions(levels, tile_px=tile)
    assert [r.level for r in found if r.factor == 1][-1] == 0
    sizes = [(r.width, r.height) for r in found]
    assert sizes == sorted(sizes)
    assert max(r.factor for r in found) <= MAX_FACTOR
    shapes = {v.shape[-2:] for v in levels}
    assert {r.level_size for r in found if r.factor == 1} == shapes  # each level is shown as it is
    for one in found:
        columns = [one.box(c, 0) for c in range(one.num_columns)]
        rows = [one.box(0, r) for r in range(one.num_rows)]
        assert [b.left for b in columns] == [0, *(b.right for b in columns[:-1])]
        assert [b.top for b in rows] == [0, *(b.bottom for b in rows[:-1])]
        assert (rows[-1].bottom, columns[-1].right) == one.level_size
        for outside in ((one.num_columns, 0), (0, one.num_rows), (-1, 0), (0, -1)):
            assert one.box(*outside) is None
    # seen from afar it is one tile, unless the factor says otherwise
    assert found[0].factor == MAX_FACTOR or (found[0].num_columns, found[0].num_rows) == (1, 1)


def test_between_levels_far_apart_there_are_means_and_none_between_near_ones() -> None:
    near = [level(0, 4000, 4000, 1), level(1, 2000, 2000, 2), level(2, 500, 500, 8)]
    assert [(r.level, r.factor) for r in resolutions(near)] == [(2, 1), (1, 2), (1, 1), (0, 1)]
    far = [level(0, 4000, 4000, 1), level(1, 250, 250, 16)]
    assert [(r.level, r.factor) for r in resolutions(far)] == [(1, 1), (0, 8), (0, 4), (0, 2), (0, 1)]
    again = [level(0, 400, 400, 1), level(1, 400, 400, 1)]  # only another axis was halved
    assert [(r.level, r.factor) for r in resolutions(again)] == [(0, 1)]


def halved(pixels: np.ndarray, factor: int) -> np.ndarray:
    """What conversion makes of a level: halved, and halved again."""
    return pixels if factor == 1 else halved(halve(pixels), factor // 2)


def _assembled(image: TiledImage, number: int, channels: Sequence[int], at: Sequence[int]) -> np.ndarray:
    one = image.resolutions[number]
    rows = [
        np.concatenate(
            [image.pixels(one, c, r, channels=channels, at=at) for c in range(one.num_columns)], axis=2
        )
        for r in range(one.num_rows)
    ]
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("tile", [100, 128, 512])
def test_tiles_put_together_are_what_the_pyramid_reads(pyramid_path: Path, tile: int) -> None:
    pyramid = open_pyramid(pyramid_path)
    image = TiledImage(pyramid, tile_px=tile)
    for number, one in enumerate(image.resolutions):
        expected = halved(pyramid.read(one.level), one.factor)
        assert np.array_equal(_assembled(image, number, (0, 1, 2), ()), expected)
        assert np.array_equal(_assembled(image, number, (2, 0), ()), expected[[2, 0]])


def test_a_real_slide_is_served_pixel_for_pixel(slide_path: Path) -> None:
    pyramid = open_pyramid(slide_path)
    image = TiledImage(pyramid)
    whole = pyramid.read(0)
    for number in (-1, -2):
        one = image.resolutions[number]
        expected = halved(whole, one.factor)
        data = image.tile(one, 1, 1, channels=(0, 1, 2), at=(), encoding="png")
        shown = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(shown, np.moveaxis(expected[:, 512:1024, 512:1024], 0, -1))


def test_planes_of_coarse_levels_are_those_under_the_plane_of_level_0() -> None:
    fine = np.arange(8 * 64 * 64, dtype=np.uint16).reshape(1, 8, 64, 64)
    levels = [fine, fine[:, ::2, ::2, ::2].copy()]
    image = TiledImage(open_pyramid(levels, axes=("c", "z", "y", "x")))
    assert image.other_axes == (("z", 8),)
    coarse, finest = image.resolutions
    for z in range(8):
        assert np.array_equal(image.pixels(finest, 0, 0, channels=[0], at=(z,))[0], fine[0, z])
        assert np.array_equal(image.pixels(coarse, 0, 0, channels=[0], at=(z,))[0], levels[1][0, z // 2])


def test_a_large_tile_is_averaged_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    import ats_stream.viewer.image as module

    pixels = np.random.default_rng(0).integers(0, 255, (3, 333, 257), dtype=np.uint8)
    image = TiledImage(open_pyramid(pixels), tile_px=64)
    coarsest = image.resolutions[0]
    assert coarsest.factor == 8
    whole = image.pixels(coarsest, 0, 0, channels=(0, 1, 2), at=())
    monkeypatch.setattr(module, "STRIP_VALUES", 3 * 257 * 20)
    assert np.array_equal(image.pixels(coarsest, 0, 0, channels=(0, 1, 2), at=()), whole)
    assert np.array_equal(whole, halved(pixels, 8))
