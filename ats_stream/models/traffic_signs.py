"""The paper's networks for speed-limit signs (Katharopoulos & Fleuret, ICML 2019, and its published scripts).

Images of 960 x 1280, views of .3 of that, pixels in [0, 1].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ats_stream.models.sampled import SampledClassifier, keras_classifier
from ats_stream.sampling import L2Normalize, SampleSoftmax

_SMOOTH = 1e-4
_ENTROPY_STRENGTH = 1e-4
_NUM_PATCHES = 5
_NUM_CLASSES = 4  # none, 50, 70, 80


class TrafficSignAttention(nn.Sequential):
    """Views (B, C, Y, X) -> attention probabilities (B, y, x) with y = (Y - 8) // 8.

    Valid convolutions, then pooling by 8: :func:`ats_stream.sampling.geometry_of` tells where the cells lie.
    The paper weighs the kernels of the first three convolutions with an L2 penalty of 1e-5.
    """

    def __init__(self, num_channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(num_channels, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 1, 3),
            nn.MaxPool2d(8),
            SampleSoftmax(squeeze_channels=True, smooth=_SMOOTH),
        )


class TrafficSignFeature(nn.Module):
    """Patches (P, C, y, x) -> features (P, 32) of length 1: a small residual network.

    Its blocks put the normalisation first (He et al., "Identity mappings in deep residual networks", 2016).
    """

    patch_size = (100, 100)
    num_features = 32

    def __init__(self, num_channels: int = 3) -> None:
        super().__init__()
        width = self.num_features
        self.layers = nn.Sequential(
            nn.Conv2d(num_channels, width, 3, padding=1, bias=False),
            *(_Block(width) for _ in range(3)),
            *_activation(width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            L2Normalize(),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Features (P, 32)."""
        features: Tensor = self.layers(patches)
        return features


class _Block(nn.Module):
    """Half the resolution, by two 3x3 convolutions beside a 1x1 one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Sequential(*_activation(width))
        self.short = nn.Conv2d(width, width, 1, stride=2, bias=False)
        self.long = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            *_activation(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        joined: Tensor = self.long(x) + self.short(x)
        return joined


def _activation(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width, eps=1e-3, momentum=0.01), nn.ReLU()]  # as Keras has them


def traffic_sign_classifier(
    num_classes: int = _NUM_CLASSES,
    *,
    num_channels: int = 3,
    n_patches: int = _NUM_PATCHES,
    entropy: float = _ENTROPY_STRENGTH,
    **sampling: Any,
) -> SampledClassifier:
    """Build the paper's model for speed limits: 5 patches of 100 x 100, entropy regulariser 1e-4.

    Patches are cut where the cells of the attention map truly lie (the original's receptive field of 9 is off
    where pooling leaves a remainder). ``sampling`` are further arguments of
    :func:`ats_stream.sampling.attention_sampling`. The paper augments with
    ``Compose(RandomIntensity(), RandomPan(...))`` and trains with Adam at 1e-3, gradients clipped to norm 1.
    """
    return keras_classifier(
        TrafficSignAttention(num_channels),
        TrafficSignFeature(num_channels),
        num_features=TrafficSignFeature.num_features,
        num_classes=num_classes,
        entropy=entropy,
        n_patches=n_patches,
        **{"receptive_field": None, **sampling},
    )
