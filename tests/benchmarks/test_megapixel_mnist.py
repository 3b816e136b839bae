"""The data and the model of the Megapixel MNIST benchmark are what they claim to be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megapixel_data import GLYPH_PX, NOISE_ORDERS, DataConfig, make_dataset, noise_patterns, paint, shrink
from megapixel_mnist import SETTINGS, Run, Schedule, evaluate, train_epoch
from megapixel_model import MegapixelModel, Method, SparseMaxFeatures

from ats_stream.models import MnistFeature

SMALL = DataConfig(side_px=200, scale=0.12, num_noise=4)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Glyphs of 20 shades that stand for digits: their mean tells which one it is."""
    label_L = np.repeat(np.arange(10), 2)
    glyph_LYX = np.zeros((20, GLYPH_PX, GLYPH_PX), dtype=np.uint8)
    glyph_LYX[:, 4:24, 4:24] = (20 + 20 * label_L)[:, None, None]
    return glyph_LYX, label_L


def test_three_digits_show_the_class_and_two_another_and_none_overlap():
    glyphs = digits()
    data = make_dataset(glyphs, SMALL, 50)
    shown_IG = torch.from_numpy(glyphs[1])[data.glyph_IG[:, :5]]
    assert bool(((shown_IG == data.label_I[:, None]).sum(dim=1) == 3).all())
    apart_IGG = (data.place_IG2[:, :5, None] - data.place_IG2[:, None, :5]).abs().amax(dim=-1)
    pairs = apart_IGG[:, ~torch.eye(5, dtype=torch.bool)]
    assert int(pairs.min()) >= GLYPH_PX
    assert int(data.place_IG2.min()) >= 0
    assert int(data.place_IG2.max()) <= SMALL.side_px - GLYPH_PX


def test_same_seed_same_images_other_seed_others():
    one, two, other = (make_dataset(digits(), replace(SMALL, seed=seed), 5) for seed in (0, 0, 1))
    assert torch.equal(one.place_IG2, two.place_IG2)
    assert torch.equal(one.glyph_IG, two.glyph_IG)
    assert not torch.equal(one.place_IG2, other.place_IG2)


@pytest.mark.parametrize("order", NOISE_ORDERS)
def test_what_is_painted_last_covers_the_rest(order):
    data = make_dataset(digits(), replace(SMALL, noise_order=order, num_noise=40), 20)
    view, canvas = data.paint(torch.arange(20))
    assert view.shape == (20, 1, 24, 24)
    assert canvas.shape == (20, 1, 200, 200)
    last = data.glyph_IG[:, -1]
    assert bool((last >= 20).all()) == (order == NOISE_ORDERS[0])
    for image in range(20):
        y, x = data.place_IG2[image, -1].tolist()
        box = canvas[image, 0, y : y + GLYPH_PX, x : x + GLYPH_PX]
        assert torch.equal(box, data.glyphs_LYX[last[image]])


def test_paint_cuts_what_reaches_over_the_far_border():
    canvas = paint(
        4, torch.full((1, 3, 3), 7, dtype=torch.uint8), torch.zeros(1, 1).long(), torch.tensor([[[2, 3]]])
    )
    assert canvas.tolist() == [[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 7]]]


def test_settings_are_the_published_ones():
    assert [(SETTINGS[name].side_px, SETTINGS[name].view_px) for name in ("quick", "full")] == [
        (500, 100),
        (1500, 180),
    ]
    assert shrink(digits()[0], 0.12).shape == (20, 3, 3)
    assert shrink(digits()[0], 0.2).shape == (20, 6, 6)
    lines = noise_patterns(np.random.default_rng(0))
    assert lines.shape == (50, 28, 28)
    assert lines.max() <= 255
    assert lines[lines > 0].min() >= 204
    ink = (lines > 0).sum(axis=(1, 2))
    assert ink.min() >= 28
    assert ink.max() <= 112


def test_sparse_features_are_the_plain_ones_with_the_same_gradient():
    torch.manual_seed(0)
    network = SparseMaxFeatures(8).double()
    data = make_dataset(digits(), SMALL, 3)
    _, canvas = data.paint(torch.arange(3))
    patches = torch.cat([canvas[:, :, y : y + 40, x : x + 40] for y in (0, 70) for x in (0, 50, 120)])
    assert 0 < int(patches.flatten(1).any(dim=1).sum()) < len(patches)  # black ones and others
    upstream = torch.randn(len(patches), 8, dtype=torch.float64)
    results = []
    for forward in (network.forward, network.plain):
        network.zero_grad()
        features = forward(patches)
        (features * upstream).sum().backward()
        results.append([features.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    for sparse, plain in zip(*results, strict=True):
        assert torch.allclose(sparse, plain, rtol=1e-9, atol=1e-12)


def test_features_are_those_of_the_paper():
    torch.manual_seed(0)
    paper, ours = MnistFeature(), SparseMaxFeatures(MnistFeature.num_features)
    ours.layers.load_state_dict(paper.state_dict())
    patches = torch.randint(0, 256, (3, 1, 50, 50), dtype=torch.uint8)
    assert torch.allclose(ours(patches), paper(patches / 255), atol=1e-5)


def test_schedules_move_numbers_of_the_method():
    run = Run(schedules=(Schedule("num_patches", 30, 10, 4), Schedule("temperature", 0.5, 1.0, 2)))
    assert [run.method_at(epoch).num_patches for epoch in (0, 2, 4, 9)] == [30, 20, 10, 10]
    assert run.method_at(1).temperature == pytest.approx(0.75)


@pytest.mark.parametrize("scheme", ["murthy", "balanced", "with_replacement", "biased_original"])
def test_training_learns_to_tell_images_apart(scheme):
    torch.manual_seed(0)
    run = Run(
        data=SMALL,
        method=Method(scheme=scheme, num_patches=6, patch_px=32, prior="ink"),
        lr=5e-3,
        batch_size=16,
    )
    data = make_dataset(digits(), SMALL, 64)
    model = MegapixelModel(width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)
    before = evaluate(model, data, run, 0)
    for epoch in range(6):
        during = train_epoch(model, optimizer, data, run, epoch)
    after = evaluate(model, data, run, 6)
    assert during["loss"] < before["test_loss"] - 0.1
    assert after["test_loss"] < before["test_loss"] - 0.1
