"""The gather on the CPU, for benchmarks/kernels.py: 64 patches of 3 x 224 x 224 uint8, two threads.

The ways, to the same normalised batch:

    slices     torch: stack slices of the image, to float, times scale, plus shift, to the output's dtype
    patches    gather_patches from the image
    crops      gather_crops from crops that were cut already
    stacked    torch from those crops: to float, times scale, plus shift, to the output's dtype
    last       gather_crops to channels last
    stacked_last  the torch way to channels last
    floor      one copy of as many bytes as the output has, into memory allocated anew, as torch allocates it
    floor_huge one into memory allocated anew in huge pages, as the gather allocates it

and the first four once more with memory that is there already for all that they write: slices_again,
patches_again, stacked_again, crops_again, floor_again. That is what a batch costs that is small enough to
come from the heap, and what the arithmetic itself costs.

Times are the least of many calls, the ways in turn.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.kernels import ChunkTable, gather_cpu, gather_crops, gather_patches, normalisation
from ats_stream.kernels.gather_calls import CropsCall
from ats_stream.kernels.memory import ask_for_huge_pages

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_PATCHES, CHANNELS, SIDE, IMAGE_SIDE = 64, 3, 224, 4096
NUM_THREADS = 2
NUM_ROUNDS = 40
TARGET = 3.0  # times faster than torch


def measure(*, quick: bool = False) -> list[dict[str, Any]]:
    torch.set_num_threads(NUM_THREADS)
    rounds = 2 if quick else NUM_ROUNDS
    image_side, side = (512, 64) if quick else (IMAGE_SIDE, SIDE)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [measure_dtype(dtype, image_side, side, rounds) for dtype in dtypes]


def measure_dtype(dtype: torch.dtype, image_side: int, side: int, num_rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (CHANNELS, image_side, image_side), dtype=torch.uint8, generator=generator)
    offsets_ND = torch.randint(0, image_side - side, (NUM_PATCHES, 2), generator=generator)
    image_N = torch.zeros(NUM_PATCHES, dtype=torch.int64)
    scale_C, shift_C = normalisation([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    scale_C11, shift_C11 = scale_C[:, None, None], shift_C[:, None, None]
    table = ChunkTable.of_images(image[None])
    places = offsets_ND.tolist()

    def cut() -> torch.Tensor:
        return torch.stack([image[:, y : y + side, x : x + side] for y, x in places])

    def normalised(crops_NCS: torch.Tensor) -> torch.Tensor:
        return (crops_NCS.float() * scale_C11 + shift_C11).to(dtype)

    crops_NCS = cut()
    output = normalised(crops_NCS)
    again = Again(crops_NCS, scale_C, shift_C, dtype)

    def cut_again() -> torch.Tensor:
        pieces = [image[:, y : y + side, x : x + side] for y, x in places]
        return torch.stack(pieces, out=again.crops_NCS)

    def copied_huge() -> torch.Tensor:
        new = torch.empty_like(output)
        ask_for_huge_pages(new)
        return new.copy_(output)

    ways: dict[str, Callable[[], Any]] = {
        "slices": lambda: normalised(cut()),
        "patches": lambda: gather_patches(table, image_N, offsets_ND, (side, side), scale_C, shift_C, dtype),
        "stacked": lambda: normalised(crops_NCS),
        "crops": lambda: gather_crops(crops_NCS, scale_C, shift_C, dtype),
        "stacked_last": lambda: normalised(crops_NCS).contiguous(memory_format=torch.channels_last),
        "last": lambda: gather_crops(crops_NCS, scale_C, shift_C, dtype, channels_last=True),
        "floor": lambda: torch.empty_like(output).copy_(output),
        "floor_huge": copied_huge,
        "slices_again": lambda: again.normalise(cut_again()),
        "patches_again": lambda: again.gather(table, image_N, offsets_ND, (side, side)),
        "stacked_again": lambda: again.normalise(crops_NCS),
        "crops_again": lambda: again.gather(
            ChunkTable.of_images(crops_NCS.flatten(2)),
            torch.arange(NUM_PATCHES),
            torch.zeros(NUM_PATCHES, 1, dtype=torch.int64),
            (side * side,),
        ),
        "floor_again": lambda: again.out.copy_(output),
    }
    times_ms = {name: value * 1e3 for name, value in least_seconds(ways, num_rounds).items()}
    faster = times_ms["slices"] / times_ms["patches"]
    return {
        "case": f"{NUM_PATCHES} x {CHANNELS} x {side} x {side} uint8 -> {dtype}".replace("torch.", ""),
        "threads": NUM_THREADS,
        "ms": {name: round(value, 3) for name, value in times_ms.items()},
        "patches_times_faster_than_slices": round(faster, 2),
        "crops_times_faster_than_stacked": round(times_ms["stacked"] / times_ms["crops"], 2),
        "last_times_faster_than_stacked_last": round(times_ms["stacked_last"] / times_ms["last"], 2),
        "patches_again_times_faster": round(times_ms["slices_again"] / times_ms["patches_again"], 2),
        "crops_again_times_faster": round(times_ms["stacked_again"] / times_ms["crops_again"], 2),
        "targets_met": faster >= TARGET,
    }


class Again:
    """Both ways into memory that was written before."""

    def __init__(
        self, crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.call = CropsCall(crops_NCS, scale_C, shift_C, dtype)
        self.crops_NCS = crops_NCS.clone()
        self.floats = crops_NCS.float()
        self.out = self.floats if dtype == torch.float32 else self.floats.to(dtype)

    def normalise(self, crops_NCS: torch.Tensor) -> torch.Tensor:
        scale_C11, shift_C11 = self.call.scale_C[:, None, None], self.call.shift_C[:, None, None]
        self.floats.copy_(crops_NCS).mul_(scale_C11).add_(shift_C11)
        return self.floats if self.out is self.floats else self.out.copy_(self.floats)

    def gather(
        self, table: ChunkTable, image_N: torch.Tensor, offsets_ND: torch.Tensor, patch: tuple[int, ...]
    ) -> torch.Tensor:
        request = gather_cpu.Request.of(table, image_N, offsets_ND, patch, self.call)
        gather_cpu.gather(request, self.out.flatten(2), channels_last=False)
        return self.out


def least_seconds(ways: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, float]:
    least = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()  # compiles; does not count
    for _ in range(num_rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            least[name] = min(least[name], time.perf_counter() - start)
    return least
