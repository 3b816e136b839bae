"""timm models as feature and attention networks.

Shapes: P patches, F features.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ats_stream.errors import CheckpointError, InputError
from ats_stream.models import timm_attention, timm_feature
from ats_stream.sampling import (
    SampleSoftmax,
    attention_sampling,
    geometry_from_receptive_field,
    geometry_of,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("mobilenetv3_small_050", {}), ("vit_tiny_patch16_224", {"img_size": 32})],
)
def test_feature_networks_are_the_models_on_standardised_pixels(
    timm: ModuleType, name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    feature = timm_feature(name, max_value=255.0, **options).eval()
    pixels = noise(3, 3, 32, 32)
    with torch.no_grad():
        features_PF = feature(pixels * 255)
        config = feature.network.pretrained_cfg
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        expected = feature.network((pixels - mean) / std)
    assert features_PF.shape == (3, feature.num_features)
    torch.testing.assert_close(features_PF, expected, rtol=1e-4, atol=1e-4)
    assert feature.patch_size == (224, 224)


@pytest.mark.parametrize(
    ("name", "stride", "options"),
    [
        ("resnet18", 4, {}),
        ("resnet18", 8, {}),
        ("convnext_atto", 8, {}),
        ("efficientnet_b0", 16, {}),
        ("vit_tiny_patch16_224", 16, {"dynamic_img_size": True}),
        ("swin_tiny_patch4_window7_224", 8, {"img_size": (96, 128)}),
    ],
)
def test_attention_networks_keep_their_places(
    timm: ModuleType, name: str, stride: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    attention = timm_attention(name, stride=stride, **options).eval()
    with torch.no_grad():
        logits = attention(noise(2, 3, 96, 128))
    assert logits.shape == (2, 96 // stride, 128 // stride)
    assert float(logits.std()) > 0
    geometry = geometry_of(attention, (3, 96, 128))
    even = geometry_from_receptive_field(0, logits.shape[1:], (96, 128))
    assert geometry.stride == even.stride == (stride, stride)
    assert attention.even_grid == (name[:3] in ("vit", "swi"))
    if attention.even_grid:
        assert geometry.offset == even.offset
        assert geometry.receptive_field == (96, 128)
    # in front of a softmax, too
    assert geometry_of(nn.Sequential(attention, SampleSoftmax()), (3, 96, 128)) == geometry


def test_a_cell_of_a_convolutional_network_sees_what_the_geometry_says(timm: ModuleType) -> None:
    torch.manual_seed(0)
    attention = timm_attention("resnet18", stride=4).eval()
    for parameter in attention.parameters():  # nothing may cancel, and no path be switched off
        nn.init.uniform_(parameter, 0.1, 0.2)
    geometry = geometry_of(attention, (3, 96, 128))
    view = noise(1, 3, 96, 128).requires_grad_()
    cell = (12, 16)
    (gradient,) = torch.autograd.grad(attention(view)[0][cell], view)
    for axis in range(2):
        seen = gradient[0].abs().sum(dim=(0, 2 - axis)).nonzero().flatten()
        centre = geometry.offset[axis] + geometry.stride[axis] * (cell[axis] + 0.5)
        width = geometry.receptive_field[axis]
        assert (int(seen[0]), int(seen[-1]) + 1) == (centre - width / 2, centre + width / 2)


def test_both_kinds_work_in_attention_sampling(timm: ModuleType) -> None:
    torch.manual_seed(0)
    feature = timm_feature("resnet18", num_channels=1, patch_size=(20, 20))
    model = attention_sampling(
        timm_attention("resnet18", stride=8, num_channels=1),
        feature,
        n_patches=3,
        use_logits=True,
        receptive_field=None,
    ).eval()
    features_BF, attention, patches = model(noise(2, 1, 48, 48), noise(2, 1, 192, 192))
    assert features_BF.shape == (2, feature.num_features)
    assert attention.shape == (2, 6, 6)
    assert patches.shape == (2, 3, 1, 20, 20)
    features_BF.sum().backward()
    for part in (model.attention, model.feature):
        # nothing idle is left in it, which data-parallel training would refuse
        assert all(one.grad is not None for one in part.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_local_file_with_their_classifier_left_out(
    timm: ModuleType, tmp_path: Path, suffix: str
) -> None:
    whole = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(whole.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(whole.state_dict(), path)
    pixels = noise(2, 3, 40, 40)
    with torch.no_grad():
        features_PF = timm_feature("resnet18", path=path).eval().network(pixels)
        assert torch.equal(features_PF, whole.forward_head(whole.forward_features(pixels), pre_logits=True))
        trunk = timm_attention("resnet18", stride=32, path=path).eval().network
        (maps,) = trunk.forward_intermediates(pixels, indices=[4], intermediates_only=True)
        assert torch.equal(maps, whole.forward_features(pixels))
    with pytest.raises(
        CheckpointError, match=r"does not fit ResNet: \d+ missing: layer1\.2\.conv1\.weight, "
    ):
        timm_feature("resnet34", path=path)
    with pytest.raises(CheckpointError, match=r"1 of another size or dtype: conv1\.weight \(\(64, 3, 7, 7\)"):
        timm_feature("resnet18", num_channels=1, path=path)


def test_bad_input(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="timm model 'resnet19' cannot be built: Unknown model"):
        timm_feature("resnet19")
    with pytest.raises(InputError, match=r"'resnet18' has maps of stride 2, 4, 8, 16, 32, got 5"):
        timm_attention("resnet18", stride=5)
    with pytest.raises(InputError, match=r"'hf-hub:a/b': give a name of timm\.list_models\(\)"):
        timm_feature("hf-hub:a/b")
    with pytest.raises(
        InputError, match=r"pixels must be floating point \(N, 3, \*space\), got .*\(1, 2, 32, 32\)"
    ):
        timm_feature("resnet18")(noise(1, 2, 32, 32))
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not there
    with pytest.raises(
        InputError, match=r"needs the packages timm and torchvision.*ats-stream\[timm\]"
    ) as caught:
        timm_attention("resnet18")
    assert "\n" not in str(caught.value)


def test_importing_the_models_does_not_import_timm() -> None:
    heavy = ("timm", "torchvision")
    program = f"import sys, ats_stream.models; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
