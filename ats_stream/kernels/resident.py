"""Decoded chunks that stay where they are gathered from: the feed for images visited again and again.

Shapes: S slots of E elements each.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ats_stream.errors import InputError
from ats_stream.kernels.feeder import DeviceFeeder
from ats_stream.kernels.table import ChunkTable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence


@dataclass(frozen=True)
class ChunkedImage:
    """An image of a batch: its size, and the names of its chunks by channel, z, y, x; None: not stored."""

    space: tuple[int, ...]
    keys: Sequence[Hashable | None]
    """Only the chunks that a patch touches need names; the others may be None too."""


class ResidentChunks:
    """A pool of chunks of one shape on a device, the least recently used leaving first.

    Args:
        device: where the chunks are kept.
        num_slots: chunks that the pool holds; a batch may not touch more.
        chunk_shape: pixels of a chunk, (D,).
        num_channels: channels of an image.
        chunk_channels: channels of a chunk, by default all.
        is_interleaved: as in :class:`~ats_stream.kernels.table.ChunkTable`.
        dtype: of the pixels.
        absent: value of pixels in chunks that are not stored.
        feeder: of the same device; by default one of its own.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_slots: int,
        chunk_shape: Sequence[int],
        num_channels: int,
        chunk_channels: int | None = None,
        is_interleaved: bool = False,
        dtype: torch.dtype = torch.uint8,
        absent: float = 0.0,
        feeder: DeviceFeeder | None = None,
    ) -> None:
        if num_slots < 1:
            raise InputError(f"num_slots is {num_slots}, expected at least 1")
        self.device, self.num_slots = device, num_slots
        self.chunk_shape, self.num_channels = tuple(chunk_shape), num_channels
        self.chunk_channels = num_channels if chunk_channels is None else chunk_channels
        self.is_interleaved, self.absent = is_interleaved, absent
        num_elements = self.chunk_channels
        for side in self.chunk_shape:
            num_elements *= side
        self._pool_SE = torch.zeros(num_slots, num_elements, dtype=dtype, device=device)
        self._feeder = feeder or DeviceFeeder(device)
        self._slot_of: OrderedDict[Hashable, int] = OrderedDict()
        self.num_hits = 0
        self.num_misses = 0

    def table(
        self,
        images: Sequence[ChunkedImage],
        fetch: Callable[[list[Hashable]], Sequence[torch.Tensor]],
    ) -> ChunkTable:
        """Bring the chunks of a batch to the device and return its table, which the next call may overwrite.

        ``fetch`` decodes the chunks that are missing: contiguous CPU tensors in the pool's dtype, whole also
        at the edge of an image, in the order asked for. Raises InputError if the batch has more chunks than
        there are slots, or ``fetch`` returns something else; the pool is then as before.
        """
        wanted = dict.fromkeys(key for image in images for key in image.keys if key is not None)
        if len(wanted) > self.num_slots:
            raise InputError(f"a batch of {len(wanted)} chunks does not fit {self.num_slots} slots")
        missing = [key for key in wanted if key not in self._slot_of]
        if missing:
            self._load(missing, wanted, fetch)
        self.num_hits += len(wanted) - len(missing)
        self.num_misses += len(missing)
        for key in wanted:
            self._slot_of.move_to_end(key)
        size = self._pool_SE.shape[1]
        starts = [-1 if key is None else self._slot_of[key] * size for image in images for key in image.keys]
        table = ChunkTable.of_chunks(
            self._pool_SE.view(-1),
            starts,
            [image.space for image in images],
            self.chunk_shape,
            num_channels=self.num_channels,
            chunk_channels=self.chunk_channels,
            is_interleaved=self.is_interleaved,
            absent=self.absent,
        )
        return table.to(self.device)

    def _load(
        self,
        missing: list[Hashable],
        wanted: dict[Hashable, None],
        fetch: Callable[[list[Hashable]], Sequence[torch.Tensor]],
    ) -> None:
        chunks = fetch(missing)
        size, dtype = self._pool_SE.shape[1], self._pool_SE.dtype
        for key, chunk in zip(missing, chunks, strict=True):
            if chunk.dtype != dtype or chunk.numel() != size:
                raise InputError(
                    f"chunk {key!r} is {chunk.dtype} of {chunk.numel()} elements, expected {dtype} of {size}"
                )
        free = [slot for slot in range(self.num_slots) if slot not in set(self._slot_of.values())]
        leaving = [key for key in self._slot_of if key not in wanted][: max(len(missing) - len(free), 0)]
        free += [self._slot_of.pop(key) for key in leaving]
        slots = free[: len(missing)]
        self._slot_of.update(zip(missing, slots, strict=True))
        staged = self._feeder.stage([torch.stack([chunk.flatten() for chunk in chunks]), torch.tensor(slots)])
        chunks_ME, slots_M = staged.take()
        # on the stream that gathers: earlier gathers are done with the slots, later ones see the chunks
        _bytes(self._pool_SE)[slots_M.to(self.device)] = _bytes(chunks_ME).to(self.device)
        staged.release()


def _bytes(rows_SE: torch.Tensor) -> torch.Tensor:
    """Rows as bytes: torch cannot index uint16."""
    return rows_SE.view(torch.uint8)
