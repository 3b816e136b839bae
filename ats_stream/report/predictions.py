"""Predictions for people: a table, and a picture of each image with what the model looked at."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from ats_stream.files import write_atomic
from ats_stream.report.page import Figure, Section, Table, png_bytes
from ats_stream.report.picture import prediction_picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from typing import Any

    import numpy.typing as npt
    from PIL import Image

    from ats_stream.predictions.record import PredictionInfo, SlideRecord
    from ats_stream.workers.predict import Predicted

THUMBNAIL_PX = 640


def draw_picture(
    prediction: Predicted, thumbnail_CYX: npt.NDArray[Any], *, dark: bool = False
) -> Image.Image:
    """Thumbnail, attention with the drawn patches boxed, and the patches with their share of the weight."""
    patch_size = prediction.crops_NCPP.shape[2:]
    confidence = f" ({float(prediction.probability_K.max()):.0%})" if _is_of_classes(prediction) else ""
    label = f", label {prediction.label}" if prediction.label else ""
    share = prediction.decoded_bytes / prediction.full_bytes
    return prediction_picture(
        thumbnail_YXC=np.moveaxis(thumbnail_CYX, 0, -1),
        attention_YX=prediction.attention_YX,
        patches_NCYX=prediction.crops_NCPP,
        weights_N=prediction.attention_N * prediction.weight_N,
        offsets_N2=prediction.offsets_ND,
        patch_size=(patch_size[0], patch_size[1]),
        image_shape=(prediction.full_shape[-2], prediction.full_shape[-1]),
        title=prediction.name,
        subtitle=f"predicted {prediction.predicted}{confidence}{label}; {share:.2%} of pixels read",
        theme="dark" if dark else "light",
    )


def write_picture(path: Path, prediction: Predicted, thumbnail_CYX: npt.NDArray[Any]) -> Path:
    """Write the picture of one image as a PNG."""
    return write_atomic(path, png_bytes(draw_picture(prediction, thumbnail_CYX)))


def accuracy(judged: Iterable[bool | None]) -> float | None:
    """Share of right predictions among those that are right or wrong; None if there are none.

    >>> accuracy([True, None, False]), accuracy([None])
    (0.5, None)
    """
    known = [right for right in judged if right is not None]
    return sum(known) / len(known) if known else None


def confusion_table(info: PredictionInfo, records: Sequence[SlideRecord]) -> Table:
    """How often each label was predicted as each class."""
    classes = info.outputs
    counts = Counter((one.label, one.predicted) for one in records)
    rows: tuple[tuple[str | int | float | None, ...], ...] = tuple(
        (label, *(counts[label, guess] for guess in classes)) for label in classes
    )
    return Table(header=("label", *(f"predicted {name}" for name in classes)), rows=rows)


def predictions_section(
    info: PredictionInfo, records: Sequence[SlideRecord], figures: Sequence[Figure]
) -> Section:
    """A section of a page: figures of merit, the confusion table, and pictures."""
    good = [one for one in records if not one.is_bad]
    known = accuracy(one.right for one in good)
    facts: list[tuple[str, str | int | float]] = [("images", len(good))]
    if known is not None:
        facts.append(("accuracy", f"{known:.3f}"))
    if good:
        share = float(np.mean([one.read_share for one in good]))
        facts.append(("pixels of full resolution read, per image", f"{share:.3%}"))
    is_confusable = known is not None and info.task == "classification"
    return Section(
        heading="Predictions",
        key_values=tuple(facts),
        figures=tuple(figures),
        table=confusion_table(info, good) if is_confusable else None,
    )


def slide_figure(prediction: Predicted, thumbnail_CYX: npt.NDArray[Any]) -> Figure:
    """The picture of one image for a page, light and dark."""
    label = f", label {prediction.label}" if prediction.label else ""
    return Figure(
        content=draw_picture(prediction, thumbnail_CYX),
        dark=draw_picture(prediction, thumbnail_CYX, dark=True),
        caption=f"{prediction.name}: predicted {prediction.predicted}{label}",
        encoding="jpeg",
    )


def _is_of_classes(prediction: Predicted) -> bool:
    return prediction.task == "classification"
