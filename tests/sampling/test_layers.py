import math

import pytest
import torch

from ats_stream.errors import InputError
from ats_stream.sampling import ActivityRegularizer, L2Normalize, SampleSoftmax, multinomial_entropy

NEVER = float("-inf")


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 4), (2, 1, 3, 4), (2, 1, 2, 3, 4)])
def test_softmax_is_over_the_whole_sample(shape):
    logits = torch.randn(shape)
    expected = logits.flatten(1).softmax(dim=1).view(shape)
    assert torch.allclose(SampleSoftmax()(logits), expected)
    if shape[1] == 1:
        assert torch.allclose(SampleSoftmax(squeeze_channels=True)(logits), expected[:, 0])


def test_smooth_spreads_over_drawable_positions_only():
    logits = torch.tensor([[[2.0, NEVER], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    plain, smooth = SampleSoftmax()(logits), SampleSoftmax(smooth=0.3)(logits)
    assert torch.allclose(smooth.flatten(1).sum(dim=1), torch.ones(2))
    assert smooth[0, 0, 1].item() == 0
    assert torch.allclose(smooth[0, 1], 0.7 * plain[0, 1] + 0.1)
    (smooth * torch.randn(2, 2, 2)).sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_softmax_bad_input():
    for smooth in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match=rf"smooth must lie in \[0, 1\), got {smooth}"):
            SampleSoftmax(smooth=smooth)
    with pytest.raises(InputError, match="row 0 has the value nan"):
        SampleSoftmax()(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match=r"\(2, 3, 4\)"):
        SampleSoftmax(squeeze_channels=True)(torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="nothing to draw from"):
        SampleSoftmax()(torch.full((1, 2), NEVER))


@pytest.mark.parametrize("dim", [-1, 1, (1, 2)])
def test_l2_normalize(dim):
    x = torch.randn(3, 4, 5)
    assert torch.allclose(L2Normalize(dim)(x).square().sum(dim=dim), torch.ones(()), atol=1e-5)


def test_l2_normalize_of_zero_is_zero_with_a_finite_gradient():
    x = torch.zeros(1, 3, requires_grad=True)
    y = L2Normalize()(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 3))
    assert bool(x.grad.isfinite().all())


def test_entropy_of_known_distributions():
    attention = torch.tensor([[[0.25, 0.25], [0.25, 0.25]], [[1.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    value = multinomial_entropy(strength=2.0)(attention)
    assert float(value.detach()) == pytest.approx(-math.log(4), abs=1e-4)  # twice the mean of -log 4 and 0
    value.backward()
    assert bool(attention.grad.isfinite().all())


def test_activity_regularizer_passes_on_and_keeps_the_value():
    layer = ActivityRegularizer(multinomial_entropy(0.5))
    attention = torch.full((2, 4), 0.25, requires_grad=True)
    assert layer(attention) is attention
    assert float(layer.regularization.detach()) == pytest.approx(-0.5 * math.log(4), abs=1e-4)
    layer.regularization.backward()
    assert attention.grad is not None
