"""Which noise a module takes: a seed and a step counter that travel in its state dict.

Shapes: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ats_stream.errors import InputError

_MAX_ROWS = 1 << 16
_EVALUATION = 1 << 62


class Seeded(nn.Module):
    """A module whose noise depends on its seed, and in training on the step, the rank and the row.

    The step counter advances with each training call, so a resumed state dict goes on where it stopped.
    """

    seed: Tensor
    step: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def next_streams(self, num_rows: int, *, number: int = 0) -> Tensor:
        """Stream ids (B,) int64 of the next call.

        In training the id is (step, rank, row), and the step advances; in evaluation it is (number, row),
        where ``number`` tells apart several draws of the same row. Raises InputError for too many rows.
        """
        if num_rows > _MAX_ROWS:
            raise InputError(f"a batch may have up to {_MAX_ROWS} rows, got {num_rows}")
        row_B = torch.arange(num_rows, device=self.step.device)
        if not self.training:
            return row_B + (number * _MAX_ROWS + _EVALUATION)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        streams_B = (self.step << 32) + (rank * _MAX_ROWS) + row_B
        self.step += 1
        return streams_B
