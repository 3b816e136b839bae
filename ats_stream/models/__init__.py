"""Ready networks: attention over the low-resolution view, features of patches, a head."""

from ats_stream.models.classifier import (
    AttentionNet,
    Batch,
    FeatureNet,
    ModelConfig,
    PatchClassifier,
    Prediction,
)

__all__ = ["AttentionNet", "Batch", "FeatureNet", "ModelConfig", "PatchClassifier", "Prediction"]
