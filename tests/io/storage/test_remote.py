"""Pyramids behind a web server that is slow, busy, broken, or not there."""

from __future__ import annotations

import base64
import pickle
import socket

import numpy as np
import pytest

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, open_pyramid
from ats_stream.io.storage.remote import ObjectStore, shown

FAST = {"timeout_s": 5, "max_retries": 3}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Retries come at once."""
    monkeypatch.setattr("ats_stream.io.storage.retry.RetryPolicy.delay_s", lambda self, attempt, share: 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    rng = np.random.default_rng(0)
    with PyramidWriter(
        root / "a slide.zarr",
        level_shapes=[(3, 128, 128), (3, 64, 64)],
        dtype="uint8",
        chunk_px=16,
        shard_px=64,
        metadata={"vendor": "x"},
    ) as writer:
        for place in np.ndindex(2, 2):
            writer.write_shard(0, place, rng.integers(1, 255, (3, 64, 64), dtype=np.uint8))
        writer.write_label("tissue", np.eye(64, dtype=np.uint8), downsample=2)
    return root


def read_all(pyramid):
    return [pyramid.read(level) for level in pyramid.levels]


def test_everything_is_as_in_the_folder(folder, serve):
    server = serve(folder)
    pyramid, plain = open_pyramid(f"{server.url}/a slide.zarr/"), open_pyramid(folder / "a slide.zarr")
    for got, expected in zip(read_all(pyramid), read_all(plain), strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(pyramid.label("tissue").read(0), plain.label("tissue").read(0))
    assert (pyramid.name, pyramid.metadata) == (plain.name, plain.metadata)
    assert pyramid.slide == f"{server.url}/a slide.zarr"
    copy = pickle.loads(pickle.dumps(pyramid))
    np.testing.assert_array_equal(copy.read(0), plain.read(0))


@pytest.mark.parametrize("fault", [503, 500, 429, "cut", "short"])
def test_what_passes_is_waited_for(folder, serve, fault):
    server = serve(folder)
    plain = read_all(open_pyramid(folder / "a slide.zarr"))
    # the first two answers to every request are wrong
    server.fault = lambda path, count: fault if count <= 2 and (fault != "short" or "/c/" in path) else None
    got = read_all(open_pyramid(f"{server.url}/a slide.zarr", storage_options=FAST))
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (503, r"cannot read c/0/0/0: the server answered 503 Service Unavailable \(Told\) \(4 tries\)"),
        ("cut", r"cannot read c/0/0/0: the connection broke \(4 tries\)"),
        ("short", r"cannot read c/0/0/0: the server gave other bytes than it was asked for \(4 tries\)"),
        ("plain", "the server does not give ranges of bytes of c/0/0/0"),
        (403, r"access to c/0/0/0 is denied: the server answered 403 Forbidden \(Told\)"),
        (401, r"access to c/0/0/0 is denied: the server answered 401 Unauthorized"),
        (400, r"cannot read c/0/0/0: the server answered 400 Bad Request"),
    ],
)
def test_what_does_not_pass_is_one_line(folder, serve, fault, says):
    server = serve(folder)
    pyramid = open_pyramid(f"{server.url}/a slide.zarr", storage_options=FAST)
    server.fault = lambda path, count: fault if path.endswith("0/c/0/0/0") else None
    with pytest.raises(SlideError, match=f"a slide.zarr: level 0: .*{says}") as caught:
        pyramid.read_patches(0, [[0, 0]], (8, 8))
    assert "\n" not in str(caught.value)
    server.fault = lambda path, count: None
    assert pyramid.read_patches(0, [[0, 0]], (8, 8)).all()


@pytest.mark.parametrize("key", ["zarr.json", "0/zarr.json"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (503, r"503 Service Unavailable \(Told\) \(4 tries\)"),
        (403, "is denied"),
        ("hang", r"no answer in 0\.2 s"),
    ],
)
def test_opening_tells_what_is_wrong(folder, serve, key, fault, says):
    server = serve(folder)
    server.fault = lambda path, count: fault if path == f"/a%20slide.zarr/{key}" else None
    options = {"timeout_s": 0.2 if fault == "hang" else 5, "max_retries": 0 if fault == "hang" else 3}
    with pytest.raises(SlideError, match=rf"^http://127\.0\.0\.1:\d+/a slide\.zarr: .*{says}") as caught:
        open_pyramid(f"{server.url}/a slide.zarr", storage_options=options)
    assert "\n" not in str(caught.value)


def test_nothing_there_and_nobody_listening(folder, serve):
    server = serve(folder)
    with pytest.raises(SlideError, match=r"neither zarr\.json nor \.zattrs"):
        open_pyramid(f"{server.url}/none.zarr")
    with pytest.raises(SlideError, match=r"none\.zip: none\.zip does not exist"):
        open_pyramid(f"{server.url}/none.zip")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.zarr"
        with pytest.raises(SlideError, match=rf"^{url}: cannot read zarr\.json: cannot connect \(2 tries\)$"):
            open_pyramid(url, storage_options={"timeout_s": 2, "max_retries": 1})


def test_a_missing_shard_is_fill_and_a_broken_one_is_an_error(folder, serve):
    server = serve(folder)
    pyramid = open_pyramid(f"{server.url}/a slide.zarr")
    server.fault = lambda path, count: 404 if path.endswith("0/c/0/1/1") else None
    level = pyramid.read(0)
    assert not level[:, 64:, 64:].any()
    assert level[:, :64].all()


def test_metadata_of_many_bytes_are_refused_before_they_are_read(folder, serve, monkeypatch):
    server = serve(folder)
    monkeypatch.setattr("ats_stream.io.storage.documents.MAX_JSON_BYTES", 50)
    with pytest.raises(SlideError, match=r"zarr\.json has \d+ bytes, at most 50 are read"):
        open_pyramid(f"{server.url}/a slide.zarr")


def test_credentials_in_a_url_are_used_and_never_shown(folder, serve):
    server = serve(folder)
    url = server.url.replace("//", "//me:pass%20word@") + "/a slide.zarr"
    pyramid = open_pyramid(url)
    assert pyramid.slide == f"{server.url}/a slide.zarr"
    seen = [repr(pyramid), repr(pyramid._reader.sources[0].store), pyramid.slide]
    server.fault = lambda path, count: 400
    for action in (lambda: pyramid.read(0), lambda: open_pyramid(url)):
        with pytest.raises(SlideError) as caught:
            action()
        seen += [str(caught.value), repr(caught.value)]
    assert not any("word" in text or "me:" in text for text in seen)
    expected = "Basic " + base64.b64encode(b"me:pass word").decode()
    assert server.headers["authorization"] == expected


def test_options_are_carried_and_never_shown():
    options = {"secret_access_key": "verysecret", "access_key_id": "AKIAVERY", "region": "us-east-1"}
    store = ObjectStore("s3://bucket/a.zarr", {**options, "timeout_s": 3, "max_retries": 1})
    assert "VERY" not in repr(store).upper()
    copy = pickle.loads(pickle.dumps(store))
    assert copy.identity == store.identity
    assert (copy.timeout_s, copy.policy.max_retries) == (3, 1)
    assert copy.identity != ObjectStore("s3://bucket/a.zarr", options | {"region": "eu"}).identity
    assert copy.place("0/zarr.json") == "s3://bucket/a.zarr/0/zarr.json"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a:b@host/x/?q=1#f", "https://host/x"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("http://[", "http://["),
        ("http://me:word@[/x?sig=1", "[/x"),
    ],
)
def test_urls_are_shown_without_secrets(url, expected):
    assert shown(url) == expected


@pytest.mark.parametrize("url", ["gs://bucket/a.zarr", "az://container/a.zarr", "abfs://container/a.zarr"])
def test_other_clouds_are_reached_through_their_options(url):
    options = {} if url.startswith("gs") else {"account_name": "devstore", "skip_signature": True}
    assert ObjectStore(url, options).place("") == url
