"""Turning pixels of any dtype and number of channels into what a screen shows.

Colour images are shown as they are. Of others each channel has a colour and a window, the values shown as
black and as full colour; channels add up, as the lights of a microscope do. Shape letters: C channels,
Y rows, X columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ats_stream.io import Channel

# values shown as black and as full colour where nothing else is known: all but the extreme ones
PERCENTILES = (0.5, 99.8)
MAX_SHOWN = 4
WHITE = (255, 255, 255)
# for channels whose colours are not known: told apart by most eyes, and in sum near white
PALETTE = ((0, 170, 255), (255, 80, 0), (90, 255, 60), (255, 0, 200), (255, 220, 0), (140, 120, 255))


@dataclass(frozen=True, kw_only=True)
class ChannelView:
    """How one channel is shown."""

    label: str
    color: tuple[int, int, int]
    window: tuple[float, float]
    """Values shown as black and as the full colour."""


@dataclass(frozen=True, kw_only=True)
class Display:
    """How an image is shown."""

    is_colour: bool
    """Whether the channels are red, green and blue, 8 bits each."""
    channels: tuple[ChannelView, ...]

    @property
    def shown(self) -> tuple[int, ...]:
        """The channels shown at first."""
        return tuple(range(3 if self.is_colour else min(len(self.channels), MAX_SHOWN)))

    def rgb(self, planes_CYX: NDArray[Any], chosen: Sequence[int]) -> NDArray[np.uint8]:
        """The pixels of the chosen channels as RGB (Y, X, 3), in the order of ``chosen``.

        >>> grey = ChannelView(label="a", color=(255, 255, 255), window=(0, 1000))
        >>> view = Display(is_colour=False, channels=(grey,))
        >>> view.rgb(np.array([[[-5, 500, 9999]]], np.int16), [0])[0, :, 0].tolist()
        [0, 128, 255]
        """
        if self.is_colour:
            return np.ascontiguousarray(np.moveaxis(planes_CYX, 0, -1))
        total = np.zeros((*planes_CYX.shape[1:], 3), np.float32)
        for plane_YX, number in zip(planes_CYX, chosen, strict=True):
            channel = self.channels[number]
            low, high = channel.window
            with np.errstate(over="ignore", invalid="ignore"):  # infinities are clipped like the rest
                # an unsigned difference would wrap
                level = (plane_YX.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-30))
            level = np.clip(np.nan_to_num(level, nan=0.0), 0.0, 1.0)
            total += level[..., None] * np.asarray(channel.color, np.float32)
        return np.rint(np.minimum(total, 255.0)).astype(np.uint8)


def display_for(channels: Sequence[Channel], sample_CYX: NDArray[Any]) -> Display:
    """How to show an image, from what it says of its channels and a look at it from afar.

    ``sample_CYX`` holds all channels. The window of a channel is the stored one, unless that is no more than
    the range of the dtype; else 0 to 255 for 8 bits, 0 to 1 for truth values and floats inside, percentiles
    of the sample for all others.
    """
    num_channels, dtype = len(sample_CYX), sample_CYX.dtype
    if dtype == np.uint8 and num_channels == 3 and _is_rgb(channels):
        labels = ("red", "green", "blue")
        views = [ChannelView(label=n, color=WHITE, window=(0, 255)) for n in labels]
        return Display(is_colour=True, channels=tuple(views))
    views = []
    for number in range(num_channels):
        stored = channels[number] if number < len(channels) else None
        window = _stored_window(stored, dtype) or _window(sample_CYX[number])
        color = _color(stored.color if stored else "", number, num_channels)
        label = stored.label if stored else f"channel {number}"
        views.append(ChannelView(label=label, color=color, window=window))
    if num_channels > 1 and len({view.color for view in views}) == 1:
        views = [replace(v, color=PALETTE[i % len(PALETTE)]) for i, v in enumerate(views)]
    return Display(is_colour=False, channels=tuple(views))


def _is_rgb(channels: Sequence[Channel]) -> bool:
    """Whether three channels are a colour image: nobody said otherwise, or their colours say so."""
    colors = [channel.color.upper() for channel in channels]
    return colors in ([], ["FF0000", "00FF00", "0000FF"]) or set(colors) == {"FFFFFF"}


def _stored_window(channel: Channel | None, dtype: np.dtype[Any]) -> tuple[float, float] | None:
    if channel is None or channel.window is None:
        return None
    low, high = channel.window
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        return None
    if dtype.kind in "iu" and dtype.itemsize > 1:
        limits = np.iinfo(dtype)
        says_nothing = (low <= limits.min and high >= limits.max) or (low, high) == (0, 255)
        return None if says_nothing else (low, high)
    return (low, high) if dtype.kind in "iu" else None


def _window(plane_YX: NDArray[Any]) -> tuple[float, float]:
    dtype = plane_YX.dtype
    if dtype == np.uint8:
        return 0.0, 255.0
    values = plane_YX[np.isfinite(plane_YX)]
    if dtype.kind == "b" or values.size == 0:
        return 0.0, 1.0
    if dtype.kind == "f" and values.min() >= 0 and 0.1 < values.max() <= 1:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values.astype(np.float64), PERCENTILES))
    if not low < high:
        low, high = float(values.min()), float(values.max())
    # an image of one value is black, however large the value
    return (low, high) if low < high else (low, low + max(1.0, abs(low) * 2.0**-20))


def _color(stored: str, number: int, num_channels: int) -> tuple[int, int, int]:
    if num_channels == 1:
        return WHITE
    try:
        red, green, blue = bytes.fromhex(stored)
    except ValueError:
        return PALETTE[number % len(PALETTE)]
    return red, green, blue
