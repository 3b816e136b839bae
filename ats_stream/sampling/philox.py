"""Counter-based random numbers: every position of every image owns its own noise.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
128-bit counter and a 64-bit key into four 32-bit words. The counter here is

    (global index // 4,  stream id low word,  stream id high word,  purpose)      key = (seed low, seed high)

and position ``i`` takes word ``i % 4``. Nothing depends on the batch, the row, the rank or the device.
Words are kept in int64 tensors, because torch has no full unsigned 32-bit arithmetic.

Shapes: B rows, P positions; a trailing ``1`` broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ats_stream.kernels.arithmetic import PHILOX_MULTIPLIERS, PHILOX_NUM_ROUNDS, PHILOX_WEYL

_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]

# Purposes: the fourth counter word. Arrival number k of a position takes its high word from 2 k and its
# low word from 2 k + 1; the top of the range serves one draw per image.
PURPOSE_CURVE = 0xFFFFFFFE
PURPOSE_OFFSET = 0xFFFFFFF0


def philox4x32(counter: Words, key: tuple[int | Tensor, int | Tensor]) -> Words:
    """Return the four output words of Philox4x32-10 for broadcastable int64 counter words in [0, 2^32).

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> " ".join(f"{int(word):08x}" for word in philox4x32((zero, zero, zero, zero), (0, 0)))
    '6627e8d5 e169c58d bc57ac4c 9b00dbd8'
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_NUM_ROUNDS):
        # int64 products wrap modulo 2^64, so both halves come out right once masked
        product0 = c0 * PHILOX_MULTIPLIERS[0]
        product1 = c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + PHILOX_WEYL[0]) & _MASK
        k1 = (k1 + PHILOX_WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The random words of a batch: one seed, one 64-bit stream id per row."""

    seed: int | Tensor
    """64-bit key; a negative one stands for its two's complement. A tensor () int64 stays on its device."""
    stream_ids: Tensor
    """(B,) int64; only their bits matter."""

    def seed_on(self, device: torch.device) -> Tensor:
        """The seed as a tensor () int64 on ``device``."""
        if isinstance(self.seed, Tensor):
            return self.seed.to(device)
        signed = (self.seed + (1 << 63)) % (1 << 64) - (1 << 63)
        return torch.full((), signed, dtype=torch.int64, device=device)

    def words(self, index: Tensor, purpose: int | Tensor) -> Tensor:
        """Words at any positions: ``index`` (P,) or (B, P, ...), broadcasting with ``purpose``."""
        batch_dims = max(index.ndim, purpose.ndim if isinstance(purpose, Tensor) else 0, 2) - 1
        four = philox4x32(self._counter(index >> 2, purpose, batch_dims), self._key)
        lane = index & 3
        even = torch.where(lane == 0, four[0], four[2])
        odd = torch.where(lane == 1, four[1], four[3])
        return torch.where(lane & 1 == 0, even, odd)

    def range_words(self, start: int, stop: int, purpose: int) -> Tensor:
        """Words (B, stop - start) of consecutive positions, four from each counter."""
        group = torch.arange(start // 4, (stop + 3) // 4, device=self.stream_ids.device)
        four = philox4x32(self._counter(group, purpose, 1), self._key)
        shape = (len(self.stream_ids), len(group))
        words_BP = torch.stack([word.expand(shape) for word in four], dim=-1).flatten(1)
        first = start - start // 4 * 4
        return words_BP[:, first : first + stop - start]

    @property
    def _key(self) -> tuple[int | Tensor, int | Tensor]:
        return self.seed & _MASK, (self.seed >> 32) & _MASK

    def _counter(self, group: Tensor, purpose: int | Tensor, batch_dims: int) -> Words:
        stream = self.stream_ids.view(-1, *[1] * batch_dims)
        if not isinstance(purpose, Tensor):
            purpose = torch.full((), purpose, dtype=torch.int64, device=stream.device)
        return group, stream & _MASK, (stream >> 32) & _MASK, purpose


def settled_seed(seed: int | Tensor) -> int | Tensor:
    """A seed that stays as it is now: a number, or a copy of a tensor that only a device may read."""
    if isinstance(seed, Tensor):
        is_at_hand = seed.device.type == "cpu" and not torch.compiler.is_compiling()
        return int(seed) if is_at_hand else seed.detach().clone()
    return seed


def unit_from_words(high: Tensor, low: Tensor) -> Tensor:
    """Uniform float64 u = (bits + 1/2) 2^-53 in (0, 1), from ``high`` and the top 21 bits of ``low``."""
    bits = (high << 21) | (low >> 11)
    # above 1/2 the half rounds to even; the very last value would round up to one
    return ((bits.double() + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-53)
