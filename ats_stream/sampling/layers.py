"""Layers and regularisers for attention and feature networks.

Shapes: B rows, M positions of the flattened map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.sampling.attention import log_attention

Regularizer = Callable[[Tensor], Tensor]


class SampleSoftmax(nn.Module):
    """Softmax over all positions of each sample: logits (B, *map) or (B, 1, *map) -> probabilities alike.

    Args:
        squeeze_channels: drop the channel axis of (B, 1, *map).
        smooth: share of the mass, in [0, 1), that is spread evenly over the drawable positions, those with
            finite logits: ``(1 - smooth) p + smooth / num_drawable``. A little keeps every position possible
            for an older version of the network.

    >>> SampleSoftmax(smooth=0.1)(torch.tensor([[0.0, float("-inf"), 0.0]]))
    tensor([[0.5000, 0.0000, 0.5000]])
    """

    def __init__(self, squeeze_channels: bool = False, smooth: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smooth < 1:
            raise InputError(f"smooth must lie in [0, 1), got {smooth}")
        self.squeeze_channels = squeeze_channels
        self.smooth = smooth

    def forward(self, logits: Tensor) -> Tensor:
        """Return probabilities, in float32 at least."""
        if logits.ndim < 2 or (self.squeeze_channels and (logits.ndim < 3 or logits.shape[1] != 1)):
            expected = "(B, 1, *map)" if self.squeeze_channels else "(B, *map)"
            raise InputError(f"SampleSoftmax expects {expected}, got {tuple(logits.shape)}")
        logits_BM = logits.flatten(1)
        probability_BM = log_attention(logits_BM).exp()
        if self.smooth > 0:
            drawable_BM = logits_BM > float("-inf")
            even_BM = drawable_BM / drawable_BM.sum(dim=1, keepdim=True)
            probability_BM = (1 - self.smooth) * probability_BM + self.smooth * even_BM
        probability = probability_BM.view(logits.shape)
        return probability.squeeze(1) if self.squeeze_channels else probability

    def extra_repr(self) -> str:
        """Show the two settings."""
        return f"squeeze_channels={self.squeeze_channels}, smooth={self.smooth}"


class L2Normalize(nn.Module):
    """Divide by the Euclidean norm along ``dim``; vectors shorter than 1e-6 are divided by 1e-6.

    >>> L2Normalize()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def __init__(self, dim: int | tuple[int, ...] = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return x * x.square().sum(dim=self.dim, keepdim=True).clamp(min=1e-12).rsqrt()

    def extra_repr(self) -> str:
        """Show the axis."""
        return f"dim={self.dim}"


def multinomial_entropy(strength: float = 1.0, eps: float = 1e-6) -> Regularizer:
    """Return a regulariser of attention (B, *map): ``strength * mean over rows of sum_i a_i log(a_i + eps)``.

    Added to a loss, a positive strength raises the entropy of the attention, a negative one lowers it.

    >>> float(multinomial_entropy(eps=0.0)(torch.tensor([[0.5, 0.5]])))
    -0.6931471824645996
    """

    def regularizer(attention: Tensor) -> Tensor:
        negative_entropy_B = (attention * (attention + eps).log()).flatten(1).sum(dim=1)
        return strength * negative_entropy_B.mean()

    return regularizer


class ActivityRegularizer(nn.Module):
    """Pass the input on and keep ``regularizer(input)`` in ``.regularization``, to be added to the loss."""

    regularization: Tensor

    def __init__(self, regularizer: Regularizer) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.regularization = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        self.regularization = self.regularizer(x)
        return x
