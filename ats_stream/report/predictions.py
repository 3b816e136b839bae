"""Pictures of predictions: thumbnail, attention with the drawn patches boxed, and the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.files import write_atomic
from ats_stream.report.page import Figure, png_bytes
from ats_stream.report.picture import prediction_picture

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy.typing as npt
    from PIL import Image

    from ats_stream.predictions.record import PredictionInfo, SlideRecord

THUMBNAIL_PX = 640


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What the picture of a prediction is made of, besides its record."""

    thumbnail_CYX: npt.NDArray[Any]
    attention_YX: npt.NDArray[Any]
    crops_NCPP: npt.NDArray[Any]
    """All patches of the record, in its order."""


def draw_picture(
    info: PredictionInfo, record: SlideRecord, pixels: Pixels, *, dark: bool = False
) -> Image.Image:
    """Thumbnail, attention with the drawn patches boxed, and the patches with their share of the weight."""
    confidence = f" ({max(record.value_K):.0%})" if info.task == "classification" else ""
    label = f", label {record.label}" if record.label else ""
    patches = record.patches
    return prediction_picture(
        thumbnail_YXC=np.moveaxis(pixels.thumbnail_CYX, 0, -1),
        attention_YX=pixels.attention_YX,
        patches_NCYX=pixels.crops_NCPP,
        weights_N=np.array(patches.counts_for),
        offsets_N2=np.array([patches.y, patches.x]).T,
        patch_size=(record.patch_px, record.patch_px),
        image_shape=(record.height, record.width),
        title=record.name,
        subtitle=f"predicted {record.predicted}{confidence}{label}; {record.read_share:.2%} of pixels read",
        theme="dark" if dark else "light",
    )


def write_picture(path: Path, info: PredictionInfo, record: SlideRecord, pixels: Pixels) -> Path:
    """Write the picture of one image as a PNG."""
    return write_atomic(path, png_bytes(draw_picture(info, record, pixels)))


def slide_figure(info: PredictionInfo, record: SlideRecord, pixels: Pixels, caption: str) -> Figure:
    """The picture of one image for a page, light and dark."""
    light, dark = (draw_picture(info, record, pixels, dark=dark) for dark in (False, True))
    return Figure(content=light, dark=dark, caption=caption, encoding="jpeg")


def accuracy(judged: Iterable[bool | None]) -> float | None:
    """Share of right predictions among those that are right or wrong; None if there are none.

    >>> accuracy([True, None, False]), accuracy([None])
    (0.5, None)
    """
    known = [right for right in judged if right is not None]
    return sum(known) / len(known) if known else None
