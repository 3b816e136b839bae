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

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


class Reserved:
    """Memory of the ring to be filled: ``tensors``, and then :meth:`stage`."""

    def __init__(self, tensors: list[torch.Tensor], stage: Callable[[list[torch.Tensor]], Staged]) -> None:
        self.tensors = tensors
        self._stage = stage

    def stage(self) -> Staged:
        """Begin to copy; the tensors must not be written any more."""
        return self._stage(self.tensors)


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
        InputError for a tensor that is not a contiguous one on the CPU, and for ``zero_copy`` if no batch of
        the ring was released.
        """
        for tensor in tensors:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise InputError(
                    f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} with strides"
                    f" {tensor.stride()} cannot be staged, expected a contiguous one on the CPU"
                )
        if self._copies is None:
            return Staged(list(tensors))
        reserved = self.reserve([(tensor.shape, tensor.dtype) for tensor in tensors])
        for tensor, pinned in zip(tensors, reserved.tensors, strict=True):
            pinned.copy_(tensor)
        return reserved.stage()

    def reserve(self, kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> Reserved:
        """Lend tensors of given shapes and dtypes to be written in place, which saves a copy on the host.

        Waits and raises as :meth:`stage` does; one batch is reserved at a time.
        """
        if self._copies is None:
            return Reserved([torch.empty(tuple(shape), dtype=dtype) for shape, dtype in kinds], Staged)
        slot = self._slots[self._next]
        if slot.is_lent:
            raise InputError(f"all {len(self._slots)} batches of the ring are in use: release one first")
        self._next = (self._next + 1) % len(self._slots)
        layout = _Layout(kinds)
        memory = self._free(slot, layout.num_bytes)[: layout.num_bytes]
        return Reserved(layout.views(memory), lambda pinned: self._begin(slot, layout, memory, pinned))

    def _begin(
        self, slot: _Slot, layout: _Layout, memory: torch.Tensor, pinned: list[torch.Tensor]
    ) -> Staged:
        assert self._copies is not None
        if self.feed == "zero_copy":
            slot.is_lent = True
            return Staged(pinned, self._copies, slot=slot)
        copy, slot.busy = self._copies.begin(memory)
        return Staged(layout.views(copy), self._copies, copy=copy, event=slot.busy)

    def _free(self, slot: _Slot, num_bytes: int) -> torch.Tensor:
        """The memory of a slot, once nothing reads it any more, and large enough."""
        assert self._copies is not None
        if slot.busy is not None:
            self._copies.wait(slot.busy)
            slot.busy = None
        if slot.memory is None or len(slot.memory) < num_bytes:
            slot.memory = self._copies.pinned(num_bytes)
        return slot.memory


class _Layout:
    """Where tensors lie in one piece of memory.

    >>> layout = _Layout([((3,), torch.float32), ((65,), torch.float32), ((), torch.uint8)])
    >>> layout.starts, layout.num_bytes
    ([0, 256, 768], 1024)
    """

    def __init__(self, kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> None:
        self.kinds = kinds
        self.starts: list[int] = []
        self.num_bytes = 0
        for shape, dtype in kinds:
            self.starts.append(self.num_bytes)
            self.num_bytes += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a piece of memory."""
        return [
            memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
            for (shape, dtype), start in zip(self.kinds, self.starts, strict=True)
        ]
