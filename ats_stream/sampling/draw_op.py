"""Drawing as one opaque operator, so that ``torch.compile`` takes it as a single step of the graph.

Shapes: B rows (images), M positions of the flattened map, N draws, K = N + 1 arrivals kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ats_stream.kernels.arithmetic import NUM_LEVELS
from ats_stream.sampling.drawn import Draw, draw_eagerly
from ats_stream.sampling.mass import Mass
from ats_stream.sampling.philox import Noise, settled_seed
from ats_stream.sampling.race import Race
from ats_stream.sampling.weights import Scheme, check_scheme


def draw_in_graph(
    logits_BM: Tensor,
    num_samples: int,
    scheme: Scheme,
    noise: Noise,
    global_index: Tensor | None,
    map_shape: list[int] | None,
) -> Draw:
    """:func:`ats_stream.sampling.drawn.draw_eagerly` through the operator ``ats_stream::draw``."""
    seed = noise.seed_on(logits_BM.device)
    tensors = _draw_op(logits_BM, num_samples, scheme, seed, noise.stream_ids, global_index, map_shape)
    return _draw_of(tensors, noise, scheme)


_Tensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # index, log_prob, weight, num_drawn, log_normaliser, inclusion; key, index, logit, peak, levels of a race


@torch.library.custom_op("ats_stream::draw", mutates_args=())
def _draw_op(
    logits_BM: Tensor,
    num_samples: int,
    scheme: str,
    seed: Tensor,
    stream_ids: Tensor,
    global_index: Tensor | None,
    map_shape: list[int] | None,
) -> _Tensors:
    noise = Noise(seed=settled_seed(seed), stream_ids=stream_ids)
    drawn = draw_eagerly(logits_BM, num_samples, check_scheme(scheme), noise, global_index, map_shape)
    common = (drawn.index, drawn.log_prob, drawn.weight, drawn.num_drawn, drawn.log_normaliser)
    if drawn.race is None:
        assert drawn.inclusion is not None
        return *common, drawn.inclusion, *_absent(logits_BM)
    race = drawn.race
    absent = torch.empty(0, dtype=torch.float64, device=logits_BM.device)
    return *common, absent, race.key, race.index, race.logit, race.rest.peak, race.rest.levels


@_draw_op.register_fake
def _draw_op_fake(
    logits_BM: Tensor,
    num_samples: int,
    scheme: str,
    seed: Tensor,  # noqa: ARG001  the operator's signature
    stream_ids: Tensor,  # noqa: ARG001
    global_index: Tensor | None,  # noqa: ARG001
    map_shape: list[int] | None,  # noqa: ARG001
) -> _Tensors:
    num_rows = logits_BM.shape[0]
    common = (
        logits_BM.new_empty((num_rows, num_samples), dtype=torch.int64),
        logits_BM.new_empty((num_rows, num_samples), dtype=torch.float32),
        logits_BM.new_empty((num_rows, num_samples), dtype=torch.float32),
        logits_BM.new_empty(num_rows, dtype=torch.int64),
        logits_BM.new_empty(num_rows, dtype=torch.float64),
    )
    if scheme == "balanced":
        inclusion_BN = logits_BM.new_empty((num_rows, num_samples), dtype=torch.float64)
        return *common, inclusion_BN, *_absent(logits_BM)
    return (
        *common,
        logits_BM.new_empty(0, dtype=torch.float64),
        logits_BM.new_empty((num_rows, num_samples + 1), dtype=torch.float64),
        logits_BM.new_empty((num_rows, num_samples + 1), dtype=torch.int64),
        logits_BM.new_empty((num_rows, num_samples + 1), dtype=torch.float64),
        logits_BM.new_empty(num_rows, dtype=torch.float64),
        logits_BM.new_empty((num_rows, NUM_LEVELS), dtype=torch.int64),
    )


def _absent(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors in the place of a race."""
    dtypes = (torch.float64, torch.int64, torch.float64, torch.float64, torch.int64)
    key, index, logit, peak, levels = (like.new_empty(0, dtype=dtype) for dtype in dtypes)
    return key, index, logit, peak, levels


def _draw_of(tensors: _Tensors, noise: Noise, scheme: Scheme) -> Draw:
    index, log_prob, weight, num_drawn, log_normaliser, inclusion = tensors[:6]
    key, race_index, logit, peak, levels = tensors[6:]
    race = Race(key=key, index=race_index, logit=logit, rest=Mass(peak=peak, levels=levels))
    return Draw(
        index=index,
        log_prob=log_prob,
        weight=weight,
        num_drawn=num_drawn,
        scheme=scheme,
        log_normaliser=log_normaliser,
        noise=noise,
        race=None if scheme == "balanced" else race,
        inclusion=inclusion if scheme == "balanced" else None,
    )
