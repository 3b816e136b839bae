"""The best and the worst images of a prediction, with what the model looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ats_stream.errors import AtsStreamError
from ats_stream.io import StorageOptions, open_pyramid
from ats_stream.predictions.folder import attention_path, picture_path, read_record
from ats_stream.report.page import Figure, Section
from ats_stream.report.predictions import THUMBNAIL_PX, Pixels, slide_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ats_stream.predictions.record import PredictionInfo, SlideRecord
    from ats_stream.report.merits import Judged

NUM_SLIDES = 6
"""Images shown of each kind, by default."""
_LOSS_NAMES = {"classification": "log loss", "multilabel": "log loss", "regression": "squared error"}


def slide_sections(
    folder: Path,
    info: PredictionInfo,
    records: Sequence[SlideRecord],
    judged: Judged,
    *,
    num_slides: int,
    options: StorageOptions | None = None,
) -> tuple[Section, ...]:
    """Two sections, the best and the worst, each image once; of images without labels the most and least
    certain, of survival the lowest and highest risk.

    Pictures are drawn anew from the slides, which may be looked for with ``options``; of slides that are not
    there any more the picture of the prediction is taken.
    """
    headings, ranked = ranking(info, records, judged)
    half = min(num_slides, -(-len(ranked) // 2))
    ends = ranked[:half], ranked[max(half, len(ranked) - num_slides) :][::-1]
    sections = []
    for heading, end in zip(headings, ends, strict=True):
        figures = [_figure(folder, info, one, text, options or StorageOptions.of(None)) for one, text in end]
        found = tuple(figure for figure in figures if figure is not None)
        lost = len(figures) - len(found)
        text = f"There is no picture of {lost} of them, and their slides cannot be read." if lost else ""
        if figures:
            sections.append(Section(heading=heading, text=text, figures=found))
    return tuple(sections)


def ranking(
    info: PredictionInfo, records: Sequence[SlideRecord], judged: Judged
) -> tuple[tuple[str, str], list[tuple[SlideRecord, str]]]:
    """Headings of both ends, and the images in between with a caption each, in order."""
    if len(judged) and info.task != "survival":
        name, scores = _LOSS_NAMES[info.task], judged.losses
        headings, ranked = ("Best images", "Worst images"), judged.records
    else:
        ranked = tuple(one for one in records if not one.is_bad)
        if info.has_probabilities:
            # certain: far from 1/2 in every class
            certainty = [float(np.abs(np.array(one.value_K) - 0.5).mean()) for one in ranked]
            name, scores = "certainty", -np.array(certainty)
            headings = ("Most certain images", "Least certain images")
        else:
            name, scores = info.outputs[0], np.array([one.value_K[0] for one in ranked])
            headings = (f"Lowest {name}", f"Highest {name}")
    order = np.argsort(scores, kind="stable")
    return headings, [(ranked[i], f"{_caption(ranked[i])}; {name} {abs(scores[i]):.3g}") for i in order]


def _caption(record: SlideRecord) -> str:
    label = f", label {record.label}" if record.label else ""
    return f"{record.name}: predicted {record.predicted}{label}"


def _figure(
    folder: Path, info: PredictionInfo, record: SlideRecord, caption: str, options: StorageOptions
) -> Figure | None:
    whole = read_record(folder, record.name)
    try:
        if whole is None:
            raise FileNotFoundError(record.name)
        slide = options.open(whole.slide)
        offsets = np.array([whole.patches.y, whole.patches.x]).T
        pixels = Pixels(
            thumbnail_CYX=slide.thumbnail(THUMBNAIL_PX),
            attention_YX=open_pyramid(attention_path(folder, record.name)).read(0)[0],
            crops_NCPP=slide.read_patches(0, offsets, (whole.patch_px, whole.patch_px)),
        )
        return slide_figure(info, whole, pixels, caption)
    except (AtsStreamError, OSError):
        # moved, behind a login, damaged since: the picture that was drawn then
        place = picture_path(folder, record.name)
        if not place.is_file():
            return None
        with Image.open(place) as picture:
            return Figure(content=picture.convert("RGB"), caption=caption, encoding="jpeg")
