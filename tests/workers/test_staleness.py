"""Lag is unbiased where the method is: the mean gradient over all draws, through sampler, stream and learner.

The loss is linear in F and the view has few positions, so all draws are made, by as many seeds as it takes,
and each is weighed by its exact chance.
Shapes: M positions, N draws.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from tiny import MODEL, run_config
from tiny import attention as sharp_attention

from ats_stream.io import PyramidWriter
from ats_stream.sampling import estimator_weights
from ats_stream.workers import AttentionWeights, Item, PatchSampler, Plan, SamplerConfig, Stream
from ats_stream.workers.executors import SerialExecutor
from ats_stream.workers.learner import Learner
from ats_stream.workers.ranks import Alone

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from ats_stream.models import AttentionNet

VIEW_YX, SCALE = (2, 3), 8
M, N = 6, 2
STEP, LAG = 9, 4
NUM_SEEDS = 500
FLATTEN = 0.1
Draw = tuple[int, ...]


def attention(version: int) -> AttentionNet:
    """A network of its own for each version, flat enough that every draw comes within some hundred seeds."""
    net = sharp_attention(version)
    with torch.no_grad():
        list(net.parameters())[-1].mul_(FLATTEN)
    return net


def weights(version: int) -> AttentionWeights:
    """The weights of :func:`attention`."""
    return AttentionWeights.of({name: t.numpy() for name, t in attention(version).state_dict().items()})


class LinearTask:
    """A loss that is linear in the outputs, hence in F."""

    needs_whole_batch = False
    ignores_shift = False

    def loss(self, outputs_BK: Tensor, _target_BT: Tensor) -> Tensor:
        return outputs_BK @ torch.tensor([1.0, -2.0])


class Problem(NamedTuple):
    """An image of M positions, and the learner whose attention is that of STEP."""

    slide: str
    learner: Learner


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    rng = np.random.default_rng(3)
    target = tmp_path_factory.mktemp("image") / "one.ome.zarr"
    shapes = [(3, *(SCALE * n for n in VIEW_YX)), (3, *VIEW_YX)]
    with PyramidWriter(target, level_shapes=shapes, dtype="uint8") as writer:
        for level, shape in enumerate(shapes):
            writer.write_shard(level, (0, 0), rng.integers(0, 256, shape).astype(np.uint8))
    config = run_config(entropy_weight=0.0, clip_norm=1e9)
    learner = Learner(config, Alone(), num_steps=99, target_RT=torch.zeros(1, 1), weight_R=torch.ones(1))
    learner.task = LinearTask()  # type: ignore[assignment]  # all that a step asks for
    learner.model.attention.load_state_dict(attention(STEP).state_dict())
    return Problem(str(target), learner)


def item_of(problem: Problem, *, lag: int, seed: int, num_patches: int = N) -> Item:
    """What the stream brings for STEP, drawn with the version that the lag says."""
    config = SamplerConfig(num_patches=num_patches, patch_px=SCALE, view_downsample=SCALE, seed=seed)
    sampler = PatchSampler([problem.slide], [0], MODEL, config)
    plan = Plan(images=(0,), batch_size=1, num_epochs=STEP + 1, seed=0, lag=lag)
    stream = Stream(plan, SerialExecutor(sampler), start_step=STEP)
    version = plan.version_of(STEP)
    stream.restore({version: weights(version)})
    (item,) = stream.next_step()
    assert item.attention_key == weights(STEP - lag).key
    return item


def gradient_of(problem: Problem, item: Item) -> tuple[Tensor, Tensor]:
    """Gradients of a step on one item: of the attention network, and of the feature network."""
    model = problem.learner.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    problem.learner.step([item])
    model.load_state_dict(before)
    found = [
        torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])
        for net in (model.attention, model.features)
    ]
    return found[0], found[1]


def attention_of(version: int, item: Item) -> Tensor:
    """Attention (M,) of a version."""
    view_1CYX = torch.from_numpy(item.view_CYX.copy())[None]
    with torch.no_grad():
        return attention(version)(view_1CYX).double().flatten().softmax(0)


def chance(q_M: Tensor, draw: Draw) -> float:
    """Of drawing just these positions in this order, without replacement."""
    found, left = 1.0, 1.0
    for position in draw:
        found, left = found * float(q_M[position]) / left, left - float(q_M[position])
    return found


class Draws(NamedTuple):
    """An item of each ordered draw, and how often it came."""

    items: Mapping[Draw, Item]
    counts: Mapping[Draw, int]

    @classmethod
    def of(cls, problem: Problem, *, lag: int, num_seeds: int) -> Draws:
        items: dict[Draw, Item] = {}
        counts: dict[Draw, int] = {}
        for seed in range(num_seeds):
            item = item_of(problem, lag=lag, seed=seed)
            draw = tuple(item.index_N.tolist())
            items.setdefault(draw, item)
            counts[draw] = counts.get(draw, 0) + 1
        return cls(items, counts)


@pytest.fixture(scope="module")
def stale(problem: Problem) -> Draws:
    return Draws.of(problem, lag=LAG, num_seeds=NUM_SEEDS)


@pytest.fixture(scope="module")
def exact(problem: Problem) -> tuple[Tensor, Tensor]:
    """The gradient without any chance: every position is drawn."""
    return gradient_of(problem, item_of(problem, lag=0, seed=0, num_patches=M))


def unchanged(item: Item) -> Item:
    return item


def with_weight(item: Item, weight_N: Tensor) -> Item:
    return dataclasses.replace(item, weight_N=weight_N.float().numpy())


def weighed_as_fresh(item: Item) -> Item:
    """R as if the present attention had drawn."""
    a_1N = attention_of(STEP, item)[torch.from_numpy(item.index_N.copy())][None]
    return with_weight(item, estimator_weights(a_1N, "murthy")[0])


def not_weighed(item: Item) -> Item:
    """No R: the attention of what was drawn is made to sum to 1."""
    a_N = attention_of(STEP, item)[torch.from_numpy(item.index_N.copy())]
    return with_weight(item, (1 / a_N.sum()).expand(N))


CHANGES = (weighed_as_fresh, not_weighed)


def relative_error(
    problem: Problem, draws: Draws, exact: tuple[Tensor, Tensor], change: Callable[[Item], Item] = unchanged
) -> float:
    """Of the expectation over the draws of the stale attention, the larger of the two networks."""
    assert len(draws.items) == M * (M - 1)  # every one
    q_M = attention_of(STEP - LAG, next(iter(draws.items.values())))
    chances = [chance(q_M, draw) for draw in draws.items]
    assert sum(chances) == pytest.approx(1, abs=1e-9)
    parts = [gradient_of(problem, change(item)) for item in draws.items.values()]
    errors = []
    for part_SP, exact_P in zip(zip(*parts, strict=True), exact, strict=True):
        mean_P = torch.tensor(chances).double() @ torch.stack(part_SP)
        errors.append(float((mean_P - exact_P).norm() / exact_P.norm()))
    return max(errors)


def test_with_a_lag_the_mean_gradient_is_exact(
    problem: Problem, stale: Draws, exact: tuple[Tensor, Tensor]
) -> None:
    assert relative_error(problem, stale, exact) < 2e-5


@pytest.mark.parametrize("change", CHANGES)
def test_without_the_correction_it_is_not(
    problem: Problem, stale: Draws, exact: tuple[Tensor, Tensor], change: Callable[[Item], Item]
) -> None:
    assert relative_error(problem, stale, exact, change) > 0.1


def worst_deviation(
    problem: Problem, draws: Draws, exact: tuple[Tensor, Tensor], change: Callable[[Item], Item] = unchanged
) -> float:
    """Of the mean gradient of the attention over the seeds: the largest, in standard errors."""
    share_S = torch.tensor([draws.counts[draw] / NUM_SEEDS for draw in draws.items]).double()
    gradient_SP = torch.stack([gradient_of(problem, change(item))[0] for item in draws.items.values()])
    mean_P = share_S @ gradient_SP
    error_P = (share_S @ (gradient_SP - mean_P).square() / NUM_SEEDS).sqrt()
    moves_P = error_P > 1e-6 * error_P.max()
    return float(((mean_P - exact[0]).abs() / error_P)[moves_P].max())


def test_over_many_seeds_it_is_the_synchronous_one_within_its_standard_error(
    problem: Problem, stale: Draws, exact: tuple[Tensor, Tensor]
) -> None:
    synchronous = Draws.of(problem, lag=0, num_seeds=NUM_SEEDS)
    assert worst_deviation(problem, synchronous, exact) < 4
    assert worst_deviation(problem, stale, exact) < 4
    assert worst_deviation(problem, stale, exact, weighed_as_fresh) > 6
    assert worst_deviation(problem, stale, exact, not_weighed) > 6
