"""The stream of drawn patches, the trainer and inference: in one process or on a Ray cluster."""

from ats_stream.workers.config import ClusterConfig, RunConfig, TrainerConfig
from ats_stream.workers.plan import Plan, Visit
from ats_stream.workers.protocol import AttentionWeights, Item
from ats_stream.workers.sampler import PatchSampler, SamplerConfig
from ats_stream.workers.stream import Stream
from ats_stream.workers.training import TrainResult, train

__all__ = [
    "AttentionWeights",
    "ClusterConfig",
    "Item",
    "PatchSampler",
    "Plan",
    "RunConfig",
    "SamplerConfig",
    "Stream",
    "TrainResult",
    "TrainerConfig",
    "Visit",
    "train",
]
