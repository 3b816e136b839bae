from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ats_stream.io.tissue import otsu_threshold, saturation, tissue_level, tissue_mask


def brute_otsu(values):
    """Try every threshold; the best variance between the classes."""
    best = None
    for threshold in np.unique(values)[:-1]:
        low, high = values[values <= threshold].astype(float), values[values > threshold].astype(float)
        score = low.size * high.size * (low.mean() - high.mean()) ** 2
        if best is None or score > best * (1 + 1e-9):
            best = score
    return best


@given(hnp.arrays("uint8", st.integers(2, 60)))
def test_otsu_is_the_best_of_all_thresholds(values):
    threshold = otsu_threshold(values)
    if values.min() == values.max():
        assert threshold is None
        return
    low, high = values[values <= threshold].astype(float), values[values > threshold].astype(float)
    assert low.size * high.size * (low.mean() - high.mean()) ** 2 == pytest.approx(brute_otsu(values))


@given(hnp.arrays("uint8", (3, 4, 4)))
def test_saturation_is_that_of_hsv(rgb):
    from PIL import Image

    theirs = np.asarray(Image.fromarray(rgb.transpose(1, 2, 0)).convert("HSV"))[..., 1]
    bright = rgb.max(axis=0) >= 16
    np.testing.assert_array_equal(saturation(rgb), np.where(bright, theirs, 0))


def disc(side=64):
    y, x = np.mgrid[:side, :side]
    return (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / 4) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_stained_discs_on_white_and_on_black_are_found(seed):
    noise = np.random.default_rng(seed).normal(0, 2, (3, 64, 64))
    for background, colour in (((240, 240, 240), (200, 60, 150)), ((3, 3, 3), (10, 20, 200))):
        flat = np.where(disc(), np.array(colour)[:, None, None], np.array(background)[:, None, None])
        np.testing.assert_array_equal(tissue_mask(np.clip(flat + noise, 0, 255).astype(np.uint8)), disc())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(("background", "content"), [(20, 180), (200, 50)])
def test_without_colour_the_border_is_background(dtype, channels, background, content):
    noise = np.random.default_rng(0).normal(0, 4, (channels, 64, 64))
    image = (np.where(disc(), content, background) + noise).astype(dtype)
    np.testing.assert_array_equal(tissue_mask(image), disc())


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_empty_image_has_no_tissue(value, channels):
    assert not tissue_mask(np.full((channels, 9, 9), value, np.uint8)).any()


def test_grey_stored_as_colour_falls_back_to_intensity():
    grey = np.where(disc(), 30, 220).astype(np.uint8)
    np.testing.assert_array_equal(tissue_mask(np.stack([grey] * 3)), disc())


@pytest.mark.parametrize(
    ("size_um", "level"),
    [(0.25, 5), (0.5, 4), (8.0, 0), (100.0, 0), (None, 6)],
)
def test_the_level_is_near_8_um_per_pixel(size_um, level):
    shapes = [(3, 50_000 >> i, 50_000 >> i) for i in range(9)]
    if size_um is not None and size_um >= 8:
        shapes = [(3, 4000 >> i, 4000 >> i) for i in range(5)]
    factors = [2**i for i in range(len(shapes))]
    assert tissue_level(shapes, factors, (size_um, size_um) if size_um else None) == level


def test_the_level_is_never_too_large_to_hold():
    shapes = [(3, 50_000 >> i, 50_000 >> i) for i in range(9)]
    assert max(shapes[tissue_level(shapes, [2**i for i in range(9)], (8.0, 8.0))]) <= 4096
