"""The method: draw positions from an attention map, estimate sums over the whole map. Needs torch alone."""

from ats_stream.sampling.draw import Draw, draw, merge_draws
from ats_stream.sampling.expectation import effective_sample_share, expectation
from ats_stream.sampling.weights import SCHEMES, Scheme, estimator_weights

__all__ = [
    "SCHEMES",
    "Draw",
    "Scheme",
    "draw",
    "effective_sample_share",
    "estimator_weights",
    "expectation",
    "merge_draws",
]
