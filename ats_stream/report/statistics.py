"""Figures of merit with bootstrap intervals, as functions of weights on the images.

A resample of B images with replacement is a vector of counts, so a metric that takes weights is computed for
R resamples at once; weights of 1 give the metric itself.

Shape letters: R resamples, B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = npt.NDArray[Any]
Metric = Callable[[Array], Array]
"""Weights (R, B) -> values (R,), NaN where a resample does not define it."""

NUM_RESAMPLES = 1000
LEVEL = 0.95
_BLOCK_NUMBERS = 4 << 20  # weights held at a time: 32 MiB
_BLOCK_PAIRS = 512


@dataclass(frozen=True)
class Estimate:
    """A metric and the interval that holds 95 % of its bootstrap resamples; NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As a reader wants it.

        >>> str(Estimate(0.875, 0.75, 1.0)), str(Estimate(float("nan"), float("nan"), float("nan")))
        ('0.875 (0.750 to 1.000)', 'none')
        """
        if np.isnan(self.value):
            return "none"
        if np.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def resample_weights(
    num_images: int, num_resamples: int, *, groups: Sequence[str] | None, seed: int
) -> Array:
    """Counts (R, B) of resamples with replacement; with ``groups``, of whole groups (patients).

    >>> resample_weights(3, 2, groups=["a", "a", "b"], seed=1).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]
    """
    names, group_B = (
        (np.arange(num_images), np.arange(num_images))
        if groups is None
        else np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    )
    counts = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), num_resamples)
    return counts[:, group_B].astype(np.float64)


def estimate(
    metric: Metric,
    num_images: int,
    *,
    groups: Sequence[str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A metric with its percentile bootstrap interval (Efron 1979); the same seed gives the same interval.

    Resamples that do not define the metric (one class alone, say) are left out; without two of the others
    there is no interval.
    """
    value = float(metric(np.ones((1, num_images)))[0]) if num_images else np.nan
    if not np.isfinite(value):
        return Estimate(np.nan, np.nan, np.nan)
    rows = max(1, _BLOCK_NUMBERS // num_images)
    parts = []
    for number, start in enumerate(range(0, num_resamples, rows)):
        size = min(rows, num_resamples - start)
        parts.append(metric(resample_weights(num_images, size, groups=groups, seed=seed + number)))
    values = np.concatenate(parts) if parts else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def weighted_mean(value_B: Array) -> Metric:
    """The mean of one number an image: accuracy, absolute error, ..."""
    numbers = np.asarray(value_B, np.float64)
    return lambda weight_RB: _ratio(weight_RB @ numbers, weight_RB.sum(1))


def balanced_accuracy(right_B: Array, label_B: Array) -> Metric:
    """The mean over the labels of the share of right answers."""
    right = np.asarray(right_B, np.float64)
    is_label = [np.asarray(label_B) == label for label in sorted(set(np.asarray(label_B).tolist()))]

    def metric(weight_RB: Array) -> Array:
        recalls = [_ratio(weight_RB[:, of] @ right[of], weight_RB[:, of].sum(1)) for of in is_label]
        mean: Array = np.mean(recalls, axis=0)
        return mean

    return metric


def area_under_roc(score_B: Array, is_positive_B: Array) -> Metric:
    """Probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
    order = np.argsort(score_B, kind="stable")
    score, positive = np.asarray(score_B)[order], np.asarray(is_positive_B, bool)[order]
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]]) if len(score) else np.empty(0, int)

    def metric(weight_RB: Array) -> Array:
        weight = weight_RB[:, order]
        # sums over images of equal score
        positives = np.add.reduceat(weight * positive, starts, axis=1)
        negatives = np.add.reduceat(weight * ~positive, starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        won = (positives * (below + negatives / 2)).sum(1)
        return _ratio(won, positives.sum(1) * negatives.sum(1))

    return metric


def mean_area_under_roc(score_BK: Array, is_positive_BK: Array) -> Metric:
    """The mean over classes, each against the others."""
    metrics = [area_under_roc(s, p) for s, p in zip(score_BK.T, is_positive_BK.T, strict=True)]
    return lambda weight_RB: np.mean([metric(weight_RB) for metric in metrics], axis=0)


def explained_variance(value_B: Array, target_B: Array) -> Metric:
    """R squared: 1 - squared error / variance of the targets."""
    target = np.asarray(target_B, np.float64)
    squared = (np.asarray(value_B, np.float64) - target) ** 2

    def metric(weight_RB: Array) -> Array:
        total = weight_RB.sum(1)
        mean = _ratio(weight_RB @ target, total)
        # around the overall mean, so that large numbers do not cancel
        moved = target - target.mean()
        spread = weight_RB @ moved**2 - total * (mean - target.mean()) ** 2
        return 1 - _ratio(weight_RB @ squared, np.where(spread > 1e-12 * (moved**2).sum(), spread, 0.0))

    return metric


def root_mean_square(error_B: Array) -> Metric:
    """The root of the mean squared error."""
    mean = weighted_mean(np.asarray(error_B, np.float64) ** 2)
    return lambda weight_RB: np.sqrt(mean(weight_RB))


def concordance(risk_B: Array, time_B: Array, is_event_B: Array) -> Metric:
    """Harrell's C: of the pairs whose order is known, the share in which who came first was riskier.

    Ties of the risk count half. Pairs are gone through in blocks, so memory goes with the number of images.
    """
    risk, time, event = np.asarray(risk_B), np.asarray(time_B), np.asarray(is_event_B, bool)
    came_first = np.flatnonzero(event)

    def metric(weight_RB: Array) -> Array:
        weight = weight_RB.astype(np.float32)
        sums = np.zeros((2, len(weight)))
        for start in range(0, len(came_first), _BLOCK_PAIRS):
            of = came_first[start : start + _BLOCK_PAIRS]
            known = (time > time[of, None]) | ((time == time[of, None]) & ~event)
            won = known * ((risk < risk[of, None]) + np.float32(0.5) * (risk == risk[of, None]))
            for total, pairs in zip(sums, (won, known), strict=True):
                after = weight @ pairs.astype(np.float32).T
                total += np.einsum("rb,rb->r", after, weight[:, of], dtype=np.float64)
        return _ratio(*sums)

    return metric


def roc_points(score_B: Array, is_positive_B: Array) -> tuple[Array, Array]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    >>> false, true = roc_points(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    >>> false.tolist(), true.tolist()
    ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    order = np.argsort(-np.asarray(score_B), kind="stable")
    score, positive = np.asarray(score_B)[order], np.asarray(is_positive_B, bool)[order]
    ends = np.flatnonzero(np.r_[score[1:] != score[:-1], True])
    true, false = np.cumsum(positive)[ends], np.cumsum(~positive)[ends]
    return np.r_[0.0, false / max(false[-1], 1)], np.r_[0.0, true / max(true[-1], 1)]


@dataclass(frozen=True)
class Calibration:
    """Bins of predicted probability: their mean, the share that came true, and how many images they hold."""

    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of both, weighed by the images (Guo et al. 2017)."""
        pairs = zip(self.predicted, self.observed, self.counts, strict=True)
        return sum(abs(p - o) * n for p, o, n in pairs) / max(1, sum(self.counts))


def calibration(probability_B: Array, is_true_B: Array, num_bins: int = 10) -> Calibration:
    """Bins of equal width over 0 to 1; empty ones are left out.

    >>> calibration(np.array([0.1, 0.15, 0.9]), np.array([0, 1, 1]), num_bins=2)
    Calibration(predicted=(0.125, 0.9), observed=(0.5, 1.0), counts=(2, 1))
    """
    probability, is_true = np.asarray(probability_B, np.float64), np.asarray(is_true_B, np.float64)
    bins = np.minimum((probability * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    mean = np.bincount(bins, probability, num_bins)[used] / counts[used]
    share = np.bincount(bins, is_true, num_bins)[used] / counts[used]
    return Calibration(tuple(mean.tolist()), tuple(share.tolist()), tuple(counts[used].tolist()))


def survival_curve(time_B: Array, is_event_B: Array) -> tuple[Array, Array]:
    """Share without an event after each time of an event, from (0, 1) on (Kaplan and Meier 1958).

    >>> time, share = survival_curve(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, False]))
    >>> time.tolist(), share.tolist()
    ([0.0, 1.0, 3.0], [1.0, 0.75, 0.375])
    """
    times = np.asarray(time_B, np.float64)
    moments, events = np.unique(times[np.asarray(is_event_B, bool)], return_counts=True)
    at_risk = len(times) - np.searchsorted(np.sort(times), moments)
    return np.r_[0.0, moments], np.r_[1.0, np.cumprod(1 - events / np.maximum(at_risk, 1))]


def _ratio(above: Array, below: Array) -> Array:
    """Element by element, NaN over 0."""
    ratio: Array = np.full(np.shape(above), np.nan)
    return np.divide(above, below, out=ratio, where=np.asarray(below) != 0)
