"""What every operator asks of its arguments before it looks closer."""

from __future__ import annotations

import torch

from ats_stream.errors import InputError


def check_tensors(**tensors: object) -> None:
    """Raise InputError for what is no dense tensor, which the operators would refuse in other words.

    >>> check_tensors(index_N=torch.tensor([0]))
    >>> check_tensors(index_N=[0])
    Traceback (most recent call last):
    ats_stream.errors.InputError: index_N is a list, expected a torch.Tensor
    """
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
        if value.layout != torch.strided:
            raise InputError(f"{name} has layout {value.layout}, expected torch.strided")
