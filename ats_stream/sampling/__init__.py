"""The method: draw positions from an attention map, estimate sums over the whole map. Needs torch alone."""

from ats_stream.sampling.attention import attention_logits, log_attention
from ats_stream.sampling.augment import (
    Augmentation,
    Compose,
    RandomFlip,
    RandomIntensity,
    RandomPan,
    RandomQuarterTurn,
)
from ats_stream.sampling.draw import draw, merge_draws
from ats_stream.sampling.drawn import Draw
from ats_stream.sampling.expectation import effective_sample_share, expectation
from ats_stream.sampling.geometry import Geometry, geometry_from_receptive_field, patch_offsets
from ats_stream.sampling.layers import ActivityRegularizer, L2Normalize, SampleSoftmax, multinomial_entropy
from ats_stream.sampling.module import AttentionSampling, Expectation, SamplePatches, attention_sampling
from ats_stream.sampling.patches import PatchSource, cut_patches
from ats_stream.sampling.tracing import geometry_of, receptive_field
from ats_stream.sampling.transforms import TransformedSource
from ats_stream.sampling.weights import SCHEMES, Scheme, estimator_weights

__all__ = [
    "SCHEMES",
    "ActivityRegularizer",
    "AttentionSampling",
    "Augmentation",
    "Compose",
    "Draw",
    "Expectation",
    "Geometry",
    "L2Normalize",
    "PatchSource",
    "RandomFlip",
    "RandomIntensity",
    "RandomPan",
    "RandomQuarterTurn",
    "SamplePatches",
    "SampleSoftmax",
    "Scheme",
    "TransformedSource",
    "attention_logits",
    "attention_sampling",
    "cut_patches",
    "draw",
    "effective_sample_share",
    "estimator_weights",
    "expectation",
    "geometry_from_receptive_field",
    "geometry_of",
    "log_attention",
    "merge_draws",
    "multinomial_entropy",
    "patch_offsets",
    "receptive_field",
]
