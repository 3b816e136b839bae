"""Ranks in threads of this process: what Ray Train does for processes, without starting any."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.workers.ranks import Alone

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 60.0


class ThreadRank(Alone):
    """One of some ranks, which hand each other what they gather, and the mean of their gradients."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.world_size = rank, len(board)
        self._board, self._barrier = board, barrier

    def _exchange(self, values: torch.Tensor) -> list[torch.Tensor]:
        """What each rank brought, in the order of the ranks."""
        self._board[self.rank] = values.detach()
        self._barrier.wait(TIMEOUT_S)
        parts = [part.clone() for part in self._board]
        self._barrier.wait(TIMEOUT_S)
        return parts

    def wrap(self, model: Any) -> Any:
        """The model; each gradient becomes the mean over the ranks as soon as it is there."""

        def average(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.copy_(sum(self._exchange(parameter.grad)) / self.world_size)

        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(average)
        return model

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(values)
        parts[self.rank] = values
        return torch.cat(parts)

    def collect(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(values))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(values)).sum(0)

    def report(self, numbers: dict[str, float]) -> None:
        self._barrier.wait(TIMEOUT_S)


def make_ranks(number: int, kind: type[ThreadRank] = ThreadRank) -> list[ThreadRank]:
    """So many ranks that know each other."""
    board: list[Any] = [None] * number
    barrier = threading.Barrier(number)
    return [kind(rank, board, barrier) for rank in range(number)]


def side_by_side(ranks: list[ThreadRank], work: Callable[[ThreadRank], None]) -> None:
    """Work in a thread for each rank; what one of them raises is raised here."""
    raised: list[BaseException] = []

    def guarded(rank: ThreadRank) -> None:
        try:
            work(rank)
        except BaseException as error:
            raised.append(error)
            rank._barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        # the others only saw that somebody was missing
        raise min(raised, key=lambda error: isinstance(error, threading.BrokenBarrierError))
