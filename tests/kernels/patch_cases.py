"""The written-out matrix of gather_patches, and a reference that pads, slices and moves whole images."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ats_stream.kernels import ChunkTable
from ats_stream.kernels.gather_calls import OUTPUT_TYPES, PatchesCall
from ats_stream.kernels.orientation import NUM_CODES, parts, source_size
from ats_stream.kernels.rounding import fma_float32
from ats_stream.kernels.table import PIXEL_TYPES
from ats_stream.sampling.patches import on_bits
from ats_stream.sampling.transforms import Intensity

if TYPE_CHECKING:
    from collections.abc import Iterator

FAR = 1 << 62  # an offset with which a sum would overflow
FILL, ABSENT = 9.0, 3.0


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of two images, their chunks and a patch."""

    spaces: tuple[tuple[int, ...], tuple[int, ...]]
    chunk: tuple[int, ...]
    patch: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join("x".join(map(str, sizes)) for sizes in (self.spaces[0], self.chunk, self.patch))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How channels lie."""

    channels: int
    chunk_channels: int
    is_interleaved: bool

    def __str__(self) -> str:
        kind = "interleaved" if self.is_interleaved else "planar"
        return f"{self.channels}in{self.chunk_channels}-{kind}"


GEOMETRIES = (
    Geometry(spaces=((37,), (12,)), chunk=(10,), patch=(16,)),
    Geometry(spaces=((40, 50), (61, 33)), chunk=(32, 32), patch=(24, 24)),  # whole runs, two chunks at most
    Geometry(spaces=((40, 50), (61, 33)), chunk=(3, 5), patch=(8, 16)),  # several chunks in a run
    Geometry(spaces=((40, 50), (61, 33)), chunk=(16, 16), patch=(7, 9)),  # planes that are no whole runs
    Geometry(spaces=((40, 50), (61, 33)), chunk=(64, 64), patch=(4, 28)),  # one chunk, runs over line ends
    Geometry(spaces=((6, 5), (3, 4)), chunk=(1, 1), patch=(1, 1)),
    Geometry(spaces=((12, 14, 40), (5, 9, 20)), chunk=(5, 6, 24), patch=(3, 8, 16)),
    Geometry(spaces=((12, 14, 18), (5, 9, 7)), chunk=(4, 4, 4), patch=(4, 3, 5)),
)
LAYOUTS = (
    Layout(channels=1, chunk_channels=1, is_interleaved=False),
    Layout(channels=3, chunk_channels=3, is_interleaved=False),
    Layout(channels=3, chunk_channels=1, is_interleaved=False),
    Layout(channels=3, chunk_channels=3, is_interleaved=True),
    Layout(channels=4, chunk_channels=2, is_interleaved=True),
)


def random_pixels(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = rng.integers(0, 256 if dtype == torch.uint8 else 65536, shape, dtype=np.uint16)
    return torch.from_numpy(values).to(dtype)


def codes_of(num_axes: int) -> list[int]:
    """All orientations that a patch of so many axes can have."""
    codes = []
    for code in range(NUM_CODES):
        sources, flips = parts(code)
        missing = 3 - num_axes
        if sources[:missing] == tuple(range(missing)) and not any(flips[:missing]):
            codes.append(code)
    return codes


def offsets_of(space: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator) -> list[list[int]]:
    """Inside, over both ends of every axis, beside the image, and further away than numbers reach."""
    inside = [
        int(rng.integers(0, max(length - side, 0) + 1)) for length, side in zip(space, size, strict=True)
    ]
    return [
        inside,
        [-(side // 2) for side in size],
        [length - (side + 1) // 2 for length, side in zip(space, size, strict=True)],
        [-size[0], *inside[1:]],
        [*inside[:-1], FAR],
    ]


@dataclass(frozen=True)
class Made:
    """A call and what must come of it."""

    call: PatchesCall
    expected_NCS: torch.Tensor


def make(
    geometry: Geometry,
    layout: Layout,
    pixels: torch.dtype,
    output: torch.dtype,
    *,
    is_moved: bool = False,
    is_adjusted: bool = False,
    channels_last: bool = False,
    start: int = 0,
    seed: int = 0,
) -> Made:
    """Two images in shuffled chunks, some of them absent, ``start`` elements into their memory."""
    rng = np.random.default_rng([seed, *geometry.patch, layout.channels])
    num_axes = len(geometry.patch)
    images = [random_pixels(rng, pixels, (layout.channels, *space)) for space in geometry.spaces]
    table = store(rng, images, geometry.chunk, layout, start)
    codes = codes_of(num_axes)
    rows: list[tuple[int, list[int], int]] = []
    for image, space in enumerate(geometry.spaces):
        offsets = offsets_of(space, geometry.patch, rng)
        rows += [(image, offset, int(rng.choice(codes)) if is_moved else 0) for offset in offsets]
    num_patches = len(rows)
    intensity_N2 = rng.uniform((0.5, -40), (1.5, 40), (num_patches, 2)).astype(np.float32)
    scale_C = torch.from_numpy(rng.uniform(0.001, 0.02, layout.channels).astype(np.float32))
    shift_C = torch.from_numpy(rng.uniform(-2, 2, layout.channels).astype(np.float32))
    patches = []
    for (image, offset, code), (gain, by) in zip(rows, intensity_N2.tolist(), strict=True):
        patch, is_inside = cut(images[image], offset, source_size(code, geometry.patch))
        if is_adjusted:
            patch = adjusted(patch, gain, by)
        patch = torch.where(is_inside, patch.float(), FILL)
        patches.append(move(patch, code))
    raw_NCS = torch.stack(patches)
    wide = (-1, *[1] * num_axes)
    call = PatchesCall(
        table.pixels_L,
        table.starts_T,
        table.images_I7,
        torch.tensor([image for image, _, _ in rows]),
        torch.tensor([offset for _, offset, _ in rows]),
        scale_C,
        shift_C,
        list(geometry.chunk),
        layout.chunk_channels,
        layout.is_interleaved,
        list(geometry.patch),
        output,
        channels_last,
        torch.tensor([code for _, _, code in rows], dtype=torch.uint8) if is_moved else None,
        torch.from_numpy(intensity_N2) if is_adjusted else None,
        FILL,
        ABSENT,
    )
    return Made(call, fma_float32(raw_NCS, scale_C.view(wide), shift_C.view(wide)).to(output))


def make_all(geometry: Geometry, layout: Layout, *, adjust_every: int = 3) -> Iterator[Made]:
    """Every pair of types, both memory formats, moved or not, at four alignments."""
    switches = itertools.product(PIXEL_TYPES, OUTPUT_TYPES, (False, True), (False, True))
    for number, (pixels, output, channels_last, is_moved) in enumerate(switches):
        yield make(
            geometry,
            layout,
            pixels,
            output,
            channels_last=channels_last,
            is_moved=is_moved,
            is_adjusted=number % adjust_every == 0,
            start=number % 4,
        )


def store(
    rng: np.random.Generator,
    images: list[torch.Tensor],
    chunk: tuple[int, ...],
    layout: Layout,
    start: int,
) -> ChunkTable:
    """Cut images (C, *space) into chunks, leave some out (their pixels become ABSENT), shuffle the others."""
    pieces: list[torch.Tensor | None] = []
    for image in images:
        grid = [range(0, side, step) for side, step in zip(image.shape[1:], chunk, strict=True)]
        for first in range(0, layout.channels, layout.chunk_channels):
            for corner in np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, len(chunk)).tolist():
                where = tuple(slice(at, at + step) for at, step in zip(corner, chunk, strict=True))
                part = image[first : first + layout.chunk_channels][(slice(None), *where)]
                if rng.random() < 0.15:
                    part.fill_(ABSENT)
                    pieces.append(None)
                    continue
                whole = random_pixels(
                    rng, image.dtype, (layout.chunk_channels, *chunk)
                )  # beyond the edge: noise
                whole[(slice(None), *(slice(0, side) for side in part.shape[1:]))] = part
                pieces.append(whole.movedim(0, -1).contiguous() if layout.is_interleaved else whole)
    size = layout.chunk_channels * int(np.prod(chunk))
    places = rng.permutation(len(pieces))
    pixels_L = random_pixels(rng, images[0].dtype, (start + len(pieces) * size,))
    starts = [-1] * len(pieces)
    for number, piece in enumerate(pieces):
        if piece is not None:
            starts[number] = start + int(places[number]) * size
            pixels_L[starts[number] : starts[number] + size] = piece.view(-1)
    return ChunkTable.of_chunks(
        pixels_L,
        starts,
        [image.shape[1:] for image in images],
        chunk,
        num_channels=layout.channels,
        chunk_channels=layout.chunk_channels,
        is_interleaved=layout.is_interleaved,
        absent=ABSENT,
    )


def cut(image: torch.Tensor, offset: list[int], size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch (C, *size), zero outside the image, and where it is inside."""
    patch = torch.zeros(len(image), *size, dtype=image.dtype)
    is_inside = torch.zeros(1, *size, dtype=torch.bool)
    here, there = [slice(None)], [slice(None)]
    for at, side, length in zip(offset, size, image.shape[1:], strict=True):
        low, high = max(at, 0), min(at + side, length)
        if low >= high:
            return patch, is_inside
        here.append(slice(low - at, high - at))
        there.append(slice(low, high))
    patch[tuple(here)] = image[tuple(there)]
    is_inside[tuple(here)] = True
    return patch, is_inside


def adjusted(patch: torch.Tensor, gain: float, by: float) -> torch.Tensor:
    """As the augmentation does, which counts the offset of integers in the largest value of their type."""
    if patch.is_floating_point():
        return Intensity(gain, by).image(patch)
    limit = torch.iinfo(patch.dtype).max  # dividing by it and multiplying again need not give the same
    return (patch.float() * gain + by).round().clamp(0, limit).to(patch.dtype)


def move(patch: torch.Tensor, code: int) -> torch.Tensor:
    """Exchange and then mirror axes of (C, *size), spelled in torch."""
    sources, flips = parts(code)
    num_axes = patch.ndim - 1
    missing = 3 - num_axes
    order = [0, *(1 + sources[axis] - missing for axis in range(missing, 3))]
    mirrored = [1 + axis - missing for axis in range(missing, 3) if flips[axis]]
    return on_bits(lambda bits: bits.permute(order).flip(mirrored), patch)
