import pytest
import torch

from ats_stream.errors import InputError
from ats_stream.sampling import draw, effective_sample_share, expectation


def test_weights_carry_no_gradient():
    weight_BN = torch.ones(2, 3, requires_grad=True)
    a_BN = torch.rand(2, 3, requires_grad=True)
    expectation(torch.rand(2, 3, 4), a_BN, weight_BN).sum().backward()
    assert weight_BN.grad is None
    assert a_BN.grad is not None


def test_padding_contributes_nothing():
    features_BNF = torch.rand(1, 3, 4)
    a_BN, weight_BN = torch.rand(1, 3), torch.tensor([[1.5, 2.0, 0.0]])
    whole = expectation(features_BNF, a_BN, weight_BN)
    assert torch.equal(whole, expectation(features_BNF[:, :2], a_BN[:, :2], weight_BN[:, :2]))


def test_keeps_the_precision_of_the_attention_under_low_precision_features():
    features_BNF = torch.rand(1, 64, 4).bfloat16()
    a_BN, weight_BN = torch.rand(1, 64), torch.rand(1, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value_BF = expectation(features_BNF, a_BN, weight_BN)
    assert value_BF.dtype == torch.float32
    exact_BF = torch.einsum("bn,bn,bnf->bf", a_BN.double(), weight_BN.double(), features_BNF.double())
    assert torch.allclose(value_BF.double(), exact_BF, rtol=1e-6)


def test_effective_share_is_one_when_fresh_and_falls_with_staleness():
    logits_BM = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    shift_BM = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits_BM, 20)
    shares = []
    for staleness in (0.0, 0.3, 1.0, 3.0):
        a_BM = (logits_BM + staleness * shift_BM).softmax(dim=1)
        shares.append(effective_sample_share(drawn.weight, drawn.log_prob.exp(), a_BM.gather(1, drawn.index)))
    assert torch.allclose(shares[0], torch.ones(4), atol=1e-5)
    assert bool((torch.stack(shares).diff(dim=0) < 0).all())


def test_effective_share_is_the_written_formula_and_ignores_padding():
    weight_BN, q_BN = torch.tensor([[2.0, 3.0, 0.0]]), torch.tensor([[0.3, 0.1, 0.0]])
    a_BN = torch.tensor([[0.2, 0.4, 0.9]])
    v, r = [0.6, 0.3], [0.2 / 0.3, 4.0]
    expected = (v[0] * r[0] + v[1] * r[1]) ** 2 / (v[0] * r[0] ** 2 + v[1] * r[1] ** 2)
    assert float(effective_sample_share(weight_BN, q_BN, a_BN)) == pytest.approx(expected)


def test_bad_input():
    with pytest.raises(InputError, match=r"\(2, 3\)"):
        expectation(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        expectation(torch.zeros(2, 3, 1), torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        effective_sample_share(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3))
