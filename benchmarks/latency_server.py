"""A loopback HTTP server of a folder that answers byte ranges, each after a delay, like object storage.

    .venv/bin/python benchmarks/latency_server.py FOLDER DELAY_MS    # prints the port it listens on

It counts what it is asked: ``GET /-/counts`` gives requests and bytes of bodies as JSON, without delay and
uncounted. Answering costs little, so that on a machine of few cores the client's work is what is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTS = "/-/counts"
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
MAX_HEAD_BYTES = 64 << 10  # 64 KiB


@contextmanager
def latency_server(folder: Path, delay_ms: float) -> Iterator[str]:
    """Address of a server of the folder, which runs in a process of its own."""
    command = [sys.executable, __file__, str(folder), str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class Folder:
    """Files of a folder by their path in a URL, kept open, and counts of what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.num_requests = self.num_bytes = 0
        self._files: dict[str, tuple[int, int]] = {}

    def find(self, target: str) -> tuple[int, int] | None:
        """Descriptor and size of a file; None when there is none under the folder."""
        if target not in self._files:
            path = (self.root / unquote(target).lstrip("/")).resolve()
            if not path.is_relative_to(self.root) or not path.is_file():
                return None
            self._files[target] = (os.open(path, os.O_RDONLY), path.stat().st_size)
        return self._files[target]

    def close(self) -> None:
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()


def answer(folder: Folder, method: str, target: str, headers: dict[str, str]) -> bytes:
    """The response to one request, counted."""
    folder.num_requests += 1
    if method not in {"GET", "HEAD"}:
        return _response(405, b"", {})
    found = folder.find(target.partition("?")[0])
    if found is None:
        return _response(404, b"", {})
    descriptor, size = found
    common = {"Accept-Ranges": "bytes", "ETag": f'"{size}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    if method == "HEAD":
        return _response(200, b"", common, length=size)
    begin, end = 0, size
    wanted = RANGE.fullmatch(headers.get("range", ""))
    if wanted is not None:
        first, last = wanted.groups()
        begin = int(first) if first else max(0, size - int(last or 0))
        end = min(size, int(last) + 1) if first and last else size
        if begin >= end:
            return _response(416, b"", {"Content-Range": f"bytes */{size}"})
    body = os.pread(descriptor, end - begin, begin)
    folder.num_bytes += len(body)
    if wanted is None:
        return _response(200, body, common)
    return _response(206, body, {**common, "Content-Range": f"bytes {begin}-{end - 1}/{size}"})


def _response(status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} -", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One connection that stays open; requests are answered one after another."""

    def __init__(self, folder: Folder, delay_s: float) -> None:
        self.folder, self.delay_s = folder, delay_s
        self.received = b""
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # of a TCP server

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._next()

    def _next(self) -> None:
        head, separator, rest = self.received.partition(b"\r\n\r\n")
        if self.busy or not separator:
            if len(self.received) > MAX_HEAD_BYTES:
                self.transport.abort()
            return
        self.received = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        if target == COUNTS:
            counts = {"requests": self.folder.num_requests, "bytes": self.folder.num_bytes}
            self.transport.write(_response(200, json.dumps(counts).encode(), {}))
            self._next()
            return
        self.busy = True
        reply = partial(self._reply, method, target, headers)
        asyncio.get_running_loop().call_later(self.delay_s, reply)

    def _reply(self, method: str, target: str, headers: dict[str, str]) -> None:
        self.busy = False
        if not self.transport.is_closing():
            self.transport.write(answer(self.folder, method, target, headers))
            self._next()


async def serve(root: Path, delay_s: float) -> None:
    """Serve until cancelled; print the port."""
    folder = Folder(root)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(folder, delay_s), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    try:
        await server.serve_forever()
    finally:
        folder.close()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]) / 1e3))
