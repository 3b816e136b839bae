"""The picture of a prediction: boxes on the right pixels, patches in order, the same bytes every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from ats_stream.errors import InputError
from ats_stream.report.layout import fit_within, grid_for, patch_boxes
from ats_stream.report.page import png_bytes
from ats_stream.report.picture import BOX_COLOUR, draw_boxes, prediction_picture


def arguments(num: int = 3, *, channels: int = 3, dtype: Any = np.uint8, **changes: object) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    thumbnail = rng.integers(0, 200, (48, 48, channels)).astype(dtype)
    given: dict[str, Any] = {
        "thumbnail_YXC": thumbnail,
        "attention_YX": rng.random((12, 12)),
        "patches_NCYX": rng.integers(0, 200, (num, channels, 10, 10)).astype(dtype),
        "weights_N": np.linspace(0.1, 0.5, num),
        "offsets_N2": np.stack([np.linspace(0, 800, num), np.linspace(800, 0, num)], axis=1).round(),
        "patch_size": (100, 100),
        "image_shape": (960, 960),
        "title": "slide.svs",
        "subtitle": "label 1, predicted 0.9",
    }
    return {**given, **changes}


def runs_of_box_colour(image: Image.Image) -> np.ndarray:
    return np.all(np.asarray(image) == BOX_COLOUR, axis=-1)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((100, 200), [10, 20, 15, 25]),
        ((-50, -50), [0, 0, 4, 4]),  # half over the corner: cut, but never thinner than asked
        ((975, 990), [96, 96, 100, 100]),
        ((-5000, 5000), [0, 96, 4, 100]),  # wholly outside: at the nearest edge
    ],
)
def test_boxes_are_scaled_and_cut(offset: tuple[int, int], expected: list[int]) -> None:
    boxes = patch_boxes(np.array([offset]), (50, 50), (1000, 1000), (100, 100), 4)
    assert boxes.tolist() == [expected]


def test_a_tiny_patch_gets_a_visible_box_about_its_centre() -> None:
    boxes = patch_boxes(np.array([[50_000, 20_000]]), (10, 10), (100_000, 100_000), (400, 400), 11)
    assert boxes.tolist() == [[195, 75, 206, 86]]


def test_boxes_of_a_whole_tiling_tile_the_display() -> None:
    starts = np.stack(np.meshgrid(np.arange(0, 1000, 125), np.arange(0, 600, 100), indexing="ij"), -1)
    boxes = patch_boxes(starts.reshape(-1, 2), (125, 100), (1000, 600), (333, 217), 1)
    covered = np.zeros((333, 217), int)
    for top, left, bottom, right in boxes:
        covered[top:bottom, left:right] += 1
    np.testing.assert_array_equal(covered, 1)


def test_draw_boxes_colours_exactly_the_two_inner_rings() -> None:
    base = Image.new("RGB", (60, 50), "white")
    drawn = runs_of_box_colour(draw_boxes(base, np.array([[20, 25, 40, 50]]), [""]))
    expected = np.zeros((50, 60), bool)
    expected[20:40, 25:50] = True
    expected[22:38, 27:48] = False
    np.testing.assert_array_equal(drawn[17:], expected[17:])  # above it stands the tag
    assert np.asarray(base).min() == 255  # the picture given is not touched


def test_box_of_a_patch_lies_on_its_place_in_the_overlay_panel() -> None:
    given = arguments(1, offsets_N2=np.array([[480, 240]]), patch_size=(192, 96))
    with_box = np.asarray(prediction_picture(**given)).astype(int)
    elsewhere = np.asarray(prediction_picture(**{**given, "offsets_N2": np.array([[0, 864]])})).astype(int)
    mask = np.all(with_box == BOX_COLOUR, axis=-1) & np.any(with_box != elsewhere, axis=-1)
    rows, columns = np.nonzero(mask.sum(1) >= 40)[0], np.nonzero(mask.sum(0) >= 90)[0]
    # panels of 480 px show 960 px, so the box is 96 x 48 px; the overlay is one panel and gap to the right
    top, left = 28 + 102, 28 + 480 + 28
    assert rows.tolist() == [top + 240, top + 241, top + 334, top + 335]
    assert columns.tolist() == [left + 120, left + 121, left + 166, left + 167]


def test_patches_stand_sorted_by_weight() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    patches = np.array(colours, np.uint8)[:, :, None, None].repeat(8, 2).repeat(8, 3)
    picture = np.asarray(
        prediction_picture(**arguments(3, patches_NCYX=patches, weights_N=np.array([0.2, 0.5, 0.3])))
    )
    centres = [np.argwhere(np.all(picture == colour, axis=-1)).mean(0) for colour in colours]
    counts = [np.all(picture == colour, axis=-1).sum() for colour in colours]
    assert len(set(counts)) == 1
    # reading order: green (0.5), blue (0.3), red (0.2)
    grid_order = sorted(range(3), key=lambda index: (round(centres[index][0]), centres[index][1]))
    assert grid_order == [1, 2, 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_any_channels_and_dtype(channels: int, dtype: Any, theme: str) -> None:
    picture = prediction_picture(**arguments(4, channels=channels, dtype=dtype, theme=theme))
    assert picture.mode == "RGB"
    assert runs_of_box_colour(picture).sum() > 4 * 100


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (31, 17)])
@pytest.mark.parametrize("num", [0, 1, 16, 60])
def test_any_aspect_and_number(shape: tuple[int, int], num: int) -> None:
    given = arguments(num, subtitle="", title="a very long name " * 30)
    given |= {
        "thumbnail_YXC": np.zeros(shape, np.uint8),
        "image_shape": shape,
        "attention_YX": np.zeros((2, 3)),
    }
    picture = prediction_picture(**given)
    assert 400 < picture.width < 2000
    assert 150 < picture.height < 900


def test_sparse_digits_stay_visible(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = digits
    canvas = np.zeros((1500, 1500), np.uint8)
    canvas[700:728, 900:928] = images[0]
    attention = np.zeros((180, 180))
    attention[85, 109] = 1.0
    picture = prediction_picture(
        **arguments(
            1,
            thumbnail_YXC=canvas[::4, ::4],
            attention_YX=attention,
            patches_NCYX=canvas[None, None, 690:740, 890:940],
            offsets_N2=np.array([[690, 890]]),
            patch_size=(50, 50),
            image_shape=(1500, 1500),
        )
    )
    pixels = np.asarray(picture)
    top, left = 28 + 102, 28 + 480 + 28
    panel = pixels[top : top + 480, left : left + 480].astype(int)
    hottest = np.argwhere(np.abs(panel - (252, 255, 164)).sum(-1) < 200)
    assert len(hottest) >= 1  # the one hot cell of 32400 shines
    np.testing.assert_allclose(hottest.mean(0), (85.5 / 180 * 480, 109.5 / 180 * 480), atol=3)
    assert runs_of_box_colour(picture).sum() >= 100


def test_same_input_same_bytes() -> None:
    assert png_bytes(prediction_picture(**arguments())) == png_bytes(prediction_picture(**arguments()))
    assert png_bytes(prediction_picture(**arguments())) != png_bytes(
        prediction_picture(**arguments(theme="dark"))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_N": np.ones(2)}, r"weights \(2,\)"),
        ({"offsets_N2": np.ones((3, 3))}, r"offsets \(3, 3\)"),
        ({"patches_NCYX": np.ones((3, 8, 8))}, r"expected \(N, C, Y, X\)"),
        ({"patches_NCYX": np.ones((3, 1, 0, 8))}, "no pixels"),
        ({"weights_N": np.array([1, np.nan, 1])}, "finite"),
        ({"weights_N": np.array([1, -1, 1])}, "not negative"),
        ({"attention_YX": np.ones(5)}, "attention map"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prediction_picture(**arguments(**changes))


@pytest.mark.parametrize("num", [0, 1, 2, 7, 16, 100])
@pytest.mark.parametrize("limit", [(480, 640), (200, 900), (50, 50)])
def test_grid_fits_and_holds_all_cells(num: int, limit: tuple[int, int]) -> None:
    grid = grid_for(num, height_px=limit[0], max_width_px=limit[1], max_side_px=232, gap_px=12, caption_px=24)
    assert grid.num_columns * grid.num_rows >= num
    corners = {grid.corner(index) for index in range(num)}
    assert len(corners) == num
    if grid.side_px > 1:
        assert grid.height_px <= limit[0]
        assert grid.width_px <= limit[1]
        assert all(top + grid.side_px <= grid.height_px for top, _ in corners)


def test_fit_within_keeps_the_aspect() -> None:
    for shape in [(1, 1), (100_000, 50_000), (3, 7), (1, 100_000)]:
        height, width = fit_within(shape, (480, 300))
        assert 1 <= height <= 480
        assert 1 <= width <= 300
        assert height == 480 or width == 300
        assert abs(height / width - shape[0] / shape[1]) <= max(1 / width, shape[0] / shape[1] / width) + 1
