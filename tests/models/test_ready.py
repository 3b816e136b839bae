"""The ready networks: what the paper describes, names that checkpoints have, places that are told.

Shapes: B images, P patches, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ats_stream.errors import CheckpointError, InputError
from ats_stream.models import (
    MnistAttention,
    MnistFeature,
    ResNet,
    Standardize,
    TrafficSignAttention,
    TrafficSignFeature,
    load_weights,
    mnist_classifier,
    resnet18,
    resnet34,
    resnet50,
    traffic_sign_classifier,
)
from ats_stream.sampling import Geometry, geometry_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

BUILDERS: dict[int, Callable[..., ResNet]] = {18: resnet18, 34: resnet34, 50: resnet50}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def size_of(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def test_sizes_are_those_of_the_paper() -> None:
    # weights and biases of the layers, counted by hand
    assert size_of(MnistAttention()) == (9 * 8 + 8) + (9 * 8 * 8 + 8) + (9 * 8 + 1)
    assert size_of(MnistFeature()) == (49 * 32 + 32) + 3 * (9 * 32 * 32 + 32)
    assert size_of(TrafficSignAttention()) == sum(
        9 * a * b + b for a, b in ((3, 8), (8, 16), (16, 32), (32, 1))
    )
    block = 2 * (2 * 32) + 32 * 32 + 2 * 9 * 32 * 32
    assert size_of(TrafficSignFeature()) == 9 * 3 * 32 + 3 * block + 2 * 32
    assert {depth: size_of(build()) for depth, build in BUILDERS.items()} == {
        18: 11_176_512,
        34: 21_284_672,
        50: 23_508_032,
    }  # the published sizes less the classifier


@pytest.mark.parametrize("feature", [MnistFeature(), TrafficSignFeature(), MnistFeature(3)])
def test_features_of_the_paper_have_length_one(feature: Any) -> None:
    first = next(iter(feature.parameters()))
    features_PF = feature(noise(3, first.shape[1], *feature.patch_size))
    assert features_PF.shape == (3, feature.num_features)
    torch.testing.assert_close(features_PF.norm(dim=1), torch.ones(3))


def test_maps_lie_where_the_networks_put_them() -> None:
    assert geometry_of(MnistAttention(), (1, 180, 180)) == Geometry(
        offset=(0.0, 0.0),
        stride=(1.0, 1.0),
        input_shape=(180, 180),
        map_shape=(180, 180),
        receptive_field=(7, 7),
    )
    signs = geometry_of(TrafficSignAttention(), (3, 288, 384))
    assert signs.map_shape == (35, 47)
    assert signs.stride == (8.0, 8.0)
    assert signs.offset == (4.0, 4.0)
    assert signs.receptive_field == (16, 16)


@pytest.mark.parametrize("scheme", ["des_raj", "murthy"])
@pytest.mark.parametrize(
    ("build", "channels", "view", "image", "map_shape", "num_patches"),
    [
        (mnist_classifier, 1, (18, 18), (150, 150), (18, 18), 10),
        (traffic_sign_classifier, 3, (48, 56), (160, 187), (5, 6), 5),
    ],
)
def test_classifiers_train(
    build: Callable[..., Any],
    channels: int,
    view: tuple[int, int],
    image: tuple[int, int],
    map_shape: tuple[int, int],
    num_patches: int,
    scheme: str,
) -> None:
    torch.manual_seed(0)
    model = build(num_classes=3, scheme=scheme)
    logits_BK, attention, patches = model(noise(2, channels, *view), noise(2, channels, *image))
    assert logits_BK.shape == (2, 3)
    assert attention.shape == (2, *map_shape)
    assert patches.shape == (2, num_patches, channels, *model.sampling.feature.patch_size)
    assert float(model.sampling.regularization.detach()) < 0
    (logits_BK.square().sum() + model.sampling.regularization).backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in model.parameters())


def test_a_resnet_is_that_of_timm_with_its_weights(timm: ModuleType, tmp_path: Path) -> None:
    for depth, build in BUILDERS.items():
        torch.manual_seed(depth)
        theirs = timm.create_model(f"resnet{depth}", pretrained=False, zero_init_last=False)
        for name, value in theirs.state_dict().items():
            if "running" in name:  # as after training
                value.uniform_(0.5, 1.5)
        path = tmp_path / f"resnet{depth}.pth"
        torch.save(theirs.state_dict(), path)
        ours = build(max_value=255.0)
        load_weights(ours, path)
        theirs.reset_classifier(0)
        assert set(ours.state_dict()) == set(theirs.state_dict())
        mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = noise(2, 3, 41, 50)
        with torch.no_grad():
            features_PF = ours.eval()(pixels * 255)
            expected = theirs.eval()((pixels - mean) / std)
        assert features_PF.shape == (2, ours.num_features)
        torch.testing.assert_close(features_PF, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_weights_of_another_depth_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r"does not fit ResNet: 80 missing: layer1\.2\.conv1\.weight, .*"
    ):
        load_weights(resnet34(), path)


def test_geometry_of_a_residual_trunk() -> None:
    net = resnet18()
    trunk = nn.Sequential(
        net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, nn.Conv2d(128, 1, 1)
    )
    geometry = geometry_of(trunk, (3, 96, 100))
    assert geometry.stride == (8.0, 8.0)
    assert geometry.offset == (-3.5, -3.5)
    assert geometry.map_shape == (12, 13)
    assert geometry.receptive_field == (99, 99)


def test_standardize_is_the_formula() -> None:
    pixels = noise(2, 2, 5, 6) * 200
    layer = Standardize([0.25, 0.5], [0.5, 0.125], max_value=200)
    mean, std = torch.tensor([0.25, 0.5]).view(2, 1, 1), torch.tensor([0.5, 0.125]).view(2, 1, 1)
    torch.testing.assert_close(layer(pixels), (pixels / 200 - mean) / std)
    assert layer(pixels.bfloat16()).dtype == torch.bfloat16
    assert not layer.state_dict()
    for wrong in (pixels[:, :1], pixels[0, 0], pixels.byte()):
        with pytest.raises(InputError, match=r"pixels must be floating point \(N, 2, \*space\)"):
            layer(wrong)


def test_bad_resnets() -> None:
    with pytest.raises(InputError, match="depth must be one of 18, 34, 50, got 19"):
        ResNet(19)
    with pytest.raises(InputError, match="mean and std must have 2 values, one per channel, got 3"):
        ResNet(18, num_channels=2, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(InputError, match="std_C"):
        ResNet(18, num_channels=2, std=(1, 0))
    assert resnet18(num_channels=1)(noise(2, 1, 32, 32)).shape == (2, 512)
