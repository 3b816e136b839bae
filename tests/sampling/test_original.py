"""What is wrong with the gradients of earlier code, and what is not: every ordered sample, in float64.

Letters: S samples (all of them), M positions, N draws, F features.
"""

import itertools

import pytest
import torch
from biased_original import original_expectation
from torch import Tensor

from ats_stream.sampling import estimator_weights, expectation

# the example of docs/method.md
LOGITS_M = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05], dtype=torch.float64).log()
FEATURES_MF = torch.tensor([[2.0], [-1.0], [1.0], [0.0], [-2.0], [3.0]], dtype=torch.float64)
EVERY_N = range(1, 7)


def every_sample(q_M: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """All ordered samples (S, N) without replacement and their chances (S,)."""
    index_SN = torch.tensor(list(itertools.permutations(range(len(q_M)), num_draws)))
    q_SN = q_M[index_SN]
    left_SN = 1 - (q_SN.cumsum(dim=1) - q_SN)
    return index_SN, (q_SN / left_SN).prod(dim=1)


def means(num_draws: int, *, inclusive: bool = False, logits_M=LOGITS_M, features_MF=FEATURES_MF):
    """Mean value, gradient to the logits and gradient to the features; and the same three exactly."""
    logits_M, f_MF = logits_M.clone().requires_grad_(), features_MF.clone().requires_grad_()
    a_M = logits_M.softmax(dim=0)
    index_SN, chance_S = every_sample(a_M.detach(), num_draws)
    value_SF = original_expectation(f_MF[index_SN], a_M[index_SN], inclusive=inclusive)
    mean_F, exact_F = chance_S @ value_SF, a_M @ f_MF
    mean = torch.autograd.grad(mean_F.sum(), [logits_M, f_MF], retain_graph=True)
    exact = torch.autograd.grad(exact_F.sum(), [logits_M, f_MF])
    return (mean_F.detach(), *mean), (exact_F.detach(), *exact)


def relative_bias(mean: Tensor, exact: Tensor) -> float:
    return float((mean - exact).norm() / exact.norm())


@pytest.mark.parametrize("num_draws", EVERY_N)
def test_value_is_that_of_des_raj_and_so_is_the_gradient_to_the_features(num_draws):
    a_M, f_MF = LOGITS_M.softmax(dim=0), FEATURES_MF.clone().requires_grad_()
    index_SN, _ = every_sample(a_M, num_draws)
    weight_SN = estimator_weights(a_M[index_SN], "des_raj")
    ours_SF = expectation(f_MF[index_SN], a_M[index_SN], weight_SN)
    theirs_SF = original_expectation(f_MF[index_SN], a_M[index_SN])
    assert torch.allclose(ours_SF, theirs_SF, atol=1e-13)
    weights_S = torch.linspace(-1, 1, len(index_SN), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(weights_S @ v, f_MF)[0] for v in (ours_SF, theirs_SF))
    assert torch.allclose(ours, theirs, atol=1e-12)
    mean, exact = means(num_draws)
    assert relative_bias(mean[0], exact[0]) < 1e-12
    assert relative_bias(mean[2], exact[2]) < 1e-12


def test_attention_gradient_is_right_for_one_draw_alone():
    mean, exact = means(1)
    assert relative_bias(mean[1], exact[1]) < 1e-12


@pytest.mark.parametrize(
    ("num_draws", "bias", "slope"),
    [(2, 0.464, 0.548), (3, 0.769, 0.243), (4, 0.956, 0.052), (5, 1.062, -0.060), (6, 1.114, -0.113)],
)
def test_attention_gradient_is_biased_and_turns_round(num_draws, bias, slope):
    mean, exact = means(num_draws)
    assert relative_bias(mean[1], exact[1]) == pytest.approx(bias, abs=5e-4)
    # part of the true gradient that is left in the mean one: negative leads away from the minimum
    assert float(mean[1] @ exact[1] / exact[1].square().sum()) == pytest.approx(slope, abs=5e-4)


def test_bias_is_that_of_no_special_case():
    biases, slopes = [], []
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        logits_M = torch.randn(6, generator=generator, dtype=torch.float64)
        features_MF = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        of_n = [means(n, logits_M=logits_M, features_MF=features_MF) for n in (2, 3, 5)]
        biases.append([relative_bias(mean[1], exact[1]) for mean, exact in of_n])
        slopes.append(float(of_n[2][0][1] @ of_n[2][1][1]))
    median = torch.tensor(biases).median(dim=0).values.tolist()
    assert 0.3 < median[0] < 0.5
    assert 0.6 < median[1] < 0.9
    assert 1.0 < median[2] < 1.3
    assert sum(slope < 0 for slope in slopes) > 12  # of 25: opposite sign at N = 5


@pytest.mark.parametrize("num_draws", EVERY_N)
def test_inclusive_sum_of_the_ports_biases_the_feature_gradient_too(num_draws):
    mean, exact = means(num_draws, inclusive=True)
    assert relative_bias(mean[0], exact[0]) < 1e-12
    assert relative_bias(mean[2], exact[2]) > 0.16
    # each draw loses a_n / N of its weight, whichever the sample
    a_M = LOGITS_M.softmax(dim=0)
    index_SN, chance_S = every_sample(a_M, num_draws)
    drawn_M = torch.zeros(6, dtype=torch.float64).index_add(
        0, index_SN.flatten(), chance_S.repeat_interleave(num_draws)
    )
    assert torch.allclose(mean[2][:, 0], a_M - drawn_M * a_M / num_draws, atol=1e-12)


def test_two_draws_by_hand():
    # a = (1/2, 1/4), f = (2, 4): e_0 = 2, e_1 = 1/2 2 + 1/2 4 = 3, m = (1, 1/2)
    a_BN = torch.tensor([[0.5, 0.25]], requires_grad=True)
    f_BNF = torch.tensor([[[2.0], [4.0]]], requires_grad=True)
    value_BF = original_expectation(f_BNF, a_BN)
    to_f, to_a = torch.autograd.grad(value_BF.sum(), [f_BNF, a_BN])
    assert value_BF.item() == 2.5
    assert to_f.flatten().tolist() == [(1 + 0.5) / 2, 0.5 / 2]
    assert to_a.flatten().tolist() == [(2 / 0.5) / 2, (3 * 0.5 / 0.25 + 2 - 4) / 2]
