// The drawn patches as boxes over the image, drawn anew whenever the view moves.

const SMALLEST_PX = 8;
const COLOUR = "#00e5ff";
const EDGE = "#062028";
const CHOSEN = "#ffffff";

export class Boxes {
  // patches: [{box: [left, top, width, height], ...}] in pixels of level 0
  constructor(viewer, patches, imageWidth) {
    this.viewer = viewer;
    this.patches = patches;
    this.imageWidth = imageWidth;
    this.isShown = true;
    this.chosen = -1;
    this.canvas = document.createElement("canvas");
    this.canvas.id = "boxes";
    viewer.canvas.append(this.canvas);
    for (const event of ["update-viewport", "resize", "open"]) viewer.addHandler(event, () => this.draw());
  }

  // Rectangle of a patch on the screen, [left, top, width, height], never smaller than can be seen.
  onScreen(patch) {
    const [left, top, width, height] = patch.box;
    const viewport = this.viewer.viewport;
    const at = (x, y) => viewport.pixelFromPoint(new OpenSeadragon.Point(x / this.imageWidth, y / this.imageWidth), true);
    const [first, last] = [at(left, top), at(left + width, top + height)];
    const wide = Math.max(last.x - first.x, SMALLEST_PX);
    const high = Math.max(last.y - first.y, SMALLEST_PX);
    return [(first.x + last.x - wide) / 2, (first.y + last.y - high) / 2, wide, high];
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.viewer.canvas;
    const [width, height] = [Math.round(clientWidth * ratio), Math.round(clientHeight * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, clientWidth, clientHeight);
    if (!this.isShown || !this.viewer.viewport) return;
    // the heaviest last, so on top; the chosen one above all
    for (let number = this.patches.length - 1; number >= 0; number--) {
      if (number !== this.chosen) this.stroke(pen, number, clientWidth, clientHeight);
    }
    if (this.chosen >= 0) this.stroke(pen, this.chosen, clientWidth, clientHeight);
  }

  stroke(pen, number, screenWidth, screenHeight) {
    const [left, top, width, height] = this.onScreen(this.patches[number]);
    if (left > screenWidth || top > screenHeight || left + width < 0 || top + height < 0) return;
    const isChosen = number === this.chosen;
    pen.lineWidth = isChosen ? 8 : 4;
    pen.strokeStyle = EDGE;
    pen.strokeRect(left, top, width, height);
    pen.lineWidth = isChosen ? 4 : 2;
    pen.strokeStyle = isChosen ? CHOSEN : COLOUR;
    pen.strokeRect(left, top, width, height);
  }

  // Number of the smallest patch under a point of the screen, the heaviest of equal ones; -1 for none.
  under(point) {
    let [found, area] = [-1, Infinity];
    if (!this.isShown) return found;
    this.patches.forEach((patch, number) => {
      const [left, top, width, height] = this.onScreen(patch);
      const isInside = point.x >= left && point.x <= left + width && point.y >= top && point.y <= top + height;
      if (isInside && width * height < area - 1e-6) [found, area] = [number, width * height];
    });
    return found;
  }
}
