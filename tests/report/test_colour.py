"""Colours: the map only gets brighter, images keep or stretch their values, overlays peak with attention."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import InputError
from ats_stream.report.colour import ANCHORS, attention_overlay, colour_map, fit_map, to_rgb

LUMA = np.array([0.299, 0.587, 0.114])


def test_colour_map_hits_its_anchors_and_only_gets_brighter() -> None:
    np.testing.assert_array_equal(colour_map(np.linspace(0, 1, len(ANCHORS))), ANCHORS)
    brightness = colour_map(np.linspace(0, 1, 501)) @ LUMA
    assert np.all(np.diff(brightness) > -0.7)  # rounding to bytes moves luma by less than that
    assert np.all(np.diff(brightness[::10]) > 0)


def test_colour_map_clips_and_keeps_shape() -> None:
    colours = colour_map(np.array([[-1.0, 2.0, np.nan]]))
    assert colours.shape == (1, 3, 3)
    np.testing.assert_array_equal(colours[0], ANCHORS[[0, -1, 0]])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.array([[3, 250]], np.uint8), [[[3, 3, 3], [250, 250, 250]]]),
        (np.array([[[1, 2]]], np.uint8), [[[1, 2, 1]]]),
        (np.array([[[1, 2, 3]]], np.uint8), [[[1, 2, 3]]]),
        (np.array([[[1, 2, 3, 4, 5]]], np.uint8), [[[1, 2, 3]]]),
        (np.array([[1000, 3000, 2000]], np.uint16), [[[0] * 3, [255] * 3, [128] * 3]]),
        (np.array([[-4, 6]], np.int16), [[[0] * 3, [255] * 3]]),
        (np.array([[0.0, 0.2]], np.float32), [[[0] * 3, [51] * 3]]),
        (np.array([[-1.0, 3.0, np.nan, np.inf]]), [[[0] * 3, [255] * 3, [0] * 3, [0] * 3]]),
        (np.array([[True, False]]), [[[255] * 3, [0] * 3]]),
        (np.full((1, 1), 7, np.uint16), [[[0] * 3]]),
        (np.full((1, 1), np.nan), [[[0] * 3]]),
    ],
)
def test_to_rgb(image: np.ndarray, expected: list[object]) -> None:
    rgb = to_rgb(image)
    assert rgb.dtype == np.uint8
    assert rgb.tolist() == expected


def test_to_rgb_leaves_its_input_alone() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image.setflags(write=False)
    to_rgb(image)
    assert image.sum() == 0


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3, 4), (0, 3), (2, 2, 0)])
def test_to_rgb_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \(Y, X\)"):
        to_rgb(np.zeros(shape, np.uint8))


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.data(),
)
def test_a_single_hot_cell_survives_any_resizing(
    shape: tuple[int, int], target: tuple[int, int], data: st.DataObject
) -> None:
    cell = (data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1)))
    hot = np.zeros(shape)
    hot[cell] = 1.0
    fitted = fit_map(hot, target)
    assert fitted.shape == target
    peak = np.unravel_index(int(fitted.argmax()), target)
    for axis in range(2):
        # the cell covers [c, c + 1) / size of the picture; the peak's pixel must touch that stretch
        low, high = cell[axis] / shape[axis], (cell[axis] + 1) / shape[axis]
        assert peak[axis] / target[axis] < high + 1e-9
        assert (peak[axis] + 1) / target[axis] > low - 1e-9
        if shape[axis] >= target[axis]:
            starts = np.arange(target[axis]) * shape[axis] // target[axis]
            assert peak[axis] == np.searchsorted(starts, cell[axis], side="right") - 1
    if shape[0] >= target[0] and shape[1] >= target[1]:
        assert fitted.max() == 1.0


def test_fit_map_of_equal_shape_is_the_map() -> None:
    array = np.random.default_rng(0).random((7, 5), np.float32)
    np.testing.assert_array_equal(fit_map(array, (7, 5)), array)


@pytest.mark.parametrize(
    "array", [np.ones(3), np.ones((0, 2)), np.array([[np.nan]]), np.array([[np.inf]]), np.array([[-1e-9]])]
)
def test_fit_map_refuses(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="attention map"):
        fit_map(array, (2, 2))


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_overlay_is_the_map_colour_where_attention_peaks(grey: int) -> None:
    attention = np.zeros((9, 12))
    attention[2, 7] = 0.5
    attention[6, 3] = 0.125
    overlay = attention_overlay(np.full((9, 12, 3), grey, np.uint8), attention, alpha=1.0)
    np.testing.assert_array_equal(overlay[2, 7], ANCHORS[-1])
    np.testing.assert_array_equal(
        overlay[6, 3], np.rint(0.725 * ANCHORS[5] + 0.275 * grey)
    )  # sqrt(1/4) = 1/2
    rest = np.ones((9, 12), bool)
    rest[[2, 6], [7, 3]] = False
    np.testing.assert_array_equal(
        overlay[rest], np.broadcast_to(np.rint(0.45 * ANCHORS[0] + 0.55 * grey), (106, 3))
    )


def test_overlay_without_attention_or_alpha() -> None:
    thumbnail = np.random.default_rng(1).integers(0, 256, (6, 5), dtype=np.uint8)
    np.testing.assert_array_equal(
        attention_overlay(thumbnail, np.zeros((2, 2)), alpha=0.0), np.repeat(thumbnail[..., None], 3, axis=-1)
    )
    dark = attention_overlay(thumbnail, np.zeros((2, 2)), alpha=1.0)
    assert dark.max() <= np.ceil(0.55 * 255 + 0.45 * 4)
    with pytest.raises(InputError, match=r"alpha=1\.5"):
        attention_overlay(thumbnail, np.ones((2, 2)), alpha=1.5)
