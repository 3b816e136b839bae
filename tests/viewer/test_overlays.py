"""Overlays: each map lies where its metadata say, masks cover their image, colours follow the values."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ats_stream.errors import SlideError
from ats_stream.io import ConvertConfig, PyramidWriter, open_pyramid, write_pyramid
from ats_stream.report.colour import colour_map
from ats_stream.viewer.overlays import attention_overlays, class_colours, map_colours, mask_overlays

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("pixel_um", [None, 0.25])
@pytest.mark.parametrize("factors", [(32, 32), (16, 40)])
def test_a_map_of_blocks_covers_the_blocks(
    tmp_path: Path, pixel_um: float | None, factors: tuple[int, int]
) -> None:
    sizes = None if pixel_um is None else (pixel_um, pixel_um)
    image = open_pyramid(np.zeros((1, 320, 640), np.uint8), pixel_size_um=sizes)
    attention = np.zeros((1, 320 // factors[0], 640 // factors[1]), np.float32)
    with PyramidWriter(
        tmp_path / "a.ome.zarr",
        level_shapes=[attention.shape],
        dtype=np.float32,
        downsamples=[factors],
        pixel_size_um=sizes,
    ) as writer:
        writer.write_shard(0, (0, 0), attention)
    (overlay,) = attention_overlays(str(tmp_path / "a.ome.zarr"), image)
    where = overlay.placement
    assert (where.left, where.top) == pytest.approx((0, 0), abs=1e-9)
    assert (where.scale_y, where.scale_x) == pytest.approx(factors)


def test_a_map_that_says_nothing_is_stretched_over_the_image(tmp_path: Path) -> None:
    write_pyramid(np.zeros((1, 10, 40), np.float32), tmp_path / "a.ome.zarr", ConvertConfig(tissue=False))
    (overlay,) = attention_overlays(
        str(tmp_path / "a.ome.zarr"), open_pyramid(np.zeros((1, 100, 800), np.uint8))
    )
    assert (overlay.placement.scale_y, overlay.placement.scale_x) == (10, 20)


def test_several_maps_are_several_overlays_each_with_its_peak(tmp_path: Path) -> None:
    maps = np.stack([np.full((8, 8), 0.5), np.full((8, 8), 2.0)]).astype(np.float32)
    maps[0, 3, 3], maps[1, 0, 0] = np.nan, np.inf
    write_pyramid(maps, tmp_path / "a.ome.zarr", ConvertConfig(tissue=False))
    found = attention_overlays(str(tmp_path / "a.ome.zarr"), open_pyramid(np.zeros((1, 64, 64), np.uint8)))
    assert [(one.label, one.peak) for one in found] == [("attention 1", 0.5), ("attention 2", 2.0)]


def test_what_is_no_map_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.ome.zarr").mkdir()
    with pytest.raises(SlideError, match=r"a\.ome\.zarr"):
        attention_overlays(str(tmp_path / "a.ome.zarr"), open_pyramid(np.zeros((1, 64, 64), np.uint8)))


def test_masks_cover_their_image(pyramid_path: Path) -> None:
    image = open_pyramid(pyramid_path)
    (overlay,) = mask_overlays(image)
    assert (overlay.label, overlay.is_map) == ("tissue", False)
    level = overlay.image.pyramid.levels[0]
    height, width = image.levels[0].shape[-2:]
    assert level.shape[-2] == -(-height // overlay.placement.scale_y)
    assert level.shape[-1] == -(-width // overlay.placement.scale_x)
    finest = overlay.image.resolutions[-1]
    shown = np.asarray(Image.open(io.BytesIO(overlay.tile(finest, 0, 0))))
    mask = overlay.image.pyramid.read(0)[0][:512, :512]
    assert np.array_equal(shown[..., 3] > 0, mask > 0)
    assert overlay.tile(finest, 99, 0) is None


def test_colours_of_maps_follow_the_root_of_the_value() -> None:
    values = np.array([[0.0, 0.01, 0.04, np.nan, -1.0, np.inf]])
    level = np.array([[0.0, 0.5, 1.0, 0.0, 0.0, 0.0]])
    rgba = map_colours(values, 0.04)
    assert np.array_equal(rgba[..., :3], colour_map(level))
    assert np.array_equal(rgba[..., 3], np.rint(255 * level))
    assert not map_colours(np.zeros((2, 2)), 0.0)[..., 3].any()


def test_classes_have_colours_of_their_own() -> None:
    rgba = class_colours(np.array([[0, 1, 2, 3, -1, 250]], np.int16))
    assert rgba[0, :, 3].tolist() == [0, 120, 120, 120, 0, 120]
    assert len({tuple(colour) for colour in rgba[0, 1:4].tolist()}) == 3
