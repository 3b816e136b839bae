"""The estimate itself, and a gauge of how stale a draw has become.

Shapes: B rows, N draws, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ats_stream.errors import InputError


def expectation(
    features_BNF: Tensor, attention_BN: Tensor, weight_BN: Tensor, *, centred: bool = False
) -> Tensor:
    """Estimate sum_i a_i f_i over the whole map as F = sum_n a_n stop_gradient(R_n) f_n, (B, F).

    ``attention_BN`` is the present attention at the drawn positions (carries the gradient), ``weight_BN``
    the R of the draw. Value and gradients are unbiased for every scheme but "top".

    ``centred=True`` keeps the value and takes the gradient of sum_n a_n R_n (f_n - F) instead: less
    variance, a small bias, and, when the draw is fresh, no gradient at all for logits that were not drawn.

    Raises InputError if the shapes do not fit.

    >>> expectation(torch.tensor([[[2.0], [4.0]]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2))
    tensor([[3.]])
    """
    rows_draws = tuple(features_BNF.shape[:2])
    if features_BNF.ndim != 3 or attention_BN.shape != rows_draws or weight_BN.shape != rows_draws:
        shapes = f"{tuple(features_BNF.shape)}, {tuple(attention_BN.shape)} and {tuple(weight_BN.shape)}"
        raise InputError(
            f"features, attention and weights must be (B, N, F), (B, N) and (B, N), got {shapes}"
        )
    share_BN = attention_BN * weight_BN.detach()
    if not centred:
        return _weighted_sum(share_BN, features_BNF)
    value_BF = _weighted_sum(share_BN, features_BNF).detach()
    carrier_BF = _weighted_sum(share_BN, features_BNF - value_BF[:, None, :])
    return value_BF + carrier_BF - carrier_BF.detach()


def effective_sample_share(weight_BN: Tensor, q_BN: Tensor, attention_BN: Tensor) -> Tensor:
    """Share (B,) of the draw that still counts: (sum v r)^2 / sum v r^2 with v = R q and r = a / q.

    It is 1 when the draw is fresh (a = q) and falls as q grows stale. A gauge, without gradient.

    >>> q = torch.tensor([[0.5, 0.25]])
    >>> effective_sample_share(torch.tensor([[1.2, 1.6]]), q, q)
    tensor([1.])
    """
    if not weight_BN.shape == q_BN.shape == attention_BN.shape or weight_BN.ndim != 2:
        shapes = f"{tuple(weight_BN.shape)}, {tuple(q_BN.shape)} and {tuple(attention_BN.shape)}"
        raise InputError(f"weights, q and attention must all be (B, N), got {shapes}")
    with torch.no_grad():
        drawn_BN = weight_BN > 0
        ratio_BN = torch.where(drawn_BN, attention_BN, 0.0) / torch.where(drawn_BN, q_BN, 1.0)
        share_BN = attention_BN * weight_BN
        return share_BN.sum(dim=1).square() / (share_BN * ratio_BN).sum(dim=1)


def _weighted_sum(share_BN: Tensor, features_BNF: Tensor) -> Tensor:
    # products and sums keep their dtype under autocast, where an einsum would be rounded to bfloat16
    return (share_BN[:, :, None] * features_BNF).sum(dim=1)
