"""The classifier against its formula, image by image and in float64.

Shapes: B images, C channels, Y X the view's pixels, N patches, P the patch's side, F features, K classes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ats_stream.errors import InputError
from ats_stream.models import AttentionNet, Batch, FeatureNet, ModelConfig, PatchClassifier
from ats_stream.sampling import draw

CONFIG = ModelConfig(num_classes=3, attention_width=4, feature_width=8)
NEVER = -math.inf


def make_model(**changed: Any) -> PatchClassifier:
    torch.manual_seed(0)
    return PatchClassifier(dataclasses.replace(CONFIG, **changed))


def pixels(*shape: int, seed: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    largest = 255 if dtype == torch.uint8 else 65535
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.int32).to(dtype)


def one_image(
    model: PatchClassifier, seed: int, *, view: tuple[int, int] = (6, 5), mask: Tensor | None = None
) -> Batch:
    """A batch of one image whose positions the model itself has drawn."""
    view_CYX = pixels(3, *view, seed=seed)
    log_prior_YX = None if mask is None else torch.zeros(view).masked_fill(~mask, NEVER)
    with torch.no_grad():
        log_a_M = model.log_attention(view_CYX, log_prior_YX)
    drawn = draw(log_a_M[None], 4, seed=seed)
    return Batch(
        views_CYX=[view_CYX],
        log_priors_YX=[log_prior_YX],
        crops_BNCPP=pixels(1, 4, 3, 14, 14, seed=seed + 100),
        index_BN=drawn.index,
        weight_BN=drawn.weight,
    )


def join(*batches: Batch) -> Batch:
    return Batch(
        views_CYX=[view for batch in batches for view in batch.views_CYX],
        log_priors_YX=[prior for batch in batches for prior in batch.log_priors_YX],
        crops_BNCPP=torch.cat([batch.crops_BNCPP for batch in batches]),
        index_BN=torch.cat([batch.index_BN for batch in batches]),
        weight_BN=torch.cat([batch.weight_BN for batch in batches]),
    )


def mask_of(view: tuple[int, int], seed: int) -> Tensor:
    return torch.rand(view, generator=torch.Generator().manual_seed(seed)) < 0.5


def by_hand(model: PatchClassifier, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits, attention of the draws and entropy by the formula, in float64, image by image."""
    double = PatchClassifier(model.config).double()
    double.load_state_dict(model.state_dict())
    logits_BK, attention_BN, entropy_B = [], [], []
    for b, (view_CYX, prior_YX) in enumerate(zip(batch.views_CYX, batch.log_priors_YX, strict=True)):
        if double.attention.layers is None:
            logits_M = torch.zeros(view_CYX[0].numel(), dtype=torch.float64)
        else:
            x = view_CYX.double()[None] * (2 / model.config.max_value)
            logits_M = double.attention.layers(x).flatten()
        if prior_YX is not None:
            logits_M = logits_M + prior_YX.flatten()
        a_M = logits_M.exp() / logits_M.exp().sum()
        total_F: Any = 0
        seen = []
        for n in range(batch.index_BN.shape[1]):
            weight = batch.weight_BN[b, n].double()
            a = a_M[batch.index_BN[b, n]] if weight > 0 else torch.tensor(0.0, dtype=torch.float64)
            crop = batch.crops_BNCPP[b, n].double()[None] / model.config.max_value
            f_F = double.features.layers(crop)[0]
            total_F = total_F + a * weight * f_F / f_F.norm() * model.config.feature_scale
            seen.append(a)
        logits_BK.append(double.head(total_F))
        attention_BN.append(torch.stack(seen))
        entropy_B.append(-sum(a * a.log() for a in a_M if a > 0))
    return torch.stack(logits_BK), torch.stack(attention_BN), torch.stack(entropy_B)


def mixed(model: PatchClassifier) -> Batch:
    """Images with and without a mask, with views of several sizes."""
    return join(
        one_image(model, 0),
        one_image(model, 1, mask=mask_of((6, 5), 1)),
        one_image(model, 2, view=(4, 9)),
        one_image(model, 3, view=(4, 9), mask=mask_of((4, 9), 3)),
    )


@pytest.mark.parametrize("kind", ["learned", "uniform"])
def test_forward_is_the_expectation_over_the_drawn_patches(kind: str) -> None:
    model = make_model(attention=kind)
    batch = mixed(model)
    for mine, exact in zip(model(batch), by_hand(model, batch), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = make_model()
    alone = [
        one_image(model, 0),
        one_image(model, 1, mask=mask_of((6, 5), 1)),
        one_image(model, 2, view=(4, 9)),
        one_image(model, 3, view=(4, 9), mask=mask_of((4, 9), 3)),
    ]
    together = model(join(*alone))
    for number, batch in enumerate(alone):
        for field, mine in zip(together._fields, model(batch), strict=True):
            torch.testing.assert_close(getattr(together, field)[number], mine[0], rtol=1e-5, atol=1e-6)


def test_views_of_one_size_computed_at_once_equal_those_computed_one_by_one() -> None:
    model = make_model()
    masks = [mask_of((6, 5), seed) for seed in range(3)]
    batch = join(*(one_image(model, seed, mask=mask) for seed, mask in enumerate(masks)))
    rows = model._log_attention(batch)
    for row, view, prior in zip(rows, batch.views_CYX, batch.log_priors_YX, strict=True):
        torch.testing.assert_close(row, model.log_attention(view, prior), rtol=1e-5, atol=1e-6)


def test_attention_is_a_probability_within_the_prior() -> None:
    model = make_model()
    view_CYX, mask = pixels(3, 6, 5, seed=1), mask_of((6, 5), 1)
    a_M = model.log_attention(view_CYX, torch.zeros(6, 5).masked_fill(~mask, NEVER)).exp()
    assert float(a_M.detach().sum()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(a_M > 0, mask.flatten())
    # conditioning on the mask is all that the prior does
    free_M = model.log_attention(view_CYX, None).exp() * mask.flatten()
    torch.testing.assert_close(a_M, free_M / free_M.sum())


def pad(batch: Batch, crop: int) -> Batch:
    """Two padded draws behind each row: index 0, weight 0, and a crop of any kind."""
    extra = torch.full_like(batch.crops_BNCPP[:, :2], crop)
    zeros = torch.zeros_like(batch.index_BN[:, :2])
    return dataclasses.replace(
        batch,
        crops_BNCPP=torch.cat([batch.crops_BNCPP, extra], dim=1),
        index_BN=torch.cat([batch.index_BN, zeros], dim=1),
        weight_BN=torch.cat([batch.weight_BN, zeros.float()], dim=1),
    )


def gradients(model: PatchClassifier, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    prediction = model(batch)
    loss = F.cross_entropy(prediction.class_logits_BK, torch.ones(len(batch.views_CYX), dtype=torch.int64))
    (loss - 0.1 * prediction.entropy_B.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("crop", [0, 255])
@pytest.mark.parametrize("is_first_cell_drawable", [False, True])
def test_padded_draws_count_for_nothing(crop: int, is_first_cell_drawable: bool) -> None:
    model = make_model()
    mask = mask_of((6, 5), 1)
    mask[0, 0] = is_first_cell_drawable
    batch = join(one_image(model, 0, mask=mask), one_image(model, 1, mask=mask))
    plain, padded = model(batch), model(pad(batch, crop))
    torch.testing.assert_close(padded.class_logits_BK, plain.class_logits_BK)
    torch.testing.assert_close(padded.attention_BN[:, :4], plain.attention_BN)
    assert torch.equal(padded.attention_BN[:, 4:], torch.zeros(2, 2))
    wanted, mine = gradients(model, batch), gradients(model, pad(batch, crop))
    assert set(mine) == set(wanted) == {name for name, _ in model.named_parameters()}
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_the_formula() -> None:
    model = make_model()
    batch = mixed(model)
    mine = gradients(model, batch)
    # differences of the same loss by the formula in float64, along one random direction of each parameter
    for name, parameter in model.named_parameters():
        assert torch.isfinite(mine[name]).all(), name
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        values = []
        step = 1e-6
        for sign in (1, -1):
            moved = make_model().double()
            moved.load_state_dict(model.state_dict())
            with torch.no_grad():
                moved.get_parameter(name).add_(sign * step * direction)
            logits_BK, _, entropy_B = by_hand(moved, batch)
            label_B = torch.ones(4, dtype=torch.int64)
            values.append(float((F.cross_entropy(logits_BK, label_B) - 0.1 * entropy_B.sum()).detach()))
        slope = (values[0] - values[1]) / (2 * step)
        assert float((mine[name].double() * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=1e-5), (
            name
        )


def test_attention_is_trained_by_the_classification_alone() -> None:
    model = make_model()
    batch = mixed(model)
    F.cross_entropy(model(batch).class_logits_BK, torch.ones(4, dtype=torch.int64)).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.attention.parameters())


def test_uniform_attention_has_nothing_to_learn() -> None:
    model = make_model(attention="uniform")
    assert list(model.attention.state_dict()) == []
    mask = mask_of((6, 5), 1)
    a_M = model.log_attention(pixels(3, 6, 5, seed=1), torch.zeros(6, 5).masked_fill(~mask, NEVER)).exp()
    torch.testing.assert_close(a_M, mask.flatten().float() / mask.sum())


@pytest.mark.parametrize("kind", ["learned", "uniform"])
def test_an_attention_map_has_a_cell_for_each_view_pixel(kind: str) -> None:
    net = AttentionNet(dataclasses.replace(CONFIG, attention=kind))
    assert net(pixels(2, 3, 7, 11, seed=0)).shape == (2, 7, 11)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_attention_cell_sees_one_view_pixel_more_on_each_side_with_each_layer(layers: int) -> None:
    torch.manual_seed(0)
    net = AttentionNet(dataclasses.replace(CONFIG, attention_layers=layers, attention_width=32))
    base = torch.full((1, 3, 15, 15), 100.0)
    moved = base.clone()
    moved[:, :, 7, 7] += 80
    changed_YX = (net(moved) != net(base))[0]
    rows, columns = changed_YX.nonzero().unbind(1)
    assert (
        (int(rows.min()), int(rows.max()))
        == (int(columns.min()), int(columns.max()))
        == (7 - layers, 7 + layers)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("patch_px", [1, 5, 14, 40])
def test_features_have_one_length_whatever_the_patch(dtype: torch.dtype, patch_px: int) -> None:
    torch.manual_seed(0)
    net = FeatureNet(dataclasses.replace(CONFIG, max_value=255.0 if dtype == torch.uint8 else 65535.0))
    features_NF = net(pixels(6, 3, patch_px, patch_px, seed=0, dtype=dtype))
    assert features_NF.shape == (6, net.num_features) == (6, 16)
    torch.testing.assert_close(features_NF.norm(dim=1), torch.full((6,), 8.0))


def test_16_bit_pixels_of_full_range_look_like_those_of_8_bit() -> None:
    narrow, wide = make_model(), make_model(max_value=65535.0)
    batch = join(one_image(narrow, 0), one_image(narrow, 1))
    masked = join(
        one_image(narrow, 0, mask=mask_of((6, 5), 0)), one_image(narrow, 1, mask=mask_of((6, 5), 1))
    )

    def widen(pixels_8: Tensor) -> Tensor:
        return (pixels_8.int() * 257).to(torch.uint16)

    for one in (batch, masked):
        wider = dataclasses.replace(
            one, views_CYX=[widen(v) for v in one.views_CYX], crops_BNCPP=widen(one.crops_BNCPP)
        )
        torch.testing.assert_close(
            wide(wider).class_logits_BK, narrow(one).class_logits_BK, rtol=1e-4, atol=1e-5
        )


def test_a_batch_moves_whole() -> None:
    model = make_model()
    moved = join(one_image(model, 0), one_image(model, 1, mask=mask_of((6, 5), 1))).to(torch.device("meta"))
    tensors = [*moved.views_CYX, moved.log_priors_YX[1], moved.crops_BNCPP, moved.index_BN, moved.weight_BN]
    assert moved.log_priors_YX[0] is None
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}


def test_crops_of_other_types_are_refused() -> None:
    model = make_model()
    batch = one_image(model, 0)
    with pytest.raises(InputError, match=r"crops_NCS is torch\.float64"):
        model(dataclasses.replace(batch, crops_BNCPP=batch.crops_BNCPP.double()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("num_classes", "num_channels", "attention_width", "attention_layers")),
        ("feature_width", 0),
        ("max_value", 0.0),
        ("max_value", math.nan),
        ("feature_scale", -1.0),
        ("attention", "soft"),
    ],
)
def test_impossible_configurations_name_the_field_and_the_value(field: str, value: object) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        dataclasses.replace(CONFIG, **changed)


def test_centred_changes_the_gradient_of_the_attention_alone():
    results = []
    for centred in (False, True):
        model = make_model(centred=centred)
        prediction = model(join(one_image(model, 1), one_image(model, 2)))
        prediction.class_logits_BK.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((prediction.class_logits_BK.detach(), gradients))
    (plain_BK, plain), (centred_BK, centred) = results
    assert torch.allclose(plain_BK, centred_BK, atol=1e-6)
    for name, gradient in plain.items():
        same = torch.allclose(gradient, centred[name], rtol=1e-4, atol=1e-6)
        assert same != name.startswith("attention."), name
