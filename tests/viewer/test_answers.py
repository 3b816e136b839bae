"""What the viewer answers: tiles that are the image's, plain refusals for all else, nothing that leaks."""

from __future__ import annotations

import io
import json
import string
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from view_data import HEIGHT, PATCHES, PIXEL_UM, TOKEN, WIDTH

from ats_stream.io import open_pyramid
from ats_stream.viewer.answers import STATIC, Viewer
from ats_stream.viewer.predictions import Predictions
from ats_stream.viewer.targets import Target, Targets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., Viewer]


def get(viewer: Viewer, inside: str, **options: Any) -> Any:
    return viewer.answer(f"/{TOKEN}/{inside}", **options)


def json_of(viewer: Viewer, inside: str) -> Any:
    answer = get(viewer, inside)
    assert (answer.status, answer.media_type) == (200, "application/json"), answer.body
    return json.loads(answer.body)


def picture(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status == 200, answer.body
    return np.asarray(Image.open(io.BytesIO(answer.body)))


def test_the_page_and_its_files(viewer_of: Make, pyramid_path: Path) -> None:
    viewer = viewer_of(pyramid_path)
    page = get(viewer, "")
    assert page.body == get(viewer, "index.html").body
    assert b"openseadragon.min.js" in page.body
    for name, media_type in STATIC.items():
        answer = get(viewer, name)
        assert (answer.status, answer.media_type) == (200, media_type)
        assert answer.body
    assert viewer.answer(f"/{TOKEN}").headers == {"Location": f"/{TOKEN}/"}


def test_the_description_of_an_image(viewer_of: Make, pyramid_path: Path, predictions: Path) -> None:
    found = Predictions(predictions)
    viewer = viewer_of(Target.of(str(pyramid_path), found.of(str(pyramid_path))))
    assert json_of(viewer, "images.json") == [{"name": "quadrants"}]
    info = json_of(viewer, "images/0/info.json")
    assert (info["width"], info["height"], info["pixelSizeUm"]) == (WIDTH, HEIGHT, PIXEL_UM)
    assert (info["isColour"], info["axes"], info["numPatches"]) == (True, [], 3)
    assert [one["label"] for one in info["overlays"]] == ["attention", "tissue"]
    assert info["overlays"][0]["peak"] == 1.0
    assert {f["name"]: f["value"] for f in info["facts"]} == {
        "label": "a",
        "predicted": "a",
        "p_a": "0.9",
        "p_b": "0.1",
    }
    assert info["problems"] == []
    assert [r["scaleX"] for r in info["resolutions"]] == sorted(
        (r["scaleX"] for r in info["resolutions"]), reverse=True
    )
    patches = json_of(viewer, "images/0/patches.json")
    assert [(*p["box"][:3], p["weight"]) for p in patches] == [tuple(map(float, one)) for one in PATCHES]
    for answer in ("images.json", "images/0/info.json", "images/0/patches.json"):
        assert str(pyramid_path.parent).encode() not in get(viewer, answer).body


def test_tiles_are_the_pixels_of_the_level(viewer_of: Make, pyramid_path: Path) -> None:
    viewer = viewer_of(pyramid_path)
    pyramid = open_pyramid(pyramid_path)
    finest = len(json_of(viewer, "images/0/info.json")["resolutions"]) - 1
    expected = np.moveaxis(pyramid.read(0, (0, 512, 1024), (3, 1024, WIDTH)), 0, -1)
    assert np.array_equal(picture(get(viewer, f"images/0/tiles/{finest}/2/1.png")), expected)
    for encoding in ("jpeg", "webp"):
        shown = picture(get(viewer, f"images/0/tiles/{finest}/2/1.{encoding}")).astype(int)
        assert np.abs(shown - expected).mean() < 2


def test_channels_and_planes_are_chosen(viewer_of: Make, tmp_path: Path) -> None:
    import tifffile

    series = np.random.default_rng(0).integers(0, 255, (4, 2, 40, 60), dtype=np.uint8)  # z, c, y, x
    tifffile.imwrite(tmp_path / "a.ome.tiff", series, metadata={"axes": "ZCYX"})
    viewer = viewer_of(tmp_path / "a.ome.tiff")
    info = json_of(viewer, "images/0/info.json")
    assert info["axes"] == [{"name": "z", "length": 4, "at": 2}]
    assert [c["shown"] for c in info["channels"]] == [True, True]
    red, green, blue = (int(info["channels"][1]["color"][i : i + 2], 16) for i in (1, 3, 5))
    shown = picture(get(viewer, "images/0/tiles/0/0/0.png?c=1&at=3"))
    level = series[3, 1].astype(np.float32)[..., None] / np.float32(255)
    assert np.array_equal(shown, np.rint(level * np.array([red, green, blue], np.float32)))
    both = picture(get(viewer, "images/0/tiles/0/0/0.png?at=2"))
    assert np.array_equal(both, picture(get(viewer, "images/0/tiles/0/0/0.png")))
    assert not np.array_equal(both, picture(get(viewer, "images/0/tiles/0/0/0.png?at=1&c=0,1")))
    outside = get(viewer, "images/0/tiles/0/0/0.png?at=4")
    assert (outside.status, outside.body) == (404, b"z 4 is outside the image, there are 4\n")


@pytest.mark.parametrize(
    ("inside", "status"),
    [
        ("images/1/info.json", 404),
        ("images/0/tiles/99/0/0.png", 404),
        ("images/0/tiles/0/1/0.png", 404),
        ("images/0/tiles/0/0/9999999.png", 404),
        ("images/0/tiles/0/-1/0.png", 404),
        ("images/0/tiles/0/00/0.png", 404),
        ("images/0/tiles/0/0/0.gif", 404),
        ("images/0/tiles/0/0/99999999999999999999.png", 404),
        ("images/0/tiles/0/0/0.png?c=3", 404),
        ("images/0/tiles/0/0/0.png?c=0", 400),
        ("images/0/tiles/0/0/0.png?c=", 400),
        ("images/0/tiles/0/0/0.png?c=0,0,1", 400),
        ("images/0/tiles/0/0/0.png?c=a", 400),
        ("images/0/tiles/0/0/0.png?at=0", 400),
        ("images/0/tiles/0/0/0.png?x=1", 400),
        ("images/0/tiles/0/0/0.png?c=0,1,2&c=0,1,2", 400),
        ("images/0/tiles/0/0/0.png?%", 400),
        ("images/0/tiles/0/0/0.png?" + "c=0&" * 10, 400),
        ("images/0/tiles/0/0/0.png?c=" + "0," * 5000, 414),
        ("images/0/overlays/1/0/0/0.png", 404),
        ("images/0/overlays/0/0/9/9.png", 404),
        ("../viewer.css", 404),
        ("..%2fviewer.css", 404),
        ("static/viewer.css", 404),
        ("/etc/passwd", 404),
        ("openseadragon.json", 404),
        ("\u0661", 404),
        ("images/\u0661/info.json", 404),
    ],
)
def test_what_there_is_not_is_refused(viewer_of: Make, pyramid_path: Path, inside: str, status: int) -> None:
    viewer = viewer_of(pyramid_path)
    answer = get(viewer, inside)
    assert answer.status == status
    assert answer.body.count(b"\n") == 1
    assert viewer.told == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "target", ["/", "", "/x/", "/a-toke/", "/a-token2/images.json", "*", "/\u00e9/", "/\udcff/"]
)
def test_nothing_is_told_without_the_token(viewer_of: Make, pyramid_path: Path, target: str) -> None:
    answer = viewer_of(pyramid_path).answer(target)
    assert (answer.status, answer.body) == (
        404,
        b"not found; open the address that ats-stream view printed\n",
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(f"/{TOKEN}/images/0/tiles/0/0/0.png?c=0,1,2")
@given(st.text(alphabet=string.printable + "\u0661\udcff", max_size=60).map(lambda text: f"/{TOKEN}/{text}"))
def test_no_request_is_answered_with_a_failure(viewer_of: Make, pyramid_path: Path, target: str) -> None:
    assert viewer_of(pyramid_path).answer(target).status in (200, 308, 400, 404)


def test_known_tiles_are_not_sent_again(viewer_of: Make, pyramid_path: Path) -> None:
    viewer = viewer_of(pyramid_path)
    first = get(viewer, "images/0/tiles/0/0/0.jpeg")
    tag = first.headers["ETag"]
    assert first.cache.startswith("private, max-age=")
    for known in (tag, f'"x", W/{tag}', "*"):
        again = get(viewer, "images/0/tiles/0/0/0.jpeg", known=known)
        assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    assert get(viewer, "images/0/tiles/0/0/0.jpeg", known='"x"').status == 200
    assert get(viewer, "images/0/tiles/0/0/0.png").headers["ETag"] != tag
    assert get(viewer, "images.json").cache == "no-store"


def test_the_cache_of_tiles_is_bounded_and_used(viewer_of: Make, pyramid_path: Path) -> None:
    viewer = viewer_of(pyramid_path, cache_bytes=1 << 20)
    pyramid = viewer.targets.get(0).image.pyramid
    tiles = [f"images/0/tiles/4/{column}/{row}.png" for column in range(3) for row in range(3)]
    assert len(json_of(viewer, "images/0/info.json")["resolutions"]) == 4
    tiles = [tile.replace("/4/", "/3/") for tile in tiles]
    first = [get(viewer, tile).body for tile in tiles]
    before = pyramid.read_stats(0)
    assert [get(viewer, tile).body for tile in tiles] == first
    assert pyramid.read_stats(0) == before  # nothing was read again
    small = viewer_of(pyramid_path, cache_bytes=2 * max(map(len, first)))
    for tile in tiles * 3:
        get(small, tile)
        assert small.cache.num_bytes <= 2 * max(map(len, first))


def test_many_threads_get_the_same_tiles_each_read_once(viewer_of: Make, pyramid_path: Path) -> None:
    tiles = [f"images/0/tiles/3/{column}/{row}.png" for column in range(3) for row in range(3)]
    alone = viewer_of(pyramid_path)
    expected = [get(alone, tile).body for tile in tiles]
    viewer = viewer_of(pyramid_path)
    start = threading.Barrier(8)

    def ask(_: int) -> list[bytes]:
        start.wait()
        return [get(viewer, tile).body for tile in tiles]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [expected] * 8
    one, all_of_them = alone.targets.get(0).image.pyramid, viewer.targets.get(0).image.pyramid
    assert all_of_them.read_stats(0) == one.read_stats(0)


def test_damage_is_told_here_and_hidden_there(viewer_of: Make, pyramid_path: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken.ome.zarr"
    shutil.copytree(pyramid_path, broken)
    for shard in (broken / "0" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"no shard")
    viewer = viewer_of(broken, pyramid_path)
    answer = get(viewer, "images/0/tiles/3/0/0.png")
    assert (answer.status, answer.body) == (500, b"the image cannot be read\n")
    assert [line.startswith(str(broken)) for line in viewer.told] == [True]  # type: ignore[attr-defined]
    assert get(viewer, "images/0/tiles/0/0/0.png").status == 200  # other levels are whole
    assert get(viewer, "images/1/tiles/3/0/0.png").status == 200
    shutil.rmtree(broken)
    gone = viewer_of(broken)
    assert get(gone, "images/0/info.json").status == 500


def test_broken_overlays_leave_the_image(viewer_of: Make, pyramid_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text("{")
    target = Target(place=str(pyramid_path), attention=tmp_path / "none.zarr", patches=tmp_path / "a.geojson")
    viewer = viewer_of(target)
    info = json_of(viewer, "images/0/info.json")
    assert info["problems"] == ["attention cannot be shown", "patches cannot be shown"]
    assert len(viewer.told) == 2  # type: ignore[attr-defined]
    assert get(viewer, "images/0/tiles/0/0/0.png").status == 200


def test_few_images_stay_open(pyramid_path: Path) -> None:
    opened: list[str] = []

    def open_image(place: str) -> Any:
        opened.append(place)
        return open_pyramid(place)

    targets = Targets([Target(place=str(pyramid_path))] * 5, open_image, tell=print, max_open=2)
    assert len(targets) == 5
    for number in (0, 1, 0, 2, 0):
        targets.get(number)
    assert len(opened) == 3  # 2 took the place of 1, which was looked at longest ago
    targets.get(1)
    assert len(opened) == 4
    with pytest.raises(IndexError):
        targets.get(5)
