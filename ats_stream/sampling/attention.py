"""From what an attention network says to log-probabilities over the map, the same way wherever it is needed.

Shapes: B rows, M positions of the flattened map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.sampling.checks import holds

_NEGATIVE_INFINITY = float("-inf")


def attention_logits(output: Tensor, *, use_logits: bool) -> Tensor:
    """Flatten an attention network's output (B, ...) to logits (B, M), in float32 at least.

    With ``use_logits`` the output holds logits already. Otherwise it holds probabilities p, or any positive
    scores, and the logits are log p, with p = 0 giving -inf and no gradient. Raises InputError for scores
    that are negative or NaN.

    >>> attention_logits(torch.tensor([[0.0, 1.0]]), use_logits=False)
    tensor([[-inf, 0.]])
    """
    if output.ndim < 2 or not output.is_floating_point():
        raise InputError(
            f"attention must be floating point (B, *map), got {output.dtype} {tuple(output.shape)}"
        )
    output_BM = output.flatten(1).to(torch.promote_types(output.dtype, torch.float32))
    if use_logits:
        return output_BM
    if not holds(output_BM >= 0):
        raise InputError(
            f"attention {tuple(output.shape)} holds negative or NaN values, not probabilities; "
            "a network that returns logits needs use_logits=True"
        )
    possible_BM = output_BM > 0
    # the inner where keeps the gradient of log away from zero
    log_BM = torch.where(possible_BM, output_BM, 1.0).log()
    return torch.where(possible_BM, log_BM, _NEGATIVE_INFINITY)


def log_attention(logits_BM: Tensor, log_prior_BM: Tensor | None = None) -> Tensor:
    """Log-probabilities (B, M) of softmax(logits + log_prior), in float32 at least.

    -inf in either marks positions that cannot be drawn; gradients stay finite (zero there). ``log_prior_BM``
    may have any scale; a tissue mask is 0 inside, -inf outside. Raises InputError for NaN or +inf, for
    shapes that differ, and for a row that is -inf everywhere.

    >>> log_attention(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, float("-inf")]])).exp()
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    if logits_BM.ndim != 2 or not logits_BM.is_floating_point():
        raise InputError(
            f"logits must be floating point (B, M), got {logits_BM.dtype} {tuple(logits_BM.shape)}"
        )
    if log_prior_BM is not None:
        if log_prior_BM.shape != logits_BM.shape:
            shapes = f"{tuple(log_prior_BM.shape)} and {tuple(logits_BM.shape)}"
            raise InputError(f"log_prior and logits must have the same shape, got {shapes}")
        _check_rows("log_prior", log_prior_BM.detach())
        logits_BM = logits_BM + log_prior_BM
    logits_BM = logits_BM.to(torch.promote_types(logits_BM.dtype, torch.float32))
    _check_rows("logits" if log_prior_BM is None else "logits + log_prior", logits_BM.detach())
    return torch.log_softmax(logits_BM, dim=1)


def _check_rows(name: str, value_BM: Tensor) -> None:
    largest_B = value_BM.amax(dim=1)  # NaN wins over everything
    is_good_B = largest_B.isfinite()
    if not holds(is_good_B):
        row = int((~is_good_B).nonzero()[0])
        largest = float(largest_B[row])
        what = (
            "nothing to draw from, all are -inf" if largest == _NEGATIVE_INFINITY else f"the value {largest}"
        )
        raise InputError(f"{name} {tuple(value_BM.shape)}: row {row} has {what}")
