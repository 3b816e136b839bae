"""Exact unbiasedness: every sample of a small map, through the package's own functions and autograd.

Samples are ordered draws, or, for "balanced", the sets that the uniform offset picks: nothing changes between
the fractional parts of the interval ends, so the integral over it is a finite sum.

Letters: S samples (all of them), M positions, N draws, F features.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ats_stream.sampling import SCHEMES, estimator_weights, expectation, log_attention
from ats_stream.sampling.balanced import (
    curve_places,
    equidistant_points,
    inclusion_units,
    intervals_of,
)
from ats_stream.sampling.philox import Noise

MAX_M, F = 7, 2
TOLERANCE = 1e-10
UNBIASED = ("with_replacement", "des_raj", "murthy", "balanced")
SIZES = [(m, n) for m in range(1, MAX_M + 1) for n in range(1, m + 1)]
CHUNK = 1 << 17  # samples at once: 7^7 of them would need a gigabyte


def vector(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_sample(q_M: Tensor, num_draws: int, scheme: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All samples in chunks: positions (S, N), chances (S,) and weights (S, N)."""
    num_positions = len(q_M)
    if scheme == "balanced":
        yield every_offset(q_M, num_draws)
        return
    position = torch.arange(num_positions)
    if scheme == "with_replacement":
        index_SN = torch.cartesian_prod(*[position] * num_draws).view(-1, num_draws)
    else:
        index_SN = torch.tensor(list(itertools.permutations(range(num_positions), num_draws)))
    for chunk_SN in index_SN.split(CHUNK):
        q_SN = q_M[chunk_SN]
        left_SN = 1 - (q_SN.cumsum(dim=1) - q_SN)
        chance_S = q_SN.prod(dim=1) if scheme == "with_replacement" else (q_SN / left_SN).prod(dim=1)
        yield chunk_SN, chance_S, estimator_weights(q_SN, scheme)


def every_offset(q_M: Tensor, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the offsets of a balanced draw pick, along the curve of some stream."""
    position_1M = torch.arange(len(q_M))[None]
    curve = Noise(seed=5, stream_ids=torch.tensor([3]))
    order_1M = curve_places(position_1M, (len(q_M),), curve).argsort(dim=1)
    units_1M, bits = inclusion_units(q_M.log()[None], num_draws)
    length_1M = units_1M.gather(1, order_1M)
    ends_M = length_1M[0].cumsum(dim=0).double() * 2.0**-bits
    cuts = torch.cat([torch.zeros(1), ends_M - ends_M.floor(), torch.ones(1)]).sort().values
    length_S, offset_S = cuts.diff(), (cuts[1:] + cuts[:-1]) / 2
    length_S, offset_S = length_S[length_S > 1e-13], offset_S[length_S > 1e-13]
    length_SM, point_SN = length_1M.expand(len(offset_S), -1), equidistant_points(offset_S, num_draws, bits)
    index_SN = order_1M[0, intervals_of(length_SM, point_SN)]
    pi_SM = (units_1M.double() * 2.0**-bits).expand(len(offset_S), -1)
    inclusion_SN = pi_SM.gather(1, index_SN)
    return index_SN, length_S, estimator_weights(q_M[index_SN], "balanced", inclusion_BN=inclusion_SN)


def case(num_positions: int, spread: float, stale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the present network, features, and q (M,) that draws."""
    logits_M = spread * vector(1, num_positions)
    old_M = spread * vector(4, num_positions) if stale else logits_M
    return logits_M, vector(2, num_positions, F), old_M.softmax(dim=0)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize(("num_positions", "num_draws"), SIZES)
@pytest.mark.parametrize("scheme", UNBIASED)
def test_value_and_gradients_are_unbiased(scheme, num_positions, num_draws, spread, stale):
    logits_M, f_MF, q_M = case(num_positions, spread, stale)
    upstream_F = vector(3, F)
    logits_M.requires_grad_()
    f_MF.requires_grad_()

    total, mean_F, gradients = 0.0, torch.zeros(F), [torch.zeros(()), torch.zeros(())]
    for index_SN, chance_S, weight_SN in every_sample(q_M, num_draws, scheme):
        a_M = logits_M.softmax(dim=0)
        part_F = chance_S @ expectation(f_MF[index_SN], a_M[index_SN], weight_SN)
        more = torch.autograd.grad(part_F @ upstream_F, [logits_M, f_MF])
        gradients = [old + new for old, new in zip(gradients, more, strict=True)]
        total, mean_F = total + float(chance_S.sum()), mean_F + part_F.detach()

    exact_F = logits_M.softmax(dim=0) @ f_MF
    exact_gradients = torch.autograd.grad(exact_F @ upstream_F, [logits_M, f_MF])
    assert abs(total - 1) < TOLERANCE
    assert float((mean_F - exact_F).detach().abs().max()) < TOLERANCE
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert float((gradient - exact).abs().max()) < TOLERANCE


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize(("num_positions", "num_draws"), SIZES)
@pytest.mark.parametrize("scheme", UNBIASED)
def test_attention_times_weight_sums_to_one_in_every_fresh_sample(scheme, num_positions, num_draws, spread):
    _, _, q_M = case(num_positions, spread, stale=False)
    for index_SN, _, weight_SN in every_sample(q_M, num_draws, scheme):
        sum_S = (q_M[index_SN] * weight_SN).sum(dim=1)
        assert float((sum_S - 1).abs().max()) < TOLERANCE


def test_balanced_cases_above_are_capped_and_not():
    def largest_inclusions(spread: float) -> list[float]:
        chances = (case(m, spread, stale=False)[2] for m, n in SIZES if n == 2 < m)
        given = (inclusion_units(q_M.log()[None], 2) for q_M in chances)
        return [float(units_1M.max()) * 2.0**-bits for units_1M, bits in given]

    assert max(largest_inclusions(3.0)) == 1
    assert min(largest_inclusions(1.0)) < 1


@pytest.mark.parametrize("num_draws", range(1, MAX_M))
@pytest.mark.parametrize("scheme", UNBIASED)
def test_attention_times_weight_sums_to_one_on_average_alone_when_stale(scheme, num_draws):
    logits_M, _, q_M = case(MAX_M, 1.0, stale=True)
    a_M, mean, farthest = logits_M.softmax(dim=0), 0.0, 0.0
    for index_SN, chance_S, weight_SN in every_sample(q_M, num_draws, scheme):
        sum_S = (a_M[index_SN] * weight_SN).sum(dim=1)
        mean += float(chance_S @ sum_S)
        farthest = max(farthest, float((sum_S - 1).abs().max()))
    assert abs(mean - 1) < TOLERANCE
    assert farthest > 0.05


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("num_positions", range(1, MAX_M + 1))
@pytest.mark.parametrize("scheme", ["murthy", "balanced"])
def test_drawing_everything_gives_the_exact_sum(scheme, num_positions, stale):
    logits_M, f_MF, q_M = case(num_positions, 1.0, stale)
    a_M = logits_M.softmax(dim=0)
    for index_SN, _, weight_SN in every_sample(q_M, num_positions, scheme):
        value_SF = expectation(f_MF[index_SN], a_M[index_SN], weight_SN)
        assert float((value_SF - a_M @ f_MF).abs().max()) < TOLERANCE


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize(("num_positions", "num_draws"), SIZES)
def test_murthy_is_the_mean_of_des_raj_given_the_set(num_positions, num_draws, spread):
    _, _, q_M = case(num_positions, spread, stale=False)
    ((index_SN, chance_S, des_raj_SN),) = every_sample(q_M, num_draws, "des_raj")
    murthy_SN = estimator_weights(q_M[index_SN], "murthy")
    by_position_SM = torch.zeros(len(index_SN), num_positions, dtype=torch.float64)
    des_raj_SM = by_position_SM.scatter(1, index_SN, des_raj_SN)
    murthy_SM = by_position_SM.scatter(1, index_SN, murthy_SN)
    for members in itertools.combinations(range(num_positions), num_draws):
        same_set_S = (index_SN.sort(dim=1).values == torch.tensor(members)).all(dim=1)
        chance = chance_S[same_set_S]
        mean_M = (chance @ des_raj_SM[same_set_S]) / chance.sum()
        # weights reach 1 / q, hundreds here
        assert torch.allclose(
            murthy_SM[same_set_S], mean_M.expand(len(chance), -1), atol=TOLERANCE, rtol=1e-11
        )


@pytest.mark.parametrize("num_draws", range(2, MAX_M + 1))
def test_murthy_has_less_variance_than_des_raj_and_that_less_than_replacement(num_draws):
    _, f_MF, q_M = case(MAX_M, 1.0, stale=False)
    variances = []
    for scheme in ("murthy", "des_raj", "with_replacement"):
        variance_F = torch.zeros(F, dtype=torch.float64)
        for index_SN, chance_S, weight_SN in every_sample(q_M, num_draws, scheme):
            value_SF = expectation(f_MF[index_SN], q_M[index_SN], weight_SN)
            variance_F += chance_S @ (value_SF - q_M @ f_MF).square()
        variances.append(variance_F)
    assert bool((variances[0] < variances[1]).all())
    assert bool((variances[1] < variances[2]).all())


def test_centred_keeps_the_value_and_has_no_gradient_outside_a_fresh_sample():
    logits_M, f_MF, q_M = case(MAX_M, 1.0, stale=False)
    logits_M.requires_grad_()
    a_M = logits_M.softmax(dim=0)
    ((index_SN, _, weight_SN),) = every_sample(q_M, 3, "murthy")
    plain_SF = expectation(f_MF[index_SN], a_M[index_SN], weight_SN)
    centred_SF = expectation(f_MF[index_SN], a_M[index_SN], weight_SN, centred=True)
    assert torch.allclose(plain_SF, centred_SF, atol=1e-14)
    for sample in range(0, len(index_SN), 17):
        (gradient_M,) = torch.autograd.grad(centred_SF[sample].sum(), logits_M, retain_graph=True)
        outside = [position for position in range(MAX_M) if position not in index_SN[sample]]
        assert float(gradient_M[outside].abs().max()) < 1e-14
        assert float(gradient_M.abs().max()) > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradcheck(scheme):
    index_BN = torch.tensor([[0, 3, 5], [2, 1, 4]])
    log_prior_BM = torch.zeros(2, MAX_M, dtype=torch.float64)
    log_prior_BM[:, 6] = float("-inf")
    inclusion_BN = torch.full((2, 3), 0.4, dtype=torch.float64)

    def estimate(logits_BM, features_BNF):
        a_BN = log_attention(logits_BM, log_prior_BM).gather(1, index_BN).exp()
        q_BN = torch.full((2, 3), 0.2, dtype=torch.float64)
        return expectation(features_BNF, a_BN, estimator_weights(q_BN, scheme, inclusion_BN=inclusion_BN))

    inputs = (vector(8, 2, MAX_M).requires_grad_(), vector(9, 2, 3, F).requires_grad_())
    assert torch.autograd.gradcheck(estimate, inputs)
