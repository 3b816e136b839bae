"""``view``: what it shows and refuses before it serves. What it serves: tests/viewer."""

from __future__ import annotations

import json
import socket
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.commands import view
from ats_stream.io import ConvertConfig, open_pyramid, write_pyramid
from ats_stream.viewer.predictions import Predictions
from ats_stream.viewer.targets import Target, Targets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ats_stream.viewer.server import ViewerServer

    Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pyramids in a folder."""
    config = ConvertConfig(chunk_px=16, shard_px=32, coarsest_px=32, tissue=False)
    for name in ("a", "b"):
        write_pyramid(np.zeros((3, 70, 50), np.uint8), tmp_path / "p" / f"{name}.ome.zarr", config)
    return tmp_path / "p"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images, asked over the network from the server that the command made, which then ends."""
    import threading

    import ats_stream.viewer.server as module

    found: list[str] = []

    def serve(server: ViewerServer, announce: Callable[[], None]) -> None:
        announce()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with urllib.request.urlopen(f"{server.url}images.json") as answer:
            found.extend(one["name"] for one in json.load(answer))
        server.shutdown()
        server.server_close()
        thread.join()

    monkeypatch.setattr(module, "serve", serve)
    return found


def test_images_and_folders_of_them_are_served(folder: Path, run: Run, names: list[str]) -> None:
    done = run("view", folder, folder / "a.ome.zarr")
    assert (done.code, names) == (0, ["a (1)", "b", "a (3)"])
    assert done.out.startswith("3 images at http://127.0.0.1:")
    assert done.err == "ats-stream: stopped\n"


def test_predictions_say_what_to_show(folder: Path, run: Run, names: list[str], tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    table.write_text(f"slide,name\n{folder / 'b.ome.zarr'},b\n")
    assert run("view", "--predictions", tmp_path).code == 0
    assert names == ["b"]


def test_what_predict_writes_is_shown(
    trained: Path, table: Path, run: Run, names: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "predictions"
    assert run("predict", trained, table, "--split", "test", "--out", out).code == 0
    assert run("view", "--predictions", out).code == 0
    assert names == ["test-0000", "test-0001", "test-0002"]
    found = Predictions(out)
    targets = [Target.of(slide, found.of(slide)) for slide in found.slides]
    shown = Targets(targets, open_pyramid, tell=pytest.fail).get(1)
    attention = shown.overlays[0]
    assert (attention.label, shown.problems) == ("attention", ())
    where, size = attention.placement, attention.image.size
    # the map lies over the image to its edges
    assert (where.left, where.top) == pytest.approx((0, 0), abs=1e-6)
    assert (where.scale_y * size[0], where.scale_x * size[1]) == pytest.approx(shown.image.size)
    assert 0 < attention.peak <= 1
    assert len(shown.patches) == 4
    assert sum(patch.weight or 0 for patch in shown.patches) == pytest.approx(1)
    assert {(patch.width, patch.height) for patch in shown.patches} == {(32, 32)}
    assert set(shown.facts) == {"label", "predicted", "p_0", "p_1"}
    for name in ("predictions.csv", "predictions.parquet"):  # as while it was under way
        (out / name).unlink()
    before = Predictions(out)
    assert [(s, before.of(s)) for s in before.slides] == [(s, found.of(s)) for s in found.slides]


def test_images_behind_urls_are_served_and_credentials_are_not(
    folder: Path, run: Run, names: list[str], s3: Any
) -> None:
    url = s3.upload(folder / "a.ome.zarr", "view", "a.ome.zarr")
    words = [f"{name}={value}" for name, value in s3.options.items()]
    options = [part for word in words for part in ("--storage-options", word)]
    done = run("view", url, *options)
    assert (done.code, names) == (0, ["a"])
    assert s3.secret not in done.out + done.err


def test_what_cannot_be_read_is_told_and_the_rest_is_shown(folder: Path, run: Run, names: list[str]) -> None:
    done = run("view", folder / "none.zarr", folder / "b.ome.zarr")
    assert (done.code, names) == (0, ["b"])
    assert done.err.splitlines()[0] == f"ats-stream: error: {folder / 'none.zarr'}: no such file or folder"
    done = run("view", folder / "none.zarr")
    assert (done.code, done.out) == (2, "")
    assert done.complaint.endswith("no such file or folder")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "view needs a TARGET, or --predictions with a table of images"),
        (("a", "--port", "70000"), "--port must lie in 0 to 65535, got 70000"),
        (("a", "--predictions", "none"), "none: no such folder of predictions"),
        (("a", "b", "--patches", "c"), "--patches is for one image, got 2"),
        (("a", "--attention", "none"), "--attention none: no such file or folder"),
        (("a", "--format", "gif"), "invalid choice"),
    ],
)
def test_wrong_arguments_are_one_line(run: Run, words: tuple[str, ...], reason: str) -> None:
    done = run("view", *words)
    assert done.code == 2
    assert reason in done.complaint


def test_a_port_that_is_taken_is_one_line(folder: Path, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run("view", folder, "--port", listener.getsockname()[1])
    assert (done.code, done.out) == (2, "")
    assert "cannot listen on 127.0.0.1, port " in done.complaint


def test_other_addresses_come_with_a_warning(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or False)
    monkeypatch.setattr("ats_stream.viewer.server.ViewerServer.serve_forever", lambda self, **_: None)
    done = run("view", folder, "--host", "0.0.0.0", "--open")
    assert done.code == 0
    warning, no_browser, _ = done.err.splitlines()
    assert warning.startswith("ats-stream: warning: --host 0.0.0.0 lets everyone")
    assert no_browser == "ats-stream: no browser could be opened here"
    assert opened == [done.out.split()[3]]


def test_help_teaches(run: Run) -> None:
    done = run("view", "--help")
    assert done.code == 0
    for word in ("--predictions DIR", "Ctrl-C", "ssh -L", "next and the previous"):
        assert word in done.out
    assert view.__doc__ is not None
