"""How good predictions are: the figures of merit of each task, with their intervals.

Shape letters: B images, K values of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.io.archive import label_names
from ats_stream.report import statistics
from ats_stream.report.statistics import NUM_RESAMPLES, Estimate, estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ats_stream.predictions.record import PredictionInfo, SlideRecord
    from ats_stream.report.statistics import Metric

_SMALLEST = 1e-12  # probabilities below count as this, so that the log is finite
_MOST_PAIRS = 2e10  # resampled pairs of a concordance; some seconds


@dataclass(frozen=True)
class Judged:
    """The images with a prediction and a label that fits the task."""

    info: PredictionInfo
    records: tuple[SlideRecord, ...]

    @classmethod
    def of(cls, info: PredictionInfo, records: Sequence[SlideRecord]) -> Judged:
        """Leave out images without prediction or label, and with labels that the model does not know."""
        kept = [one for one in records if not one.is_bad and one.value_K and _fits(info, one)]
        return cls(info, tuple(kept))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def values(self) -> npt.NDArray[Any]:
        """Values of the head."""
        shape = (len(self.records), len(self.info.outputs))
        return np.array([one.value_K for one in self.records], np.float64).reshape(shape)

    @property
    def targets(self) -> npt.NDArray[Any]:
        """Whether each class is the label, or one of the labels (bool); of numbers, the label (B, 1)."""
        if not self.info.has_probabilities:
            return np.array([[float(one.label)] for one in self.records])
        split = label_names if self.info.task == "multilabel" else lambda label: (label,)
        rows = [set(split(one.label)) for one in self.records]
        return np.array([[name in row for name in self.info.outputs] for row in rows], bool).reshape(
            len(rows), len(self.info.outputs)
        )

    @property
    def times(self) -> npt.NDArray[Any]:
        """Time until the event, of survival."""
        return np.array([one.time for one in self.records], np.float64)

    @property
    def right(self) -> npt.NDArray[Any]:
        """Whether the answer is the label."""
        return np.array([bool(one.right) for one in self.records])

    @property
    def groups(self) -> tuple[str, ...] | None:
        """Groups (patients) that are resampled as a whole; None if the table has none."""
        names = tuple(one.group or f"\0{number}" for number, one in enumerate(self.records))
        return names if any(one.group for one in self.records) else None

    @property
    def losses(self) -> npt.NDArray[Any]:
        """How wrong each image is: log loss in nats, or squared error; zeros for survival."""
        value, target = self.values, self.targets
        if self.info.task == "classification":
            of_label: npt.NDArray[Any] = -np.log(np.maximum((value * target).sum(1), _SMALLEST))
            return of_label
        if self.info.task == "multilabel":
            of_truth = np.where(target, value, 1 - value)
            losses: npt.NDArray[Any] = -np.log(np.maximum(of_truth, _SMALLEST)).mean(1)
            return losses
        if self.info.task == "regression":
            squared: npt.NDArray[Any] = (value[:, 0] - target[:, 0]) ** 2
            return squared
        return np.zeros(len(self.records))


def resamples_for(judged: Judged, num_resamples: int = NUM_RESAMPLES) -> int:
    """So many, or fewer where the pairs of a concordance would take long."""
    if judged.info.task != "survival":
        return num_resamples
    return min(num_resamples, max(100, int(_MOST_PAIRS / max(1, len(judged)) ** 2)))


def merits(judged: Judged, *, num_resamples: int = NUM_RESAMPLES) -> list[tuple[str, Estimate]]:
    """Names and estimates, the most telling first; the same call gives the same numbers."""
    if not len(judged):
        return []
    return [
        (name, estimate(metric, len(judged), groups=judged.groups, num_resamples=num_resamples))
        for name, metric in _metrics(judged).items()
    ]


def _metrics(judged: Judged) -> dict[str, Metric]:
    value, target = judged.values, judged.targets
    task = judged.info.task
    if task == "survival":
        return {
            "concordance (Harrell)": statistics.concordance(value[:, 0], judged.times, target[:, 0] > 0.5)
        }
    if task == "regression":
        error = value[:, 0] - target[:, 0]
        return {
            "mean absolute error": statistics.weighted_mean(np.abs(error)),
            "root mean square error": statistics.root_mean_square(error),
            "variance explained (R squared)": statistics.explained_variance(value[:, 0], target[:, 0]),
        }
    last = {"log loss (nats)": statistics.weighted_mean(judged.losses)}
    if task == "multilabel":
        return {
            **_area(value, target, "area under ROC, mean over classes"),
            "all classes right": statistics.weighted_mean(judged.right),
            "classes right, mean": statistics.weighted_mean(((value > 0.5) == target).mean(1)),
            **last,
        }
    if target.shape[1] == 2:  # the second class against the first
        areas = _area(value[:, 1:], target[:, 1:], "area under ROC")
    else:
        areas = _area(value, target, "area under ROC, mean over classes against the rest")
    return {
        "accuracy": statistics.weighted_mean(judged.right),
        "balanced accuracy": statistics.balanced_accuracy(judged.right, target.argmax(1)),
        **areas,
        **last,
    }


def _area(value_BK: npt.NDArray[Any], target_BK: npt.NDArray[Any], name: str) -> dict[str, Metric]:
    """Nothing when every class is that of all images or of none: then there is no curve."""
    both = target_BK.any(0) & ~target_BK.all(0)
    return {name: statistics.mean_area_under_roc(value_BK[:, both], target_BK[:, both])} if both.any() else {}


def _fits(info: PredictionInfo, record: SlideRecord) -> bool:
    if info.task == "classification":
        return record.label in info.outputs
    if info.task == "multilabel":
        return bool(record.label)
    try:
        number = float(record.label)
    except ValueError:
        return False
    return bool(np.isfinite(number)) and (info.task != "survival" or record.time is not None)
