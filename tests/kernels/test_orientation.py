"""Orientations and intensities of the gather against the moves of the augmentations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact import bits
from patch_cases import codes_of, move

from ats_stream.errors import InputError
from ats_stream.kernels import ChunkTable, gather_crops, gather_patches
from ats_stream.kernels.orientation import NUM_CODES, flip, parts, quarter_turn, source_size, then, transpose
from ats_stream.sampling.transforms import Flip, Intensity, TransformedSource, Transpose, quarter_turns

CUBE = torch.arange(3 * 4 * 4 * 4, dtype=torch.uint8).view(3, 4, 4, 4)
ONE, NONE = torch.ones(3), torch.full((3,), -0.0)


def shown(code: int) -> torch.Tensor:
    """The cube as the gather moves it."""
    orientation_N = torch.tensor([code], dtype=torch.uint8)
    return gather_crops(CUBE[None], ONE, NONE, orientation_N=orientation_N)[0].to(torch.uint8)


def test_flips_are_those_of_the_augmentation() -> None:
    for axes in [(-1,), (-2,), (-3,), (-1, -3), (-2, -1), (-3, -2, -1)]:
        assert torch.equal(shown(flip(*axes)), Flip(axes).image(CUBE))


def test_exchanges_are_those_of_the_augmentation() -> None:
    for first, second in [(-1, -2), (-2, -3), (-3, -1)]:
        assert torch.equal(shown(transpose(first, second)), Transpose(first, second).image(CUBE))


@pytest.mark.parametrize("axes", [(-2, -1), (-1, -2), (-3, -1), (-3, -2)])
def test_quarter_turns_are_those_of_torch_and_of_the_augmentation(axes: tuple[int, int]) -> None:
    for number in range(-1, 5):
        assert torch.equal(shown(quarter_turn(number, axes)), torch.rot90(CUBE, number, axes))
        moved = CUBE
        for step in quarter_turns(number, *axes):
            moved = step.image(moved)
        assert torch.equal(shown(quarter_turn(number, axes)), moved)


def test_one_move_after_another_is_a_move() -> None:
    for first in range(NUM_CODES):
        for second in range(NUM_CODES):
            assert torch.equal(move(move(CUBE, first), second), move(CUBE, then(first, second)))


def test_the_codes_are_all_different_moves() -> None:
    assert len({tuple(move(CUBE, code).flatten().tolist()) for code in range(NUM_CODES)}) == NUM_CODES
    assert [len(codes_of(num_axes)) for num_axes in (1, 2, 3)] == [2, 8, 48]


class Source:
    """An image in memory that is read like a slide."""

    def __init__(self, image: torch.Tensor) -> None:
        self.image = image
        self.levels = (image,)

    def read_patches(
        self, level: int, offsets: np.ndarray, size: tuple[int, ...], *, fill: float = 0
    ) -> torch.Tensor:
        ones = torch.ones(len(self.image))
        return gather_patches(
            ChunkTable.of_images(self.image[None]),
            torch.zeros(len(offsets), dtype=torch.int64),
            torch.as_tensor(offsets),
            size,
            ones,
            -0.0 * ones,
            fill=fill,
        ).to(torch.uint8)


def test_a_lazy_image_that_is_moved_shows_the_same_patches() -> None:
    """TransformedSource asks for other pixels and moves them; the gather takes both in one step."""
    rng = np.random.default_rng(4)
    image = torch.from_numpy(rng.integers(0, 256, (3, 20, 30), dtype=np.uint8))
    offsets_ND = torch.tensor([[0, 0], [-3, 25], [11, 14], [17, -2]])
    size = (8, 6)
    for number, flipped in [(1, ()), (2, ()), (3, (-1,)), (0, (-2,)), (1, (-2, -1))]:
        steps = [*quarter_turns(number, -2, -1), *([Flip(flipped)] if flipped else [])]
        source, requests, code = Source(image), [], 0
        for step in steps:
            requests.append((step, tuple(source.levels[0].shape[1:])))
            source = TransformedSource(source, step)
            code = then(code, _code_of(step))
        expected = source.read_patches(0, offsets_ND, size, fill=7)
        there_ND, size_there = offsets_ND, size
        for step, space in reversed(requests):
            there_ND, size_there = step.request(there_ND, size_there, space)
        assert size_there == source_size(code, size)
        got = gather_patches(
            ChunkTable.of_images(image[None]),
            torch.zeros(len(offsets_ND), dtype=torch.int64),
            there_ND.contiguous(),
            size,
            ONE,
            NONE,
            fill=7,
            orientation_N=torch.full((len(offsets_ND),), code, dtype=torch.uint8),
        )
        assert torch.equal(got.to(torch.uint8), expected)


def _code_of(step: object) -> int:
    if isinstance(step, Flip):
        return flip(*step.axes)
    assert isinstance(step, Transpose)
    return transpose(step.first, step.second)


@pytest.mark.parametrize("pixels", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_intensity_is_that_of_the_augmentation(pixels: torch.dtype) -> None:
    count = 256 if pixels == torch.uint8 else 65536
    image = torch.arange(count, dtype=torch.int32).to(pixels).view(1, count)
    largest = 1.0 if pixels == torch.float32 else count - 1
    for gain, offset in [(0.8, -0.1), (1.2, 0.1), (1.0, 0.0), (0.9371, 0.0413), (1.1, -0.07)]:
        expected = Intensity(gain, offset).image(image).float()
        intensity_N2 = torch.tensor([[gain, offset * largest]])
        got = gather_crops(image[None], ONE[:1], NONE[:1], intensity_N2=intensity_N2)[0]
        assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flip(0), "axes are counted from the end, -1 to -3, got 0"),
        (lambda: transpose(-1, -4), "got -4"),
        (lambda: quarter_turn(1, (-1, -1)), "must be different ones"),
        (lambda: parts(48), "a number from 0 to 47, got 48"),
        (lambda: source_size(4, (2, 2)), "orientation 4 moves an axis that a patch of 2 axes does not have"),
    ],
)
def test_what_means_nothing_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InputError, match=message):
        call()
