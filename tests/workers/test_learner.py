"""One optimiser step: the same however it is cut, averaged weights, tasks over several ranks."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
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


class Pair(Alone):
    """Two ranks in two threads, which hand each other what they gather."""

    world_size = 2

    def __init__(self, rank: int, board: dict[int, Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.board, self.barrier = rank, board, barrier

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self.board[self.rank] = values.detach()
        self.barrier.wait(60)
        parts = [self.board[0], self.board[1]]
        self.barrier.wait(60)
        parts[self.rank] = values
        return torch.cat(parts)


def test_coxs_gradient_over_two_ranks_is_that_of_one(archive: Archive) -> None:
    items = items_of(archive)
    given: dict[str, Any] = {"task": "survival", "num_outputs": 1, "target_RT": SURVIVAL_RT}
    alone = learner(**given)
    sums = alone.step(items)
    board: dict[int, Any] = {}
    barrier = threading.Barrier(2)
    ranks = [learner(Pair(rank, board, barrier), **given) for rank in range(2)]
    found: dict[int, dict[str, float]] = {}

    def work(rank: int) -> None:
        try:
            found[rank] = ranks[rank].step(items[2 * rank : 2 * rank + 2])
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0]["loss"] + found[1]["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    one, other = gradients(ranks[0]), gradients(ranks[1])
    # Distributed training takes the mean over the ranks
    mean = {name: (one[name] + other[name]) / 2 for name in one}
    torch.testing.assert_close(mean, gradients(alone), rtol=1e-4, atol=1e-6)


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
