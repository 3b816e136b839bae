import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.sampling import (
    Expectation,
    SamplePatches,
    SampleSoftmax,
    attention_sampling,
    draw,
    geometry_of,
    multinomial_entropy,
)

NEVER = float("-inf")


def attention_net(num_axes: int = 2, *, softmax: bool = True) -> nn.Module:
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[num_axes]
    torch.manual_seed(1)
    body = [convolution(1, 4, 3, padding=1), nn.Tanh(), convolution(4, 1, 3, padding=1)]
    return nn.Sequential(*body, *([SampleSoftmax(squeeze_channels=True, smooth=1e-3)] if softmax else []))


class PatchMean(nn.Module):
    """Feature of a patch: its mean per channel, and a constant one."""

    patch_size = (8, 8)

    def forward(self, patches: Tensor) -> Tensor:
        means = patches.flatten(2).mean(dim=2)
        return torch.cat([means, torch.ones_like(means[:, :1])], dim=1)


def views(num_axes: int = 2, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(batch, 1, *[6] * num_axes, generator=generator)
    high = low
    for axis in range(2, num_axes + 2):
        high = high.repeat_interleave(8, dim=axis)
    return low, high


class ArraySource:
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.levels = array, (array,)

    def read_patches(self, level, offsets, size, *, fill=0):
        widest = max(size)
        padded = np.pad(
            self.array, [(0, 0)] + [(widest, widest)] * (self.array.ndim - 1), constant_values=fill
        )
        starts = np.clip(offsets + widest, 0, np.array(padded.shape[1:]) - np.array(size))
        boxes = [
            tuple(slice(int(a), int(a) + s) for a, s in zip(start, size, strict=True)) for start in starts
        ]
        return np.stack([padded[(slice(None), *box)] for box in boxes])


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_shapes_and_a_constant_feature(num_axes):
    x_low, x_high = views(num_axes)
    model = attention_sampling(attention_net(num_axes), PatchMean(), 8, n_patches=5)
    features, attention, patches = model(x_low, x_high)
    assert features.shape == (2, 2)
    assert attention.shape == (2, *[6] * num_axes)
    assert patches.shape == (2, 5, 1, *[8] * num_axes)
    assert torch.allclose(attention.flatten(1).sum(dim=1), torch.ones(2))
    assert torch.allclose(features[:, 1], torch.ones(2), atol=1e-5)  # sum a R = 1


def test_patches_are_those_of_the_drawn_cells():
    # every cell of the 6 x 6 map is one block of 8 x 8 equal pixels
    x_low, x_high = views()
    model = attention_sampling(attention_net(), PatchMean(), n_patches=5)
    _, attention, patches = model(x_low, x_high)
    cells_BN = x_low.flatten(1).gather(1, model.last_draw.index)
    assert torch.equal(patches, cells_BN[:, :, None, None, None].expand(-1, -1, 1, 8, 8))
    logits = attention_net()(x_low).flatten(1).log()
    assert torch.allclose(attention.flatten(1), logits.softmax(dim=1), atol=1e-6)


@pytest.mark.parametrize("scheme", ["with_replacement", "des_raj", "murthy", "balanced"])
def test_mean_over_many_draws_is_the_whole_sum(scheme):
    x_low, x_high = views(batch=1)
    num_rows = 3000
    model = attention_sampling(attention_net(), PatchMean(), n_patches=4, scheme=scheme)
    features, attention, _ = model(x_low.expand(num_rows, -1, -1, -1), x_high.expand(num_rows, -1, -1, -1))
    exact = float((attention[0] * x_low[0, 0]).sum().detach())
    values = features[:, 0].detach()
    assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / num_rows**0.5


def test_all_positions_drawn_give_the_exact_sum_and_gradients():
    x_low, x_high = views()
    model = attention_sampling(attention_net(), PatchMean(), n_patches=36)
    features, attention, _ = model(x_low, x_high)
    exact_B = (attention * x_low[:, 0]).flatten(1).sum(dim=1)
    assert torch.allclose(features[:, 0], exact_B, atol=1e-5)
    parameters = list(model.attention.parameters())
    gradients = torch.autograd.grad(features[:, 0].sum(), parameters, retain_graph=True)
    for gradient, exact in zip(gradients, torch.autograd.grad(exact_B.sum(), parameters), strict=True):
        assert torch.allclose(gradient, exact, atol=1e-5)


def test_lazy_sources_equal_the_tensor():
    x_low, x_high = views()
    sources = [ArraySource(row.numpy()) for row in x_high]
    kinds = {"patch_size": 11, "n_patches": 5, "fill": 0.0}
    from_tensor = attention_sampling(attention_net(), PatchMean(), **kinds)(x_low, x_high)
    from_sources = attention_sampling(attention_net(), PatchMean(), **kinds)(x_low, sources)
    for one, other in zip(from_tensor, from_sources, strict=True):
        assert torch.equal(one, other)


def test_lazy_images_may_differ_in_size_and_be_integers():
    x_low, _ = views()
    sources = [ArraySource(np.full((1, 40 + 8 * row, 64), 200, np.uint8)) for row in range(2)]
    model = attention_sampling(attention_net(), PatchMean(), patch_size=5, n_patches=3)
    features, _, patches = model(x_low, sources)
    assert patches.dtype == torch.float32
    assert torch.allclose(features[:, 0], torch.full((2,), 200.0))


def test_prior_masks_and_probabilities_agree_with_logits():
    x_low, x_high = views()
    log_prior = torch.zeros(2, 6, 6)
    log_prior[:, :, 3:] = NEVER
    log_prior[0] = NEVER
    log_prior[0, 2, 2] = 0
    body = attention_net(softmax=False)
    kinds = {"n_patches": 4, "seed": 3}
    on_logits = attention_sampling(body, PatchMean(), use_logits=True, **kinds)
    on_probabilities = attention_sampling(nn.Sequential(body, SampleSoftmax()), PatchMean(), **kinds)
    features, attention, patches = on_logits(x_low, x_high, log_prior)
    assert bool((attention[log_prior == NEVER] == 0).all())
    assert bool((on_logits.last_draw.index % 6 < 3).all())
    assert on_logits.last_draw.num_drawn.tolist() == [1, 4]
    assert float(features[0, 0].detach()) == pytest.approx(float(x_low[0, 0, 2, 2]), abs=1e-6)
    features.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in body.parameters())
    other_features, other_attention, other_patches = on_probabilities(x_low, x_high, log_prior)
    assert torch.allclose(attention, other_attention, atol=1e-6)
    assert torch.equal(patches, other_patches)
    assert torch.allclose(features, other_features, atol=1e-5)


def test_training_draws_anew_each_step_and_evaluation_never():
    x_low, x_high = views()
    model = attention_sampling(attention_net(), PatchMean(), n_patches=4)
    training = []
    for _ in range(3):
        model(x_low, x_high)
        training.append(model.last_draw.index.tolist())
    assert training[0] != training[1] != training[2]
    model.eval()
    evaluation = []
    for _ in range(2):
        model(x_low, x_high)
        evaluation.append(model.last_draw.index.tolist())
    assert evaluation[0] == evaluation[1]
    assert int(model.sampler.step) == 3


def test_state_dict_resumes_the_noise():
    x_low, x_high = views()
    first = attention_sampling(attention_net(), PatchMean(), n_patches=4, seed=8)
    first(x_low, x_high)
    second = attention_sampling(attention_net(), PatchMean(), n_patches=4)
    second.load_state_dict(first.state_dict())
    first(x_low, x_high)
    second(x_low, x_high)
    assert torch.equal(first.last_draw.index, second.last_draw.index)


def test_top_inference_is_deterministic_and_renormalised():
    x_low, x_high = views()
    model = attention_sampling(attention_net(), PatchMean(), n_patches=4, inference="top")
    model(x_low, x_high)
    assert model.last_draw.scheme == "murthy"
    features, attention, _ = model.eval()(x_low, x_high)
    top = attention.flatten(1).topk(4)
    assert torch.equal(model.last_draw.index, top.indices)
    cells = x_low.flatten(1).gather(1, top.indices)
    assert torch.allclose(features[:, 0], (top.values * cells).sum(dim=1) / top.values.sum(dim=1), atol=1e-5)


@pytest.mark.parametrize("scheme", ["with_replacement", "des_raj", "murthy", "balanced"])
def test_an_average_is_that_of_single_draws_with_its_streams(scheme):
    x_low, x_high = views()
    model = attention_sampling(
        attention_net(), PatchMean(), n_patches=4, scheme=scheme, inference="average", num_draws=5
    ).eval()
    features, attention, patches = model(x_low, x_high)
    assert patches.shape == (2, 20, 1, 8, 8)
    assert len(model.last_draws) == 5
    assert model.last_draw is model.last_draws[0]
    streams = torch.cat([one.noise.stream_ids for one in model.last_draws])
    assert len(set(streams.tolist())) == 10
    log_a_BM = attention.flatten(1).log()
    singles = []
    for number, made in enumerate(model.last_draws):
        alone = draw(log_a_BM.detach(), 4, scheme=scheme, stream_ids=made.noise.stream_ids, map_shape=(6, 6))
        assert torch.equal(alone.index, made.index)
        features_BNF = PatchMean()(patches[:, 4 * number : 4 * number + 4].flatten(0, 1)).view(2, 4, 2)
        singles.append(Expectation(scheme=scheme)(features_BNF, made))
    stacked = torch.stack(singles)
    torch.testing.assert_close(features, stacked.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.last_standard_error, stacked.std(dim=0) / 5**0.5, rtol=1e-3, atol=1e-6)


def test_the_first_of_the_average_is_the_single_draw_and_training_draws_once():
    x_low, x_high = views()
    kinds = {"n_patches": 4, "seed": 5}
    average = attention_sampling(attention_net(), PatchMean(), inference="average", num_draws=3, **kinds)
    single = attention_sampling(attention_net(), PatchMean(), **kinds)
    for one, other in zip(average(x_low, x_high), single(x_low, x_high), strict=True):
        assert torch.equal(one, other)
    assert average.last_standard_error is None
    single.eval()(x_low, x_high)
    _, _, patches = average.eval()(x_low, x_high)
    assert torch.equal(average.last_draw.index, single.last_draw.index)
    assert torch.equal(patches, average(x_low, x_high)[2])  # evaluation repeats itself
    assert int(average.sampler.step) == 1
    average.num_draws = 1
    for one, other in zip(average(x_low, x_high), single(x_low, x_high), strict=True):
        assert torch.equal(one, other)
    assert average.last_standard_error is None


def test_the_draws_of_a_row_do_not_depend_on_the_batch():
    x_low, x_high = views(batch=4)
    model = attention_sampling(attention_net(), PatchMean(), n_patches=4, inference="average").eval()
    model(x_low, x_high)
    whole = [one.index for one in model.last_draws]
    assert len(whole) == 8
    model(x_low[:1], x_high[:1])
    assert all(
        torch.equal(one.index, all_rows[:1]) for one, all_rows in zip(model.last_draws, whole, strict=True)
    )


def test_variance_falls_with_the_number_of_draws_and_the_standard_error_tells_it():
    x_low, x_high = (view.expand(600, -1, -1, -1) for view in views(batch=1))
    spread, told = {}, {}
    for num_draws in (1, 4, 16):
        model = attention_sampling(
            attention_net(), PatchMean(), n_patches=2, inference="average", num_draws=num_draws
        ).eval()
        with torch.no_grad():
            spread[num_draws] = float(model(x_low, x_high)[0][:, 0].var())
        error = model.last_standard_error
        told[num_draws] = None if error is None else float(error[:, 0].square().mean())
    assert told[1] is None
    for num_draws in (4, 16):
        assert spread[num_draws] == pytest.approx(spread[1] / num_draws, rel=0.25)
        assert told[num_draws] == pytest.approx(spread[1] / num_draws, rel=0.25)


def test_regularization_is_scaled_and_carries_a_gradient():
    x_low, x_high = views()
    regularizer = multinomial_entropy(0.25)
    model = attention_sampling(attention_net(), PatchMean(), attention_regularizer=regularizer)
    _, attention, _ = model(x_low, x_high)
    assert torch.equal(model.regularization, regularizer(attention))
    model.regularization.backward()
    assert any(float(parameter.grad.abs().sum()) > 0 for parameter in model.attention.parameters())
    plain = attention_sampling(attention_net(), PatchMean())
    plain(x_low, x_high)
    assert float(plain.regularization) == 0


def test_geometry_read_off_the_network():
    attention = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Conv2d(2, 1, 1), SampleSoftmax())
    x_low, x_high = torch.rand(1, 1, 12, 13), torch.rand(1, 1, 96, 104)
    geometry = geometry_of(attention, (1, 12, 13))
    traced = attention_sampling(attention, PatchMean(), receptive_field=None)
    given = attention_sampling(attention, PatchMean(), receptive_field=geometry)
    even = attention_sampling(attention, PatchMean())
    assert torch.equal(traced(x_low, x_high)[2], given(x_low, x_high)[2])
    assert not torch.equal(even(x_low, x_high)[2], given(x_low, x_high)[2])


@pytest.mark.parametrize(("replace", "scheme"), [(False, "murthy"), (True, "murthy"), (False, "des_raj")])
def test_sample_patches_with_expectation_equals_the_whole_module(replace, scheme):
    x_low, x_high = views()
    network = attention_net()
    sampler = SamplePatches(5, (8, 8), replace=replace, scheme=scheme)
    patches, sampled_attention = sampler(x_low, x_high, network(x_low))
    features_BNF = PatchMean()(patches.flatten(0, 1)).view(2, 5, -1)
    value = Expectation(replace, None if replace else scheme)(features_BNF, sampled_attention)
    model = attention_sampling(network, PatchMean(), n_patches=5, replace=replace, scheme=scheme)
    expected, _, _ = model(x_low, x_high)
    assert torch.allclose(value, expected, atol=1e-5)
    on_logits = SamplePatches(5, 8, replace=replace, scheme=scheme, use_logits=True)
    _, from_logits = on_logits(x_low, x_high, network(x_low).log())
    assert torch.allclose(from_logits, sampled_attention, atol=1e-6)


def test_expectation_of_an_old_draw_takes_the_fresh_attention():
    drawn = draw(torch.randn(2, 30), 6)
    features_BNF, fresh_BN = torch.rand(2, 6, 3), torch.rand(2, 6)
    value = Expectation()(features_BNF, drawn, fresh_BN)
    assert torch.allclose(value, torch.einsum("bn,bn,bnf->bf", fresh_BN, drawn.weight, features_BNF))
    own = Expectation()(features_BNF, drawn)
    assert torch.allclose(own, Expectation()(features_BNF, drawn, drawn.log_prob.exp()))


@pytest.mark.parametrize("number", [0, -1, True, 2.0, None])
def test_numbers_of_patches_and_draws_are_positive_integers(number):
    with pytest.raises(InputError, match=f"n_patches must be an integer of at least 1, got {number}"):
        SamplePatches(number, 8)
    with pytest.raises(InputError, match=f"num_draws must be an integer of at least 1, got {number}"):
        attention_sampling(attention_net(), PatchMean(), inference="average", num_draws=number)


@pytest.mark.parametrize("size", [0, (8, 0), (8, 2.5), (), (1, 1, 1, 1), "8"])
def test_patch_sizes_are_positive_integers(size):
    with pytest.raises(InputError, match="patch_size must be an integer"):
        SamplePatches(1, size)


@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 2, 2, 2, 2), (2, 1, 6, 0)])
def test_views_of_other_ranks_are_refused(shape):
    with pytest.raises(InputError, match=f"x_low must be .*{shape[-1]}"):
        attention_sampling(attention_net(), PatchMean())(torch.zeros(shape), views()[1])


@pytest.mark.parametrize(("batch", "num_axes"), [(1, 2), (3, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("lazy", [False, True])
def test_images_that_do_not_belong_to_the_view_are_refused(batch, num_axes, lazy):
    x_low, _ = views()
    _, x_high = views(num_axes, batch)
    images = [ArraySource(row.numpy()) for row in x_high] if lazy else x_high
    problem = f"x_high has {batch} rows, but 2" if num_axes == 2 else "x_high must be .* with 2 axes of space"
    with pytest.raises(InputError, match=problem):
        attention_sampling(attention_net(), PatchMean())(x_low, images)
    with pytest.raises(InputError, match=problem):
        SamplePatches(1, 8)(x_low, images, torch.ones(2, 6, 6))


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 6, 6), (2, 5, 6), (2, 36), (2, 2, 6, 6), (6, 6)])
def test_priors_and_attention_of_other_shapes_are_refused(shape):
    x_low, x_high = views()
    with pytest.raises(InputError, match=r"log_prior must be \(B, \*map\) = \(2, 6, 6\)"):
        attention_sampling(attention_net(), PatchMean())(x_low, x_high, torch.zeros(shape))
    if shape != (2, 5, 6):  # a map may be of any size
        with pytest.raises(InputError, match=r"attention must be \(B, \*map\)"):
            SamplePatches(1, 8)(x_low, x_high, torch.ones(shape))


@pytest.mark.parametrize("use_logits", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attention_that_is_no_number_is_refused(value, use_logits):
    x_low, x_high = views()
    attention = torch.ones(2, 6, 6)
    attention[1, 2, 3] = value
    with pytest.raises(InputError, match=r"\(2, (6, 6|36)\).*(NaN|nan|inf)"):
        SamplePatches(1, 8, use_logits=use_logits)(x_low, x_high, attention)
    with pytest.raises(InputError, match=r"\(2, (6, 6|36)\).*(NaN|nan|inf)"):
        attention_sampling(Constant(attention), PatchMean(), use_logits=use_logits)(x_low, x_high)
    prior = torch.zeros(2, 6, 6).masked_fill(attention != 1, value)
    with pytest.raises(InputError, match=r"log_prior \(2, 36\): row 1 has the value"):
        attention_sampling(attention_net(), PatchMean())(x_low, x_high, prior)


@pytest.mark.parametrize("lazy", [False, True])
def test_patches_larger_than_the_image_are_refused(lazy):
    x_low, x_high = views()
    images = [ArraySource(row.numpy()) for row in x_high] if lazy else x_high
    with pytest.raises(InputError, match=r"patch of \(48, 49\) pixels is larger than the image, \(48, 48\)"):
        attention_sampling(attention_net(), PatchMean(), (48, 49))(x_low, images)


class Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x_low: Tensor) -> Tensor:
        return self.output


class TwoAxes(nn.Module):
    def forward(self, patches: Tensor) -> Tensor:
        return patches.mean(dim=(2, 3))[:, :, None]


def test_bad_input():
    x_low, x_high = views()
    with pytest.raises(InputError, match="patch_size is missing"):
        attention_sampling(attention_net(), nn.Flatten())
    with pytest.raises(InputError, match=r"inference must be one of .* got 'mean'"):
        attention_sampling(attention_net(), PatchMean(), inference="mean")
    with pytest.raises(InputError, match="scheme"):
        attention_sampling(attention_net(), PatchMean(), scheme="gumbel")
    with pytest.raises(InputError, match="x_high has 1 rows, but 2 are expected"):
        attention_sampling(attention_net(), PatchMean())(x_low, x_high[:1])
    with pytest.raises(InputError, match=r"attention must be \(B, \*map\)"):
        attention_sampling(nn.Conv2d(1, 2, 1), PatchMean())(x_low, x_high)
    with pytest.raises(InputError, match="use_logits=True"):
        attention_sampling(attention_net(softmax=False), PatchMean())(x_low - 5, x_high)
    with pytest.raises(InputError, match="feature network"):
        attention_sampling(attention_net(), TwoAxes(), patch_size=8)(x_low, x_high)
    with pytest.raises(InputError, match="inclusion"):
        Expectation(scheme="balanced")(torch.zeros(1, 2, 3), torch.full((1, 2), 0.25))


def test_ranks_of_a_process_group_draw_apart(monkeypatch):
    x_low, x_high = views()
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        model = attention_sampling(attention_net(), PatchMean(), n_patches=4)
        model(x_low, x_high)
        drawn.extend(model.last_draw.noise.stream_ids.tolist())
    assert len(set(drawn)) == 4
