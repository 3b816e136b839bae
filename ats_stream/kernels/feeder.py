"""From host memory to a device while it works: a ring of pinned memory, and copies on a stream of their own.

On a device the feeds differ in who moves the pixels:

* ``crops``: a staged batch is one copy from pinned to device memory, begun at once. The default.
* ``zero_copy``: nothing is copied; kernels read the pinned memory, which is free again after
  :meth:`Staged.release`.
* resident chunks: :class:`~ats_stream.kernels.resident.ResidentChunks` keeps decoded chunks on the device,
  and uses a feeder for those it does not have.

On the CPU all of them hand over the tensors as they came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

FEEDS = ("crops", "zero_copy")
_ALIGNMENT = 256  # bytes: as the allocator of the device aligns


class Copies(Protocol):
    """What a feeder needs of a device."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """New host memory, uint8, that the device can copy from and read."""

    def begin(self, pinned: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to copy to the device; the copy, and the event of its end."""

    def mark(self) -> Any:
        """The event of the end of all that was launched so far by whoever consumes."""

    def wait(self, event: Any) -> None:
        """Let the host wait for an event."""

    def follow(self, event: Any, copy: torch.Tensor) -> None:
        """Let the consumer's launches from here on wait for an event, and keep ``copy`` until they end."""


class CudaCopies:
    """Copies to a CUDA device on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch says nothing

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """New host memory, uint8, that the device can copy from and read."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def begin(self, pinned: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Begin to copy to the device; the copy, and the event of its end."""
        with torch.cuda.stream(self._stream):
            copy = pinned.to(self.device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch says nothing
            event.record(self._stream)
        return copy, event

    def mark(self) -> torch.cuda.Event:
        """The event of the end of all that was launched so far on the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch says nothing
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the host wait for an event."""
        event.synchronize()

    def follow(self, event: torch.cuda.Event, copy: torch.Tensor) -> None:
        """Let the current stream wait for an event, and keep ``copy`` until the stream is past its use."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        copy.record_stream(stream)


class _Slot:
    """One piece of pinned memory of the ring."""

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.busy: Any = None
        """Event after which the memory may be written again; None if it may be now."""
        self.is_lent = False
        """Whether a consumer reads it and has not said yet when it will be done."""


class Staged:
    """A batch on its way; :meth:`take` gives its tensors."""

    def __init__(
        self,
        tensors: list[torch.Tensor],
        copies: Copies | None = None,
        *,
        copy: torch.Tensor | None = None,
        event: Any = None,
        slot: _Slot | None = None,
    ) -> None:
        self._tensors, self._copies, self._copy, self._event, self._slot = tensors, copies, copy, event, slot

    def take(self) -> list[torch.Tensor]:
        """The tensors, in the order they were staged; what is launched from here on waits for their copy."""
        if self._copies is not None and self._copy is not None:
            self._copies.follow(self._event, self._copy)
        return self._tensors

    def release(self) -> None:
        """Say that all that reads the tensors was launched; needed for ``zero_copy``, harmless elsewhere."""
        if self._copies is not None and self._slot is not None and self._slot.is_lent:
            self._slot.busy, self._slot.is_lent = self._copies.mark(), False


class DeviceFeeder:
    """Stages batches of host tensors for a device, one ahead of the other.

    Args:
        device: where the tensors are wanted.
        feed: one of :data:`FEEDS`.
        depth: batches that may be on their way at once; pinned memory is kept for so many.

    Raises InputError for an unknown feed or a depth below 1.

    >>> feeder = DeviceFeeder(torch.device("cpu"))
    >>> feeder.stage([torch.tensor([1, 2])]).take()
    [tensor([1, 2])]
    """

    def __init__(
        self, device: torch.device, *, feed: str = "crops", depth: int = 2, copies: Copies | None = None
    ) -> None:
        if feed not in FEEDS:
            raise InputError(f"feed is {feed!r}, expected one of {', '.join(FEEDS)}")
        if depth < 1:
            raise InputError(f"depth is {depth}, expected at least 1")
        self.feed = feed
        self._copies = CudaCopies(device) if copies is None and device.type == "cuda" else copies
        self._slots = [_Slot() for _ in range(depth)]
        self._next = 0

    @property
    def copies_ahead(self) -> bool:
        """Whether staging early saves time: on a device."""
        return self._copies is not None

    def stage(self, tensors: Sequence[torch.Tensor]) -> Staged:
        """Take contiguous CPU tensors; on a device, begin to copy them, and return.

        The host waits only if the pinned memory that is next in the ring is still being read. Raises
        InputError for a tensor that is not a contiguous one on the CPU, and for ``zero_copy`` batches none of
        which was released.
        """
        for tensor in tensors:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise InputError(
                    f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} with strides"
                    f" {tensor.stride()} cannot be staged, expected a contiguous one on the CPU"
                )
        if self._copies is None:
            return Staged(list(tensors))
        starts, total = _layout(tensors)
        slot = self._slots[self._next]
        if slot.is_lent:
            raise InputError(
                f"all {len(self._slots)} batches of the ring are in use: release one, or go deeper"
            )
        self._next = (self._next + 1) % len(self._slots)
        memory = self._free(slot, total)[:total]
        for tensor, part in zip(tensors, _views(tensors, memory, starts), strict=True):
            part.copy_(tensor)
        if self.feed == "zero_copy":
            slot.is_lent = True
            return Staged(_views(tensors, memory, starts), self._copies, slot=slot)
        copy, slot.busy = self._copies.begin(memory)
        return Staged(_views(tensors, copy, starts), self._copies, copy=copy, event=slot.busy)

    def _free(self, slot: _Slot, num_bytes: int) -> torch.Tensor:
        """The memory of a slot, once nothing reads it any more, and large enough."""
        assert self._copies is not None
        if slot.busy is not None:
            self._copies.wait(slot.busy)
            slot.busy = None
        if slot.memory is None or len(slot.memory) < num_bytes:
            slot.memory = self._copies.pinned(num_bytes)
        return slot.memory


def _layout(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """First byte of each tensor in one piece of memory, and its size.

    >>> _layout([torch.zeros(3), torch.zeros(65), torch.zeros(1)])
    ([0, 256, 768], 1024)
    """
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, total


def _views(
    tensors: Sequence[torch.Tensor], memory: torch.Tensor, starts: Sequence[int]
) -> list[torch.Tensor]:
    return [
        memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=True)
    ]
