"""How far a training is, how fast, and when it will be done: what its progress line shows."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RECENT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A training between two steps; speed and shares are those of the steps before, a few at most."""

    step: int
    """Steps that are done."""
    num_steps: int
    """Steps of the whole run."""
    images_per_s: float
    """Images over all ranks, validation and checkpoints left out."""
    wait_share: float
    """Share of the time in which the first rank waited for items."""
    staleness: float
    """Steps by which the attention that drew was behind."""
    effective_share: float
    """Effective sample size of the draws as a share of the patches."""
    eta_s: float
    """Time to the last step, if all goes on as since the start, validation and checkpoints included."""

    def to_json(self) -> bytes:
        """One object."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Progress:
        """The reverse; ValueError or TypeError for anything else."""
        return cls(**json.loads(data))


class Pace:
    """Makes Progress of what each step adds up to.

    >>> seconds = iter([0.0, 3.0, 4.0])
    >>> pace = Pace(first_step=10, num_steps=20, world_size=2, clock=lambda: next(seconds))
    >>> sums = {"images": 4, "staleness": 8, "effective_share": 3, "wait_s": 0.5, "step_s": 2.0}
    >>> first, second = pace.after(11, sums), pace.after(12, sums)
    >>> first.images_per_s, first.wait_share, first.staleness, first.effective_share, first.eta_s
    (4.0, 0.25, 2.0, 0.75, 27.0)
    >>> second.step, second.eta_s
    (12, 16.0)
    """

    def __init__(
        self,
        *,
        first_step: int,
        num_steps: int,
        world_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_step, self._num_steps, self._world_size = first_step, num_steps, world_size
        self._clock = clock
        self._start_s = clock()
        self._recent: deque[Mapping[str, float]] = deque(maxlen=RECENT_STEPS)

    def after(self, step: int, sums: Mapping[str, float]) -> Progress:
        """The progress after a step, of which the sums over the images of one rank are given."""
        self._recent.append(sums)
        images = self._sum("images")
        step_s = max(self._sum("step_s"), 1e-9)
        per_step_s = (self._clock() - self._start_s) / (step - self._first_step)
        return Progress(
            step=step,
            num_steps=self._num_steps,
            images_per_s=images * self._world_size / step_s,
            wait_share=self._sum("wait_s") / step_s,
            staleness=self._sum("staleness") / max(images, 1.0),
            effective_share=self._sum("effective_share") / max(images, 1.0),
            eta_s=per_step_s * (self._num_steps - step),
        )

    def _sum(self, name: str) -> float:
        return float(sum(sums.get(name, 0.0) for sums in self._recent))
