"""The paper's networks for Megapixel MNIST around any estimator, the biased one of the original included.

Shapes: B images, M positions of the view, N patches, P patches of a batch (B * N), W windows, C = 32
channels, F features, K = 10 classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from biased_original import original_expectation
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.models import MnistAttention
from ats_stream.models.sampled import start_like_keras
from ats_stream.sampling import (
    cut_patches,
    draw,
    expectation,
    log_attention,
    multinomial_entropy,
    patch_offsets,
)

BIASED_ORIGINAL = "biased_original"
NUM_CLASSES = 10
# few enough, on a CPU, that activations stay in its cache
_PATCHES_AT_ONCE = 64
_WINDOWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Method:
    """How attention is estimated; the defaults are the paper's, but for the scheme."""

    scheme: str = "murthy"
    """A scheme of ats_stream.sampling, or "biased_original"."""
    num_patches: int = 10
    """N."""
    patch_px: int = 50
    """Side of a patch."""
    entropy_weight: float = 1e-4
    """Strength of the entropy regulariser."""
    temperature: float = 1.0
    """Attention is softmax(logits / temperature)."""
    centred: bool = False
    """Take the self-centred gradient."""
    prior: str = "none"
    """"none", or "ink": attention only where the low-resolution view is not black."""


class Output(NamedTuple):
    """What a forward pass gives."""

    class_logits_BK: Tensor
    regularization: Tensor
    sampled_mass: float


class MegapixelModel(nn.Module):
    """Attention network on the view, feature network on the patches, a linear head."""

    def __init__(self, *, width: int = 32) -> None:
        super().__init__()
        self.attention = MnistAttention()
        self.feature = SparseMaxFeatures(width)
        self.head = nn.Linear(width, NUM_CLASSES)
        start_like_keras(self)

    def forward(
        self, view_B1YX: Tensor, canvas_B1YX: Tensor, method: Method, *, seed: int, step: int
    ) -> Output:
        """Classify; ``seed`` and ``step`` name the noise of the draw."""
        num_images, _, *map_shape = view_B1YX.shape
        *convolutions, softmax = self.attention
        logits_B1YX = nn.Sequential(*convolutions)(view_B1YX.float() / 255) / method.temperature
        probability_BM = softmax(logits_B1YX).flatten(1)
        prior_BM = None
        if method.prior == "ink":
            # a cell whose patch may hold ink: the view is black where no glyph reaches
            ink_BYX = F.max_pool2d((view_B1YX > 0).float(), 3, stride=1, padding=1)
            prior_BM = ink_BYX.flatten(1).log()
        log_a_BM = log_attention(probability_BM.log(), prior_BM)
        biased = method.scheme == BIASED_ORIGINAL
        drawn = draw(
            log_a_BM.detach(),
            method.num_patches,
            scheme="des_raj" if biased else method.scheme,
            seed=seed,
            stream_ids=(step << 20) + torch.arange(num_images, device=view_B1YX.device),
            map_shape=map_shape,
        )
        size = (method.patch_px, method.patch_px)
        offsets_BN2 = patch_offsets(drawn.index, map_shape, canvas_B1YX.shape[2:], size)
        patches = cut_patches(canvas_B1YX, offsets_BN2, size)
        features_BNF = self.feature(patches.flatten(0, 1)).view(num_images, method.num_patches, -1)
        attention_BN = log_a_BM.gather(1, drawn.index).exp()
        if biased:
            features_BF = original_expectation(features_BNF, attention_BN)
        else:
            features_BF = expectation(features_BNF, attention_BN, drawn.weight, centred=method.centred)
        mass = float(attention_BN.detach().sum(dim=1).mean()) if method.scheme != "with_replacement" else 0.0
        regularization = multinomial_entropy(method.entropy_weight)(log_a_BM.exp())
        return Output(self.head(features_BF), regularization, mass)


class SparseMaxFeatures(nn.Module):
    """Convolutions 7x7 and three 3x3 (valid, ReLU), global maximum, unit length, without needless work.

    The maximum passes the gradient of a channel to one place alone. So the places are found without
    recording, and the windows of 13 x 13 pixels that they see pass through the layers once more,
    recorded: the same values, the same gradients, half the work. Black patches, all alike, are computed
    once.
    """

    window_px = 13  # 7 + 2 + 2 + 2: what one place of the last layer sees

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 7), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, patches_P1YX: Tensor) -> Tensor:
        """uint8 patches -> features (P, F) of length 1."""
        pixels = patches_P1YX.to(self.layers[0].weight.dtype) / 255
        has_ink_P = (patches_P1YX.flatten(1) > 0).any(dim=1)
        inked = pixels[has_ink_P]
        black = pixels.new_zeros(1, 1, self.window_px, self.window_px)
        windows, place_PC = self._windows_of_maxima(inked)
        parts = _parts(torch.cat([windows, black]), _WINDOWS_AT_ONCE)
        out_WC = torch.cat([self._convolve(part)[:, :, 0, 0] for part in parts])
        channel_C = torch.arange(out_WC.shape[1], device=out_WC.device)
        inked_PC = out_WC[place_PC, channel_C]
        row_P = torch.where(has_ink_P, has_ink_P.cumsum(0) - 1, len(inked))
        features_PC = torch.cat([inked_PC, out_WC[-1:]])[row_P]
        return F.normalize(features_PC, dim=1, eps=1e-6)

    def _convolve(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.contiguous(memory_format=torch.channels_last))

    def plain(self, patches_P1YX: Tensor) -> Tensor:
        """The same, as it is written in the paper."""
        out = self.layers(patches_P1YX.to(self.layers[0].weight.dtype) / 255)
        return F.normalize(out.amax(dim=(2, 3)), dim=1, eps=1e-6)

    @torch.no_grad()
    def _windows_of_maxima(self, pixels_P1YX: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct windows (W, 1, 13, 13) that hold a maximum, and which one holds that of (P, C)."""
        if len(pixels_P1YX) == 0:
            none = torch.zeros(0, self.layers[0].out_channels, dtype=torch.int64, device=pixels_P1YX.device)
            return pixels_P1YX.new_zeros(0, 1, self.window_px, self.window_px), none
        parts = _parts(pixels_P1YX, _PATCHES_AT_ONCE)
        best_PC = torch.cat([self._convolve(part).flatten(2).argmax(dim=2) for part in parts])
        side = pixels_P1YX.shape[-1] - self.window_px + 1
        key_PC = torch.arange(len(best_PC), device=best_PC.device)[:, None] * side**2 + best_PC
        key_W, place_PC = key_PC.unique(return_inverse=True)
        patch_W, spot_W = key_W // side**2, key_W % side**2
        pixel = torch.arange(self.window_px, device=key_W.device)
        y_WY1 = ((spot_W // side)[:, None] + pixel)[:, :, None]
        x_W1X = ((spot_W % side)[:, None] + pixel)[:, None, :]
        return pixels_P1YX[patch_W[:, None, None], 0, y_WY1, x_W1X][:, None], place_PC


def _parts(rows: Tensor, at_once: int) -> tuple[Tensor, ...]:
    return rows.split(at_once) if rows.device.type == "cpu" else (rows,)
