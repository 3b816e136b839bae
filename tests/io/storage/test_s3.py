"""Pyramids in a server process that speaks S3 (moto), with right and wrong credentials."""

from __future__ import annotations

import http.client
import http.server
import pickle
import socket
import threading
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, open_pyramid, read_batch, verify

SECRET = "a-very-secret-word"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("s3") / "slide.zarr"
    rng = np.random.default_rng(0)
    with PyramidWriter(
        target, level_shapes=[(3, 192, 128), (3, 96, 64)], dtype="uint8", chunk_px=16, shard_px=64
    ) as writer:
        for place in np.ndindex(3, 2):
            writer.write_shard(0, place, rng.integers(1, 255, (3, 64, 64), dtype=np.uint8))
        writer.write_label("tissue", np.eye(96, 64, dtype=np.uint8), downsample=2)
    return target


@pytest.fixture(scope="module")
def options(s3):
    return {**s3.options, "secret_access_key": SECRET}


@pytest.fixture(scope="module")
def endpoint(s3):
    return s3.endpoint


@pytest.fixture(scope="module")
def bucket(s3, folder):
    """The pyramid as objects under two prefixes of a bucket."""
    for name in ("a.zarr", "b.zarr"):
        s3.upload(folder, "slides", f"archive/{name}")
    return "s3://slides/archive"


def test_pyramids_in_a_bucket_are_those_of_the_folder(bucket, folder, options):
    plain = open_pyramid(folder)
    one, other = (open_pyramid(f"{bucket}/{name}.zarr", storage_options=options) for name in "ab")
    for level in plain.levels:
        np.testing.assert_array_equal(one.read(level), plain.read(level))
    np.testing.assert_array_equal(one.label("tissue").read(0), plain.label("tissue").read(0))
    offsets = np.random.default_rng(0).integers(-20, 190, (12, 2))
    got = read_batch([(one, 0, offsets), (other, 0, offsets)], (30, 20), fill=3)
    expected = plain.read_patches(0, offsets, (30, 20), fill=3)
    np.testing.assert_array_equal(got, np.concatenate([expected, expected]))
    assert one.slide == f"{bucket}/a.zarr"


def test_copies_in_threads_and_pickles_read_on(bucket, folder, options):
    pyramid = open_pyramid(f"{bucket}/a.zarr", storage_options=options)
    expected = open_pyramid(folder).read(0)
    copy = pickle.loads(pickle.dumps(pyramid))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda one: one.read(0), [pyramid, copy] * 3):
            np.testing.assert_array_equal(got, expected)


def refused(url, options, says):
    with pytest.raises(SlideError, match=says) as caught:
        open_pyramid(url, storage_options=options)
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)
    assert SECRET not in f"{caught.value!r} {caught.value}"


def test_what_is_not_there_is_named(bucket, options):
    refused("s3://no-such-bucket/a.zarr", options, "the bucket of s3://no-such-bucket/a.zarr does not exist")
    refused(f"{bucket}/none.zarr", options, r"neither zarr\.json nor \.zattrs")


def test_wrong_credentials_are_told_without_showing_them(bucket, endpoint, options):
    url = f"{endpoint}/moto-api/reset-auth"

    def check_credentials_after(num_requests):
        request = urllib.request.Request(url, data=str(num_requests).encode(), method="POST")
        request.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(request).close()

    check_credentials_after(0)
    try:
        refused(
            f"{bucket}/a.zarr", options, r"access to zarr\.json is denied: the server answered 403 Forbidden"
        )
    finally:
        check_credentials_after(10**9)
    assert open_pyramid(f"{bucket}/a.zarr", storage_options=options).read(1).shape == (3, 96, 64)


class Between:
    """A server in front of the one that speaks S3, which passes on all but what ``fault`` spoils."""

    def __init__(self, endpoint):
        behind = urllib.parse.urlsplit(endpoint)
        self.requests, self.fault, self._lock = [], lambda path, count: None, threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                with outer._lock:
                    outer.requests.append(self.path)
                    fault = outer.fault(self.path, outer.requests.count(self.path))
                if fault == "busy":
                    self.answer(503, b"<Error><Code>SlowDown</Code><Message>hush</Message></Error>", {})
                    return
                connection = http.client.HTTPConnection(behind.hostname, behind.port, timeout=30)
                connection.request(self.command, self.path, headers=dict(self.headers))
                response = connection.getresponse()
                body = response.read()
                kept = {k: v for k, v in response.getheaders() if k.lower() in KEPT_HEADERS}
                self.answer(response.status, body, kept, is_cut=fault == "cut")
                connection.close()

            do_HEAD = do_GET

            def answer(self, status, body, headers, is_cut=False):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if is_cut else body)
                if is_cut:
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


KEPT_HEADERS = {"content-range", "etag", "last-modified", "content-type", "accept-ranges"}


@pytest.fixture
def between(endpoint):
    one = Between(endpoint)
    yield one
    one.close()


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_storms_and_cut_connections_are_waited_out(bucket, folder, options, between, fault):
    plain, offsets = open_pyramid(folder), np.random.default_rng(0).integers(-20, 190, (6, 2))
    # the first two answers for every object are spoilt
    between.fault = lambda path, count: fault if count <= 2 else None
    pyramid = open_pyramid(f"{bucket}/a.zarr", storage_options={**options, "endpoint": between.url})
    np.testing.assert_array_equal(
        pyramid.read_patches(0, offsets, (30, 20)), plain.read_patches(0, offsets, (30, 20))
    )
    np.testing.assert_array_equal(pyramid.read(0), plain.read(0))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("busy", r"the server answered 503 Service Unavailable \(SlowDown\) \(3 tries\)"),
        ("cut", r"the connection broke \(3 tries\)"),
    ],
)
def test_a_storm_that_does_not_end_is_one_line(bucket, options, between, fault, says):
    pyramid = open_pyramid(f"{bucket}/a.zarr", storage_options={**options, "endpoint": between.url})
    between.fault = lambda path, count: fault if "/c/" in path else None
    with pytest.raises(SlideError, match=rf"^{bucket}/a\.zarr: level 0: cannot read .*: {says}$") as caught:
        pyramid.read(0)
    assert SECRET not in f"{caught.value!r}"
    assert "hush" not in f"{caught.value!r}"
    between.fault = lambda path, count: fault if path.endswith("zarr.json") else None
    with pytest.raises(SlideError, match=rf"^{bucket}/a\.zarr: cannot read zarr\.json: {says}$"):
        open_pyramid(f"{bucket}/a.zarr", storage_options={**options, "endpoint": between.url})


def test_a_private_bucket_without_credentials(bucket, options):
    public = {k: v for k, v in options.items() if "key" not in k} | {"skip_signature": True}
    refused(f"{bucket}/a.zarr", public, r"access to zarr\.json is denied: the server answered 403 Forbidden")


def test_pyramids_in_a_bucket_are_verified(bucket, folder, options):
    import obstore
    from obstore.store import S3Store

    report = verify(f"{bucket}/b.zarr", storage_options=options, source=folder)
    assert [finding.key for finding in report.findings] == ["1"]  # of which nothing was written
    assert report.num_objects == sum(path.is_file() for path in folder.rglob("*"))
    assert report.num_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    config = {k: v for k, v in options.items() if k not in {"timeout_s", "max_retries"}}
    store = S3Store("slides", config=config, client_options={"allow_http": True})
    data = bytearray((folder / "0/c/0/1/1").read_bytes())
    data[-1] ^= 1
    obstore.put(store, "archive/b.zarr/0/c/0/1/1", bytes(data))
    obstore.put(store, "archive/b.zarr/0/c/0/9/9", b"x")
    report = verify(f"{bucket}/b.zarr", storage_options=options)
    first, second = report.findings
    assert str(first).startswith("0/c/0/1/1: shard index is damaged: crc32c ")
    assert str(second) == "0/c/0/9/9: lies in the array 0, but is no part of it"
