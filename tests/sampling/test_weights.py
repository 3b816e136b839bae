import itertools
import math
from fractions import Fraction

import pytest
import torch

from ats_stream.errors import InputError
from ats_stream.sampling import SCHEMES, estimator_weights
from ats_stream.sampling.weights import weights_from_logs

UNBIASED = ("with_replacement", "des_raj", "murthy")
NEVER = float("-inf")


def chance_of_set(members: list[Fraction], total: Fraction) -> Fraction:
    """Probability that a race of total mass ``total`` brings these members first, in any order."""
    chance = Fraction(0)
    for order in itertools.permutations(members):
        left, product = total, Fraction(1)
        for q in order:
            product *= q / left
            left -= q
        chance += product
    return chance


def murthy_by_enumeration(q: list[float]) -> list[float]:
    exact = [Fraction(one) for one in q]
    whole = chance_of_set(exact, Fraction(1))
    without = [
        chance_of_set([*exact[:s], *exact[s + 1 :]], 1 - exact[s]) if len(q) > 1 else Fraction(1)
        for s in range(len(q))
    ]
    return [float(one / whole) for one in without]


def drawn_probabilities(num_draws: int, num_positions: int, spread: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_positions, generator=generator, dtype=torch.float64)
    q = logits.softmax(dim=0)
    race = torch.empty_like(q).exponential_(generator=generator) / q
    return q[race.argsort()[:num_draws]]


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("num_draws", range(1, 8))
def test_murthy_against_enumeration_of_all_orders(num_draws, spread):
    for num_positions in (num_draws + 1, 30, 3000) if num_draws < 7 else (3000,):
        q_N = drawn_probabilities(num_draws, num_positions, spread, seed=num_positions)
        exact_rest = 1 - sum(Fraction(one) for one in q_N.tolist())
        if exact_rest <= 0:
            continue
        rest_B = torch.tensor([float(exact_rest)], dtype=torch.float64)
        weight_N = estimator_weights(q_N[None], "murthy", rest_B=rest_B)[0]
        exact_N = torch.tensor(murthy_by_enumeration(q_N.tolist()), dtype=torch.float64)
        assert float((weight_N / exact_N - 1).abs().max()) < 1e-12


def murthy_by_many_nodes(log_q_N: torch.Tensor, log_rest: float) -> torch.Tensor:
    """The integrals of METHOD by 4096 nodes over all of y in which float64 sees anything, on logarithms."""
    y_G = torch.linspace(-45, 9, 4096, dtype=torch.float64)
    factor_NG = (-torch.expm1(-(log_q_N[:, None] - log_rest + y_G).exp())).log()
    whole_G = y_G - y_G.exp() + factor_NG.sum(dim=0)
    return (torch.logsumexp(whole_G - factor_NG, dim=1) - torch.logsumexp(whole_G, dim=0)).exp()


@pytest.mark.parametrize("mass", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 1e-12])
@pytest.mark.parametrize("num_draws", [3, 10, 19, 20, 64, 300])
def test_murthy_against_many_nodes(num_draws, mass):
    for num_positions, spread in ((1_000_000, 1.0), (20_000, 4.0), (2 * num_draws, 12.0)):
        q_N = drawn_probabilities(num_draws, num_positions, spread, seed=num_draws)
        log_q_N = q_N.log() - q_N.log().logsumexp(0) + math.log(mass)
        log_rest_B = torch.tensor([math.log1p(-mass)], dtype=torch.float64)
        weight_N = weights_from_logs(log_q_N[None], log_rest_B, "murthy")[0]
        exact_N = murthy_by_many_nodes(log_q_N, float(log_rest_B))
        assert float((weight_N / exact_N - 1).abs().max()) < 1e-10


@pytest.mark.parametrize("num_draws", [1, 2, 3, 10, 64, 500])
@pytest.mark.parametrize("scheme", UNBIASED)
def test_attention_times_weight_sums_to_one_when_fresh(scheme, num_draws):
    q_BN = torch.stack([drawn_probabilities(num_draws, 5000, spread, 1) for spread in (0.0, 1.0, 3.0)])
    weight_BN = estimator_weights(q_BN, scheme)
    assert torch.allclose((q_BN * weight_BN).sum(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-11)


def test_top_renormalises():
    weight_BN = estimator_weights(torch.tensor([[0.5, 0.3]]), "top")
    assert torch.allclose(weight_BN, torch.full((1, 2), 1.25))


def test_murthy_limits():
    everything = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    one = torch.ones(1, 3, dtype=torch.float64)
    assert torch.equal(estimator_weights(everything, "murthy", rest_B=torch.zeros(1)), one)
    nearly = estimator_weights(everything, "murthy", rest_B=torch.tensor([1e-300], dtype=torch.float64))
    assert torch.allclose(nearly, one, rtol=1e-12)
    single = estimator_weights(torch.tensor([[1e-30]], dtype=torch.float64), "murthy")
    assert torch.allclose(single, torch.tensor([[1e30]], dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("scheme", ["des_raj", "murthy"])
def test_probabilities_beyond_float64(scheme):
    # the second and third draw come from what the first leaves: a map of mass e^-2000
    log_q_BN = torch.tensor([[0.0, -2000.0, -2001.0]], dtype=torch.float64)
    weight_BN = weights_from_logs(log_q_BN, torch.tensor([-2002.0], dtype=torch.float64), scheme)
    assert bool(weight_BN.isfinite().all())
    assert bool((weight_BN > 0).all())
    if scheme == "murthy":
        tail = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64).softmax(dim=1)
        assert torch.allclose(weight_BN[:, 1:], estimator_weights(tail[:, :2], "murthy"), rtol=1e-9)


def test_murthy_of_a_draw_nobody_expects():
    # far below anything likely the weight is 1 / q times what holds for every such draw
    for log_q in (-250.0, -650.0):
        log_q_BN = torch.tensor([[-1.0, -2.0, log_q]], dtype=torch.float64)
        log_rest_B = torch.log1p(-log_q_BN.exp().sum(dim=1))
        weight_N = weights_from_logs(log_q_BN, log_rest_B, "murthy")[0]
        near_BN = torch.tensor([[-1.0, -2.0, -60.0]], dtype=torch.float64)
        near_N = weights_from_logs(near_BN, torch.log1p(-near_BN.exp().sum(dim=1)), "murthy")[0]
        assert torch.allclose(weight_N[:2], near_N[:2], rtol=1e-11)
        assert float(weight_N[2].log() + log_q) == pytest.approx(float(near_N[2].log()) - 60, abs=1e-9)


@pytest.mark.parametrize("scheme", [*UNBIASED, "top"])
def test_padding_changes_nothing(scheme):
    q_BN = drawn_probabilities(4, 50, 1.0, 2)[None]
    padded_BN = torch.cat([q_BN, torch.zeros(1, 3, dtype=torch.float64)], dim=1)
    rest_B = 1 - q_BN.sum(dim=1)
    weight_BN = estimator_weights(padded_BN, scheme, rest_B=rest_B)
    assert torch.allclose(weight_BN[:, :4], estimator_weights(q_BN, scheme, rest_B=rest_B), rtol=1e-12)
    assert torch.equal(weight_BN[:, 4:], torch.zeros(1, 3, dtype=torch.float64))


def test_balanced_inverts_the_inclusion_and_needs_it():
    q_BN = torch.tensor([[0.5, 0.25, 0.0]])
    weight_BN = estimator_weights(q_BN, "balanced", inclusion_BN=torch.tensor([[1.0, 0.5, 1.0]]))
    assert torch.equal(weight_BN, torch.tensor([[1.0, 2.0, 0.0]]))
    with pytest.raises(InputError, match="inclusion"):
        estimator_weights(q_BN, "balanced")


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_and_no_gradient(given, returned):
    q_BN = torch.tensor([[0.5, 0.25]], dtype=given, requires_grad=True)
    weight_BN = estimator_weights(q_BN, "murthy")
    assert weight_BN.dtype == returned
    assert not weight_BN.requires_grad


def test_all_schemes_have_a_weight():
    q_BN = torch.tensor([[0.5, 0.25]])
    for scheme in SCHEMES:
        assert estimator_weights(q_BN, scheme, inclusion_BN=torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    ("q_BN", "scheme", "extra", "message"),
    [
        (torch.tensor([0.5]), "murthy", {}, r"\(1,\)"),
        (torch.tensor([[1]]), "murthy", {}, "int64"),
        (torch.empty(2, 0), "murthy", {}, r"\(2, 0\)"),
        (torch.tensor([[-0.5]]), "murthy", {}, r"\[0, 1\]"),
        (torch.tensor([[float("nan")]]), "murthy", {}, r"\[0, 1\]"),
        (torch.tensor([[0.9, 0.9]]), "des_raj", {}, "more than 1"),
        (torch.tensor([[0.5]]), "poisson", {}, "poisson"),
        (torch.tensor([[0.5]]), "murthy", {"rest_B": torch.tensor([-1.0])}, "rest"),
        (torch.tensor([[0.5]]), "murthy", {"rest_B": torch.ones(2)}, "rest"),
        (torch.tensor([[0.5]]), "balanced", {"inclusion_BN": torch.ones(2, 2)}, "inclusion"),
    ],
)
def test_bad_input(q_BN, scheme, extra, message):
    with pytest.raises(InputError, match=message):
        estimator_weights(q_BN, scheme, **extra)
