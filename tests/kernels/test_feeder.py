"""The feeder over copies that are as late as they may be, and the pool of resident chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from lazy_copies import LazyCopies
from patch_cases import random_pixels

from ats_stream.errors import InputError
from ats_stream.kernels import gather_patches
from ats_stream.kernels.feeder import DeviceFeeder
from ats_stream.kernels.resident import ChunkedImage, ResidentChunks

if TYPE_CHECKING:
    from collections.abc import Hashable

CPU = torch.device("cpu")


def batch(number: int) -> list[torch.Tensor]:
    return [
        torch.full((3, 5), number, dtype=torch.uint8),
        torch.tensor([number, -number]),
        torch.full((2, 2), number / 8, dtype=torch.bfloat16),
        torch.full((7,), number, dtype=torch.uint16),
        torch.tensor(float(number)),
    ]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_batches_arrive_as_they_were_staged(depth: int) -> None:
    copies = LazyCopies()
    feeder = DeviceFeeder(CPU, depth=depth, copies=copies)
    assert feeder.copies_ahead
    staged = feeder.stage(batch(0))
    for number in range(7):
        tensors = batch(number + 1)
        following = feeder.stage(tensors)
        for tensor in tensors:
            tensor.zero_()  # the caller's memory is free at once
        assert_same(staged.take(), batch(number))
        staged = following
    assert_same(staged.take(), batch(7))


def test_pinned_memory_is_allocated_once_and_waited_for_before_it_is_written_again() -> None:
    copies = LazyCopies()
    feeder = DeviceFeeder(CPU, depth=2, copies=copies)
    for number in range(4):
        feeder.stage(batch(number)).take()
    size = 5 * 256
    once = [f"pin {size}", "begin", "follow"]
    assert copies.log == [*once, *once, *["wait", "begin", "follow"] * 2]
    feeder.stage([torch.zeros(10000, dtype=torch.uint8)])  # larger: a larger piece
    assert copies.log[-3:] == ["wait", "pin 10240", "begin"]


def test_many_batches_may_be_on_their_way_at_once() -> None:
    # their copies on the device are their own; only the ring is shared, and the host waits for it
    feeder = DeviceFeeder(CPU, depth=2, copies=LazyCopies())
    staged = [feeder.stage(batch(number)) for number in range(6)]
    for number in reversed(range(6)):
        assert_same(staged[number].take(), batch(number))


def test_without_copies_the_memory_is_lent_until_it_is_released() -> None:
    copies = LazyCopies()
    feeder = DeviceFeeder(CPU, feed="zero_copy", depth=2, copies=copies)
    first, second = feeder.stage(batch(1)), feeder.stage(batch(2))
    assert_same(first.take(), batch(1))
    with pytest.raises(InputError, match="all 2 batches of the ring are in use"):
        feeder.stage(batch(3))
    first.release()
    third = feeder.stage(batch(3))
    assert_same(second.take(), batch(2))
    assert_same(third.take(), batch(3))
    assert copies.log == ["pin 1280", "pin 1280", "mark", "wait"]


@pytest.mark.parametrize("feed", ["crops", "zero_copy"])
@pytest.mark.parametrize("copies", [None, LazyCopies()], ids=["cpu", "lazy copies"])
def test_memory_may_be_written_in_place(feed: str, copies: LazyCopies | None) -> None:
    feeder = DeviceFeeder(CPU, feed=feed, copies=copies)
    for number in range(5):
        wanted = batch(number)
        reserved = feeder.reserve([(tensor.shape, tensor.dtype) for tensor in wanted])
        for tensor, value in zip(reserved.tensors, wanted, strict=True):
            tensor.copy_(value)
        staged = reserved.stage()
        assert_same(staged.take(), wanted)
        staged.release()


@pytest.mark.parametrize("feed", ["crops", "zero_copy"])
def test_on_the_cpu_the_tensors_are_handed_over_as_they_are(feed: str) -> None:
    feeder = DeviceFeeder(CPU, feed=feed)
    assert not feeder.copies_ahead
    tensors = batch(3)
    staged = feeder.stage(tensors)
    assert all(one is other for one, other in zip(staged.take(), tensors, strict=True))
    staged.release()


def test_what_cannot_be_fed_is_refused() -> None:
    with pytest.raises(InputError, match="feed is 'chunks', expected one of crops, zero_copy"):
        DeviceFeeder(CPU, feed="chunks")
    with pytest.raises(InputError, match="depth is 0, expected at least 1"):
        DeviceFeeder(CPU, depth=0)
    feeder = DeviceFeeder(CPU)
    with pytest.raises(InputError, match=r"shape \(3, 2\) on cpu with strides \(1, 3\) cannot be staged"):
        feeder.stage([torch.zeros(2, 3).t()])
    with pytest.raises(InputError, match="on meta"):
        feeder.stage([torch.zeros(2, device="meta")])


# ---- chunks that stay ----

SIDE = 8  # of a chunk


class Image:
    """An image in chunks that counts how often each is decoded."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.pixels_CYX = random_pixels(np.random.default_rng(3), dtype, (2, 30, 40))
        self.decoded: list[Hashable] = []

    def keys(self, offsets_ND: list[list[int]], patch: int) -> list[Hashable | None]:
        """Names of the chunks that patches touch; None for the others."""
        touched = set()
        for y, x in offsets_ND:
            for cy in range(y // SIDE, (y + patch - 1) // SIDE + 1):
                touched |= {(cy, cx) for cx in range(x // SIDE, (x + patch - 1) // SIDE + 1)}
        return [(cy, cx) if (cy, cx) in touched else None for cy in range(4) for cx in range(5)]

    def fetch(self, keys: list[Hashable]) -> list[torch.Tensor]:
        self.decoded += keys
        chunks = []
        for cy, cx in keys:  # type: ignore[misc]  # keys of this image
            chunk = torch.zeros(2, SIDE, SIDE, dtype=self.pixels_CYX.dtype)
            part = self.pixels_CYX[:, cy * SIDE : (cy + 1) * SIDE, cx * SIDE : (cx + 1) * SIDE]
            chunk[:, : part.shape[1], : part.shape[2]] = part
            chunks.append(chunk)
        return chunks


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
@pytest.mark.parametrize("copies", [None, LazyCopies()], ids=["cpu", "lazy copies"])
def test_patches_of_resident_chunks_are_those_of_the_image(
    copies: LazyCopies | None, dtype: torch.dtype
) -> None:
    image = Image(dtype)
    feeder = DeviceFeeder(CPU, copies=copies)
    pool = ResidentChunks(
        CPU, num_slots=9, chunk_shape=(SIDE, SIDE), num_channels=2, dtype=dtype, feeder=feeder
    )
    one, none = torch.ones(2), torch.zeros(2)
    rng = np.random.default_rng(5)
    for _ in range(20):
        offsets = rng.integers(0, 20, (2, 2)).tolist()
        table = pool.table([ChunkedImage((30, 40), image.keys(offsets, 9))], image.fetch)
        got = gather_patches(
            table, torch.zeros(2, dtype=torch.int64), torch.tensor(offsets), (9, 9), one, none
        )
        for patch, (y, x) in zip(got, offsets, strict=True):
            assert torch.equal(patch, image.pixels_CYX[:, y : y + 9, x : x + 9].float())
    assert pool.num_misses == len(image.decoded)
    assert pool.num_hits > 10


def test_the_chunk_that_leaves_is_the_one_not_used_for_longest() -> None:
    image = Image(torch.uint8)
    pool = ResidentChunks(CPU, num_slots=2, chunk_shape=(SIDE, SIDE), num_channels=2)

    def ask(*keys: Hashable) -> None:
        pool.table([ChunkedImage((30, 40), [key if key in keys else None for key in ALL])], image.fetch)

    for keys in [((0, 0),), ((0, 1),), ((0, 0),), ((0, 2),), ((0, 0),), ((0, 1),)]:
        ask(*keys)
    assert image.decoded == [(0, 0), (0, 1), (0, 2), (0, 1)]
    ask((0, 0), (0, 1))
    assert image.decoded[4:] == []
    with pytest.raises(InputError, match="a batch of 3 chunks does not fit 2 slots"):
        ask((0, 0), (0, 1), (0, 2))


ALL = [(cy, cx) for cy in range(4) for cx in range(5)]


def test_a_chunk_of_another_kind_is_refused_and_nothing_lost() -> None:
    image = Image(torch.uint8)
    pool = ResidentChunks(CPU, num_slots=2, chunk_shape=(SIDE, SIDE), num_channels=2)
    keys = [key if key == (0, 0) else None for key in ALL]
    with pytest.raises(InputError, match=r"chunk \(0, 0\) is torch.uint8 of 4 elements, expected"):
        pool.table([ChunkedImage((30, 40), keys)], lambda _: [torch.zeros(4, dtype=torch.uint8)])
    pool.table([ChunkedImage((30, 40), keys)], image.fetch)
    assert image.decoded == [(0, 0)]
    with pytest.raises(InputError, match="num_slots is 0"):
        ResidentChunks(CPU, num_slots=0, chunk_shape=(SIDE, SIDE), num_channels=2)
