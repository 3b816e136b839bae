"""How a stop reaches the ranks of Ray Train: by SIGTERM to one of them, or by a word from the driver.

Kept in a module of its own because importing it imports Ray. The training function runs in a thread of the
rank, where no handler may be set; what a backend runs as it starts runs in the rank's main thread.
"""

from __future__ import annotations

import math
import time
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put
from ray.train.torch import TorchConfig

from ats_stream.workers.preemption import StopRequest

LOOK_INTERVAL_S = 0.3
_NAMESPACE = b"ats-stream-stop"

RANK_STOP = StopRequest()
"""The request to this process, if it is a rank: signals belong to processes."""


def _take_sigterm() -> None:
    RANK_STOP.take_sigterm()


class _StoppableBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray has no types
    """The backend of torch, which besides watches for SIGTERM."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set torch up in all ranks, then the handlers."""
        super().on_start(worker_group, backend_config)
        worker_group.execute(_take_sigterm)


class StoppableTorchConfig(TorchConfig):
    """TorchConfig, for ranks that can be asked to stop."""

    @property
    def backend_cls(self) -> type:
        """What sets the ranks up."""
        return _StoppableBackend


class StopSign:
    """How the driver tells the first rank to stop, wherever that runs: a key of Ray's own key-value store.

    A file in the run folder would be seen late: network file systems remember for up to a minute that there
    was none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._looked_s = -math.inf

    def put_up(self) -> None:
        """Tell the first rank."""
        _internal_kv_put(self.name, b"1", namespace=_NAMESPACE)

    def is_up(self) -> bool:
        """Whether it was told; looks no more often than every ``LOOK_INTERVAL_S``."""
        if time.monotonic() - self._looked_s < LOOK_INTERVAL_S:
            return False
        self._looked_s = time.monotonic()
        return bool(_internal_kv_exists(self.name, namespace=_NAMESPACE))

    def take_down(self) -> None:
        """Leave nothing behind."""
        _internal_kv_del(self.name, namespace=_NAMESPACE)
