"""Exact unbiasedness: every ordered sample of a small map, through the package's own functions and autograd.

Letters: S samples (all of them), M positions, N draws, F features.
"""

import itertools

import pytest
import torch
from torch import Tensor

from ats_stream.sampling import estimator_weights, expectation

M, F = 6, 3
TOLERANCE = 1e-10
SCHEMES = ("with_replacement", "des_raj", "murthy")


def vector(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_sample(q_M: Tensor, num_draws: int, scheme: str) -> tuple[Tensor, Tensor]:
    """All ordered samples (S, N) and their probabilities (S,)."""
    if scheme == "with_replacement":
        index_SN = torch.tensor(list(itertools.product(range(M), repeat=num_draws)))
        return index_SN, q_M[index_SN].prod(dim=1)
    index_SN = torch.tensor(list(itertools.permutations(range(M), num_draws)))
    q_SN = q_M[index_SN]
    left_SN = 1 - (q_SN.cumsum(dim=1) - q_SN)
    return index_SN, (q_SN / left_SN).prod(dim=1)


def estimates(scheme: str, num_draws: int, q_M: Tensor, a_M: Tensor, f_MF: Tensor, *, centred: bool = False):
    index_SN, chance_S = every_sample(q_M, num_draws, scheme)
    weight_SN = estimator_weights(q_M[index_SN], scheme)
    return expectation(f_MF[index_SN], a_M[index_SN], weight_SN, centred=centred), chance_S


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("num_draws", range(1, M))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_value_and_gradients_are_unbiased(scheme, num_draws, stale):
    logits_M = vector(1, M).requires_grad_()
    f_MF = vector(2, M, F).requires_grad_()
    upstream_F = vector(3, F)
    a_M = logits_M.softmax(dim=0)
    q_M = vector(4, M).softmax(dim=0) if stale else a_M.detach()

    value_SF, chance_S = estimates(scheme, num_draws, q_M, a_M, f_MF)
    mean_F = chance_S @ value_SF
    gradients = torch.autograd.grad(mean_F @ upstream_F, [logits_M, f_MF], retain_graph=True)

    exact_F = a_M @ f_MF
    exact_gradients = torch.autograd.grad(exact_F @ upstream_F, [logits_M, f_MF])
    assert abs(float(chance_S.sum()) - 1) < TOLERANCE
    assert float((mean_F - exact_F).detach().abs().max()) < TOLERANCE
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert float((gradient - exact).abs().max()) < TOLERANCE


@pytest.mark.parametrize("num_draws", range(2, M))
def test_enumeration_catches_the_published_bias(num_draws):
    # the inclusive cumulative sum of the ports: one draw too much is taken off
    q_M, f_MF = vector(1, M).softmax(dim=0), vector(2, M, F)
    index_SN, chance_S = every_sample(q_M, num_draws, "des_raj")
    q_SN = q_M[index_SN]
    wrong_SN = ((1 - q_SN.cumsum(dim=1)) / q_SN + torch.arange(num_draws - 1, -1, -1)) / num_draws
    mean_F = chance_S @ expectation(f_MF[index_SN], q_SN, wrong_SN)
    assert float((mean_F - q_M @ f_MF).abs().max()) > 1e-2


@pytest.mark.parametrize("num_draws", range(1, M))
def test_murthy_is_the_mean_of_des_raj_given_the_set(num_draws):
    q_M = vector(5, M).softmax(dim=0)
    index_SN, chance_S = every_sample(q_M, num_draws, "des_raj")
    by_position_SM = torch.zeros(len(index_SN), M, dtype=torch.float64)
    des_raj_SM = by_position_SM.scatter(1, index_SN, estimator_weights(q_M[index_SN], "des_raj"))
    murthy_SM = by_position_SM.scatter(1, index_SN, estimator_weights(q_M[index_SN], "murthy"))
    for members in itertools.combinations(range(M), num_draws):
        same_set_S = (index_SN.sort(dim=1).values == torch.tensor(members)).all(dim=1)
        chance = chance_S[same_set_S]
        mean_M = (chance @ des_raj_SM[same_set_S]) / chance.sum()
        assert float((murthy_SM[same_set_S] - mean_M).abs().max()) < TOLERANCE


def test_murthy_never_has_more_variance_than_des_raj():
    q_M, f_MF = vector(6, M).softmax(dim=0), vector(7, M, F)
    for num_draws in range(2, M):
        variances = []
        for scheme in ("murthy", "des_raj"):
            value_SF, chance_S = estimates(scheme, num_draws, q_M, q_M, f_MF)
            variances.append(chance_S @ (value_SF - q_M @ f_MF).square())
        assert bool((variances[0] < variances[1]).all())


def test_centred_keeps_the_value_and_has_no_gradient_outside_a_fresh_sample():
    logits_M = vector(1, M).requires_grad_()
    f_MF = vector(2, M, F)
    a_M = logits_M.softmax(dim=0)
    plain_SF, _ = estimates("murthy", 3, a_M.detach(), a_M, f_MF)
    centred_SF, _ = estimates("murthy", 3, a_M.detach(), a_M, f_MF, centred=True)
    index_SN, _ = every_sample(a_M.detach(), 3, "murthy")
    assert torch.allclose(plain_SF, centred_SF, atol=1e-14)
    for sample in range(0, len(index_SN), 17):
        (gradient_M,) = torch.autograd.grad(centred_SF[sample].sum(), logits_M, retain_graph=True)
        outside = [position for position in range(M) if position not in index_SN[sample]]
        assert float(gradient_M[outside].abs().max()) < 1e-14
        assert float(gradient_M.abs().max()) > 1e-3


def test_gradcheck():
    index_BN = torch.tensor([[0, 3, 5], [2, 1, 4]])

    def estimate(logits_BM, features_BNF):
        a_BN = logits_BM.softmax(dim=1).gather(1, index_BN)
        weight_BN = estimator_weights(torch.full((2, 3), 0.2, dtype=torch.float64), "murthy")
        return expectation(features_BNF, a_BN, weight_BN)

    inputs = (vector(8, 2, M).requires_grad_(), vector(9, 2, 3, F).requires_grad_())
    assert torch.autograd.gradcheck(estimate, inputs)
