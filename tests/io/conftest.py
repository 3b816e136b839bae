"""What the tests of io share: validators, a store made by zarr-python, seeded pictures."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))  # makes the helpers beside the tests importable


@pytest.fixture
def assert_valid() -> Callable[[Path], None]:
    """Run both validators of OME-Zarr 0.5: each finds violations that the other misses."""
    import yaozarrs
    import zarr
    from ome_zarr_models.v05 import Image

    def check(target: Path) -> None:
        yaozarrs.validate_zarr_store(str(target))
        Image.from_zarr(zarr.open_group(str(target), mode="r"))

    return check


@pytest.fixture(scope="session")
def picture() -> Callable[..., NDArray[Any]]:
    """Seeded pictures (C, y, x): smooth fields with some noise, so that they compress like photographs."""

    def make(shape: tuple[int, int, int], dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        channels, height, width = shape
        y = np.sin(np.linspace(0, 9, height))[None, :, None]
        x = np.cos(np.linspace(0, 7, width))[None, None, :]
        field = (y + x + np.arange(channels)[:, None, None]) % 2 / 2 + rng.normal(0, 0.02, shape)
        kind = np.dtype(dtype)
        if kind.kind == "f":
            return field.astype(kind)
        limits = np.iinfo(kind)
        return np.clip(field * limits.max, limits.min, limits.max).astype(kind)

    return make


class RangeServer:
    """A loopback HTTP server of a folder that answers byte ranges, and misbehaves when told to.

    ``fault(path, count)`` is asked before each answer, with the number of requests for this path so far; it
    gives None, a status, "cut" (the connection breaks in the middle of the body), "hang" (no answer until the
    server closes), "plain" (ranges are not understood) or "short" (the end of the range is left out).
    """

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, []
        self.fault: Callable[[str, int], str | int | None] = lambda path, count: None
        self.headers: dict[str, str] = {}
        self.states_tags = False
        self.closing = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def count(self, path: str) -> int:
        return sum(one == path for one, _ in self.requests)

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path, asked = handler.path, handler.headers.get("Range")
        with self._lock:
            self.requests.append((path, asked))
            self.headers = {k.lower(): v for k, v in handler.headers.items()}
            fault = self.fault(path, self.count(path))
        if fault == "hang":
            self.closing.wait()
            handler.close_connection = True
            return
        if isinstance(fault, int):
            self._send(handler, fault, b"<Error><Code>Told</Code></Error>", {})
            return
        file = self.root / urllib.parse.unquote(path).lstrip("/")
        if not file.is_file():
            self._send(handler, 404, b"", {})
            return
        size, status, headers = file.stat().st_size, 200, {}
        if self.states_tags:
            headers["ETag"] = f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'
        begin, end = 0, size
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
        if match is not None and fault != "plain":
            first, last = match.groups()
            begin = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            end -= fault == "short"
            if begin >= end:
                self._send(handler, 416, b"", {})
                return
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        with file.open("rb") as opened:
            opened.seek(begin)
            data = opened.read(end - begin)
        self._send(handler, status, data, headers, is_cut=fault == "cut")

    def _send(
        self, handler: Any, status: int, body: bytes, headers: dict[str, str], is_cut: bool = False
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        handler.wfile.write(body[: len(body) // 2] if is_cut else body)
        if is_cut:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], RangeServer]]:
    """Start servers of folders; they end with the test."""
    servers: list[RangeServer] = []

    def start(root: Path) -> RangeServer:
        servers.append(RangeServer(root))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
