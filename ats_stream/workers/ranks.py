"""What a training process needs of the others, and the process that is alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ats_stream.workers.preemption import StopRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from ats_stream.models import PatchClassifier


class Ranks(Protocol):
    """What a rank needs of the others."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, model: PatchClassifier) -> nn.Module:
        """The model with gradients averaged over the ranks."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all ranks, equally many, in the order of the ranks; gradients reach this rank's."""

    def collect(self, values: Tensor) -> Tensor:
        """The rows of all ranks, any number of each, on the CPU and without gradients."""

    def report(self, numbers: dict[str, float]) -> None:
        """Tell the outside, all ranks together."""

    def must_stop(self) -> bool:
        """Whether any rank was asked to stop: all ranks ask together, before each step."""


class Alone:
    """The only rank there is."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")

    def __init__(self, device: torch.device | None = None, stop: StopRequest | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.stop = stop or StopRequest()

    def wrap(self, model: PatchClassifier) -> nn.Module:
        """The model itself."""
        return model

    def total(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def collect(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values.detach().cpu()

    def report(self, numbers: dict[str, float]) -> None:
        """Nobody listens."""

    def must_stop(self) -> bool:
        """Whether this process was asked to."""
        return self.stop.asked


def collect_lines(ranks: Ranks, texts: Iterable[str]) -> list[bytes]:
    """The lines of all ranks, each ended, in the order of the ranks; all ranks ask together.

    ``texts`` are this rank's, without ends of lines in them.

    >>> collect_lines(Alone(), ["a", "b"])
    [b'a\\n', b'b\\n']
    """
    lines = "".join(f"{text}\n" for text in texts).encode()
    of_all = ranks.collect(torch.from_numpy(np.frombuffer(bytearray(lines), np.uint8)))
    return of_all.numpy().tobytes().splitlines(keepends=True)
