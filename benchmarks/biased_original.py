"""The estimator of the original library with its own gradient, which is biased: for comparison only.

The original (Katharopoulos & Fleuret 2019, the Keras library and its PyTorch ports) draws N positions one
after another without replacement and averages N estimates of Phi = sum_i a_i f_i, one for each draw,

    F = 1/N sum_n e_n         e_n = sum_{j<n} a_j f_j + m_n f_n         m_n = 1 - sum_{j<n} a_j

Its value is that of Des Raj's estimator and unbiased. The gradients are written by hand. With g the gradient
that arrives at F and n counted from 0, the library hands on

    to f_n:    1/N (m_n + (N-1-n) a_n) g
    to a_n:    1/N <g, e_n m_n / a_n + sum_{j<n} f_j - n f_n>

The first is right. The second is not the gradient of Phi in expectation: where an unbiased one has
f_n (m_n / a_n + N-1-n) it has e_n, which holds what was drawn before and m_n once more. The two agree at
N = 1 alone. The ports end the sums at n in place of n - 1 (``inclusive``). The value happens not to change,
as a_n f_n comes in once and goes out once, but m_n loses a_n, and now the gradient to f_n is biased too.

Shapes: B rows, N draws in draw order, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def original_expectation(features_BNF: Tensor, attention_BN: Tensor, *, inclusive: bool = False) -> Tensor:
    """Return (B, F): Des Raj's estimate, with the original's gradients to features and attention.

    ``attention_BN`` is the attention at the drawn positions, in draw order, without padding.
    """
    return _Original.apply(features_BNF, attention_BN, inclusive)


class _Original(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_BNF: Tensor, attention_BN: Tensor, inclusive: bool) -> Tensor:
        left_BN = 1 - _sum_before(attention_BN, inclusive)
        share_BNF = attention_BN[:, :, None] * features_BNF
        estimate_BNF = _sum_before(share_BNF, inclusive) + left_BN[:, :, None] * features_BNF
        ctx.inclusive = inclusive
        ctx.save_for_backward(features_BNF, attention_BN, left_BN, estimate_BNF)
        return estimate_BNF.mean(dim=1)

    @staticmethod
    def backward(ctx: Any, upstream_BF: Tensor) -> tuple[Tensor, Tensor, None]:
        features_BNF, attention_BN, left_BN, estimate_BNF = ctx.saved_tensors
        num_draws = attention_BN.shape[1]
        step_N = torch.arange(num_draws, device=attention_BN.device, dtype=attention_BN.dtype)
        share_BN1 = (left_BN + (num_draws - 1 - step_N) * attention_BN)[:, :, None]
        to_features_BNF = share_BN1 * upstream_BF[:, None, :] / num_draws
        slope_BNF = (
            estimate_BNF * (left_BN / attention_BN)[:, :, None]
            + _sum_before(features_BNF, ctx.inclusive)
            - step_N[:, None] * features_BNF
        )
        to_attention_BN = (slope_BNF * upstream_BF[:, None, :]).sum(dim=2) / num_draws
        return to_features_BNF, to_attention_BN, None


def _sum_before(value: Tensor, inclusive: bool) -> Tensor:
    """Sum over the draws before n; in the ports (``inclusive``) up to n itself."""
    up_to = value.cumsum(dim=1)
    return up_to if inclusive else up_to - value
