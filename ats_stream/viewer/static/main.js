// The page: asks the server what there is, and puts viewer, layers, boxes and panel together.

import { Boxes } from "./boxes.js";
import * as panel from "./panel.js";
import { scaleBar } from "./scale.js";
import { tileSource } from "./source.js";

const OPACITY = 0.6;
const SCALE_PX = 160;
// the first look at a large image without coarse levels reads all of it
const TILE_TIMEOUT_MS = 10 * 60 * 1000;
// a patch fills this share of the view after a jump
const PATCH_SHARE = 0.3;
OpenSeadragon.DEFAULT_SETTINGS.timeout = TILE_TIMEOUT_MS; // of the small overview too, which takes no options
const isStill = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

async function ask(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

class Page {
  constructor(number, info, patches) {
    Object.assign(this, { number, info, patches, chosen: null, at: null });
    this.viewer = OpenSeadragon({
      element: document.getElementById("stage"),
      tileSources: this.imageSource(),
      drawer: "canvas", // the same on every machine, with or without a graphics card
      showNavigationControl: false,
      showNavigator: true,
      navigatorAutoFade: false,
      maxZoomPixelRatio: 8,
      visibilityRatio: 0.3,
      animationTime: isStill ? 0 : 0.5,
      imageLoaderLimit: 6,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    });
    this.boxes = new Boxes(this.viewer, patches, info.width);
    this.layers = info.overlays.map(() => null);
    this.viewer.addHandler("update-viewport", () => this.scale());
    this.viewer.addHandler("open", () => this.addOverlays());
    this.viewer.addHandler("canvas-click", (event) => this.click(event));
    this.viewer.addHandler("canvas-key", (event) => {
      // boxes are upright
      if ("rRfF".includes(event.originalEvent.key)) event.preventDefaultAction = true;
    });
    this.viewer.addHandler("tile-load-failed", ({ message }) => {
      // the viewer itself gives up tiles that have gone out of sight
      if (message !== "Image load aborted.") panel.say("Some tiles cannot be read.");
    });
  }

  imageSource() {
    const query = [this.chosen && `c=${this.chosen.join(",")}`, this.at && `at=${this.at.join(",")}`];
    const options = query.filter(Boolean).join("&");
    const end = `.${this.info.format}${options && "?"}${options}`;
    return tileSource(this.info.resolutions, (level, column, row) =>
      `images/${this.number}/tiles/${level}/${column}/${row}${end}`);
  }

  // Show other channels or planes in the same view.
  changeImage(changes) {
    Object.assign(this, changes);
    this.viewer.addTiledImage({ tileSource: this.imageSource(), index: 0, replace: true });
  }

  addOverlays() {
    // all is the image, also where the cells of a map reach over its edge
    this.viewer.world.setAutoRefigureSizes(false);
    this.info.overlays.forEach((overlay, which) => {
      const finest = overlay.resolutions[overlay.resolutions.length - 1];
      this.viewer.addTiledImage({
        tileSource: tileSource(overlay.resolutions, (level, column, row) =>
          `images/${this.number}/overlays/${which}/${level}/${column}/${row}.png`),
        x: overlay.left / this.info.width,
        y: overlay.top / this.info.width,
        width: (finest.width * finest.scaleX) / this.info.width,
        opacity: this.isOn(overlay) ? OPACITY : 0,
        success: ({ item }) => { this.layers[which] = item; },
      });
    });
  }

  // At first the attention map is shown, masks are not.
  isOn(overlay) {
    return overlay.isMap && overlay === this.info.overlays.find((one) => one.isMap);
  }

  showPanel() {
    panel.showFacts(this.info);
    const rows = this.info.overlays.map((overlay, which) => ({
      label: overlay.label, isOn: this.isOn(overlay), opacity: OPACITY, gradient: overlay.gradient, peak: overlay.peak,
      onChange: (isOn, opacity) => this.layers[which]?.setOpacity(isOn ? opacity : 0),
    }));
    if (this.patches.length > 0) {
      const onChange = (isOn) => { this.boxes.isShown = isOn; this.boxes.draw(); };
      rows.push({ label: "patches", isOn: true, opacity: null, gradient: null, onChange });
    }
    panel.showLayers(rows);
    panel.showChannels(this.info.isColour || this.info.channels.length < 2 ? [] : this.info.channels,
      (chosen) => this.changeImage({ chosen }));
    panel.showAxes(this.info.axes, (at) => this.changeImage({ at }));
    panel.showPatches(this.patches, (number) => this.jump(number));
  }

  scale() {
    const { pixelSizeUm, width } = this.info;
    if (!pixelSizeUm) return panel.showScale(null);
    const viewport = this.viewer.viewport;
    const screenPx = viewport.deltaPixelsFromPoints(new OpenSeadragon.Point(1, 0), true).x;
    return panel.showScale(scaleBar((pixelSizeUm * width) / screenPx, SCALE_PX));
  }

  click(event) {
    const number = event.quick ? this.boxes.under(event.position) : -1;
    if (number < 0) return;
    event.preventDefaultAction = true;
    this.jump(number);
  }

  jump(number) {
    const [left, top, width, height] = this.patches[number].box.map((length) => length / this.info.width);
    const [wide, high] = [width / PATCH_SHARE, height / PATCH_SHARE];
    const around = new OpenSeadragon.Rect(left + (width - wide) / 2, top + (height - high) / 2, wide, high);
    this.boxes.chosen = number;
    this.viewer.viewport.fitBounds(around, isStill);
    this.boxes.draw();
    panel.markPatch(number);
  }

  step(by) {
    const count = this.patches.length;
    if (count > 0) this.jump((Math.max(this.boxes.chosen, by < 0 ? 0 : -1) + by + count) % count);
  }

  key(event) {
    const viewport = this.viewer.viewport;
    const isTyping = event.target.closest("input, select, button, summary");
    const isInViewer = this.viewer.element.contains(event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || !viewport) return;
    const anywhere = {
      n: () => this.step(1), p: () => this.step(-1), b: () => panel.switchLayer("patches"),
      a: () => panel.switchLayer(this.info.overlays.find((one) => one.isMap)?.label ?? ""),
    };
    const move = (x, y) => viewport.panBy(viewport.deltaPointsFromPixels(new OpenSeadragon.Point(x, y)));
    // the viewer itself takes these while it has the focus
    const outside = {
      0: () => viewport.goHome(), "+": () => viewport.zoomBy(1.3), "=": () => viewport.zoomBy(1.3),
      "-": () => viewport.zoomBy(1 / 1.3), ArrowLeft: () => move(-60, 0), ArrowRight: () => move(60, 0),
      ArrowUp: () => move(0, -60), ArrowDown: () => move(0, 60),
    };
    const action = anywhere[event.key] ?? (isTyping || isInViewer ? null : outside[event.key]);
    if (!action) return;
    event.preventDefault();
    action();
  }

  close() {
    this.viewer.destroy();
  }
}

let page = null;

async function show(number) {
  page?.close();
  page = null;
  panel.say("");
  const info = await ask(`images/${number}/info.json`);
  const patches = info.numPatches > 0 ? await ask(`images/${number}/patches.json`) : [];
  page = new Page(number, info, patches);
  page.showPanel();
  globalThis.atsStreamPage = page; // for the console, and for tests
}

async function start() {
  try {
    const images = await ask("images.json");
    const wanted = Number(location.hash.slice(1));
    const number = Number.isInteger(wanted) && wanted >= 0 && wanted < images.length ? wanted : 0;
    panel.showImages(images.map((one) => one.name), number, (chosen) => { location.hash = chosen; });
    await show(number);
  } catch (error) {
    panel.say(error.message);
  }
}

document.addEventListener("keydown", (event) => page?.key(event));
window.addEventListener("hashchange", start);
start();
