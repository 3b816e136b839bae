"""A look at some images before a run starts: what does not fit is told in a line, and nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ats_stream.errors import SlideError
from ats_stream.workers.quarantine import FAIL
from ats_stream.workers.sampler import check_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.workers.trainer import TrainJob

NUM_LOOKED_AT = 8


def look_at(job: TrainJob) -> None:
    """Open some images from all over the splits and hold them to the configuration.

    Raises SlideError for one that cannot be read, or does not have what the configuration asks for (levels,
    channels, pixel size, a label to draw within), unless such images are to be left out.
    """
    rows = spread((*job.train_rows, *job.val_rows), NUM_LOOKED_AT)
    for row in rows:
        try:
            pyramid = job.storage_options.open(job.slides[row])
            check_image(pyramid, job.sampler_of(row), num_channels=job.config.model.num_channels)
        except SlideError:
            if job.config.trainer.on_bad_image == FAIL:
                raise


def spread(rows: Sequence[int], number: int) -> tuple[int, ...]:
    """So many of the rows, from all over them, the first among them.

    >>> spread(range(10), 4), spread(range(2), 4)
    ((0, 2, 5, 7), (0, 1))
    """
    taken = min(number, len(rows))
    return tuple(rows[place * len(rows) // taken] for place in range(taken))
