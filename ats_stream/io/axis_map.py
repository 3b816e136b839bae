"""How the axes that an array is stored with become (C, *space)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = npt.NDArray[Any]
Place = tuple[int, ...]


@dataclass(frozen=True)
class AxisMap:
    """How stored axes become (C, *space): ``keep[i]`` is the stored axis of axis i, None for a new one."""

    keep: tuple[int | None, ...]
    ndim: int

    @cached_property
    def is_identity(self) -> bool:
        """Whether the stored axes are (C, *space) already."""
        return self.keep == tuple(range(self.ndim))

    def view(self, values: Sequence[int]) -> tuple[int, ...]:
        """Reorder one number per stored axis."""
        return tuple(1 if a is None else int(values[a]) for a in self.keep)

    def stored(self, place: Sequence[int]) -> tuple[int, ...]:
        """Back from a place in (C, *space) to the stored axes; axes that were dropped are at 0."""
        result = [0] * self.ndim
        for value, axis in zip(place, self.keep, strict=True):
            if axis is not None:
                result[axis] = int(value)
        return tuple(result)

    def stored_rows(self, places: Sequence[Place] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same for many places at once, one per row."""
        rows = np.asarray(places, np.int64).reshape(-1, len(self.keep))
        if self.is_identity:
            return rows
        result = np.zeros((len(rows), self.ndim), np.int64)
        for i, axis in enumerate(self.keep):
            if axis is not None:
                result[:, axis] = rows[:, i]
        return result

    def array(self, array: Array) -> Array:
        """Reorder the axes of a block; dropped axes have length 1, so their first plane is all."""
        if self.is_identity:
            return array
        kept = [a for a in self.keep if a is not None]
        array = array[tuple(slice(None) if a in kept else 0 for a in range(self.ndim))]
        array = array.transpose([sorted(kept).index(a) for a in kept])
        return array.reshape(
            *[1 if a is None else n for a, n in zip(self.keep, self._sizes(array), strict=True)]
        )

    def _sizes(self, array: Array) -> list[int]:
        sizes = iter(array.shape)
        return [1 if a is None else next(sizes) for a in self.keep]
