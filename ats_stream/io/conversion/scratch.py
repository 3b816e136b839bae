"""Memory that is used again: what the system hands out anew, it first fills with zeros page by page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


class Scratch:
    """Arrays by name; of each name there is one at a time, whose content is lost when the next is asked for.

    For one thread.

    >>> scratch = Scratch()
    >>> first = scratch.array("block", (2, 3), np.uint8)
    >>> np.shares_memory(first, scratch.array("block", (3, 2), np.uint8))
    True
    """

    def __init__(self) -> None:
        self._memory: dict[Hashable, npt.NDArray[np.uint8]] = {}

    def array(self, name: Hashable, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array in C order of any content."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._memory or len(self._memory[name]) < nbytes:
            self._memory.pop(name, None)
            self._memory[name] = np.empty(nbytes, np.uint8)
        return self._memory[name][:nbytes].view(dtype).reshape(shape)
