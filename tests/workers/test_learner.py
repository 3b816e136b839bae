"""One optimiser step: the same however it is cut, averaged weights, tasks over several ranks."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from thread_ranks import ThreadRank, make_ranks, side_by_side
from tiny import make_sampler, run_config, visit, weights

from ats_stream.workers.learner import Learner
from ats_stream.workers.ranks import Alone

if TYPE_CHECKING:
    from ats_stream.io import Archive
    from ats_stream.workers import Item

NUM_IMAGES = 4
SURVIVAL_RT = torch.tensor([[3.0, 1], [1, 1], [2, 0], [4, 1]] + [[1.0, 0]] * 8)


def items_of(archive: Archive) -> list[Item]:
    sampler = make_sampler(archive)
    visits = [dataclasses.replace(visit(i), share=1 / NUM_IMAGES) for i in range(NUM_IMAGES)]
    return [sampler.sample(one, weights()) for one in visits]


def learner(
    ranks: Any = None, *, num_outputs: int = 2, target_RT: torch.Tensor | None = None, **trainer: Any
) -> Learner:
    config = run_config(**{"entropy_weight": 0.0, "clip_norm": 1e9, **trainer})
    model = dataclasses.replace(config.model, num_classes=num_outputs)
    target_RT = torch.arange(12.0)[:, None] % 2 if target_RT is None else target_RT
    return Learner(
        dataclasses.replace(config, model=model),
        ranks or Alone(),
        num_steps=10,
        target_RT=target_RT,
        weight_R=torch.linspace(0.5, 1.5, 12),
    )


def gradients(one: Learner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [2, 3, 4, 9])
def test_a_step_in_parts_has_the_gradient_of_the_whole(archive: Archive, accumulate: int) -> None:
    items = items_of(archive)
    whole, parts = learner(), learner(accumulate=accumulate)
    sums, other = whole.step(items), parts.step(items)
    assert sums.keys() == other.keys()
    for name in sums:
        assert other[name] == pytest.approx(sums[name], rel=1e-5), name
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-6)


def test_coxs_gradient_over_two_ranks_is_that_of_one(archive: Archive) -> None:
    items = items_of(archive)
    given: dict[str, Any] = {"task": "survival", "num_outputs": 1, "target_RT": SURVIVAL_RT}
    alone = learner(**given)
    sums = alone.step(items)
    ranks = make_ranks(2)
    learners = [learner(rank, **given) for rank in ranks]
    found: dict[int, dict[str, float]] = {}

    def work(ranks: ThreadRank) -> None:
        found[ranks.rank] = learners[ranks.rank].step(items[2 * ranks.rank : 2 * ranks.rank + 2])

    side_by_side(ranks, work)
    assert found[0]["loss"] + found[1]["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    for each in learners:
        torch.testing.assert_close(gradients(each), gradients(alone), rtol=1e-4, atol=1e-6)


def test_a_bias_that_the_loss_ignores_stays_where_it_is(archive: Archive) -> None:
    """Its gradient is rounding alone, of which the optimiser makes whole steps: they depend on the ranks."""
    items = items_of(archive)
    one = learner(task="survival", num_outputs=1, target_RT=SURVIVAL_RT, lr=0.1)
    for _ in range(3):
        one.step(items)
    assert one.model.head.bias.tolist() == [0.0]
    other = learner(task="survival", num_outputs=1, target_RT=SURVIVAL_RT)
    state = copy.deepcopy(one.state())
    state["model"]["head.bias"] += 1  # as earlier versions trained it
    other.restore(state)
    other.step(items)
    assert other.model.head.bias.tolist() == [1.0]


@pytest.mark.parametrize("task", ["multilabel", "regression", "survival"])
def test_other_tasks_learn(archive: Archive, task: str) -> None:
    items = items_of(archive)
    target = {"multilabel": torch.eye(2)[torch.arange(12) % 2], "survival": SURVIVAL_RT}.get(task)
    one = learner(task=task, num_outputs=2 if task == "multilabel" else 1, target_RT=target)
    losses = [one.step(items)["loss"] for _ in range(8)]
    assert min(losses[-2:]) < losses[0]


def test_the_average_follows_the_weights_by_its_decay(archive: Archive) -> None:
    items = items_of(archive)
    one = learner(average_decay=0.75)
    wanted: dict[str, torch.Tensor] = {}
    for step in range(3):
        one.step(items)
        now = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        # the first step's weights are where it begins
        wanted = now if step == 0 else {n: 0.75 * wanted[n] + 0.25 * now[n] for n in now}
    assert one.best_guess is not one.model
    torch.testing.assert_close(dict(one.best_guess.named_parameters()), wanted)
    assert learner().best_guess.training


def test_a_restored_learner_goes_on_bit_for_bit(archive: Archive) -> None:
    items = items_of(archive)
    given: dict[str, Any] = {"average_decay": 0.9, "schedule": "cosine", "warmup_share": 0.3}
    one, other = learner(**given), learner(**given)
    one.step(items)
    other.restore(copy.deepcopy(one.state()))  # as a file would part them
    for each in (one, other):
        each.step(items)
    assert one.lr == other.lr
    for part in ("model", "average"):
        a, b = one.state()[part], other.state()[part]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), part


def test_mixed_precision_is_for_the_features_alone(archive: Archive) -> None:
    items = items_of(archive)
    plain, mixed = learner(), learner(precision="bfloat16")
    sums, other = plain.step(items), mixed.step(items)
    assert other["sampled_mass"] == sums["sampled_mass"]  # attention is computed as samplers do
    assert other["loss"] != sums["loss"]
    assert other["loss"] == pytest.approx(sums["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_loss_weights_scale_gradients(archive: Archive) -> None:
    items = items_of(archive)
    weighed = learner()
    weighed._weight_R[:] = 2.0
    plain = learner()
    plain._weight_R[:] = 1.0
    weighed.step(items), plain.step(items)
    doubled = {name: 2 * grad for name, grad in gradients(plain).items()}
    torch.testing.assert_close(gradients(weighed), doubled, rtol=1e-4, atol=1e-6)
