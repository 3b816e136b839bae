"""The HTTP server of the viewer: Python's own, kept to few connections and to hosts that it knows.

Requests that come with another name in their Host header are refused: a page elsewhere could let its name
point to this machine and read what the viewer shows (DNS rebinding).
"""

from __future__ import annotations

import http.server
import ipaddress
import socket
import sys
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError
from ats_stream.viewer.answers import HEADERS, Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ats_stream.viewer.answers import Viewer

MAX_CONNECTIONS = 64
IDLE_S = 30.0
"""A connection that says nothing for so long is closed."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


class ViewerServer(http.server.ThreadingHTTPServer):
    """Serves one viewer; each connection has a thread, and there are at most ``MAX_CONNECTIONS``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, viewer: Viewer, *, host: str, port: int) -> None:
        """Bind to an address; port 0 takes a free one. InputError when it cannot be had."""
        self.viewer = viewer
        self.host = host
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, address = found[0][0], found[0][4]
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]  # of inet families these are host, port
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"cannot listen on {host}, port {port}: {reason}") from error

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        """Where the page is, with its token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_unspecified:
            host = socket.gethostname()
        return f"http://{host}:{self.server_port}/{self.viewer.token}/"

    def knows(self, host: str) -> bool:
        """Whether a Host header means this server."""
        name, _, port = host.lower().rpartition(":")
        if port != str(self.server_port) or not name:
            name, port = host.lower(), "80"
        if port != str(self.server_port):
            return False
        own = f"[{self.host}]" if ":" in self.host else self.host
        if name in LOOPBACK_NAMES or name == own.lower():
            return True
        # reached over the network: an address cannot be rebound, and the machine's own name is its own
        return not self.is_loopback and (_is_address(name) or name == socket.gethostname().lower())

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, or close it at once when there are too many."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error; anything else is a bug and keeps its traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    # tiles are small: waiting to fill packets costs more than it saves
    disable_nagle_algorithm = True
    wbufsize = -1
    server: ViewerServer

    def do_GET(self) -> None:
        """Answer with a body."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0].strip()):
            answer = Answer(status=403, body=b"this server is not known by that name\n")
        else:
            answer = self._answer()
        self._send(answer)

    do_HEAD = do_GET

    def _answer(self) -> Answer:
        try:
            return self.server.viewer.answer(self.path, known=self.headers.get("If-None-Match", ""))
        except (MemoryError, OSError) as error:
            self.server.viewer.report(f"{type(error).__name__}: {error}")
            return Answer(status=500, body=b"the request failed\n")

    def _send(self, answer: Answer) -> None:
        # a body is never read, so what follows it would be taken for the next request
        if self.headers.get("Content-Length", "0").strip() != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True
        self.send_response(answer.status)
        given = {**HEADERS, **answer.headers, "Cache-Control": answer.cache}
        if answer.status != HTTPStatus.NOT_MODIFIED:
            given |= {"Content-Type": answer.media_type, "Content-Length": str(len(answer.body))}
        if self.close_connection:
            given["Connection"] = "close"
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self.wfile.flush()

    def send_error(self, code: int, *_said: str | None) -> None:
        """Refuse what is no request that is served here, without repeating any of it."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        if not hasattr(self, "headers"):
            self.headers = self.MessageClass()
        headers = {"Allow": "GET, HEAD"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
        self._send(Answer(status=status, body=f"{status.phrase.lower()}\n".encode(), headers=headers))

    def version_string(self) -> str:
        """Who answers, without versions."""
        return "ats-stream"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name of the base class
        """Say nothing of single requests."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def serve(server: ViewerServer, announce: Callable[[], None]) -> None:
    """Announce, and serve until Ctrl-C, which is how it is meant to end; the port is free afterwards."""
    try:
        announce()
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
