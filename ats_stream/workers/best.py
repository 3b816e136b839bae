"""Which epoch's model was the best so far, and for how long none has been better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class BestModel:
    """The best score of a validation so far.

    >>> best = BestModel(higher_is_better=True)
    >>> [best.is_better(score, step) for step, score in enumerate([0.5, 0.4, 0.6, 0.6, 0.1])]
    [True, False, True, False, False]
    >>> best.score, best.step, best.is_stale(2), best.is_stale(3), best.is_stale(0)
    (0.6, 2, True, False, False)
    """

    def __init__(self, *, higher_is_better: bool) -> None:
        self._sign = 1.0 if higher_is_better else -1.0
        self.score: float | None = None
        self.step = 0
        self.worse_epochs = 0

    def is_better(self, score: float, step: int) -> bool:
        """Take the score of a step in; whether it is the best. NaN never is."""
        if score == score and (self.score is None or self._sign * score > self._sign * self.score):
            self.score, self.step, self.worse_epochs = score, step, 0
            return True
        self.worse_epochs += 1
        return False

    def is_stale(self, patience: int) -> bool:
        """Whether as many epochs as ``patience`` were no better; never with 0."""
        return 0 < patience <= self.worse_epochs

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"score": self.score, "step": self.step, "worse_epochs": self.worse_epochs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self.score = None if state["score"] is None else float(state["score"])
        self.step, self.worse_epochs = int(state["step"]), int(state["worse_epochs"])
