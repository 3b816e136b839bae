// The panel beside the image: rows for layers, channels and planes, and the list of patches. It only makes
// elements and calls back; what is shown is decided in main.js.

const MOST_LISTED = 1000;
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Empty a section but for its heading, fill it, and hide it if there is nothing in it.
function fill(id, rows) {
  const section = byId(id);
  section.querySelectorAll(".row").forEach((row) => row.remove());
  section.append(...rows);
  section.hidden = rows.length === 0;
}

export function showFacts(info) {
  document.title = `${info.name} - ats-stream view`;
  byId("name").textContent = info.name;
  const facts = [["size", `${info.width} \u00d7 ${info.height} px`]];
  if (info.pixelSizeUm) facts.push(["pixel", `${Number(info.pixelSizeUm.toPrecision(4))} \u00b5m`]);
  facts.push(...info.facts.map(({ name, value }) => [name.replace(/^p_/, "p "), value]));
  byId("facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]),
  );
  byId("facts").hidden = false;
  byId("problems").replaceChildren(...info.problems.map((text) => element("li", { textContent: text })));
  byId("problems").hidden = info.problems.length === 0;
}

export function showImages(names, current, onChange) {
  const select = byId("images");
  select.replaceChildren(...names.map((name, number) => element("option", { value: number, textContent: name })));
  select.value = current;
  select.onchange = () => onChange(Number(select.value));
  byId("images-row").hidden = names.length < 2;
}

// layers: [{label, isOn, opacity or null, gradient or null, peak, onChange(isOn, opacity)}]
export function showLayers(layers) {
  fill("layers", layers.map(layerRow));
}

function layerRow(layer) {
  const box = element("input", { type: "checkbox", checked: layer.isOn, name: layer.label });
  const row = element("div", { className: "row" }, box);
  box.id = `layer-${layer.label.replace(/\W+/g, "-")}`;
  row.append(element("label", { htmlFor: box.id, textContent: layer.label }));
  let slider = null;
  if (layer.opacity !== null) {
    slider = element("input", { type: "range", min: 0, max: 100, value: Math.round(100 * layer.opacity) });
    slider.setAttribute("aria-label", `opacity of ${layer.label}`);
    slider.oninput = () => layer.onChange(box.checked, slider.value / 100);
    row.append(slider);
  }
  if (layer.gradient) {
    const bar = element("span");
    bar.style.background = `linear-gradient(90deg, ${layer.gradient.join(", ")})`;
    const most = element("span", { textContent: Number(layer.peak.toPrecision(3)) });
    row.append(element("div", { className: "legend" }, element("span", { textContent: "0" }), bar, most));
  }
  box.onchange = () => layer.onChange(box.checked, slider ? slider.value / 100 : 1);
  return row;
}

// Switch a layer as a click would.
export function switchLayer(label) {
  byId(`layer-${label.replace(/\W+/g, "-")}`)?.click();
}

export function showChannels(channels, onChange) {
  const boxes = channels.map((one) => element("input", { type: "checkbox", checked: one.shown }));
  const rows = channels.map((one, number) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = one.color;
    boxes[number].id = `channel-${number}`;
    const label = element("label", { htmlFor: `channel-${number}`, textContent: one.label });
    return element("div", { className: "row" }, boxes[number], label, swatch);
  });
  boxes.forEach((box) => {
    box.onchange = () => {
      const chosen = boxes.flatMap((one, number) => (one.checked ? [number] : []));
      if (chosen.length === 0) box.checked = true; // one must stay
      else onChange(chosen);
    };
  });
  fill("channels", rows);
}

export function showAxes(axes, onChange) {
  const at = axes.map((axis) => axis.at);
  const rows = axes.map((axis, number) => {
    const id = `axis-${axis.name}`;
    const slider = element("input", { type: "range", id, min: 0, max: axis.length - 1, value: axis.at });
    const shown = element("output", { textContent: `${axis.at + 1} of ${axis.length}` });
    slider.oninput = () => { shown.textContent = `${Number(slider.value) + 1} of ${axis.length}`; };
    slider.onchange = () => {
      at[number] = Number(slider.value);
      onChange([...at]);
    };
    const label = element("label", { htmlFor: id, textContent: axis.name });
    return element("div", { className: "row" }, label, element("span"), shown, slider);
  });
  fill("axes", rows);
}

export function showPatches(patches, onChoose) {
  const heaviest = patches[0]?.weight || 1;
  const listed = patches.slice(0, MOST_LISTED).map((patch, number) => {
    const bar = element("span", { className: "bar" });
    bar.style.width = `${Math.max(0, Math.min(1, (patch.weight ?? 0) / heaviest)) * 100}%`;
    const weight = patch.weight === null ? "" : Number(patch.weight.toPrecision(3));
    const button = element(
      "button", { type: "button", title: patch.name },
      element("span", { className: "rank", textContent: number + 1 }), element("span", {}, bar),
      element("span", { textContent: weight }),
    );
    button.onclick = () => onChoose(number);
    return element("li", {}, button);
  });
  byId("patches-list").replaceChildren(...listed);
  const more = patches.length > listed.length ? `, the first ${listed.length} listed` : "";
  byId("patches-count").textContent = `(${patches.length}${more})`;
  byId("patches").hidden = patches.length === 0;
}

export function markPatch(number) {
  byId("patches-list").querySelectorAll("[aria-current]").forEach((one) => one.removeAttribute("aria-current"));
  const button = byId("patches-list").children[number]?.firstElementChild;
  button?.setAttribute("aria-current", "true");
  button?.scrollIntoView({ block: "nearest" });
}

export function showScale(bar) {
  byId("scale").hidden = bar === null;
  if (bar === null) return;
  byId("scale-label").textContent = bar.label;
  byId("scale-bar").style.width = `${bar.px}px`;
}

export function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = text === "";
}
