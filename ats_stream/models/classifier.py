"""A classifier that looks at a low-resolution view whole and at a few full-resolution patches.

Shapes: B images, C channels, Y X the view's pixels (one attention position each), M = Y * X positions,
N patches, P the patch's side, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.kernels import gather_crops, normalisation
from ats_stream.sampling import expectation, log_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTENTION_KINDS = ("learned", "uniform")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the networks look like; with the weights it is all that is needed to build them again."""

    num_classes: int
    """How many classes the head tells apart."""
    num_channels: int = 3
    """Channels of the image."""
    max_value: float = 255.0
    """The pixel value that counts as 1: 255 for uint8."""
    attention: str = "learned"
    """``learned``, or ``uniform``: every position alike (within the prior), the control without attention."""
    attention_width: int = 8
    """Channels inside the attention network."""
    attention_layers: int = 2
    """3x3 convolutions in the attention network; each widens what a position sees by 2 view pixels."""
    feature_width: int = 32
    """Channels in the middle of the feature network; it puts out twice as many features."""
    centred: bool = False
    """Train with the self-centred gradient, of less variance and a small bias (see ats_stream.sampling)."""
    feature_scale: float = 8.0
    """Length that each patch's feature vector is normalised to before the expectation."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_channels", "attention_width", "attention_layers", "feature_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_value", "feature_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_KINDS)}, got {self.attention!r}")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step looks at. Views may differ in size from image to image, patches may not."""

    views_CYX: list[Tensor]
    """B low-resolution views, each (C, Y, X), in the image's dtype."""
    log_priors_YX: list[Tensor | None]
    """B log-priors (Y, X) added to the attention logits: 0 or -inf for a mask; None for none."""
    crops_BNCPP: Tensor
    """The drawn patches at full resolution, in the image's dtype."""
    index_BN: Tensor
    """Drawn positions in the flattened view, int64."""
    weight_BN: Tensor
    """R of each draw (see ats_stream.sampling), float32, without gradient; 0 where a row is padded."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self.of([tensor.to(device, non_blocking=True) for tensor in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        priors = [prior for prior in self.log_priors_YX if prior is not None]
        return [self.crops_BNCPP, self.index_BN, self.weight_BN, *self.views_CYX, *priors]

    def of(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch made of other tensors, in the order of :meth:`tensors`."""
        rest = iter(tensors)
        crops_BNCPP, index_BN, weight_BN = next(rest), next(rest), next(rest)
        return Batch(
            views_CYX=[next(rest) for _ in self.views_CYX],
            log_priors_YX=[None if prior is None else next(rest) for prior in self.log_priors_YX],
            crops_BNCPP=crops_BNCPP,
            index_BN=index_BN,
            weight_BN=weight_BN,
        )


class Prediction(NamedTuple):
    """What a forward pass gives; a tuple, so that distributed wrappers can look through it."""

    class_logits_BK: Tensor
    """Class logits."""
    attention_BN: Tensor
    """Present attention probability of each drawn position."""
    entropy_B: Tensor
    """Entropy of the attention of each image, in nats."""


class AttentionNet(nn.Module):
    """View (B, C, Y, X) in the image's dtype -> attention logits (B, Y, X) float32, one for each view pixel.

    Same-padded 3x3 convolutions and a 1x1 one, so that position s of the map lies at view pixel s.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.max_value = config.max_value
        self.layers: nn.Sequential | None = None
        if config.attention == "learned":
            layers: list[nn.Module] = []
            channels = config.num_channels
            for _ in range(config.attention_layers):
                layers += [nn.Conv2d(channels, config.attention_width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = config.attention_width
            # no bias: it would shift all logits alike, and the optimiser would make steps of its rounding
            self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, view_BCYX: Tensor) -> Tensor:
        """Attention logits (B, Y, X)."""
        if self.layers is None:
            return torch.zeros(view_BCYX[:, 0].shape, device=view_BCYX.device)
        # twice the unit range: the first layer then starts with activations of order one on dim views
        logits: Tensor = self.layers(view_BCYX.float() * (2 / self.max_value))
        return logits[:, 0]


class FeatureNet(nn.Module):
    """Patches (N, C, P, P) in the image's dtype -> features (N, F) of one fixed length."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.feature_width
        self.num_features = 2 * width
        self.feature_scale = config.feature_scale
        scale_C, shift_C = normalisation(
            [0.0] * config.num_channels, [1.0] * config.num_channels, max_value=config.max_value
        )
        self.scale_C: Tensor
        self.shift_C: Tensor
        self.register_buffer("scale_C", scale_C)
        self.register_buffer("shift_C", shift_C)
        narrow = max(1, width // 2)
        self.layers = nn.Sequential(
            nn.Conv2d(config.num_channels, narrow, 5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(narrow, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(width, self.num_features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        # a third less time on a CPU, and what tensor cores want on a GPU
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub

    def forward(self, crops_NCPP: Tensor) -> Tensor:
        """Features (N, F)."""
        # in the memory order of the layers
        pixels = gather_crops(crops_NCPP, self.scale_C, self.shift_C, channels_last=True)
        features = self.layers(pixels)
        return F.normalize(features, dim=-1) * self.feature_scale


class PatchClassifier(nn.Module):
    """Attention network, feature network and a linear head around the unbiased expectation.

    ``F = sum_n a_n R_n f_n`` over the drawn patches, where a is the *present* attention at the drawn
    positions and R the weight that came with the draw: unbiased whichever version of the attention drew.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = AttentionNet(config)
        self.features = FeatureNet(config)
        self.head = nn.Linear(self.features.num_features, config.num_classes)

    def log_attention(self, view_CYX: Tensor, log_prior_YX: Tensor | None) -> Tensor:
        """Log-probability (M,) of each position of one image's view: the rule that samplers use too."""
        logits_1M = self.attention(view_CYX[None]).flatten(1)
        prior_1M = None if log_prior_YX is None else log_prior_YX.reshape(1, -1)
        return log_attention(logits_1M, prior_1M)[0]

    def forward(self, batch: Batch) -> Prediction:
        """Class logits, the attention of the drawn positions, and the entropy of the attention."""
        # mixed precision is for the features: the attention must be that of the samplers, who draw in float32
        with torch.autocast(batch.weight_BN.device.type, enabled=False):
            log_a_BM = self._log_attention(batch)
        return self.look(batch, log_a_BM)[0]

    def look(self, batch: Batch, log_a_BM: Sequence[Tensor]) -> tuple[Prediction, Tensor]:
        """What :meth:`forward` gives, from log-attention that is known already, and the features (B, N, F) of
        the patches.
        """
        attention_BN = torch.stack([row[i] for row, i in zip(log_a_BM, batch.index_BN, strict=True)]).exp()
        # padded draws name position 0, which may hold any attention; their weight is 0
        attention_BN = attention_BN.masked_fill(batch.weight_BN == 0, 0.0)
        num_images, num_patches = batch.index_BN.shape
        features = self.features(batch.crops_BNCPP.flatten(0, 1)).view(num_images, num_patches, -1).float()
        with torch.autocast(batch.weight_BN.device.type, enabled=False):
            expected_BF = expectation(features, attention_BN, batch.weight_BN, centred=self.config.centred)
            entropy_B = torch.stack([_entropy(row) for row in log_a_BM])
            return Prediction(self.head(expected_BF), attention_BN, entropy_B), features

    def _log_attention(self, batch: Batch) -> list[Tensor]:
        shapes = {tuple(view.shape) for view in batch.views_CYX}
        if len(shapes) > 1 or any(prior is None for prior in batch.log_priors_YX):
            pairs = zip(batch.views_CYX, batch.log_priors_YX, strict=True)
            return [self.log_attention(view, prior) for view, prior in pairs]
        logits_BM = self.attention(torch.stack(batch.views_CYX)).flatten(1)
        prior_BM = torch.stack([p for p in batch.log_priors_YX if p is not None]).flatten(1)
        return list(log_attention(logits_BM, prior_BM))


def _entropy(log_a_M: Tensor) -> Tensor:
    """-sum a log a, where a = 0 adds 0 (and no NaN to the gradient)."""
    drawable = log_a_M > -torch.inf
    log_a = log_a_M.masked_fill(~drawable, 0.0)
    return -(log_a.exp() * log_a * drawable).sum()
