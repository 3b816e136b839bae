"""The images that a viewer shows, by number: opened when they are looked at, the last few kept open."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ats_stream.errors import AtsStreamError
from ats_stream.viewer.image import TiledImage
from ats_stream.viewer.overlays import attention_overlays, mask_overlays
from ats_stream.viewer.patches import read_patches
from ats_stream.viewer.predictions import Prediction, stem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ats_stream.io import Pyramid
    from ats_stream.viewer.overlays import Overlay
    from ats_stream.viewer.patches import Patch

MAX_OPEN = 8


@dataclass(frozen=True, kw_only=True)
class Target:
    """An image to show, and what is known about it."""

    place: str
    """Path or URL; never sent to the page."""
    attention: Path | None = None
    patches: Path | None = None
    facts: Mapping[str, str] | None = None

    @classmethod
    def of(cls, place: str, prediction: Prediction | None = None) -> Target:
        """A target with what a prediction has for it."""
        found = prediction or Prediction()
        return cls(place=place, attention=found.attention, patches=found.patches, facts=found.facts)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A target that was opened."""

    name: str
    image: TiledImage
    overlays: tuple[Overlay, ...]
    patches: tuple[Patch, ...]
    facts: Mapping[str, str]
    problems: tuple[str, ...]
    """What of it cannot be shown, in words for the page: they name no file."""


class Targets:
    """All images of a viewer. Safe between threads."""

    def __init__(
        self,
        targets: Sequence[Target],
        open_image: Callable[[str], Pyramid],
        *,
        tell: Callable[[str], None],
        max_open: int = MAX_OPEN,
    ) -> None:
        """``tell`` gets a line for what cannot be shown; ``max_open`` images are kept open."""
        self._targets, self._open_image, self._tell = tuple(targets), open_image, tell
        self.names = names_of([target.place for target in targets])
        self.max_open = max_open
        self._open: OrderedDict[int, Shown] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in targets]

    def __len__(self) -> int:
        return len(self._targets)

    def get(self, number: int) -> Shown:
        """The opened image; IndexError for a number that there is none of, AtsStreamError if it is broken."""
        if not 0 <= number < len(self._targets):
            raise IndexError(number)
        with self._opening[number]:
            with self._lock:
                found = self._open.get(number)
                if found is not None:
                    self._open.move_to_end(number)
                    return found
            shown = self._opened(number)
            with self._lock:
                self._open[number] = shown
                while len(self._open) > self.max_open:
                    self._open.popitem(last=False)
            return shown

    def _opened(self, number: int) -> Shown:
        target = self._targets[number]
        pyramid = self._open_image(target.place)
        problems: list[str] = []

        def attempt(what: str, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except (AtsStreamError, ValueError) as error:
                self._tell(f"{what} of {pyramid.slide}: {error}")
                problems.append(f"{what} cannot be shown")
                return ()

        overlays: list[Overlay] = []
        if target.attention is not None:
            place = str(target.attention)
            overlays += attempt("attention", lambda: attention_overlays(place, pyramid))
        overlays += attempt("masks", lambda: mask_overlays(pyramid))
        patches: tuple[Patch, ...] = ()
        if target.patches is not None:
            path = target.patches
            patches = attempt("patches", lambda: read_patches(path))
        return Shown(
            name=self.names[number],
            image=TiledImage(pyramid),
            overlays=tuple(overlays),
            patches=patches,
            facts=target.facts or {},
            problems=tuple(problems),
        )


def names_of(places: Sequence[str]) -> tuple[str, ...]:
    """A name for each image: that of its file, with its number where several are called alike.

    >>> names_of(["a/x.svs", "b/x.svs", "y.ome.zarr"])
    ('x (1)', 'x (2)', 'y')
    """
    stems = [stem(place) for place in places]
    often = Counter(stems)
    return tuple(s if often[s] == 1 else f"{s} ({i})" for i, s in enumerate(stems, start=1))
