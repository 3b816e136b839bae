"""What pixels look like: colours untouched, windows from what is known, channels added up."""

from __future__ import annotations

import numpy as np
import pytest

from ats_stream.io import Channel
from ats_stream.viewer.display import PERCENTILES, ChannelView, Display, display_for

RNG = np.random.default_rng(0)


def test_colour_images_are_shown_as_they_are() -> None:
    pixels = RNG.integers(0, 256, (3, 20, 30), dtype=np.uint8)
    named = [Channel(label=color, color=color) for color in ("FF0000", "00FF00", "0000FF")]
    for channels in ((), named):
        display = display_for(channels, pixels)
        assert display.is_colour
        assert np.array_equal(display.rgb(pixels, (0, 1, 2)), np.moveaxis(pixels, 0, -1))
    stains = [Channel(label=n, color=c) for n, c in (("a", "00FFFF"), ("b", "FF00FF"), ("c", "FFFF00"))]
    assert not display_for(stains, pixels).is_colour


@pytest.mark.parametrize(
    ("dtype", "values", "window"),
    [
        ("uint8", (3, 40), (0, 255)),
        ("bool", (0, 1), (0, 1)),
        ("float32", (0.0, 0.9), (0, 1)),
    ],
)
def test_windows_of_known_ranges(
    dtype: str, values: tuple[float, float], window: tuple[float, float]
) -> None:
    sample = np.tile(np.array(values, dtype), (1, 10, 5))
    assert display_for((), sample).channels[0].window == window


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "float32", "float64"])
def test_other_windows_hold_all_but_the_extreme_values(dtype: str) -> None:
    sample = RNG.normal(3000, 300, (1, 200, 200)).astype(dtype)
    sample[0, 0, 0] = 60000 if dtype != "int16" else 32767  # a hot pixel
    low, high = display_for((), sample).channels[0].window
    assert (low, high) == tuple(np.percentile(sample.astype(np.float64), PERCENTILES))
    assert high < 5000


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -5.0, 1e38, -3e38])
def test_windows_of_plain_and_odd_images_are_finite(value: float) -> None:
    display = display_for((), np.full((1, 4, 4), value, np.float32))
    low, high = display.channels[0].window
    assert np.isfinite([low, high]).all()
    assert low < high
    assert display.rgb(np.full((1, 4, 4), value, np.float32), [0]).dtype == np.uint8


def test_a_stored_window_counts_unless_it_says_nothing() -> None:
    sample = RNG.integers(100, 4000, (1, 50, 50)).astype(np.uint16)

    def window(*limits: float) -> tuple[float, float]:
        return display_for([Channel(label="a", window=limits)], sample).channels[0].window

    assert window(200, 900) == (200, 900)
    told = display_for((), sample).channels[0].window
    assert window(0, 65535) == window(0, 255) == window(5, 5) == window(0, np.nan) == told


def test_channels_add_up_in_their_colours() -> None:
    def view(color: tuple[int, int, int]) -> ChannelView:
        return ChannelView(label="", color=color, window=(0, 100))

    display = Display(is_colour=False, channels=(view((255, 0, 0)), view((0, 0, 255)), view((255, 255, 0))))
    planes = np.array([[[100]], [[50]]], np.uint16)
    assert display.rgb(planes, (0, 1))[0, 0].tolist() == [255, 0, 128]
    assert display.rgb(planes, (0, 2))[0, 0].tolist() == [255, 128, 0]


def test_channels_of_one_colour_are_told_apart() -> None:
    sample = np.zeros((5, 4, 4), np.uint16)
    display = display_for([Channel(label=str(i)) for i in range(5)], sample)
    assert len({view.color for view in display.channels}) == 5
    assert display.shown == (0, 1, 2, 3)
    assert display_for([Channel(label="a", color="zz")] * 2, sample[:2]).channels[0].color
