"""A whole classifier by attention sampling: any attention network, any feature network, a linear head.

Shapes: B images, N patches, C channels, F features, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ats_stream.sampling import attention_sampling, multinomial_entropy

if TYPE_CHECKING:
    from ats_stream.sampling import AttentionSampling
    from ats_stream.sampling.patches import HighResolution


class SampledClassifier(nn.Module):
    """(x_low, x_high, log_prior=None) -> class logits (B, K), attention (B, *map), patches (B, N, C, *size).

    ``sampling`` comes from :func:`ats_stream.sampling.attention_sampling`; its ``.regularization`` belongs to
    the loss. ``num_features`` is F, what its feature network puts out.
    """

    def __init__(self, sampling: AttentionSampling, *, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.sampling = sampling
        self.head = nn.Linear(num_features, num_classes)

    def forward(
        self, x_low: Tensor, x_high: HighResolution, log_prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify; arguments and errors as those of ``sampling``."""
        features_BF, attention, patches = self.sampling(x_low, x_high, log_prior)
        return self.head(features_BF), attention, patches


def keras_classifier(
    attention: nn.Module,
    feature: nn.Module,
    *,
    num_features: int,
    num_classes: int,
    entropy: float,
    **sampling: Any,
) -> SampledClassifier:
    """A classifier as the paper's scripts build theirs: entropy regulariser, weights drawn as by Keras.

    ``sampling`` are further arguments of :func:`ats_stream.sampling.attention_sampling`.
    """
    regularizer = multinomial_entropy(entropy)
    model = SampledClassifier(
        attention_sampling(attention, feature, attention_regularizer=regularizer, **sampling),
        num_features=num_features,
        num_classes=num_classes,
    )
    start_like_keras(model)
    return model


def start_like_keras(network: nn.Module) -> None:
    """Draw all weights as Keras does by default: Glorot uniform, biases zero (Glorot & Bengio, 2010)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
