"""The picture of one prediction: what was seen, where attention went, which patches were read.

Shape letters: N patches, C channels, Y and X space. Offsets, patch size and image shape are (y, x) in pixels
of the finest level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ats_stream.errors import InputError
from ats_stream.report.colour import attention_overlay, colour_map, to_rgb, value_range
from ats_stream.report.layout import Grid, fit_within, grid_for, patch_boxes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BOX_COLOUR", "attention_overlay", "colour_map", "draw_boxes", "prediction_picture", "to_rgb"]

# cyan stands nowhere on the colour map, nor in stained tissue
BOX_COLOUR = (0, 229, 255)
_BOX_EDGE = (6, 32, 40)

_PANEL_PX = 480
_MARGIN_PX = 28
_GAP_PX = 28
_MIN_PANEL_PX = 210  # room for a panel's heading over a narrow image
_GRID_WIDTH_PX = 640
_MAX_CELL_PX = 232
_MIN_BOX_PX = 11
_BAR_PX = 10
_NOTE_PX = 42  # the colour bar and its labels, below a panel


@dataclass(frozen=True, kw_only=True)
class _Theme:
    background: str
    text: str
    muted: str
    frame: str


_THEMES = {
    "light": _Theme(background="#ffffff", text="#16191d", muted="#5d6670", frame="#c9ced4"),
    "dark": _Theme(background="#171a1f", text="#eceef1", muted="#9aa4af", frame="#3c434c"),
}


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """A heading, and the place of the image under it."""

    heading: str
    top: int
    left: int


def prediction_picture(
    *,
    thumbnail_YXC: NDArray[Any],
    attention_YX: NDArray[Any],
    patches_NCYX: NDArray[Any],
    weights_N: NDArray[Any],
    offsets_N2: NDArray[Any],
    patch_size: tuple[float, float],
    image_shape: tuple[int, int],
    title: str,
    subtitle: str = "",
    theme: Literal["light", "dark"] = "light",
    max_patches: int = 16,
) -> Image.Image:
    """Draw thumbnail, attention with the drawn patches boxed, and the patches themselves, side by side.

    `weights_N` is what each patch counted for, attention * R; its share of the sum stands under the patch.
    Patches are numbered from the greatest weight down, the same numbers on the boxes; at most `max_patches`
    are shown. Any dtype and number of channels that :func:`to_rgb` takes; patches share one brightness range.

    Raises InputError when shapes disagree, weights are negative or not finite, or there is nothing to show.
    """
    weights = _checked_weights(patches_NCYX, weights_N, offsets_N2)
    colours = _THEMES[theme]
    order = np.argsort(-weights, kind="stable")[:max_patches]
    shown = _resized(to_rgb(thumbnail_YXC), (_PANEL_PX, _PANEL_PX))
    overlay = attention_overlay(shown, attention_YX)
    boxes = patch_boxes(offsets_N2, patch_size, image_shape, overlay.shape[:2], _MIN_BOX_PX)[order]
    labels = [str(rank + 1) for rank in range(len(order))]
    grid = grid_for(
        len(order),
        height_px=_PANEL_PX,
        max_width_px=_GRID_WIDTH_PX,
        max_side_px=_MAX_CELL_PX,
        gap_px=12,
        caption_px=24,
    )
    num = f"{len(order)}" if len(order) == len(weights) else f"{len(order)} of {len(weights)}"
    canvas, panels = _blank(shown.shape, grid, bool(subtitle), f"{num} patches, share of weight", colours)
    _draw_header(canvas, title, subtitle, colours)
    _paste_panel(canvas, Image.fromarray(shown), panels[0], colours)
    _paste_panel(canvas, draw_boxes(Image.fromarray(overlay), boxes, labels), panels[1], colours)
    _draw_colour_bar(canvas, panels[1], overlay.shape, float(attention_YX.max()), colours)
    _paste_patches(canvas, patches_NCYX, order, _shares(weights), grid, panels[2], colours)
    return canvas


def draw_boxes(image: Image.Image, boxes_N4: NDArray[np.int64], labels: list[str]) -> Image.Image:
    """A copy of `image` with a cyan box, 2 px wide, just inside each of `boxes_N4`, and its label in a tag.

    Boxes are (top, left, bottom, right), bottom and right exclusive. The first box is drawn last, so on top.
    """
    result = image.copy()
    draw = ImageDraw.Draw(result)
    for (top, left, bottom, right), label in reversed(list(zip(boxes_N4.tolist(), labels, strict=True))):
        draw.rectangle((left - 1, top - 1, right, bottom), outline=_BOX_EDGE)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=BOX_COLOUR, width=2)
        _draw_tag(draw, label, (top, left), result.size)
    return result


def _draw_tag(draw: ImageDraw.ImageDraw, label: str, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """A filled tag above the corner of a box, moved inside where the picture ends."""
    font = _font(12)
    width, height = int(draw.textlength(label, font=font)) + 7, 15
    left = min(max(corner[1] - 1, 0), max(size[0] - width, 0))
    top = corner[0] - height if corner[0] >= height else 0
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_BOX_EDGE)
    draw.text((left + width / 2, top + height / 2), label, fill=BOX_COLOUR, font=font, anchor="mm")


def _checked_weights(
    patches_NCYX: NDArray[Any], weights_N: NDArray[Any], offsets_N2: NDArray[Any]
) -> NDArray[np.float64]:
    num = len(patches_NCYX)
    if patches_NCYX.ndim != 4 or weights_N.shape != (num,) or offsets_N2.shape != (num, 2):
        raise InputError(
            f"patches {patches_NCYX.shape}, weights {weights_N.shape}, offsets {offsets_N2.shape}: "
            "expected (N, C, Y, X), (N,) and (N, 2)"
        )
    if num and patches_NCYX[0].size == 0:
        raise InputError(f"patches {patches_NCYX.shape} hold no pixels")
    weights = weights_N.astype(np.float64)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise InputError("the weights of the patches must be finite and not negative")
    return weights


def _shares(weights_N: NDArray[np.float64]) -> NDArray[np.float64]:
    total = weights_N.sum()
    return weights_N / total if total > 0 else weights_N


def _resized(image_YX3: NDArray[np.uint8], limit: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize to fit into `limit`: pixels of a small image stay squares, a large one is averaged."""
    height, width = fit_within(image_YX3.shape[:2], limit)
    method = Image.Resampling.NEAREST if height >= 2 * image_YX3.shape[0] else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image_YX3).resize((width, height), method))


def _blank(
    shown_shape: tuple[int, ...], grid: Grid, has_subtitle: bool, last_heading: str, colours: _Theme
) -> tuple[Image.Image, list[_Panel]]:
    """The empty canvas and the places of thumbnail, overlay and patches on it."""
    step = max(shown_shape[1], _MIN_PANEL_PX) + _GAP_PX
    top = _MARGIN_PX + (102 if has_subtitle else 76)
    headings = ["Low-resolution view", "Attention, drawn patches", last_heading]
    panels = [
        _Panel(heading=heading, top=top, left=_MARGIN_PX + index * step)
        for index, heading in enumerate(headings)
    ]
    height = top + max(shown_shape[0] + _NOTE_PX, grid.height_px) + _MARGIN_PX
    width = panels[2].left + max(grid.width_px, _MIN_PANEL_PX) + _MARGIN_PX
    return Image.new("RGB", (width, height), colours.background), panels


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def _draw_header(canvas: Image.Image, title: str, subtitle: str, colours: _Theme) -> None:
    draw = ImageDraw.Draw(canvas)
    room = canvas.width - 2 * _MARGIN_PX
    for text, size_px, top, fill in [(title, 26, -4, colours.text), (subtitle, 16, 36, colours.muted)]:
        line = _shortened(draw, text, size_px, room)
        draw.text((_MARGIN_PX, _MARGIN_PX + top), line, fill=fill, font=_font(size_px))


def _shortened(draw: ImageDraw.ImageDraw, text: str, size_px: int, room_px: int) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font=_font(size_px)) <= room_px:
        return text
    while text and draw.textlength(f"{text}...", font=_font(size_px)) > room_px:
        text = text[:-1]
    return f"{text}..."


def _paste_panel(canvas: Image.Image, image: Image.Image, panel: _Panel, colours: _Theme) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.text((panel.left, panel.top - 26), panel.heading, fill=colours.muted, font=_font(15))
    bottom, right = panel.top + image.height, panel.left + image.width
    draw.rectangle((panel.left - 1, panel.top - 1, right, bottom), outline=colours.frame)
    canvas.paste(image, (panel.left, panel.top))


def _draw_colour_bar(
    canvas: Image.Image, panel: _Panel, shape: tuple[int, ...], peak: float, colours: _Theme
) -> None:
    height, width = shape[0], max(shape[1], _MIN_PANEL_PX)
    row = colour_map(np.linspace(0.0, 1.0, width))
    top = panel.top + height + 10
    canvas.paste(Image.fromarray(np.repeat(row[None], _BAR_PX, axis=0)), (panel.left, top))
    draw = ImageDraw.Draw(canvas)
    below = top + _BAR_PX + 5
    for text, left, anchor in [
        ("0", panel.left, "la"),
        ("square-root scale", panel.left + width // 2, "ma"),
        (f"{peak:.2g}", panel.left + width, "ra"),
    ]:
        draw.text((left, below), text, fill=colours.muted, font=_font(13), anchor=anchor)


def _paste_patches(
    canvas: Image.Image,
    patches_NCYX: NDArray[Any],
    order: NDArray[np.int64],
    shares_N: NDArray[np.float64],
    grid: Grid,
    panel: _Panel,
    colours: _Theme,
) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.text((panel.left, panel.top - 26), panel.heading, fill=colours.muted, font=_font(15))
    low, high = value_range(patches_NCYX)
    for rank, index in enumerate(order.tolist()):
        rgb = to_rgb(np.moveaxis(patches_NCYX[index], 0, -1), low=low, high=high)
        tile = Image.fromarray(_resized(rgb, (grid.side_px, grid.side_px)))
        top, left = grid.corner(rank)
        top, left = panel.top + top, panel.left + left
        draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=colours.frame)
        canvas.paste(tile, (left, top))
        below = top + tile.height + 4
        draw.text((left, below), str(rank + 1), fill=colours.muted, font=_font(14))
        share = f"{100 * shares_N[index]:.1f} %"
        draw.text((left + grid.side_px, below), share, fill=colours.text, font=_font(14), anchor="ra")
