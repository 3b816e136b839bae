"""The pages of ``ats-stream report``: the sections of a training and of a prediction, put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ats_stream.predictions.folder import read_folder
from ats_stream.report import panels, run_panels
from ats_stream.report.merits import Judged
from ats_stream.report.slides import NUM_SLIDES, slide_sections
from ats_stream.report.statistics import NUM_RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ats_stream.io import StorageOptions
    from ats_stream.report.page import Section

PARQUET_LATER = "predictions.parquet: it comes when all images are done"


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run folder holds."""

    metrics: Sequence[Mapping[str, Any]] = ()
    """Records of metrics.jsonl."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Content of config.yaml."""
    skipped: Sequence[tuple[str, str]] = ()
    """Images that training left out, with the reason."""
    missing: Sequence[str] = ()
    """What a whole run would have."""


def run_sections(parts: RunParts) -> tuple[Section, ...]:
    """The sections of a training; what there are no numbers for is left out."""
    found = (
        run_panels.missing_section(parts.missing),
        run_panels.summary_section(parts.metrics),
        run_panels.learning_section(parts.metrics),
        run_panels.drawing_section(parts.metrics),
        run_panels.time_section(parts.metrics),
        panels.skipped_section(parts.skipped),
        run_panels.settings_section(parts.config),
    )
    return tuple(section for section in found if section is not None)


def prediction_sections(
    folder: Path,
    *,
    num_slides: int = NUM_SLIDES,
    num_resamples: int = NUM_RESAMPLES,
    options: StorageOptions | None = None,
) -> tuple[Section, ...]:
    """The sections of a folder of predictions, whole or begun; InputError for another folder.

    The same folder gives the same sections, as long as its slides are where they were.
    """
    info, records, is_whole = read_folder(folder)
    judged = Judged.of(info, records)
    missing = (
        () if is_whole else (f"{info.num_images - len(records)} of {info.num_images} images", PARQUET_LATER)
    )
    bad = [(one.slide, one.error) for one in records if one.is_bad]
    found = (
        run_panels.missing_section(missing),
        panels.merit_section(info, records, judged, num_resamples=num_resamples),
        *panels.task_sections(judged),
        *slide_sections(folder, info, records, judged, num_slides=num_slides, options=options),
        panels.read_section(info, records),
        panels.skipped_section(bad),
    )
    return tuple(section for section in found if section is not None)
