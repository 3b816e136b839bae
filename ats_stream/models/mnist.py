"""The paper's networks for Megapixel MNIST (Katharopoulos & Fleuret, ICML 2019, and its published scripts).

Views of 180 x 180, images of 1500 x 1500, one channel, pixels in [0, 1].
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ats_stream.models.sampled import SampledClassifier, keras_classifier
from ats_stream.sampling import L2Normalize, SampleSoftmax

_SMOOTH = 1e-5
_ENTROPY_STRENGTH = 1e-4
_NUM_PATCHES = 10


class MnistAttention(nn.Sequential):
    """Views (B, C, Y, X) -> attention probabilities (B, Y, X): three "same" 3x3 convolutions."""

    def __init__(self, num_channels: int = 1) -> None:
        super().__init__(
            nn.Conv2d(num_channels, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 1, 3, padding=1),
            SampleSoftmax(squeeze_channels=True, smooth=_SMOOTH),
        )


class MnistFeature(nn.Sequential):
    """Patches (P, C, y, x) of at least 13 pixels a side -> features (P, 32) of length 1."""

    patch_size = (50, 50)
    num_features = 32

    def __init__(self, num_channels: int = 1) -> None:
        width = self.num_features
        layers: list[nn.Module] = [nn.Conv2d(num_channels, width, 7), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), L2Normalize())


def mnist_classifier(
    num_classes: int = 10,
    *,
    num_channels: int = 1,
    n_patches: int = _NUM_PATCHES,
    entropy: float = _ENTROPY_STRENGTH,
    **sampling: Any,
) -> SampledClassifier:
    """Build the paper's model for Megapixel MNIST: 10 patches of 50 x 50, entropy regulariser 1e-4.

    ``sampling`` are further arguments of :func:`ats_stream.sampling.attention_sampling`, such as ``scheme``
    or ``patch_size``. Train it as the paper does with Adam at 1e-3, gradients clipped to norm 1.
    """
    return keras_classifier(
        MnistAttention(num_channels),
        MnistFeature(num_channels),
        num_features=MnistFeature.num_features,
        num_classes=num_classes,
        entropy=entropy,
        n_patches=n_patches,
        **sampling,
    )
