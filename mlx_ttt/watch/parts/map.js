// The map of layers x heads over the text, and how canvases get their colours.

/** Calls back when the width changes, but not for the first width. */
function onResize(node, callback) {
  let width = null;
  new ResizeObserver(() => {
    const isChanged = width !== null && width !== node.clientWidth;
    width = node.clientWidth;
    if (isChanged) callback();
  }).observe(node);
}

/** A canvas of this size in CSS pixels, cleared. */
function prepared(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function colorsOf(node) {
  const style = getComputedStyle(node);
  const read = (name) => style.getPropertyValue(name).trim();
  return {
    ink: read("--ink"),
    muted: read("--muted"),
    surface: read("--surface"),
    font: `11px ${style.fontFamily}`,
    heat: [0, 1, 2, 3, 4].map((i) => channels(read(`--heat-${i}`))),
    depth: [0, 1].map((i) => channels(read(`--depth-${i}`))),
  };
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** A colour between those of a list, at a share of the way. */
function between(colors, share) {
  const at = Math.max(0, Math.min(1, share || 0)) * (colors.length - 1);
  const i = Math.min(Math.floor(at), colors.length - 2);
  return colors[i].map((channel, c) => Math.round(channel + (at - i) * (colors[i + 1][c] - channel)));
}

/** The colour of each code of a map, from the 2nd to the 99th hundredth of its values. */
function heatOf(values) {
  const [low, high] = [values.quantile(0.02), values.quantile(0.99)];
  const { heat } = colorsOf(document.documentElement);
  const table = Array.from(values.table, (v) => between(heat, (v - low) / (high - low || 1)));
  return { low, high, table, css: (code) => `rgb(${table[code].join(" ")})` };
}

const MAP_HEIGHT = 300;

class HeatMap {
  constructor(root, view) {
    this.root = root;
    this.view = view;
    this.canvas = root.querySelector("canvas");
    this.axis = new Axis(root, view);
    this.canvas.addEventListener("pointermove", (event) => this.read(event));
    this.canvas.addEventListener("pointerleave", () => this.say(""));
    view.on("reading", () => this.draw());
    view.on("theme", () => this.draw());
    onResize(root, () => this.draw());
  }

  draw() {
    const { reading } = this.view;
    const width = this.axis.width;
    if (width < 10) return;
    const { layers, heads } = reading.about;
    const all = reading.allHeads;
    this.gap = layers > 12 ? 1 : 2; // between layers
    this.rowHeight = Math.min(9, Math.max(MAP_HEIGHT / all, 3 / heads));
    const height = all * this.rowHeight + (layers - 1) * this.gap;
    const context = prepared(this.canvas, width, height);
    this.axis.setHeight(height);
    this.labelLayers(layers, heads);
    const columns = reading.columnCount;
    if (!columns) return;
    const heat = heatOf(reading.columns);
    const image = this.image(reading, columns, Math.min(columns, Math.round(width * (devicePixelRatio || 1))), heat);
    context.imageSmoothingEnabled = this.rowHeight < 1;
    for (let layer = 0; layer < layers; layer++) {
      const y = layer * (heads * this.rowHeight + this.gap);
      const shownWidth = (width * columns * reading.width) / Math.max(reading.length, columns * reading.width);
      context.drawImage(image, 0, layer * heads, image.width, heads, 0, y, shownWidth, heads * this.rowHeight);
    }
    this.legend(heat);
  }

  /** One pixel a head and a few columns, which is the mean of them. */
  image(reading, columns, width, heat) {
    const all = reading.allHeads;
    const { codes, table } = reading.columns;
    const canvas = element("canvas");
    [canvas.width, canvas.height] = [width, all];
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, all);
    const sums = new Float64Array(all);
    const { low, high } = heat;
    const { heat: stops } = colorsOf(document.documentElement);
    const ramp = Array.from({ length: 256 }, (_, i) => between(stops, i / 255));
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x * columns) / width);
      const to = Math.max(from + 1, Math.floor(((x + 1) * columns) / width));
      sums.fill(0);
      for (let column = from; column < to; column++) {
        const base = column * all;
        for (let head = 0; head < all; head++) sums[head] += table[codes[base + head]];
      }
      for (let head = 0; head < all; head++) {
        const share = (sums[head] / (to - from) - low) / (high - low || 1);
        const color = ramp[Math.max(0, Math.min(255, Math.round(255 * share)))];
        const at = 4 * (head * width + x);
        image.data[at] = color[0];
        image.data[at + 1] = color[1];
        image.data[at + 2] = color[2];
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  labelLayers(layers, heads) {
    const labels = this.root.querySelector(".labels");
    const height = heads * this.rowHeight + this.gap;
    const every = Math.ceil(13 / height);
    const made = [];
    for (let layer = 0; layer < layers; layer += every) {
      const label = element("span", "", `layer ${layer}`);
      label.style.top = `${layer * height + (heads * this.rowHeight) / 2}px`;
      made.push(label);
    }
    labels.replaceChildren(...made);
  }

  legend(heat) {
    this.root.querySelector(".low").textContent = figure(heat.low, 2);
    this.root.querySelector(".high").textContent = `${figure(heat.high, 2)} and more`;
  }

  read(event) {
    const { reading } = this.view;
    const box = this.canvas.getBoundingClientRect();
    const block = reading.about.heads * this.rowHeight + this.gap;
    const layer = Math.min(reading.about.layers - 1, Math.floor((event.clientY - box.top) / block));
    const head = Math.floor((event.clientY - box.top - layer * block) / this.rowHeight);
    const column = reading.columnOf(this.axis.tokenAt(event.clientX));
    if (layer < 0 || head < 0 || head >= reading.about.heads || column >= reading.columnCount) return this.say("");
    const norm = reading.columns.at(column * reading.allHeads + layer * reading.about.heads + head);
    const from = column * reading.width;
    const to = Math.min(from + reading.width, reading.length) - 1;
    this.say(`layer ${layer}, head ${head}, tokens ${count(from)}–${count(to)}: ${figure(norm)}`);
  }

  say(text) {
    this.root.querySelector(".says").textContent = text;
  }
}
