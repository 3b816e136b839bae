"""What the viewer answers to a request: a function of the method, the target and a few headers, no sockets.

Images are known by number, so no path ever stands in a URL, and no answer names one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import numpy as np

from ats_stream.errors import AtsStreamError
from ats_stream.files import sha256_of
from ats_stream.io.views import ViewCache
from ats_stream.viewer.describe import describe_image, describe_patches
from ats_stream.viewer.image import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ats_stream.viewer.targets import Shown, Targets
    from ats_stream.viewer.tiles import Resolution

TILE_CACHE_BYTES = 128 << 20  # 128 MiB of encoded tiles
MAX_READING = 4
"""Tiles that are read at once; others wait."""
MAX_QUERY = 4096
STATIC = {
    "index.html": "text/html; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    "openseadragon.min.js": "text/javascript; charset=utf-8",
    **dict.fromkeys(
        ("main.js", "source.js", "boxes.js", "scale.js", "panel.js"), "text/javascript; charset=utf-8"
    ),
}
# what the page may load: nothing but what this server gives; of styles inside of it the empty one alone
_EMPTY = base64.b64encode(hashlib.sha256().digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' 'sha256-{_EMPTY}'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
TILE_AGE_S = 3600
_NUMBER = r"(0|[1-9]\d{0,6})"
_ROUTES = {
    "images": re.compile(r"images\.json"),
    "info": re.compile(rf"images/{_NUMBER}/info\.json"),
    "patches": re.compile(rf"images/{_NUMBER}/patches\.json"),
    "tile": re.compile(rf"images/{_NUMBER}/tiles/{_NUMBER}/{_NUMBER}/{_NUMBER}\.({'|'.join(FORMATS)})"),
    "overlay": re.compile(rf"images/{_NUMBER}/overlays/{_NUMBER}/{_NUMBER}/{_NUMBER}/{_NUMBER}\.png"),
    "static": re.compile(r"([a-z.]{0,40})"),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Status, headers and body of an answer."""

    status: int
    body: bytes = b""
    media_type: str = "text/plain; charset=utf-8"
    cache: str = "no-store"
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    """A request that gets another answer than what it asked for."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.answer = Answer(status=status, body=f"{reason}\n".encode())


class Viewer:
    """Answers for the images of ``targets`` under one secret path. Safe between threads."""

    def __init__(
        self,
        targets: Targets,
        *,
        token: str,
        tell: Callable[[str], None],
        tile_format: str = "jpeg",
        cache_bytes: int = TILE_CACHE_BYTES,
    ) -> None:
        """``token`` begins every path; ``tell`` gets a line for each failure; ``cache_bytes`` bounds the
        cache of encoded tiles.
        """
        self.targets, self.token, self.tile_format = targets, token, tile_format
        self.report, self._cache_bytes = tell, cache_bytes
        self.cache = ViewCache()
        self._reading = threading.BoundedSemaphore(MAX_READING)

    def answer(self, target: str, *, known: str = "") -> Answer:
        """The answer to GET of ``target``, path and query; ``known`` are the entity tags the client has."""
        try:
            found = self._find(target)
        except RefusedError as refused:
            return refused.answer
        except AtsStreamError as error:
            self.report(str(error))
            return Answer(status=500, body=b"the image cannot be read\n")
        if found.status != 200:
            return found
        tag = f'"{sha256_of(found.body)[:32]}"'
        headers = {**found.headers, "ETag": tag}
        same = known.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in known.split(",")]
        if same:
            return Answer(status=304, cache=found.cache, media_type=found.media_type, headers=headers)
        return Answer(
            status=200, body=found.body, media_type=found.media_type, cache=found.cache, headers=headers
        )

    def _find(self, target: str) -> Answer:
        path, _, query = target.partition("?")
        token, slash, inside = path.removeprefix("/").partition("/")
        # bytes: compare_digest takes no other text than ASCII
        if not hmac.compare_digest(token.encode(errors="replace"), self.token.encode()):
            raise RefusedError(404, "not found; open the address that ats-stream view printed")
        if not slash:
            return Answer(status=308, headers={"Location": f"/{self.token}/"})
        for kind, route in _ROUTES.items():
            match = route.fullmatch(inside)
            if match is not None:
                make: Callable[..., Answer] = getattr(self, f"_{kind}")
                return make(_options(query), *match.groups())
        raise RefusedError(404, "not found")

    def _static(self, _query: dict[str, str], name: str) -> Answer:
        name = name or "index.html"
        if name not in STATIC:
            raise RefusedError(404, "not found")
        return Answer(status=200, body=self._files[name], media_type=STATIC[name], cache="no-cache")

    @cached_property
    def _files(self) -> dict[str, bytes]:
        folder = resources.files("ats_stream.viewer") / "static"
        return {name: (folder / name).read_bytes() for name in STATIC}

    def _images(self, _query: dict[str, str]) -> Answer:
        return _json([{"name": name} for name in self.targets.names])

    def _info(self, _query: dict[str, str], number: str) -> Answer:
        return _json(describe_image(self._shown(number), tile_format=self.tile_format))

    def _patches(self, _query: dict[str, str], number: str) -> Answer:
        return _json(describe_patches(self._shown(number).patches))

    def _tile(
        self, query: dict[str, str], number: str, level: str, column: str, row: str, encoding: str
    ) -> Answer:
        shown = self._shown(number)
        image = shown.image
        resolution = _resolution(image.resolutions, level)
        channels = _numbers(query, "c", None) or image.display.shown
        _check_channels(channels, image.pyramid.levels[0].shape[0], is_colour=image.display.is_colour)
        at = _numbers(query, "at", len(image.other_axes)) or image.middle
        for value, (name, length) in zip(at, image.other_axes, strict=True):
            if value >= length:
                raise RefusedError(404, f"{name} {value} is outside the image, there are {length}")
        where = (int(column), int(row))

        def make() -> bytes | None:
            return image.tile(resolution, *where, channels=channels, at=at, encoding=encoding)

        key = (number, "tile", level, *where, channels, at, encoding)
        return self._cached(key, make, FORMATS[encoding])

    def _overlay(
        self, _query: dict[str, str], number: str, which: str, level: str, column: str, row: str
    ) -> Answer:
        overlays = self._shown(number).overlays
        if int(which) >= len(overlays):
            raise RefusedError(404, f"no overlay {which}, there are {len(overlays)}")
        overlay = overlays[int(which)]
        resolution = _resolution(overlay.image.resolutions, level)
        where = (int(column), int(row))
        key = (number, "overlay", which, level, *where)
        return self._cached(key, lambda: overlay.tile(resolution, *where), FORMATS["png"])

    def _shown(self, number: str) -> Shown:
        try:
            return self.targets.get(int(number))
        except IndexError:
            raise RefusedError(404, f"no image {number}, there are {len(self.targets)}") from None

    def _cached(self, key: tuple[Any, ...], make: Callable[[], bytes | None], media_type: str) -> Answer:
        def read() -> np.ndarray[Any, np.dtype[np.uint8]]:
            with self._reading:
                made = make()
            if made is None:
                raise RefusedError(404, "the tile lies outside the image")
            return np.frombuffer(made, np.uint8)

        body = self.cache.get(key, None, read, max_bytes=self._cache_bytes)
        cache = f"private, max-age={TILE_AGE_S}"
        return Answer(status=200, body=body.tobytes(), media_type=media_type, cache=cache)


def _options(query: str) -> dict[str, str]:
    """The options of a query, each at most once."""
    if len(query) > MAX_QUERY:
        raise RefusedError(414, "the query is too long")
    try:
        given = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=4)
    except ValueError:
        raise RefusedError(400, "the query cannot be understood") from None
    if any(len(values) > 1 for values in given.values()) or not given.keys() <= {"c", "at"}:
        raise RefusedError(400, "the query takes c and at, each once")
    return {name: values[0] for name, values in given.items()}


def _numbers(query: Mapping[str, str], name: str, count: int | None) -> tuple[int, ...] | None:
    """The numbers of an option, None if it is not given."""
    if name not in query:
        return None
    words = query[name].split(",")
    if not all(re.fullmatch(_NUMBER, word) for word in words) or (count is not None and len(words) != count):
        many = "numbers" if count is None else f"{count} numbers"
        raise RefusedError(400, f"{name} takes {many} with commas between them")
    return tuple(int(word) for word in words)


def _check_channels(chosen: tuple[int, ...], num_channels: int, *, is_colour: bool) -> None:
    if max(chosen) >= num_channels:
        raise RefusedError(404, f"no channel {max(chosen)}, there are {num_channels}")
    if len(set(chosen)) != len(chosen) or (is_colour and chosen != (0, 1, 2)):
        raise RefusedError(400, "c takes each channel at most once, and all three of a colour image")


def _resolution(resolutions: tuple[Resolution, ...], number: str) -> Resolution:
    if int(number) >= len(resolutions):
        raise RefusedError(404, f"no resolution {number}, there are {len(resolutions)}")
    return resolutions[int(number)]


def _json(value: Any) -> Answer:
    return Answer(
        status=200,
        body=json.dumps(value, allow_nan=False).encode(),
        media_type="application/json",
        cache="no-store",
    )
