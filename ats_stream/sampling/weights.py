"""The weights R that make a handful of drawn positions stand for the whole map.

    F = sum_s a_s stop_gradient(R_s) f_s        with  E[R_s 1{s drawn}] = 1  for every position s

so E[F] = sum_i a_i f_i, and plain autograd through a and f gives unbiased vector-Jacobian products. R depends
on the draw and on q, the distribution it was made from, never on the present attention a. With a = q every
unbiased scheme satisfies sum a R = 1 exactly.

Shapes: B rows, N draws in draw order, G nodes of a quadrature. All work is done on logarithms in float64.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.sampling.checks import holds

Scheme = Literal["with_replacement", "des_raj", "murthy", "balanced", "top"]
"""How positions are drawn and weighed; all but ``top`` are unbiased."""
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""The names of all schemes."""

_NEGATIVE_INFINITY = float("-inf")
_NUM_SCAN_NODES = 16
_NUM_NODES = 80  # good to 1e-13 from 20 draws on
_NUM_NODES_FOR_FEW = 160  # few draws leave a long tail; good to 1e-13 from 3 draws on
_FEW_DRAWS = 20
_MANY_DRAWS = 256  # their integrand is so narrow that one more scan pays
_NEGLIGIBLE = 36.0  # e^-36 of the peak is beneath float64
_LARGEST_EXPONENT = 300.0


def check_scheme(scheme: str) -> Scheme:
    """Return ``scheme`` if it is one of :data:`SCHEMES`, else raise InputError."""
    for known in SCHEMES:
        if scheme == known:
            return known
    raise InputError(f"scheme {scheme!r} is unknown; expected one of {', '.join(SCHEMES)}")


def estimator_weights(
    probability_BN: Tensor,
    scheme: str,
    *,
    rest_B: Tensor | None = None,
    inclusion_BN: Tensor | None = None,
) -> Tensor:
    """Return R (B, N) for drawn positions, without gradient, in the dtype given (float32 at least).

    ``probability_BN`` holds q at the drawn positions, in draw order; 0 marks padding, which gets weight 0.
    With n counted from 0 and N the number of positions really drawn, R is

    * with_replacement: ``1 / (N q_n)``, the mean of the drawn features when a = q
    * des_raj: ``((1 - sum_{j<n} q_j) + (N-1-n) q_n) / (N q_n)`` (Des Raj 1956)
    * murthy: ``P(S without s, drawn from the map without s) / P(S)``, the mean of des_raj given the set S, so
      never of more variance (Murthy 1957; Kool, van Hoof & Welling, ICLR 2020)
    * balanced: ``1 / inclusion`` (Horvitz & Thompson 1952)
    * top: ``1 / sum_S q``, biased, for inference alone

    ``rest_B`` is the mass not drawn; give it where ``1 - sum q`` would cancel. ``inclusion_BN`` is needed by
    "balanced" alone. Raises InputError for an unknown scheme, wrong shapes, or values that are no
    probabilities.

    >>> estimator_weights(torch.tensor([[0.5, 0.25]]), "murthy")
    tensor([[1.2000, 1.6000]])
    """
    known = check_scheme(scheme)
    _check_probabilities(probability_BN, known, rest_B, inclusion_BN)
    with torch.no_grad():
        probability64_BN = probability_BN.double()
        unseen_B = (1 - probability64_BN.sum(dim=1)).clamp(min=0)
        rest64_B = unseen_B if rest_B is None else rest_B.double()
        weight_BN = weights_from_logs(probability64_BN.log(), rest64_B.log(), known, inclusion_BN)
    at_least_float32 = torch.promote_types(probability_BN.dtype, torch.float32)
    return weight_BN.to(at_least_float32)


@torch.no_grad()
def weights_from_logs(
    log_q_BN: Tensor, log_rest_B: Tensor, scheme: Scheme, inclusion_BN: Tensor | None = None
) -> Tensor:
    """R (B, N) float64 from float64 logarithms; -inf in ``log_q_BN`` marks padding."""
    drawn_BN = log_q_BN > _NEGATIVE_INFINITY
    # padding is kept finite through the arithmetic and cleared at the end
    if scheme == "with_replacement":
        weight_BN = (-log_q_BN).exp() / drawn_BN.sum(dim=1, keepdim=True)
    elif scheme == "des_raj":
        weight_BN = _des_raj(log_q_BN, log_rest_B, drawn_BN)
    elif scheme == "murthy":
        weight_BN = _murthy(log_q_BN, log_rest_B, drawn_BN)
    elif scheme == "balanced":
        assert inclusion_BN is not None
        weight_BN = 1 / inclusion_BN.double()
    else:
        weight_BN = (-torch.logsumexp(log_q_BN, dim=1, keepdim=True)).exp().expand_as(log_q_BN)
    return weight_BN.masked_fill(~drawn_BN, 0.0)


def _des_raj(log_q_BN: Tensor, log_rest_B: Tensor, drawn_BN: Tensor) -> Tensor:
    # 1 - sum_{j<n} q_j as what is left to draw: a sum of positive terms, where the difference would cancel
    left_BN = torch.cat([log_q_BN, log_rest_B[:, None]], dim=1).flip(1).logcumsumexp(dim=1).flip(1)[:, :-1]
    num_drawn_B1 = drawn_BN.sum(dim=1, keepdim=True)
    later_BN = num_drawn_B1 - 1 - torch.arange(log_q_BN.shape[1], device=log_q_BN.device)
    ratio_BN = (left_BN - log_q_BN).masked_fill(~drawn_BN, 0.0).exp()
    return (ratio_BN + later_BN) / num_drawn_B1


def _murthy(log_q_BN: Tensor, log_rest_B: Tensor, drawn_BN: Tensor) -> Tensor:
    """R_s = I_s / I, both integrals of the exponential race between the drawn set and the rest (mass W):

        I = int_0^inf e^{-W t} prod_{i in S} (1 - e^{-q_i t}) dt,     I_s = the same without the factor of s

    in closed form for one or two draws, by :func:`_race_integral_ratio` for more. W -> 0 gives R -> 1.
    """
    num_drawn_B1 = drawn_BN.sum(dim=1, keepdim=True)
    rest_B1 = log_rest_B[:, None]
    rest_and_own_BN = torch.logaddexp(rest_B1, log_q_BN)
    one_BN = (rest_and_own_BN - log_q_BN).exp()
    total_B1 = torch.logsumexp(torch.cat([log_q_BN, rest_B1], dim=1), dim=1, keepdim=True)
    pair_B1 = torch.logaddexp(total_B1, rest_B1)
    two_BN = (total_B1 + rest_and_own_BN - log_q_BN - pair_B1).exp()
    weight_BN = torch.where(num_drawn_B1 == 1, one_BN, two_BN)
    if log_q_BN.shape[1] > 2:
        # below any float64 mass; W = 0 itself is answered by the last line
        many_BN = _race_integral_ratio(log_q_BN, rest_B1.clamp(min=-1e4), drawn_BN)
        weight_BN = torch.where(num_drawn_B1 > 2, many_BN, weight_BN)
    return torch.where(rest_B1 == _NEGATIVE_INFINITY, torch.ones_like(weight_BN), weight_BN)


def _race_integral_ratio(log_q_BN: Tensor, log_rest_B1: Tensor, drawn_BN: Tensor) -> Tensor:
    """I_s / I by the trapezoid rule in y = log(W t), which converges exponentially: the integrand

        e^y exp(-e^y) prod_i f_i(y)        f_i(y) = 1 - exp(-r_i e^y),  r_i = q_i / W

    is entire, log-concave, and decays at both ends. Coarse scans zoom in to where it lives, with or without
    the factor of the smallest r: whichever one is left out, the others live between these two.
    """
    # padding arrives at once: its factor is 1
    log_ratio_BN = torch.where(drawn_BN, log_q_BN - log_rest_B1, float("inf"))
    # further down f = r e^y exactly, so what is cut off here is a factor of the result
    cut_BN = log_ratio_BN.clamp(min=-_LARGEST_EXPONENT)
    ratio_BN = cut_BN.exp()
    smallest_B1 = ratio_BN.amin(dim=1, keepdim=True)
    num_draws = log_q_BN.shape[1]
    # e^y is at most gamma(N + 1) distributed: beyond this, less than e^-36 is left
    highest = math.log(num_draws + 1 + math.sqrt(2 * _NEGLIGIBLE * (num_draws + 1)) + _NEGLIGIBLE)
    low_B1 = torch.full_like(smallest_B1, -_NEGLIGIBLE - 2)
    high_B1 = torch.full_like(smallest_B1, highest)
    num_scans = 2 if num_draws < _MANY_DRAWS else 3
    for _ in range(num_scans):
        y_BG = _nodes(low_B1, high_B1, _NUM_SCAN_NODES)
        whole_BG, _ = _integrand(ratio_BN, y_BG)
        without_BG = whole_BG - _log_factor(smallest_B1 * y_BG.exp())
        is_alive_BG = _is_alive(whole_BG) | _is_alive(without_BG)
        step_B1 = (high_B1 - low_B1) / (_NUM_SCAN_NODES - 1)
        low_B1, high_B1 = (
            torch.where(is_alive_BG, y_BG, high_B1).amin(dim=1, keepdim=True) - step_B1,
            torch.where(is_alive_BG, y_BG, low_B1).amax(dim=1, keepdim=True) + step_B1,
        )
    num_nodes = _NUM_NODES_FOR_FEW if num_draws < _FEW_DRAWS else _NUM_NODES
    whole_BG, factor_BNG = _integrand(ratio_BN, _nodes(low_B1, high_B1, num_nodes))
    value_BG = (whole_BG - whole_BG.amax(dim=1, keepdim=True)).exp()
    without_BN = (value_BG[:, None, :] / factor_BNG).sum(dim=2)
    return without_BN / value_BG.sum(dim=1, keepdim=True) * (cut_BN - log_ratio_BN).exp()


def _nodes(low_B1: Tensor, high_B1: Tensor, num_nodes: int) -> Tensor:
    unit_G = torch.linspace(0, 1, num_nodes, dtype=torch.float64, device=low_B1.device)
    return low_B1 + (high_B1 - low_B1) * unit_G


def _integrand(ratio_BN: Tensor, y_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the integrand (B, G) and its factors (B, N, G)."""
    time_BG = y_BG.exp()
    factor_BNG = (ratio_BN[:, :, None] * -time_BG[:, None, :]).expm1_().neg_()
    return y_BG - time_BG + factor_BNG.log().sum(dim=1), factor_BNG


def _log_factor(race_BG: Tensor) -> Tensor:
    return (-torch.expm1(-race_BG)).log()


def _is_alive(log_value_BG: Tensor) -> Tensor:
    return log_value_BG > log_value_BG.amax(dim=1, keepdim=True) - _NEGLIGIBLE


def _check_probabilities(
    probability_BN: Tensor, scheme: Scheme, rest_B: Tensor | None, inclusion_BN: Tensor | None
) -> None:
    shape = tuple(probability_BN.shape)
    if probability_BN.ndim != 2 or 0 in shape or not probability_BN.is_floating_point():
        raise InputError(f"probabilities must be floating point (B, N), got {probability_BN.dtype} {shape}")
    if not holds((probability_BN >= 0) & (probability_BN <= 1 + 1e-6)):
        raise InputError(f"probabilities {shape} must lie in [0, 1]")
    if scheme != "with_replacement" and not holds(probability_BN.double().sum(dim=1) <= 1 + 1e-4):
        raise InputError(f"probabilities {shape} of positions drawn without replacement sum to more than 1")
    if rest_B is not None and (rest_B.shape != shape[:1] or not holds(rest_B >= 0)):
        raise InputError(f"rest must be ({shape[0]},) and not negative, got {tuple(rest_B.shape)}")
    if scheme != "balanced":
        return
    if inclusion_BN is None:
        raise InputError("scheme 'balanced' needs the inclusion probabilities of the draw (inclusion_BN)")
    if tuple(inclusion_BN.shape) != shape:
        raise InputError(f"inclusion must be {shape} like the probabilities, got {tuple(inclusion_BN.shape)}")
