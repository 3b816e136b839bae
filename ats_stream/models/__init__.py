"""Ready networks: attention over the low-resolution view, features of patches, a head."""

from ats_stream.models.classifier import (
    AttentionNet,
    Batch,
    FeatureNet,
    ModelConfig,
    PatchClassifier,
    Prediction,
)
from ats_stream.models.mnist import MnistAttention, MnistFeature, mnist_classifier
from ats_stream.models.pixels import Standardize
from ats_stream.models.resnet import ResNet, resnet18, resnet34, resnet50
from ats_stream.models.sampled import SampledClassifier
from ats_stream.models.timm_adapter import TimmAttention, TimmFeature, timm_attention, timm_feature
from ats_stream.models.traffic_signs import TrafficSignAttention, TrafficSignFeature, traffic_sign_classifier
from ats_stream.models.weights import load_weights

__all__ = [
    "AttentionNet",
    "Batch",
    "FeatureNet",
    "MnistAttention",
    "MnistFeature",
    "ModelConfig",
    "PatchClassifier",
    "Prediction",
    "ResNet",
    "SampledClassifier",
    "Standardize",
    "TimmAttention",
    "TimmFeature",
    "TrafficSignAttention",
    "TrafficSignFeature",
    "load_weights",
    "mnist_classifier",
    "resnet18",
    "resnet34",
    "resnet50",
    "timm_attention",
    "timm_feature",
    "traffic_sign_classifier",
]
