"""What a verification found, as lines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is not as it must be; prints as one line."""

    key: str
    """The object, or the folder of the level, inside the store."""
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {' '.join(self.reason.split())}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was looked at and what was found; prints as one line."""

    target: str
    findings: tuple[Finding, ...]
    num_objects: int
    num_bytes: int
    """Bytes of the objects, whether or not all were read."""
    num_levels: int
    """Levels of all images in the store, labels included."""
    has_manifest: bool
    is_quick: bool
    notes: tuple[str, ...]
    """What could not be looked at, and why."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        what = (
            "ok" if self.ok else f"{len(self.findings)} findings" if len(self.findings) > 1 else "1 finding"
        )
        against = "sizes of the manifest" if self.is_quick else "manifest"
        looked = "no manifest" if not self.has_manifest else against
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.target}: {what} ({self.num_objects} objects, {self.num_bytes / 1e6:.1f} MB, "
            f"{self.num_levels} levels, {looked}, {self.seconds:.1f} s{notes})"
        )
