"""Learning rates, mixed precision and the average of the weights: what surrounds an optimiser."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def lr_factor(
    step: int, num_steps: int, *, schedule: str, warmup_share: float = 0.0, decay_share: float = 1.0
) -> float:
    """What the learning rate is multiplied with at a step.

    It rises linearly over the first share of the steps, stays at 1, and falls to 0 over the last share:
    ``linear`` in a line, ``cosine`` in half a wave, ``constant`` not at all.

    >>> [lr_factor(step, 10, schedule="linear", decay_share=0.4) for step in (0, 6, 8, 10)]
    [1.0, 1.0, 0.5, 0.0]
    >>> [round(lr_factor(step, 8, schedule="cosine", warmup_share=0.25), 3) for step in (0, 1, 2, 5, 8)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup_steps = num_steps * warmup_share
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps >= 1 else 1.0
    decay_steps = min(num_steps * decay_share, num_steps - warmup_steps)
    if schedule == "constant" or decay_steps <= 0:
        return rise
    left = min(1.0, (num_steps - step) / decay_steps)
    return rise * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Mixed precision for a forward pass; nothing for float32."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def average_of(model: nn.Module, decay: float) -> AveragedModel | None:
    """The moving average of a model's weights, to be updated after each step; None for decay 0."""
    if not decay:
        return None
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch types it partly
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
