import pytest
import torch

from ats_stream.errors import InputError
from ats_stream.sampling import attention_logits, log_attention

NEVER = float("-inf")


def test_prior_is_added_before_the_softmax():
    logits_BM, prior_BM = torch.randn(2, 5), torch.randn(2, 5)
    prior_BM[0, 2] = NEVER
    expected_BM = (logits_BM + prior_BM).log_softmax(dim=1)
    assert torch.equal(log_attention(logits_BM, prior_BM), expected_BM)
    assert float(log_attention(logits_BM, prior_BM)[0, 2]) == NEVER


def test_probabilities_and_logits_lead_to_the_same_attention():
    logits_BM, prior_BM = torch.randn(2, 5).double(), torch.zeros(2, 5).double()
    prior_BM[:, 1] = NEVER
    probabilities = logits_BM.softmax(dim=1).view(2, 1, 5)
    from_probabilities = log_attention(attention_logits(probabilities, use_logits=False), prior_BM)
    assert torch.allclose(from_probabilities, log_attention(logits_BM, prior_BM))


def test_gradients_are_finite_and_zero_where_nothing_can_be_drawn():
    logits_BM = torch.tensor([[0.5, NEVER, 1.0, 2.0]], requires_grad=True)
    prior_BM = torch.tensor([[0.0, 0.0, NEVER, 0.0]])
    attention_BM = log_attention(logits_BM, prior_BM).exp()
    (attention_BM * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert bool(logits_BM.grad.isfinite().all())
    assert logits_BM.grad[0, [1, 2]].tolist() == [0, 0]
    assert float(logits_BM.grad[0, 0]) != 0


def test_gradients_through_zero_probabilities_are_finite():
    probabilities = torch.tensor([[0.0, 0.25, 0.75]], requires_grad=True)
    attention_BM = log_attention(attention_logits(probabilities, use_logits=False)).exp()
    assert torch.allclose(attention_BM, probabilities)
    attention_BM[0, 1].backward()
    assert bool(probabilities.grad.isfinite().all())
    assert float(probabilities.grad[0, 0]) == 0


def test_half_precision_is_lifted():
    assert log_attention(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert log_attention(torch.zeros(1, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("logits_BM", "prior_BM", "message"),
    [
        (torch.zeros(3), None, r"\(3,\)"),
        (torch.zeros(1, 3, dtype=torch.int32), None, "int32"),
        (torch.tensor([[0.0], [NEVER]]), None, "row 1 has nothing to draw from"),
        (
            torch.tensor([[0.0, NEVER]]),
            torch.tensor([[NEVER, 0.0]]),
            r"logits \+ log_prior.* row 0 has nothing",
        ),
        (torch.tensor([[float("nan"), 1.0]]), None, "row 0 has the value nan"),
        (torch.tensor([[float("inf"), 1.0]]), None, "row 0 has the value inf"),
        (torch.zeros(1, 2), torch.tensor([[float("nan"), 0.0]]), "log_prior.* nan"),
        (torch.zeros(1, 2), torch.full((1, 2), NEVER), "log_prior.* nothing to draw from"),
        (torch.zeros(1, 2), torch.zeros(2, 2), r"\(2, 2\) and \(1, 2\)"),
    ],
)
def test_bad_input(logits_BM, prior_BM, message):
    with pytest.raises(InputError, match=message):
        log_attention(logits_BM, prior_BM)


def test_logits_taken_for_probabilities_are_noticed():
    with pytest.raises(InputError, match="use_logits=True"):
        attention_logits(torch.tensor([[-1.0, 2.0]]), use_logits=False)
    with pytest.raises(InputError, match="int64"):
        attention_logits(torch.tensor([[1, 2]]), use_logits=True)
