"""Losses and metrics of the tasks: against written-out sums, and against scipy where it has them."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from ats_stream.errors import ArchiveError
from ats_stream.io.archive import Archive, ArchiveRow
from ats_stream.workers.tasks import TASKS, area_under_roc, concordance

numbers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])


def archive_of(*labels: str, times: tuple[float, ...] | None = None) -> Archive:
    rows = tuple(
        ArchiveRow(
            slide=f"{n}.zarr",
            label=label,
            split="train",
            line=n + 2,
            time=None if times is None else times[n],
        )
        for n, label in enumerate(labels)
    )
    return Archive(path="t.csv", rows=rows, classes=tuple(sorted(set(labels))))


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=2, max_size=30))
def test_area_under_roc_is_that_of_mann_and_whitney(pairs: list[tuple[float, bool]]) -> None:
    score = torch.tensor([s for s, _ in pairs])
    positive = torch.tensor([p for _, p in pairs])
    area = area_under_roc(score, positive)
    if positive.all() or not positive.any():
        assert area is None
        return
    statistic = mannwhitneyu(score[positive], score[~positive]).statistic
    assert area == pytest.approx(statistic / (positive.sum() * (~positive).sum()).item(), abs=1e-12)


@given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=12))
def test_concordance_counts_the_pairs_whose_order_is_known(
    people: list[tuple[float, float, bool]],
) -> None:
    right = known = 0.0
    for one, other in combinations(people, 2):
        first, second = sorted((one, other), key=lambda p: (p[1], not p[2]))
        if not first[2] or (first[1] == second[1] and second[2]):
            continue  # the earlier one was censored, or both had the event at once
        known += 1
        right += 1.0 if first[0] > second[0] else 0.5 if first[0] == second[0] else 0.0
    risk, time, event = (torch.tensor([p[k] for p in people]) for k in range(3))
    assert concordance(risk, time, event.bool()) == pytest.approx(right / known if known else 0.5)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=9))
def test_coxs_loss_is_the_partial_likelihood_written_out(people: list[tuple[float, float, bool]]) -> None:
    outputs = torch.tensor([[p[0]] for p in people], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[p[1], float(p[2])] for p in people], dtype=torch.float64)
    events = [p for p in people if p[2]]
    wanted = sum(math.log(sum(math.exp(q[0]) for q in people if q[1] >= p[1])) - p[0] for p in events) / max(
        1, len(events)
    )
    loss = TASKS["survival"].loss(outputs, target).mean()
    assert loss.item() == pytest.approx(wanted, abs=1e-12)
    loss.backward()
    assert outputs.grad is not None
    # adding one number to all risks changes nothing
    assert float(outputs.grad.sum()) == pytest.approx(0, abs=1e-12)


def test_targets_of_each_task() -> None:
    table = archive_of("b", "a", "b")
    assert TASKS["classification"].targets(table, ("a", "b")) == [[1], [0], [1]]
    several = archive_of("x; y", "y", ";")
    assert TASKS["multilabel"].outputs(several) == ("x", "y")
    assert TASKS["multilabel"].targets(several, ("x", "y")) == [[1, 1], [0, 1], [0, 0]]
    assert TASKS["regression"].targets(archive_of("1.5", "-2"), ("value",)) == [[1.5], [-2]]
    assert TASKS["survival"].targets(archive_of("1", "0", times=(3, 4)), ("log hazard ratio",)) == [
        [3, 1],
        [4, 0],
    ]


@pytest.mark.parametrize(
    ("task", "table", "says"),
    [
        ("classification", archive_of("a", "c"), r"t\.csv:3: unknown label 'c'; the model knows \['a'\]"),
        ("multilabel", archive_of("a", "a;c"), r"t\.csv:3: unknown label 'c'"),
        ("regression", archive_of("1", "high"), r"t\.csv:3: regression needs a number as label, got 'high'"),
        ("regression", archive_of("nan"), r"t\.csv:2: regression needs a number as label, got 'nan'"),
        ("survival", archive_of("1"), r"t\.csv: survival needs the column 'time'"),
        ("survival", archive_of("2", times=(1,)), r"t\.csv:2: the event must be 0 or 1 in survival, got '2'"),
    ],
)
def test_labels_that_do_not_fit_are_named(task: str, table: Archive, says: str) -> None:
    with pytest.raises(ArchiveError, match=says):
        TASKS[task].targets(table, ("a",))


def test_numbers_of_a_perfect_and_a_reversed_model() -> None:
    value = torch.tensor([[0.0], [1.0], [2.0]])
    assert TASKS["regression"].numbers(value, value) == {"loss": 0, "mae": 0, "r2": 1}
    sides = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    found = TASKS["classification"].numbers(sides, torch.tensor([[0.0], [1.0]]))
    assert (found["accuracy"], found["auroc"]) == (1, 1)
    found = TASKS["multilabel"].numbers(sides - 2, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert (found["accuracy"], found["auroc"]) == (0, 0)


@pytest.mark.parametrize("name", TASKS)
def test_which_losses_a_shift_of_all_outputs_leaves_alone(name: str) -> None:
    task = TASKS[name]
    outputs_BK = torch.tensor([[0.5], [-1.0], [2.0]]).double()
    target_BT = torch.tensor([[3.0, 1], [1, 1], [2, 0]])
    if name == "classification":  # the shift of one class, not of all
        outputs_BK = torch.cat([outputs_BK, torch.zeros_like(outputs_BK)], 1)
        target_BT = torch.tensor([[0.0], [1], [1]])
    elif name != "survival":
        target_BT = target_BT[:, 1:]
    shift_K = torch.eye(outputs_BK.shape[1])[0] * 5
    before, after = (task.loss(o, target_BT.to(o.dtype)) for o in (outputs_BK, outputs_BK + shift_K))
    assert torch.allclose(before, after, rtol=1e-12) is task.ignores_shift
