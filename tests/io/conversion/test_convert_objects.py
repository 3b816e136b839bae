"""Conversions into an object store (moto) and from one: resumed, with connections that break."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile

from ats_stream.errors import InputError, StorageError
from ats_stream.io import ConvertConfig, convert, open_pyramid, preprocess, target_path, verify, write_pyramid
from ats_stream.io.conversion.inputs import expand_inputs
from ats_stream.io.conversion.manifest import read_manifest
from ats_stream.io.conversion.object_target import ObjectTarget

CONFIG = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64, num_threads=1)


@pytest.fixture(scope="module")
def slide(tmp_path_factory, picture):
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    image = picture((3, 500, 600)).transpose(1, 2, 0)
    tifffile.imwrite(path, image, tile=(64, 64), compression="zlib", photometric="rgb")
    return path


@pytest.fixture(scope="module")
def whole(slide, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "a.zarr"
    convert(slide, target, CONFIG)
    return {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    """The URL of a bucket that is there."""
    folder = tmp_path_factory.mktemp("upload")
    (folder / "note.txt").write_text("x")
    return s3.upload(folder, "converted", "other").rpartition("/")[0]


def objects(url, options):
    """Every object of a pyramid in the store."""
    target = ObjectTarget(url, options)
    return {key: target.store.get(key, 1 << 30) for key in target.sizes()}


def test_objects_are_the_files(slide, whole, s3, bucket):
    url = f"{bucket}/a.zarr"
    convert(slide, url, CONFIG, target_options=s3.options)
    assert objects(url, s3.options) == whole
    assert read_manifest(url, storage_options=s3.options).is_complete
    report = verify(url, source=slide, storage_options=s3.options)
    assert report.findings == ()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(slide, url, CONFIG, target_options=s3.options)
    again = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64, num_threads=1, overwrite=True)
    convert(slide, url, again, target_options=s3.options)
    assert objects(url, s3.options) == whole


def test_a_second_run_with_another_plan_makes_the_first_one_fail(slide, s3, bucket, monkeypatch):
    url = f"{bucket}/two.zarr"
    other = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64, num_threads=1, codec_level=5)
    put, num_put = ObjectTarget.put, []

    def put_and_meet(self, key, parts):
        num_put.append(key)
        if len(num_put) == 9:
            monkeypatch.undo()
            convert(slide, url, other, target_options=s3.options)
        put(self, key, parts)

    monkeypatch.setattr(ObjectTarget, "put", put_and_meet)
    with pytest.raises(
        StorageError, match=r"two\.zarr: another run has begun to write here with another plan"
    ):
        convert(slide, url, CONFIG, target_options=s3.options)
    with pytest.raises(ValueError, match=r"neither zarr\.json nor"):
        open_pyramid(url, storage_options=s3.options)


def test_an_unfinished_prefix_is_no_pyramid_and_is_gone_on_from(slide, whole, s3, bucket, monkeypatch):
    url = f"{bucket}/b.zarr"
    put, num_put = ObjectTarget.put, []

    def failing(self, key, parts):
        num_put.append(key)
        if len(num_put) == 17:
            raise StorageError("no more")
        put(self, key, parts)

    monkeypatch.setattr(ObjectTarget, "put", failing)
    with pytest.raises(StorageError, match="no more"):
        convert(slide, url, CONFIG, target_options=s3.options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"neither zarr\.json nor"):
        open_pyramid(url, storage_options=s3.options)
    assert convert(slide, url, CONFIG, target_options=s3.options).num_resumed == 16
    assert objects(url, s3.options) == whole


class Breaking:
    """A proxy that cuts connections: each third before a request arrives, of others each seventh answer."""

    def __init__(self, port):
        self.port, self.num_requests, self.num_cut = port, 0, 0
        self.lock = threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.relay, args=(client,), daemon=True).start()

    def relay(self, client):
        with self.lock:
            self.num_requests += 1
            number = self.num_requests
        with client, socket.create_connection(("127.0.0.1", self.port)) as server:
            if number % 3 == 0:
                self.cut()
                return
            done = threading.Thread(target=self.copy, args=(client, server), daemon=True)
            done.start()
            self.copy(server, client, 100 if number % 7 == 0 else None)

    def cut(self):
        with self.lock:
            self.num_cut += 1

    def copy(self, source, sink, limit=None):
        try:
            while data := source.recv(1 << 16):
                if limit is not None and len(data) > limit:
                    sink.sendall(data[:limit])
                    self.cut()
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def test_connections_that_break_are_tried_again(slide, whole, s3, bucket):
    proxy = Breaking(int(s3.endpoint.rpartition(":")[2]))
    options = {
        **s3.options,
        "endpoint": f"http://127.0.0.1:{proxy.server.getsockname()[1]}",
        "max_retries": 9,
    }
    url = f"{bucket}/c.zarr"
    try:
        convert(slide, url, CONFIG, target_options=options)
    finally:
        proxy.server.close()
    assert proxy.num_cut > 10
    assert objects(url, s3.options) == whole
    assert verify(url, storage_options=s3.options).findings == ()


def test_a_bucket_that_refuses_is_named_without_credentials(slide, s3):
    with pytest.raises(StorageError, match="no-such-bucket") as caught:
        convert(slide, "s3://no-such-bucket/a.zarr", CONFIG, target_options=s3.options)
    assert s3.secret not in str(caught.value)
    with pytest.raises(InputError, match="web servers cannot be written to"):
        convert(slide, "http://127.0.0.1:1/a.zarr", CONFIG)


def test_slides_of_a_prefix_are_fetched_and_removed(slide, whole, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    folder, out = tmp_path / "up", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.tif").write_bytes(slide.read_bytes())
    (folder / "bad.tif").write_bytes(b"no slide")
    (folder / "note.txt").write_text("x")
    write_pyramid(np.ones((1, 70, 80), np.uint8), folder / "made.ome.zarr", CONFIG)
    url = s3.upload(folder, "slides", "prefix")
    slides = expand_inputs([url], storage_options=s3.options)
    assert slides == [f"{url}/bad.tif", f"{url}/deep/a.tif", f"{url}/made.ome.zarr"]
    for workers in (1, 2):
        results = list(
            preprocess(slides, out / str(workers), CONFIG, workers=workers, storage_options=s3.options)
        )
        assert [r.ok for r in results] == [False, True, True]
        assert results[0].source == f"{url}/bad.tif"
        assert "not a slide" in str(results[0])
        assert str(tmp_path) not in results[0].reason
        assert results[1].source == f"{url}/deep/a.tif"
        target = Path(target_path(slides[1], out / str(workers)))
        found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        assert found == whole | {"zarr.json": found["zarr.json"]}
        first = json.loads(Path(f"{target}.manifest.jsonl").read_text().splitlines()[0])
        assert first["source"]["name"] == "a.tif"
        assert (open_pyramid(results[2].target).read(0) == 1).all()
        assert list((tmp_path / "tmp").iterdir()) == []
