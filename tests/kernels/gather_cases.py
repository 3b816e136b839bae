"""The written-out matrix that every path of the gather is held to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ats_stream.kernels import normalisation
from ats_stream.kernels.gather_calls import OUTPUT_TYPES, CropsCall
from ats_stream.kernels.table import PIXEL_TYPES

# (N, C, *patch): one, two and three space axes; one to many channels; planes that do and do not fill whole
# 16-byte runs, that are smaller than one run, and that need several blocks
SHAPES = (
    (1, 1, 1),
    (3, 1, 5),
    (2, 3, 16),
    (4, 2, 17),
    (1, 2, 4099),
    (5, 3, 7, 9),
    (2, 1, 28, 28),
    (2, 3, 33, 31),
    (2, 13, 3, 5),
    (1, 2, 3, 5, 7),
    (2, 4, 8, 8, 8),
)
STARTS = (0, 1)  # elements before the first pixel in its storage: aligned and not


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the matrix."""

    pixels: torch.dtype
    output: torch.dtype
    shape: tuple[int, ...]
    start: int

    def __str__(self) -> str:
        names = (str(self.pixels), str(self.output))
        return "-".join(
            [*(n.removeprefix("torch.") for n in names), "x".join(map(str, self.shape)), str(self.start)]
        )

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Crops that hold both ends of the range and random pixels, and constants of a usual size."""
        rng = np.random.default_rng([*self.shape, self.start])
        top = 255 if self.pixels == torch.uint8 else 65535
        count = int(np.prod(self.shape))
        values = rng.integers(0, top + 1, self.start + count, dtype=np.uint16)
        values[self.start], values[-1] = top, 0 if count > 1 else top
        storage = torch.from_numpy(values).to(self.pixels)
        channels = self.shape[1]
        scale_C, shift_C = normalisation(
            rng.uniform(0.2, 0.8, channels), rng.uniform(0.1, 0.4, channels), max_value=top
        )
        return storage[self.start :].view(self.shape), scale_C, shift_C

    def call(self) -> CropsCall:
        """The call of the operator."""
        return CropsCall(*self.inputs(), self.output)


CASES = tuple(
    Case(pixels=pixels, output=output, shape=shape, start=start)
    for pixels in PIXEL_TYPES
    for output in OUTPUT_TYPES
    for shape in SHAPES
    for start in STARTS
)
