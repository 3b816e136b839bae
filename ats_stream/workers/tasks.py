"""What a model is trained to say: targets from the table, the loss, and the numbers of a validation.

Shapes: R rows of the table, B images, K outputs of the head, T target values of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

from ats_stream.errors import ArchiveError
from ats_stream.io.archive import LABEL_SEPARATOR, label_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ats_stream.io import Archive


class Task(Protocol):
    """One kind of target. ``loss`` gives one value per image, whose mean is minimised."""

    score: str
    """The number of a validation that tells the best model."""
    higher_is_better: bool
    needs_whole_batch: bool
    """Whether the loss of an image depends on the others of the step, over all ranks."""
    ignores_shift: bool
    """Whether a number added to all outputs leaves the loss as it is."""

    def outputs(self, archive: Archive) -> tuple[str, ...]:
        """Names of the head's outputs."""

    def targets(self, archive: Archive, outputs: Sequence[str]) -> list[list[float]]:
        """Target values (R, T); ArchiveError, with the line, for a label that cannot be one."""

    def loss(self, outputs_BK: Tensor, target_BT: Tensor) -> Tensor:
        """(B,) float32, with gradient."""

    def probability(self, outputs_BK: Tensor) -> Tensor:
        """What is reported of an image (B, K): probabilities, or the outputs themselves."""

    def answer(self, value_K: Sequence[float], outputs: Sequence[str]) -> str:
        """What the values of one image say, in the words of the table."""

    def is_right(self, answer: str, label: str) -> bool | None:
        """Whether an answer is the label; None where answers are not simply right or wrong."""

    def numbers(self, outputs_BK: Tensor, target_BT: Tensor) -> dict[str, float]:
        """Metrics over a whole split."""


@dataclass(frozen=True)
class Classification:
    """One class of K for each image: softmax and cross-entropy."""

    score = "accuracy"
    higher_is_better = True
    needs_whole_batch = False
    ignores_shift = False

    def outputs(self, archive: Archive) -> tuple[str, ...]:
        """The classes of the table."""
        return archive.classes

    def targets(self, archive: Archive, outputs: Sequence[str]) -> list[list[float]]:
        """The number of the class."""
        class_of = {name: number for number, name in enumerate(outputs)}
        return [[float(_known(archive, row.line, row.label, class_of))] for row in archive.rows]

    def loss(self, outputs_BK: Tensor, target_BT: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(outputs_BK, target_BT[:, 0].long(), reduction="none")

    def probability(self, outputs_BK: Tensor) -> Tensor:
        """Softmax."""
        return outputs_BK.softmax(1)

    def answer(self, value_K: Sequence[float], outputs: Sequence[str]) -> str:
        """The most probable class."""
        return outputs[max(range(len(outputs)), key=lambda k: value_K[k])]

    def is_right(self, answer: str, label: str) -> bool:
        """The same class."""
        return answer == label

    def numbers(self, outputs_BK: Tensor, target_BT: Tensor) -> dict[str, float]:
        """Mean loss and accuracy; for two classes the area under the ROC curve as well."""
        class_B = target_BT[:, 0].long()
        found = {
            "loss": float(self.loss(outputs_BK, target_BT).mean()),
            "accuracy": float((outputs_BK.argmax(1) == class_B).double().mean()),
        }
        if outputs_BK.shape[1] == 2:
            area = area_under_roc(outputs_BK[:, 1] - outputs_BK[:, 0], class_B == 1)
            found |= {} if area is None else {"auroc": area}
        return found


@dataclass(frozen=True)
class MultiLabel:
    """Any number of K classes for each image, separated by ";" in the table: sigmoid and cross-entropy."""

    score = "auroc"
    higher_is_better = True
    needs_whole_batch = False
    ignores_shift = False

    def outputs(self, archive: Archive) -> tuple[str, ...]:
        """All classes that stand in the table, sorted."""
        return tuple(sorted({name for row in archive.rows for name in label_names(row.label)}))

    def targets(self, archive: Archive, outputs: Sequence[str]) -> list[list[float]]:
        """1 for each class that the image has, 0 for the others."""
        class_of = {name: number for number, name in enumerate(outputs)}
        found = []
        for row in archive.rows:
            numbers = {_known(archive, row.line, name, class_of) for name in label_names(row.label)}
            found.append([float(k in numbers) for k in range(len(outputs))])
        return found

    def loss(self, outputs_BK: Tensor, target_BT: Tensor) -> Tensor:
        """Binary cross-entropy in nats, the mean over the classes."""
        return F.binary_cross_entropy_with_logits(outputs_BK, target_BT, reduction="none").mean(1)

    def probability(self, outputs_BK: Tensor) -> Tensor:
        """Sigmoid."""
        return outputs_BK.sigmoid()

    def answer(self, value_K: Sequence[float], outputs: Sequence[str]) -> str:
        """The classes that are more probable than not."""
        return LABEL_SEPARATOR.join(name for name, p in zip(outputs, value_K, strict=True) if p > 0.5)

    def is_right(self, answer: str, label: str) -> bool:
        """The same classes, in any order."""
        return set(label_names(answer)) == set(label_names(label))

    def numbers(self, outputs_BK: Tensor, target_BT: Tensor) -> dict[str, float]:
        """Mean loss, share of right answers at 1/2, mean area under the ROC curves that there are."""
        areas = [
            area
            for k in range(outputs_BK.shape[1])
            if (area := area_under_roc(outputs_BK[:, k], target_BT[:, k] > 0.5)) is not None
        ]
        return {
            "loss": float(self.loss(outputs_BK, target_BT).mean()),
            "accuracy": float(((outputs_BK > 0) == (target_BT > 0.5)).double().mean()),
            "auroc": sum(areas) / len(areas) if areas else 0.5,
        }


class _OneNumber:
    """What the tasks have in common whose answer is a number."""

    def probability(self, outputs_BK: Tensor) -> Tensor:
        """The number itself."""
        return outputs_BK

    def answer(self, value_K: Sequence[float], outputs: Sequence[str]) -> str:  # noqa: ARG002  # the protocol's
        """The number, written out."""
        return f"{value_K[0]:.6g}"

    def is_right(self, answer: str, label: str) -> None:
        """Numbers are near or far, not right or wrong."""


@dataclass(frozen=True)
class Regression(_OneNumber):
    """A number for each image: squared error."""

    score = "loss"
    higher_is_better = False
    needs_whole_batch = False
    ignores_shift = False

    def outputs(self, archive: Archive) -> tuple[str, ...]:  # noqa: ARG002  # the protocol's
        """One."""
        return ("value",)

    def targets(self, archive: Archive, outputs: Sequence[str]) -> list[list[float]]:  # noqa: ARG002
        """The label as a number."""
        return [[_number(archive, row.line, row.label)] for row in archive.rows]

    def loss(self, outputs_BK: Tensor, target_BT: Tensor) -> Tensor:
        """Squared error."""
        return (outputs_BK - target_BT).square().mean(1)

    def numbers(self, outputs_BK: Tensor, target_BT: Tensor) -> dict[str, float]:
        """Mean squared and absolute error, and the share of the variance that is explained."""
        error_BT = (outputs_BK - target_BT).double()
        spread = (target_BT - target_BT.mean(0)).double().square().mean()
        squared = error_BT.square().mean()
        explained = {"r2": float(1 - squared / spread)} if spread > 0 else {}
        return {"loss": float(squared), "mae": float(error_BT.abs().mean()), **explained}


@dataclass(frozen=True)
class Survival(_OneNumber):
    """Time until an event that may not have been seen (column ``time``; label 1 seen, 0 censored): Cox's
    proportional hazards.

    The output is the log of the hazard ratio. The loss is the negative log partial likelihood of Breslow,
    ``-sum_{i: event} (o_i - log sum_{j: t_j >= t_i} exp(o_j)) / number of events``, over the images of a
    step, of all ranks (Cox 1972; Breslow 1974).
    """

    score = "concordance"
    higher_is_better = True
    needs_whole_batch = True
    ignores_shift = True

    def outputs(self, archive: Archive) -> tuple[str, ...]:  # noqa: ARG002  # the protocol's
        """One."""
        return ("log hazard ratio",)

    def targets(self, archive: Archive, outputs: Sequence[str]) -> list[list[float]]:  # noqa: ARG002
        """Time, and whether the event was seen."""
        found = []
        for row in archive.rows:
            if row.time is None:
                raise ArchiveError(f"{archive.path}: survival needs the column 'time'")
            if row.label not in ("0", "1"):
                raise ArchiveError(
                    f"{archive.path}:{row.line}: the event must be 0 or 1 in survival, got {row.label!r}"
                )
            found.append([row.time, float(row.label)])
        return found

    def loss(self, outputs_BK: Tensor, target_BT: Tensor) -> Tensor:
        """The share of each image in the partial likelihood, times B: the mean over B is the loss."""
        risk_B, time_B, event_B = outputs_BK[:, 0], target_BT[:, 0], target_BT[:, 1]
        at_risk_BB = time_B[None, :] >= time_B[:, None]
        log_sum_B = torch.where(at_risk_BB, risk_B[None, :], -math.inf).logsumexp(1)
        num_events = event_B.sum().clamp(min=1)
        return event_B * (log_sum_B - risk_B) * (len(risk_B) / num_events)

    def numbers(self, outputs_BK: Tensor, target_BT: Tensor) -> dict[str, float]:
        """Loss over the whole split, and Harrell's concordance."""
        return {
            "loss": float(self.loss(outputs_BK, target_BT).mean()),
            "concordance": concordance(outputs_BK[:, 0], target_BT[:, 0], target_BT[:, 1] > 0.5),
        }


TASKS: dict[str, Task] = {
    "classification": Classification(),
    "multilabel": MultiLabel(),
    "regression": Regression(),
    "survival": Survival(),
}


def area_under_roc(score_B: Tensor, is_positive_B: Tensor) -> float | None:
    """Probability that a positive scores above a negative, ties counting half; None without both kinds.

    >>> area_under_roc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True]))
    0.75
    """
    positive, negative = score_B[is_positive_B].double(), score_B[~is_positive_B].double().sort().values
    if not len(positive) or not len(negative):
        return None
    below = torch.searchsorted(negative, positive)
    up_to = torch.searchsorted(negative, positive, right=True)
    return float((below + up_to).double().mean() / (2 * len(negative)))


def concordance(risk_B: Tensor, time_B: Tensor, is_event_B: Tensor) -> float:
    """Harrell's C: of the pairs whose order is known, the share in which who came first was riskier.

    Ties of the risk count half; .5 when no pair can be compared.

    >>> concordance(torch.tensor([3.0, 1, 2]), torch.tensor([1.0, 2, 3]), torch.tensor([True, True, False]))
    0.6666666666666666
    """
    concordant = known = 0.0
    for i in torch.nonzero(is_event_B).flatten().tolist():
        later_B = (time_B > time_B[i]) | ((time_B == time_B[i]) & ~is_event_B)
        risk = risk_B[later_B]
        known += len(risk)
        concordant += float((risk < risk_B[i]).sum()) + 0.5 * float((risk == risk_B[i]).sum())
    return concordant / known if known else 0.5


def _known(archive: Archive, line: int, label: str, class_of: dict[str, int]) -> int:
    if label not in class_of:
        raise ArchiveError(
            f"{archive.path}:{line}: unknown label {label!r}; the model knows {list(class_of)}"
        )
    return class_of[label]


def _number(archive: Archive, line: int, label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArchiveError(f"{archive.path}:{line}: regression needs a number as label, got {label!r}")
    return value
