"""Figures of merit: against their definitions, pair by pair, and other libraries; intervals that cover."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.report import statistics
from ats_stream.report.statistics import calibration, estimate, resample_weights, roc_points
from ats_stream.workers import tasks

# few different values, so that there are ties
SCORES = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=9)


def columns(rows: list[tuple[int, bool, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    score, positive, weight = zip(*rows, strict=True)
    return np.array(score, float), np.array(positive), np.array(weight, float)


def repeated(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A resample written out: each image as often as its weight says."""
    return np.repeat(values, weight.astype(int))


def same(value: float, wanted: float | None) -> None:
    if wanted is None:
        assert np.isnan(value)
    else:
        assert value == pytest.approx(wanted)


@given(SCORES)
def test_area_under_roc_is_that_of_the_images_written_out(rows: list[tuple[int, bool, int]]) -> None:
    score, positive, weight = columns(rows)
    (value,) = statistics.area_under_roc(score, positive)(weight[None])
    s, p = repeated(score, weight), repeated(positive, weight)
    pairs = [float(a > b) + 0.5 * (a == b) for a, b in itertools.product(s[p], s[~p])]
    same(value, sum(pairs) / len(pairs) if pairs else None)
    # and what training says
    same(value, tasks.area_under_roc(torch.from_numpy(s), torch.from_numpy(p)) if len(s) else None)


@given(SCORES)
def test_the_area_is_that_under_the_points(rows: list[tuple[int, bool, int]]) -> None:
    score, positive, _ = columns(rows)
    false, true = roc_points(score, positive)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    if positive.any() and not positive.all():
        (value,) = statistics.area_under_roc(score, positive)(np.ones((1, len(score))))
        assert float(np.trapezoid(true, false)) == pytest.approx(value)
        assert (false[-1], true[-1]) == (1, 1)


@given(SCORES, st.data())
def test_concordance_is_that_of_the_images_written_out(
    rows: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    risk, event, weight = columns(rows)
    time = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(risk), max_size=len(risk))), float)
    (value,) = statistics.concordance(risk, time, event)(weight[None])
    r, t, e = (repeated(v, weight) for v in (risk, time, event))
    pairs = [
        float(r[i] > r[j]) + 0.5 * (r[i] == r[j])
        for i, j in itertools.permutations(range(len(r)), 2)
        if e[i] and (t[j] > t[i] or (t[j] == t[i] and not e[j]))
    ]
    same(value, sum(pairs) / len(pairs) if pairs else None)
    if pairs:
        found = tasks.concordance(torch.from_numpy(r), torch.from_numpy(t), torch.from_numpy(e))
        assert value == pytest.approx(found)


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    metric = statistics.concordance(rng.random(50), rng.random(50), rng.random(50) < 0.5)
    weights = resample_weights(50, 20, groups=None, seed=3)
    whole = metric(weights)
    monkeypatch.setattr(statistics, "_BLOCK_PAIRS", 7)
    np.testing.assert_allclose(metric(weights), whole)


@given(SCORES)
def test_the_simple_ones_are_means_of_the_images_written_out(rows: list[tuple[int, bool, int]]) -> None:
    value, right, weight = columns(rows)
    v, r = repeated(value, weight), repeated(right, weight)
    same(statistics.weighted_mean(right)(weight[None])[0], r.mean() if len(r) else None)
    same(statistics.root_mean_square(value)(weight[None])[0], np.sqrt((v**2).mean()) if len(v) else None)
    target = value * 2 + right
    t = repeated(target, weight)
    spread = ((t - t.mean()) ** 2).sum() if len(t) else 0
    wanted = 1 - ((v - t) ** 2).sum() / spread if spread else None
    same(statistics.explained_variance(value, target)(weight[None])[0], wanted)


def test_balanced_accuracy_counts_labels_alike() -> None:
    right, label = np.array([1, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 1])
    metric = statistics.balanced_accuracy(right, label)
    assert metric(np.ones((1, 5)))[0] == pytest.approx((3 / 4 + 1) / 2)
    assert np.isnan(metric(np.array([[1.0, 1, 1, 1, 0]]))[0])  # a label is absent from the resample


def test_resamples_have_as_many_images_and_keep_groups_whole() -> None:
    weights = resample_weights(40, 300, groups=None, seed=0)
    assert (weights.sum(1) == 40).all()
    assert weights.mean() == pytest.approx(1)
    groups = [f"p{n // 4}" for n in range(40)]
    grouped = resample_weights(40, 300, groups=groups, seed=0).reshape(300, 10, 4)
    assert (grouped == grouped[:, :, :1]).all()
    assert (grouped[:, :, 0].sum(1) == 10).all()


def test_an_interval_is_that_of_its_resamples_and_the_same_every_time() -> None:
    right = np.arange(30) % 3 > 0
    one = estimate(statistics.weighted_mean(right), 30)
    shares = resample_weights(30, 1000, groups=None, seed=0) @ right / 30
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))
    assert one == estimate(statistics.weighted_mean(right), 30)
    assert one.value == pytest.approx(2 / 3)
    assert one.low < one.value < one.high


def test_the_interval_of_a_mean_is_near_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    one = estimate(statistics.weighted_mean(values), 400)
    half = 1.96 * values.std() / 20
    assert one.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert one.high == pytest.approx(values.mean() + half, abs=0.2 * half)


def test_groups_that_are_alike_widen_the_interval() -> None:
    right = np.repeat(np.arange(10) % 2 == 0, 20)
    alone = estimate(statistics.weighted_mean(right), 200)
    grouped = estimate(statistics.weighted_mean(right), 200, groups=[str(n // 20) for n in range(200)])
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_few_images_have_no_nonsense(num: int) -> None:
    one = estimate(statistics.area_under_roc(np.zeros(num), np.zeros(num, bool)), num)
    assert str(one) == "none"
    assert str(estimate(statistics.weighted_mean(np.ones(num)), num)) == (
        "1.000 (1.000 to 1.000)" if num else "none"
    )


def test_many_resamples_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_BLOCK_NUMBERS", 64)
    sizes: list[int] = []

    def metric(weight: np.ndarray) -> np.ndarray:
        sizes.append(len(weight))
        return weight[:, 0]

    estimate(metric, 30, num_resamples=7)
    assert sizes == [1, 2, 2, 2, 1]


def test_calibration_of_true_probabilities_has_a_small_error() -> None:
    rng = np.random.default_rng(2)
    probability = rng.random(20_000)
    bins = calibration(probability, rng.random(20_000) < probability)
    assert sum(bins.counts) == 20_000
    assert len(bins.counts) == 10
    assert bins.error < 0.02
    assert calibration(probability, np.zeros(20_000)).error == pytest.approx(probability.mean())
    assert calibration(np.array([0.0, 1.0]), np.array([0, 1])).error == 0


def test_other_libraries_agree() -> None:
    metrics: Any = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(3)
    score, positive = rng.integers(0, 20, 300) / 20, rng.random(300) < 0.3
    (area,) = statistics.area_under_roc(score, positive)(np.ones((1, 300)))
    assert area == pytest.approx(metrics.roc_auc_score(positive, score))
    false, true, _ = metrics.roc_curve(positive, score, drop_intermediate=False)
    np.testing.assert_allclose(roc_points(score, positive), (false, true))


def test_scipy_agrees_on_the_area() -> None:
    stats: Any = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    score, positive = rng.integers(0, 20, 300) / 20, rng.random(300) < 0.3
    (area,) = statistics.area_under_roc(score, positive)(np.ones((1, 300)))
    won = stats.mannwhitneyu(score[positive], score[~positive]).statistic
    assert area == pytest.approx(won / (positive.sum() * (~positive).sum()))
