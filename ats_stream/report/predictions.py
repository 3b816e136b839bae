"""Predictions for people: a table, and a picture of each image with what the model looked at."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import numpy as np

from ats_stream.files import write_atomic
from ats_stream.report.page import Figure, Section, Table, png_bytes
from ats_stream.report.picture import prediction_picture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    import numpy.typing as npt
    from PIL import Image

    from ats_stream.workers.predict import Predicted

TABLE_NAME = "predictions.csv"
PICTURES_FOLDER = "pictures"
THUMBNAIL_PX = 640


def write_table(path: Path, predictions: Sequence[Predicted]) -> Path:
    """Write one CSV row for each image: label, prediction, probabilities, and what was read of the image."""
    classes = predictions[0].classes if predictions else ()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["slide", "split", "label", "predicted"]
        + [f"p_{name}" if _has_probabilities(predictions[0]) else name for name in classes]
        + ["num_patches", "stored_bytes", "decoded_bytes", "full_bytes", "seconds"]
    )
    for one in predictions:
        read = [len(one.weight_N), one.stored_bytes, one.decoded_bytes, one.full_bytes, f"{one.seconds:.4f}"]
        probabilities = [f"{p:.6f}" for p in one.probability_K]
        writer.writerow([one.slide, one.split, one.label, one.predicted, *probabilities, *read])
    return write_atomic(path, text.getvalue().encode())


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


def write_picture(folder: Path, prediction: Predicted, thumbnail_CYX: npt.NDArray[Any]) -> Path:
    """Write the picture of one image as a PNG named after it."""
    picture = draw_picture(prediction, thumbnail_CYX)
    return write_atomic(folder / f"{prediction.name}.png", png_bytes(picture))


def accuracy(predictions: Sequence[Predicted]) -> float | None:
    """Share of right predictions among the labelled images; None if none is labelled."""
    judged = [one.is_right for one in predictions if one.is_right is not None]
    return sum(judged) / len(judged) if judged else None


def confusion_table(predictions: Sequence[Predicted]) -> Table:
    """How often each label was predicted as each class."""
    classes = predictions[0].classes
    counts = {(label, guess): 0 for label in classes for guess in classes}
    for one in predictions:
        if (one.label, one.predicted) in counts:
            counts[one.label, one.predicted] += 1
    rows: tuple[tuple[str | int | float | None, ...], ...] = tuple(
        (label, *(counts[label, guess] for guess in classes)) for label in classes
    )
    return Table(header=("label", *(f"predicted {name}" for name in classes)), rows=rows)


def predictions_section(
    predictions: Sequence[Predicted], shown: Sequence[tuple[Predicted, npt.NDArray[Any]]]
) -> Section:
    """A section of a page: figures of merit, the confusion table, and the pictures of ``shown``."""
    share = float(np.mean([one.decoded_bytes / one.full_bytes for one in predictions]))
    known = accuracy(predictions)
    facts: list[tuple[str, str | int | float]] = [("images", len(predictions))]
    if known is not None:
        facts.append(("accuracy", f"{known:.3f}"))
    facts.append(("pixels of full resolution read, per image", f"{share:.3%}"))
    figures = tuple(
        Figure(
            content=draw_picture(one, thumbnail),
            dark=draw_picture(one, thumbnail, dark=True),
            caption=f"{one.name}: predicted {one.predicted}" + (f", label {one.label}" if one.label else ""),
            encoding="jpeg",
        )
        for one, thumbnail in shown
    )
    return Section(
        heading="Predictions",
        key_values=tuple(facts),
        figures=figures,
        table=confusion_table(predictions) if known is not None and _is_of_classes(predictions[0]) else None,
    )


def _is_of_classes(prediction: Predicted) -> bool:
    return prediction.task == "classification"


def _has_probabilities(prediction: Predicted) -> bool:
    return prediction.task in ("classification", "multilabel")
