"""The constants of a normalisation, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


def normalisation(
    mean_C: Sequence[float] | torch.Tensor, std_C: Sequence[float] | torch.Tensor, *, max_value: float = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a mean and a standard deviation per channel into the scale and shift of :func:`gather_crops`.

    ``mean_C`` and ``std_C`` are those of pixels divided by ``max_value``, as torchvision states them;
    ``max_value`` is what counts as 1: 255 for uint8, 65535 for full-range uint16, 4095 for 12-bit pixels in
    uint16. Returns two float32 tensors (C,) on the CPU, rounded once from float64::

        scale = 1 / (max_value * std)        shift = -mean / std

    so that scale * x + shift = (x / max_value - mean) / std. Raises InputError for lengths that differ, a std
    or max_value that is not positive, and values that float32 cannot hold.

    >>> scale_C, shift_C = normalisation([0.5, 0.0], [0.25, 1.0])
    >>> shift_C.tolist(), bool(scale_C[1] == torch.tensor(1 / 255))
    ([-2.0, 0.0], True)
    """
    mean = _float64_vector("mean_C", mean_C)
    std = _float64_vector("std_C", std_C)
    if mean.shape != std.shape:
        raise InputError(f"mean_C has {mean.numel()} channels and std_C {std.numel()}; both need the same")
    if not bool((std > 0).all()):
        raise InputError(f"std_C={std.tolist()}: every channel needs a positive standard deviation")
    if not max_value > 0:
        raise InputError(f"max_value={max_value} is not positive")
    scale_C = (1 / (max_value * std)).to(torch.float32)
    shift_C = (0 - mean / std).to(torch.float32)
    if not bool(scale_C.isfinite().all() & shift_C.isfinite().all() & (scale_C > 0).all()):
        raise InputError(
            f"mean_C={mean.tolist()}, std_C={std.tolist()}, max_value={max_value}: "
            f"scale {scale_C.tolist()} and shift {shift_C.tolist()} do not fit float32"
        )
    return scale_C, shift_C


def _float64_vector(name: str, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    try:
        vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be numbers, one per channel: {error}") from error
    if vector.ndim != 1 or not vector.numel():
        raise InputError(f"{name} has shape {tuple(vector.shape)}, expected (C,), one value per channel")
    return vector
