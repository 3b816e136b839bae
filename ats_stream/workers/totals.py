"""What an epoch adds up to, over its steps and over the ranks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ats_stream.workers.ranks import Ranks


class Totals:
    """Sums over the steps of an epoch, and the means that are shown."""

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._sums = dict(before or {})
        self._start_s = time.perf_counter() - self._sums.pop("seconds", 0.0)

    def add(self, sums: dict[str, float]) -> None:
        """Add the sums of one step."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def over(self, ranks: Ranks) -> dict[str, float]:
        """The sums over all ranks, which all ask for together, and the seconds since the epoch began."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        values = ranks.total(torch.tensor([self._sums[name] for name in names], dtype=torch.float64))
        sums: dict[str, float] = dict(zip(names, values.tolist(), strict=True))
        return {**sums, "seconds": time.perf_counter() - self._start_s}

    def numbers(self, ranks: Ranks) -> dict[str, float]:
        """Means per image over all ranks, with the time and the share of it spent waiting for items."""
        total = self.over(ranks)
        seconds = total.pop("seconds")
        images, wait_s, step_s = total.pop("images"), total.pop("wait_s"), total.pop("step_s")
        bad = {"bad_visits": total.pop("bad_visits")} if "bad_visits" in total else {}
        means = {name: value / max(images, 1.0) for name, value in total.items()}
        speed = {**bad, "seconds": seconds, "images_per_s": images / seconds, "wait_share": wait_s / step_s}
        return {**means, **speed}
