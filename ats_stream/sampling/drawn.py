"""What a draw is, and how races and balanced draws become one.

Shapes: B rows (images), M positions of the flattened map, N draws, K = N + 1 arrivals kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.sampling.balanced import balanced_draw
from ats_stream.sampling.logarithm import log
from ats_stream.sampling.race import Order, Race, exponentials, run_race, smallest_first
from ats_stream.sampling.weights import Scheme, weights_from_logs

if TYPE_CHECKING:
    from ats_stream.sampling.philox import Noise

_NEGATIVE_INFINITY = float("-inf")
_MAX_POSITIONS = 1 << 34  # a Philox counter word holds index / 4


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Positions drawn from each row, with all that turns them into an estimate. Nothing carries a gradient.

    Rows with fewer drawable positions than N are padded at the end: index 0, log_prob -inf, weight 0.
    """

    index: Tensor
    """(B, N) int64 positions in draw order; global ones if ``global_index`` was given."""
    log_prob: Tensor
    """(B, N) float32 log q."""
    weight: Tensor
    """(B, N) float32 R, see :func:`ats_stream.sampling.estimator_weights`."""
    num_drawn: Tensor
    """(B,) int64, N unless the row had fewer drawable positions."""
    scheme: Scheme
    log_normaliser: Tensor
    """(B,) float64 log-sum-exp of the row's logits."""
    noise: Noise
    race: Race | None = None
    """The N + 1 first arrivals, from which draws of tiles are merged; None for "balanced"."""
    inclusion: Tensor | None = None
    """(B, N) float64 inclusion probabilities of "balanced", 1 at padding."""

    @property
    def keys(self) -> Tensor | None:
        """(B, N) float64 race keys of the N first arrivals, ascending; None for "balanced"."""
        return None if self.race is None else self.race.key[:, :-1]

    @property
    def threshold(self) -> Tensor | None:
        """(B,) float64 key of arrival N + 1, +inf where there is none; None for "balanced"."""
        return None if self.race is None else self.race.key[:, -1]


def draw_eagerly(
    logits_BM: Tensor,
    num_samples: int,
    scheme: Scheme,
    noise: Noise,
    global_index: Tensor | None,
    map_shape: list[int] | None,
) -> Draw:
    """Draw from logits (B, M) with arguments that fit; InputError for values that cannot be drawn from."""
    if scheme == "balanced":
        assert map_shape is not None
        return _finish_balanced(logits_BM, num_samples, noise, tuple(map_shape))
    if global_index is not None:
        global_index = _check_global_index(global_index, logits_BM)
    order: Order = "logit" if scheme == "top" else "race"
    race = run_race(logits_BM, num_samples + 1, noise, order=order, global_index=global_index)
    return finish_race(race, num_samples, noise, scheme)


def finish_race(race: Race, num_samples: int, noise: Noise, scheme: Scheme) -> Draw:
    """The draw of N positions from a race of at least N + 1 arrivals."""
    log_normaliser_B = race.log_total
    index_BN, logit_BN = race.index[:, :num_samples], race.logit[:, :num_samples]
    if scheme == "with_replacement":
        index_BN, logit_BN = _arrivals(index_BN, logit_BN, noise)
    log_q_BN = logit_BN - log_normaliser_B[:, None]
    log_rest_B = race.log_behind(num_samples) - log_normaliser_B
    weight_BN = weights_from_logs(log_q_BN, log_rest_B, scheme)
    drawn_BN = logit_BN > _NEGATIVE_INFINITY
    return Draw(
        index=index_BN.masked_fill(~drawn_BN, 0),
        log_prob=log_q_BN.float(),
        weight=weight_BN.float(),
        num_drawn=drawn_BN.sum(dim=1),
        scheme=scheme,
        log_normaliser=log_normaliser_B,
        noise=noise,
        race=race,
    )


def _arrivals(index_BN: Tensor, logit_BN: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """First N arrivals (index, logit) when every position keeps arriving: N draws with replacement.

    Arrivals of rate w_i at each position make one Poisson process whose successive marks are independent with
    probabilities w / sum w. Whoever is among its first N arrivals has a first arrival among the N first ones.
    """
    num_rows, num_draws = index_BN.shape
    arrival_N = torch.arange(num_draws, device=index_BN.device)
    wait_BNN = exponentials(index_BN[:, :, None], noise, arrival_N)
    times = [wait_BNN[..., 0]]
    for arrival in range(1, num_draws):  # one by one: a parallel sum would round by device
        times.append(times[-1] + wait_BNN[..., arrival])
    key_BNN = log(torch.stack(times, dim=-1)) - logit_BN[:, :, None]
    key_BNN = key_BNN.masked_fill(logit_BN[:, :, None] == _NEGATIVE_INFINITY, float("inf"))
    index_BNN = index_BN[:, :, None].expand_as(key_BNN)
    first_BN = smallest_first(key_BNN.flatten(1), index_BNN.flatten(1))[:, :num_draws]
    logit_BNN = logit_BN[:, :, None].expand_as(key_BNN)
    return index_BNN.reshape(num_rows, -1).gather(1, first_BN), logit_BNN.reshape(num_rows, -1).gather(
        1, first_BN
    )


def _finish_balanced(logits_BM: Tensor, num_samples: int, noise: Noise, map_shape: tuple[int, ...]) -> Draw:
    drawn = balanced_draw(logits_BM, num_samples, noise, map_shape)
    log_q_BN = drawn.logit - drawn.log_normaliser[:, None]
    unused_B = torch.zeros_like(drawn.log_normaliser)
    return Draw(
        index=drawn.index,
        log_prob=log_q_BN.float(),
        weight=weights_from_logs(log_q_BN, unused_B, "balanced", drawn.inclusion).float(),
        num_drawn=(drawn.logit > _NEGATIVE_INFINITY).sum(dim=1),
        scheme="balanced",
        log_normaliser=drawn.log_normaliser,
        noise=noise,
        inclusion=drawn.inclusion,
    )


def _check_global_index(global_index: Tensor, logits_BM: Tensor) -> Tensor:
    shape = tuple(logits_BM.shape)
    if global_index.dtype != torch.int64 or tuple(global_index.shape) not in ((shape[1],), shape):
        got = f"{global_index.dtype} {tuple(global_index.shape)}"
        raise InputError(f"global_index must be int64 ({shape[1]},) or {shape}, got {got}")
    lowest, highest = global_index.aminmax()
    if int(lowest) < 0 or int(highest) >= _MAX_POSITIONS:
        raise InputError(f"global_index must lie in [0, {_MAX_POSITIONS})")
    return global_index.to(logits_BM.device)
