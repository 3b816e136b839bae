"""torch.compile: whole graphs where nothing must be decided from values, and equal results."""

import pytest
import torch
from torch import nn

from ats_stream.sampling import (
    SCHEMES,
    SampleSoftmax,
    attention_logits,
    attention_sampling,
    draw,
    effective_sample_share,
    estimator_weights,
    expectation,
    log_attention,
)

# what torch itself says while it compiles
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centred", [False, True])
def test_expectation_and_its_gradients(centred):
    def loss(features_BNF, attention_BN, weight_BN):
        return expectation(features_BNF, attention_BN, weight_BN, centred=centred).square().sum()

    given = [normal(0, 2, 5, 3).requires_grad_(), normal(1, 2, 5).requires_grad_()]
    weight_BN = normal(2, 2, 5).abs()
    results = []
    for function in (loss, compiled(loss)):
        value = function(*given, weight_BN)
        results.append([value, *torch.autograd.grad(value, given)])
    assert all(torch.allclose(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights(scheme):
    q_BN = normal(0, 3, 7).softmax(dim=1) / 2

    def weights(q_BN):
        return estimator_weights(q_BN, scheme, inclusion_BN=q_BN)

    assert torch.equal(weights(q_BN), compiled(weights)(q_BN))


@pytest.mark.parametrize(
    "function",
    [
        log_attention,
        lambda logits_BM: log_attention(logits_BM, 2 * logits_BM),
        lambda logits_BM: attention_logits(logits_BM.exp(), use_logits=False),
        SampleSoftmax(smooth=0.1),
        lambda q_BN: effective_sample_share(q_BN.abs(), q_BN.abs(), q_BN.abs()),
    ],
    ids=["log_attention", "prior", "attention_logits", "softmax", "share"],
)
def test_attention(function):
    logits_BM = normal(0, 2, 30)
    assert torch.allclose(function(logits_BM), compiled(function)(logits_BM))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_draw_is_one_step_of_the_graph(scheme):
    def estimate(logits_BM, features_BMF):
        drawn = draw(logits_BM, 6, scheme=scheme, seed=(1 << 64) - 3, stream_ids=[3, -1], map_shape=(5, 6))
        attention_BN = log_attention(logits_BM).gather(1, drawn.index).exp()
        features_BNF = features_BMF.gather(1, drawn.index[:, :, None].expand(-1, -1, 3))
        return expectation(features_BNF, attention_BN, drawn.weight), drawn

    given = normal(0, 2, 30).requires_grad_(), normal(1, 2, 30, 3)
    value_BF, drawn = estimate(*given)
    other_BF, other = compiled(estimate)(*given)
    assert torch.allclose(value_BF, other_BF)
    for name in ("index", "log_prob", "weight", "num_drawn", "log_normaliser", "inclusion", "threshold"):
        one, two = getattr(drawn, name), getattr(other, name)
        assert one is two is None or torch.equal(one, two)
    if drawn.race is not None:
        assert torch.equal(drawn.race.log_rest, other.race.log_rest)
    gradient, other_gradient = (torch.autograd.grad(one.sum(), given[0])[0] for one in (value_BF, other_BF))
    assert torch.allclose(gradient, other_gradient)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_operator_keeps_to_its_contract(scheme):
    arguments = (normal(0, 2, 30), 6, scheme, torch.tensor(5), torch.arange(2), None, [5, 6])
    torch.library.opcheck(torch.ops.ats_stream.draw.default, arguments)


def test_bad_logits_are_refused_inside_a_graph_too():
    function = compiled(lambda logits_BM: draw(logits_BM, 2).index)
    with pytest.raises(ValueError, match="row 0 contains nan"):
        function(torch.full((1, 9), float("nan")))


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, patches):
        return self.linear(patches.flatten(1))


def test_a_whole_step_gives_what_it_gives_uncompiled():
    torch.manual_seed(0)
    attention = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), SampleSoftmax(squeeze_channels=True))
    x_low, x_high = torch.rand(2, 1, 12, 12), torch.rand(2, 1, 96, 96)
    # the seed and the step counter are buffers, which the graph reads and advances without looking at them
    plain, whole = (attention_sampling(attention, Features(), 8, 5, seed=-4) for _ in range(2))
    whole.load_state_dict(plain.state_dict())
    step = compiled(whole)
    for training in (True, True, False):
        plain.train(training)
        whole.train(training)
        for one, other in zip(plain(x_low, x_high), step(x_low, x_high), strict=True):
            assert torch.allclose(one, other)
        assert torch.equal(plain.last_draw.index, whole.last_draw.index)
        assert torch.equal(plain.sampler.step, whole.sampler.step)
    assert int(whole.sampler.step) == 2
    assert int(whole.last_draw.noise.seed) == -4
