"""What travels between samplers and ranks.

Arrays are numpy, because Ray's object store shares those between processes without a copy.
Shapes: C channels, Y X the view's pixels, N patches, P the patch's side, D space axes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ats_stream.workers.plan import Visit

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AttentionWeights:
    """One version of the attention network's weights, known by its content.

    The key is a hash of the content and never a counter: after a run went back to a checkpoint, the same step
    number means other weights.
    """

    key: str
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> AttentionWeights:
        """Name the arrays by the hash of their names, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return cls(digest.hexdigest(), dict(arrays))


@dataclass(frozen=True, kw_only=True)
class Item:
    """What one visit brings: the view, the drawn positions, their weights and their patches."""

    visit: Visit
    slide: str
    label: int
    view_CYX: Array
    """The low-resolution view."""
    prior_YX: Array | None
    """Where positions may be drawn (bool); None for everywhere."""
    index_N: Array
    """Drawn positions in the flattened view, int64, in draw order."""
    log_q_N: Array
    """Log-probability that each position was drawn from, float32."""
    weight_N: Array
    """R of each draw, float32; 0 where fewer than N positions were drawable."""
    num_drawn: int
    """How many of the N entries are real."""
    offsets_ND: Array
    """First pixel of each patch at full resolution; may lie outside the image."""
    crops_NCPP: Array
    """The patches at full resolution, in the image's dtype."""
    attention_key: str
    """Key of the attention weights that drew."""
    stored_bytes: int
    """Bytes of the full-resolution level fetched from storage for this visit."""
    decoded_bytes: int
    """Bytes of the full-resolution level that these decoded to (whole chunks, absent ones counted)."""
    seconds: float
    """Time that the sampler took."""
    bad: str | None = None
    """Why the image could not be read, if so: the arrays then hold nothing, and the visit's share is 0."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.view_CYX, self.prior_YX, self.crops_NCPP, self.index_N, self.log_q_N, self.weight_N)
        return sum(a.nbytes for a in arrays if a is not None)
