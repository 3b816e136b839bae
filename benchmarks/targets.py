"""What a benchmark is held to: a number of ours, alone or over that of a peer measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound of ``metric`` of ``ours``, over that of ``peer`` if there is one."""

    case: str
    metric: str
    ours: str
    limit: float
    peer: str | None = None
    at_least: bool = True
    """Whether the number must not be smaller than the limit, or not larger."""

    def check(self, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The number that was measured and whether it holds; None where a side is missing."""
        found = {c["name"]: c for one in cases if one["case"] == self.case for c in one["contestants"]}
        mine = found.get(self.ours, {}).get(self.metric)
        theirs = 1.0 if self.peer is None else found.get(self.peer, {}).get(self.metric)
        over = "" if self.peer is None else f" over {self.peer}"
        check: dict[str, Any] = {
            "what": f"{self.case}: {self.metric} of {self.ours}{over}",
            "bound": "at least" if self.at_least else "at most",
            "limit": self.limit,
            "holds": None,
        }
        if mine is None or theirs is None:
            return check
        ratio = mine / theirs
        holds = ratio >= self.limit if self.at_least else ratio <= self.limit
        return {**check, "measured": round(ratio, 4), "holds": holds}


def print_targets(checks: Sequence[dict[str, Any]]) -> None:
    print()
    for check in checks:
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[check["holds"]]
        measured = f"{check['measured']:.3f}" if "measured" in check else "-"
        print(f"{verdict:12} {measured:>8}, {check['bound']} {check['limit']:<5} {check['what']}")
