"""Augmentations: both resolutions move alike, and a lazy image answers with the pixels of the moved one.

Shapes: B rows, D axes of space.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.sampling import (
    Compose,
    RandomFlip,
    RandomIntensity,
    RandomPan,
    RandomQuarterTurn,
    SampleSoftmax,
    TransformedSource,
    attention_sampling,
    cut_patches,
)
from ats_stream.sampling.transforms import Flip, Intensity, Pan, Transpose, quarter_turns

NEVER = -math.inf
SCALE = 4
SPATIAL = (RandomFlip(), RandomPan(3, fill=7), RandomQuarterTurn())
EVERYTHING = (
    *SPATIAL,
    RandomIntensity(),
    RandomPan((0, 2), p=1.0),
    Compose(RandomIntensity(p=1.0), RandomPan(2, fill=5), RandomQuarterTurn(), RandomFlip((0,)), seed=3),
)


class ArraySource:
    """A lazy source over an array (C, *space)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.levels = np.asarray(array), (np.asarray(array),)

    def read_patches(self, level, offsets, size, *, fill=0):
        assert isinstance(offsets, np.ndarray)
        assert isinstance(fill, int)
        assert level == 0
        out = np.full((len(offsets), len(self.array), *size), fill, self.array.dtype)
        for patch, start in zip(out, offsets, strict=True):
            inside = [
                (max(int(a), 0), min(int(a) + s, n))
                for a, s, n in zip(start, size, self.array.shape[1:], strict=True)
            ]
            if all(first < last for first, last in inside):
                target = tuple(slice(f - int(a), e - int(a)) for (f, e), a in zip(inside, start, strict=True))
                patch[(slice(None), *target)] = self.array[(slice(None), *(slice(f, e) for f, e in inside))]
        return out


def mean_of_blocks(x_high: Tensor, scale: int = SCALE) -> Tensor:
    """The low-resolution view; exact, since pixels are small whole numbers."""
    num_axes = x_high.ndim - 2
    split = [part for size in x_high.shape[2:] for part in (size // scale, scale)]
    return x_high.reshape(*x_high.shape[:2], *split).mean(dim=tuple(range(3, 3 + 2 * num_axes, 2)))


def images(space: tuple[int, ...] = (6, 6), batch: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """View, image and log-prior (of the view's size)."""
    generator = torch.Generator().manual_seed(0)
    size = (batch, 2, *(SCALE * n for n in space))
    x_high = torch.randint(0, 256, size, generator=generator).float()
    log_prior = torch.where(torch.rand(batch, *space, generator=generator) < 0.4, NEVER, 0.0)
    return mean_of_blocks(x_high), x_high, log_prior


def some_patches(x_high: Tensor | list, num_axes: int, batch: int = 12) -> Tensor:
    """Patches in the image, over its borders and outside of it."""
    offsets_BND = torch.randint(-9, 28, (batch, 30, num_axes), generator=torch.Generator().manual_seed(1))
    return cut_patches(x_high, offsets_BND, (5, 7, 4)[:num_axes], fill=3)


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16])
def test_lazy_patches_are_those_of_the_augmented_tensor(augmentation, dtype):
    x_low, x_high, log_prior = images()
    x_high = x_high.to(dtype)
    sources = [ArraySource(row.numpy()) for row in x_high]
    step = augmentation.step.clone()
    dense = augmentation(x_low, x_high, log_prior)
    augmentation.step.copy_(step)
    lazy = augmentation(x_low, sources, log_prior)
    augmentation.step.copy_(step)
    assert torch.equal(dense[0], lazy[0])
    assert torch.equal(dense[2], lazy[2])
    expected, patches = some_patches(dense[1], 2), some_patches(lazy[1], 2)
    assert patches.dtype == dtype
    assert torch.equal(patches, expected)
    assert not torch.equal(expected, some_patches(x_high, 2))


@pytest.mark.parametrize(
    ("augmentation", "num_axes"),
    [(one, n) for one in SPATIAL for n in (1, 2, 3) if n > 1 or not isinstance(one, RandomQuarterTurn)],
    ids=lambda one: one if isinstance(one, int) else type(one).__name__,
)
def test_both_resolutions_and_the_prior_move_alike(augmentation, num_axes):
    x_low, x_high, log_prior = images((6,) * num_axes)
    # the prior of a view that shows where it is: both carry the same picture
    log_prior = torch.where(log_prior == 0, x_low[:, 0], NEVER)
    low, high, prior = augmentation(x_low, x_high, log_prior)
    assert torch.equal(mean_of_blocks(high), low)
    drawable = prior > NEVER
    assert torch.equal(prior[drawable], low[:, 0][drawable])
    sources = [ArraySource(row.numpy()) for row in x_high]
    augmentation.step -= 1
    _, lazy, _ = augmentation(x_low, sources, log_prior)
    assert torch.equal(some_patches(lazy, num_axes), some_patches(high, num_axes))
    if isinstance(augmentation, RandomPan):
        assert int(drawable.sum()) < int((log_prior > NEVER).sum())  # some were pushed out
    else:
        assert int(drawable.sum()) == int((log_prior > NEVER).sum())


def test_every_flip_and_turn_comes_up():
    x_low, x_high, _ = images(batch=200)
    for augmentation, expected in (
        (RandomFlip(), {(), (2,), (3,), (2, 3)}),
        (RandomFlip((-1,)), {(), (3,)}),
    ):
        low, high, prior = augmentation(x_low, x_high)
        assert prior is None
        seen = set()
        for row in range(200):
            (axes,) = [
                axes
                for axes in ((), (2,), (3,), (2, 3))
                if torch.equal(low[row], x_low[row : row + 1].flip(axes)[0])
            ]
            assert torch.equal(high[row], x_high[row : row + 1].flip(axes)[0])
            seen.add(axes)
        assert seen == expected
    low, _, _ = RandomQuarterTurn()(x_low, x_high)
    turns = [
        [k for k in range(4) if torch.equal(low[row], x_low[row].rot90(k, (1, 2)))] for row in range(200)
    ]
    assert {tuple(one) for one in turns} == {(0,), (1,), (2,), (3,)}


@pytest.mark.parametrize("number", range(-4, 5))
def test_quarter_turns_are_those_of_rot90(number):
    x = torch.arange(24).view(2, 3, 4)
    moved = x
    for move in quarter_turns(number, -2, -1):
        assert move.space(moved.shape[1:]) == move.image(moved).shape[1:]
        moved = move.image(moved)
    assert torch.equal(moved, x.rot90(number, (-2, -1)))


def test_what_is_not_square_is_turned_by_halves_but_lazy_images_may_be_of_any_shape():
    x_low, x_high, _ = images((6, 5), batch=40)
    low, _, _ = RandomQuarterTurn()(x_low, x_high)
    assert all(
        torch.equal(one, before) or torch.equal(one, before.rot90(2, (1, 2)))
        for one, before in zip(low, x_low, strict=True)
    )
    sources = [ArraySource(row.numpy()) for row in x_high]
    square = x_low[:, :, :5, :5]
    low, lazy, _ = RandomQuarterTurn()(square, sources)
    seen = set()
    for row, source in enumerate(lazy):
        number = next(k for k in range(4) if torch.equal(low[row], square[row].rot90(k, (1, 2))))
        turned = x_high[row].rot90(number, (1, 2))
        assert tuple(source.levels[0].shape) == tuple(turned.shape)
        assert torch.equal(some_patches([source], 2, 1), some_patches(turned[None], 2, 1))
        seen.add(number)
    assert seen == {0, 1, 2, 3}


def shifts_of(x: Tensor, moved: Tensor, most: int) -> set[int]:
    return {s for s in range(-most, most + 1) if torch.equal(Pan((s,), 0.0).image(x), moved)}


@pytest.mark.parametrize(
    ("view", "space", "unit"),
    [(12, 48, (1, 4)), (18, 150, (3, 25)), (13, 100, (1, 8)), (12, 12, (1, 1)), (12, 18, (2, 3))],
)
def test_pans_are_whole_at_both_resolutions(view, space, unit):
    # a view of 13 is a level of a pyramid over 100: ceil(100 / 8)
    x_low = torch.arange(1.0, view + 1).expand(100, 1, -1)
    x_high = torch.arange(1.0, space + 1).expand(100, 1, -1)
    low, high, _ = RandomPan(7, p=1.0)(x_low, x_high)
    seen = set()
    for row in range(100):
        (shift,) = shifts_of(x_low[row], low[row], 7)
        assert shift % unit[0] == 0
        assert shifts_of(x_high[row], high[row], 150) == {shift // unit[0] * unit[1]}
        seen.add(shift)
    assert seen == set(range(-(7 // unit[0]) * unit[0], 8, unit[0]))


def test_a_prior_of_larger_cells_is_panned_by_whole_cells():
    x_low, x_high, _ = images((8, 8), batch=50)
    prior = torch.zeros(50, 2, 2)
    prior[:, 0, 0] = 1
    low, _, moved = RandomPan(4, p=1.0)(x_low, x_high, prior)
    seen = set()
    for row in range(50):
        (shift,) = [
            (y, x)
            for y in (-4, 0, 4)
            for x in (-4, 0, 4)
            if torch.equal(Pan((y, x), 0.0).image(x_low[row]), low[row])
        ]
        assert torch.equal(moved[row], Pan((shift[0] // 4, shift[1] // 4), NEVER).image(prior[row]))
        seen.add(shift)
    assert len(seen) == 9
    # valid convolutions lose cells, so the stride must be told
    narrow = torch.zeros(50, 3, 3)
    with pytest.raises(InputError, match=r"prior \(3, 3\) over a view \(8, 8\) needs map_stride"):
        RandomPan(4)(x_low, x_high, narrow)
    assert RandomPan(4, map_stride=2)(x_low, x_high, narrow)[2].shape == narrow.shape


def test_a_pan_that_would_leave_nothing_to_draw_is_not_made():
    x_low, x_high, _ = images(batch=100)
    prior = torch.full((100, 6, 6), NEVER)
    prior[:, 5, 5] = 0
    low, _, moved = RandomPan(2, p=1.0)(x_low, x_high, prior)
    assert bool((moved.flatten(1) == 0).any(dim=1).all())
    stayed = [torch.equal(one, before) for one, before in zip(low, x_low, strict=True)]
    assert 0 < sum(stayed) < 100


def test_intensity_is_one_line_per_row():
    x_low, x_high, _ = images()
    low, high, _ = RandomIntensity((0.5, 2.0), (-0.5, 0.5), p=0.7, max_value=255.0)(x_low, x_high)
    changed = 0
    for row in range(12):
        ones = torch.ones(2)
        points = torch.stack([x_high[row].flatten()[:2].double(), ones.double()], dim=1)
        gain, offset = torch.linalg.solve(points, high[row].flatten()[:2].double()).tolist()
        torch.testing.assert_close(low[row], x_low[row] * gain + offset, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(high[row], x_high[row] * gain + offset, rtol=1e-4, atol=1e-2)
        assert 0.499 < gain < 2.001
        assert abs(offset) < 128
        changed += not torch.equal(high[row], x_high[row])
    assert 0 < changed < 12


def test_intensity_of_integers_rounds_to_even_and_stays_in_range():
    pixels = torch.tensor([0, 1, 2, 3, 200, 255], dtype=torch.uint8)
    assert Intensity(0.5, 0.0).image(pixels).tolist() == [0, 0, 1, 2, 100, 128]
    assert Intensity(2.0, -1.0).image(pixels).tolist() == [0, 0, 0, 0, 145, 255]
    signed = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    assert torch.equal(Intensity(1.0, 0.0).image(signed), signed)


def test_noise_is_that_of_seed_and_step_and_evaluation_changes_nothing():
    x_low, x_high, log_prior = images()

    def run(augmentation):
        return augmentation(x_low, x_high, log_prior)[0]

    first = RandomPan(3, seed=4)
    one, two = run(first), run(first)
    assert not torch.equal(one, two)
    assert torch.equal(run(RandomPan(3, seed=4)), one)
    assert not torch.equal(run(RandomPan(3, seed=5)), one)
    resumed = RandomPan(3)
    first.step -= 1
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(run(resumed), two)
    for augmentation in EVERYTHING:
        augmentation.eval()
        low, high, prior = augmentation(x_low, x_high, log_prior)
        augmentation.train()
        assert low is x_low
        assert high is x_high
        assert prior is log_prior


def test_parts_of_a_composition_take_numbers_of_their_own():
    x_low, x_high, _ = images(batch=64)
    half = Compose(RandomFlip((0,)), RandomFlip((0,)))
    low, _, _ = half(x_low, x_high)
    stayed = sum(torch.equal(one, before) for one, before in zip(low, x_low, strict=True))
    assert 16 < stayed < 48  # the same numbers twice would undo every flip


def test_a_row_does_not_depend_on_its_batch():
    x_low, x_high, log_prior = images()
    for augmentation in EVERYTHING:
        step = augmentation.step.clone()
        whole = augmentation(x_low, x_high, log_prior)
        augmentation.step.copy_(step)
        part = augmentation(x_low[:3], x_high[:3], log_prior[:3])
        assert all(torch.equal(one, other[:3]) for one, other in zip(part, whole, strict=True))


def test_gradients_pass_through():
    x_low, x_high, _ = images()
    x_high.requires_grad_()
    for augmentation in EVERYTHING:
        (gradient,) = torch.autograd.grad(augmentation(x_low, x_high)[1].sum(), x_high)
        assert bool((gradient > 0).any())


def test_the_method_sees_the_same_lazily_and_dense():
    x_low, x_high, log_prior = images()

    class Means(nn.Module):
        patch_size = 5

        def forward(self, patches: Tensor) -> Tensor:
            return patches.flatten(2).mean(dim=2)

    torch.manual_seed(0)
    attention = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1), SampleSoftmax(squeeze_channels=True))
    model = attention_sampling(attention, Means(), n_patches=4, seed=1)
    augmentation = Compose(*EVERYTHING[:-1], seed=9)
    dense = model.eval()(*augmentation(x_low / 255, x_high, log_prior))
    augmentation.step.zero_()
    sources = [ArraySource(row.numpy()) for row in x_high]
    lazy = model(*augmentation(x_low / 255, sources, log_prior))
    assert all(torch.equal(one, other) for one, other in zip(dense, lazy, strict=True))


def test_nested_sources_equal_nested_moves_in_3_d():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 200, (1, 2, 9, 7, 8), generator=generator, dtype=torch.uint8)
    moves = [
        Transpose(-3, -1),
        Flip((-2,)),
        Pan((3, -2, 0), 5),
        Intensity(1.5, 0.1),
        *quarter_turns(3, -3, -2),
    ]
    source, moved = ArraySource(x[0].numpy()), x[0]
    for move in moves:
        source, moved = TransformedSource(source, move), move.image(moved)
    assert torch.equal(some_patches([source], 3, 1), some_patches(moved[None], 3, 1))
    with pytest.raises(InputError, match="level 0 alone, got 1"):
        source.read_patches(1, np.zeros((1, 3), np.int64), (2, 2, 2))


def test_bad_input():
    x_low, x_high, log_prior = images()
    with pytest.raises(InputError, match=r"p must be a probability, got 1\.5"):
        RandomFlip(p=1.5)
    with pytest.raises(InputError, match=r"gain must be an interval .* \(2, 1\)"):
        RandomIntensity((2, 1))
    with pytest.raises(InputError, match=r"offset must be an interval .*nan"):
        RandomIntensity(offset=(float("nan"), 1.0))
    with pytest.raises(InputError, match=r"pixels must be at least 0 .* \(1, -1\)"):
        RandomPan((1, -1))
    with pytest.raises(InputError, match="map_stride must be at least 1, got 0"):
        RandomPan(1, map_stride=0)
    with pytest.raises(InputError, match=r"pixels \(1,\) must have one value for each of the 2 axes"):
        RandomPan((1,))(x_low, x_high)
    with pytest.raises(
        InputError, match=r"up to 2 view pixels .* view of 5 .* image of 24 .* multiples of 5"
    ):
        RandomPan(2)(x_low[:, :, :5], x_high)
    with pytest.raises(InputError, match=r"axes \(0, 2\) must be different ones of 2"):
        RandomFlip((0, 2))(x_low, x_high)
    with pytest.raises(InputError, match=r"axes \(-2, -1\) must be different ones of 1"):
        RandomQuarterTurn()(x_low[..., 0], x_high[..., 0])
    with pytest.raises(InputError, match="x_high has 11 rows, but 12"):
        RandomFlip()(x_low, x_high[1:])
    with pytest.raises(
        InputError, match=r"log_prior must be \(B, \*map\) with B = 12 and 2 axes, got \(11, 6, 6\)"
    ):
        RandomFlip()(x_low, x_high, log_prior[1:])
