"""The server on real sockets: who may ask, what is no request, how many at once, how it ends."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from view_data import TOKEN

from ats_stream.errors import InputError
from ats_stream.viewer import server as module
from ats_stream.viewer.answers import HEADERS, Viewer
from ats_stream.viewer.server import ViewerServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., Viewer]
    Serve = Callable[[Viewer], ViewerServer]


@pytest.fixture
def server(viewer_of: Make, serving: Serve, pyramid_path: Path) -> ViewerServer:
    return serving(viewer_of(pyramid_path))


def ask(server: ViewerServer, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    answer.data = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


def raw(server: ViewerServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_answers_carry_length_tag_and_policy(server: ViewerServer) -> None:
    answer = ask(server, "GET", f"/{TOKEN}/images/0/tiles/0/0/0.jpeg")
    assert (answer.status, answer.getheader("Content-Type")) == (200, "image/jpeg")
    assert int(answer.getheader("Content-Length", "")) == len(answer.data)  # type: ignore[attr-defined]
    for name, value in HEADERS.items():
        assert answer.getheader(name) == value
    assert "'unsafe" not in HEADERS["Content-Security-Policy"]
    tag = answer.getheader("ETag", "")
    again = ask(server, "GET", f"/{TOKEN}/images/0/tiles/0/0/0.jpeg", If_None_Match=tag)
    assert (again.status, again.getheader("ETag"), again.data) == (304, tag, b"")  # type: ignore[attr-defined]
    assert answer.getheader("Server") == "ats-stream"


def test_head_has_no_body(server: ViewerServer) -> None:
    answer = raw(server, f"HEAD /{TOKEN}/ HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X" * 200])
def test_other_methods_are_refused(server: ViewerServer, method: str) -> None:
    answer = ask(server, method, f"/{TOKEN}/images.json")
    assert (answer.status, answer.getheader("Allow")) == (405, "GET, HEAD")
    assert answer.data == b"method not allowed\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_names_of_this_machine_are_served(server: ViewerServer, name: str) -> None:
    answer = ask(server, "GET", f"/{TOKEN}/images.json", Host=name.format(port=server.server_port))
    assert answer.status == 200


@pytest.mark.parametrize(
    "name",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost",
        "localhost:1",
        "127.0.0.2:{port}",
        "",
        ":{port}",
        "a:b:{port}",
    ],
)
def test_other_names_are_refused(server: ViewerServer, name: str) -> None:
    answer = ask(server, "GET", f"/{TOKEN}/images.json", Host=name.format(port=server.server_port))
    assert (answer.status, answer.data) == (403, b"this server is not known by that name\n")  # type: ignore[attr-defined]


def test_no_name_and_two_names_are_refused(server: ViewerServer) -> None:
    host = f"Host: localhost:{server.server_port}\r\n"
    for hosts in ("", 2 * host):
        answer = raw(
            server, f"GET /{TOKEN}/images.json HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode()
        )
        assert answer.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 70000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET <script>alert(1)</script>\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_without_an_echo(
    server: ViewerServer, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = raw(server, data)
    assert b" 200 " not in answer
    assert b"script>" not in answer
    assert b"Error code" not in answer  # the page of http.server repeats the request
    assert ask(server, "GET", f"/{TOKEN}/images.json").status == 200  # and it goes on serving
    assert capfd.readouterr().err == ""


def test_a_body_is_never_taken_for_the_next_request(server: ViewerServer) -> None:
    host = f"Host: localhost:{server.server_port}\r\n"
    inner = f"GET /{TOKEN}/images.json HTTP/1.1\r\n{host}\r\n"
    for header in (f"Content-Length: {len(inner)}", "Transfer-Encoding: chunked"):
        answer = raw(server, f"GET /{TOKEN}/ HTTP/1.1\r\n{host}{header}\r\n\r\n{inner}".encode())
        assert answer.count(b"HTTP/1.1 ") == 1


def test_a_connection_serves_many_requests(server: ViewerServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    sockets = set()
    for _ in range(20):
        connection.request("GET", f"/{TOKEN}/images/0/tiles/0/0/0.jpeg")
        assert connection.getresponse().read()
        sockets.add(connection.sock)
    assert len(sockets) == 1
    connection.close()


def test_many_clients_at_once(server: ViewerServer) -> None:
    paths = [f"/{TOKEN}/images/0/tiles/3/{column}/{row}.png" for column in range(3) for row in range(3)]

    def bodies(_: int) -> list[bytes]:
        return [ask(server, "GET", path).data for path in paths]  # type: ignore[attr-defined]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(bodies, range(8)))
    assert all(one == found[0] for one in found)


def test_connections_are_bounded_and_their_places_come_back(
    viewer_of: Make, serving: Serve, pyramid_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 3)
    server = serving(viewer_of(pyramid_path))
    held = []
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("GET", f"/{TOKEN}/images.json")
        connection.getresponse().read()
        held.append(connection)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as fourth:
        assert fourth.recv(1) == b""  # closed at once
    for connection in held:
        connection.close()
    for _ in held:  # the threads notice in their own time
        assert server._places.acquire(timeout=30)
    for _ in held:
        server._places.release()
    assert ask(server, "GET", f"/{TOKEN}/images.json").status == 200


def test_a_client_that_leaves_is_no_error(server: ViewerServer, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall(f"GET /{TOKEN}/openseadragon.min.js HTTP/1.1\r\nHost: localhost".encode())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # resets
    assert ask(server, "GET", f"/{TOKEN}/images.json").status == 200
    assert capfd.readouterr().err == ""


def test_places_that_cannot_be_had(viewer_of: Make, serving: Serve, pyramid_path: Path) -> None:
    viewer = viewer_of(pyramid_path)
    taken = serving(viewer)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}: "):
            ViewerServer(viewer, host="127.0.0.1", port=port)
    with pytest.raises(InputError, match=r"cannot listen on no\.such\.host\.invalid"):
        ViewerServer(viewer, host="no.such.host.invalid", port=0)
    assert taken.is_loopback


def test_on_the_network_addresses_are_known_and_other_names_are_not(
    viewer_of: Make, pyramid_path: Path
) -> None:
    server = ViewerServer(viewer_of(pyramid_path), host="0.0.0.0", port=0)
    try:
        port = server.server_port
        assert not server.is_loopback
        for name in ("localhost", "192.168.1.7", "[fe80::1]", socket.gethostname()):
            assert server.knows(f"{name}:{port}")
        assert not server.knows(f"evil.example:{port}")
    finally:
        server.server_close()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_and_leaves_nothing(pyramid_path: Path, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "ats_stream.cli", "view", str(pyramid_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()  # type: ignore[union-attr]
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20):  # one client holds on
            process.send_signal(sent)
            out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (out, err) == ("", "ats-stream: stopped\n" if code == 0 else "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=20)
