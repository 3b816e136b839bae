"""What the tests of the viewer share: pictures whose pixels tell where they are, and viewers of them."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.io import ConvertConfig, PyramidWriter, open_pyramid, write_pyramid
from ats_stream.viewer.answers import Viewer
from ats_stream.viewer.server import ViewerServer
from ats_stream.viewer.targets import Target, Targets

sys.path.insert(0, str(Path(__file__).parent))  # makes the helpers beside the tests importable
from view_data import HEIGHT, MAP_PX, PATCHES, PIXEL_UM, TOKEN, WIDTH, feature, quadrants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def pyramid_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pyramid of the quadrants with a mask of tissue."""
    target = tmp_path_factory.mktemp("view") / "quadrants.ome.zarr"
    config = ConvertConfig(chunk_px=64, shard_px=512, coarsest_px=200)
    write_pyramid(quadrants(), target, config, pixel_size_um=PIXEL_UM)
    return target


@pytest.fixture(scope="session")
def predictions(pyramid_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of predictions as ``ats-stream predict`` leaves it: attention in one cell, three patches."""
    folder = tmp_path_factory.mktemp("predictions")
    attention = np.zeros((1, HEIGHT // MAP_PX, WIDTH // MAP_PX), np.float32)
    attention[0, 5, 20] = 1.0
    with PyramidWriter(
        folder / "attention" / "quadrants.ome.zarr",
        level_shapes=[attention.shape],
        dtype=np.float32,
        downsamples=[(MAP_PX, MAP_PX)],
        pixel_size_um=(PIXEL_UM, PIXEL_UM),
        name="attention",
    ) as writer:
        writer.write_shard(0, (0, 0), attention)
    (folder / "patches").mkdir()
    features = [feature(*one) for one in reversed(PATCHES)]
    collection = {"type": "FeatureCollection", "features": features}
    (folder / "patches" / "quadrants.geojson").write_text(json.dumps(collection))
    row = f"{pyramid_path},quadrants,a,a,0.9,0.1"
    (folder / "predictions.csv").write_text(f"slide,name,label,predicted,p_a,p_b\n{row}\n")
    return folder


@pytest.fixture
def viewer_of() -> Callable[..., Viewer]:
    """Make a viewer of places; what it tells is kept in its ``told``."""

    def make(*targets: Any, **options: Any) -> Viewer:
        told: list[str] = []
        given = [one if isinstance(one, Target) else Target(place=str(one)) for one in targets]
        opened = Targets(given, open_pyramid, tell=told.append, max_open=options.pop("max_open", 8))
        viewer = Viewer(opened, token=TOKEN, tell=told.append, **options)
        viewer.told = told  # type: ignore[attr-defined]
        return viewer

    return make


@pytest.fixture
def serving() -> Iterator[Callable[[Viewer], ViewerServer]]:
    """Serve viewers on free ports until the test ends."""
    servers: list[tuple[ViewerServer, threading.Thread]] = []

    def start(viewer: Viewer) -> ViewerServer:
        server = ViewerServer(viewer, host="127.0.0.1", port=0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()
