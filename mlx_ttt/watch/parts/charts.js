// The figures over the position in the text. All have the same horizontal axis, so that they can be compared.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/** The horizontal axis of a figure: where the text in sight and the chosen token are, and a click goes there. */
class Axis {
  constructor(root, view) {
    this.view = view;
    this.plot = root.querySelector(".plot");
    this.overlay = this.plot.appendChild(element("div", "overlay"));
    this.sight = this.overlay.appendChild(element("div", "sight"));
    this.cursor = this.overlay.appendChild(element("div", "cursor"));
    this.plot.addEventListener("click", (event) => view.goTo(this.tokenAt(event.clientX)));
    view.on("token", () => this.mark());
    view.on("sight", () => this.mark());
    view.on("reading", () => this.mark());
    onResize(this.plot, () => this.mark());
  }

  get width() {
    return this.plot.clientWidth;
  }

  get length() {
    return Math.max(1, this.view.reading.length);
  }

  setHeight(height) {
    this.plot.style.height = `${height}px`;
  }

  x(token) {
    return (token / this.length) * this.width;
  }

  tokenAt(clientX) {
    const share = (clientX - this.plot.getBoundingClientRect().left) / this.width;
    return Math.max(0, Math.min(this.length - 1, Math.floor(share * this.length)));
  }

  mark() {
    const [from, to] = this.view.inSight;
    this.sight.style.left = `${this.x(from)}px`;
    this.sight.style.width = `${Math.max(2, this.x(to) - this.x(from))}px`;
    const { token } = this.view;
    this.cursor.hidden = token === null;
    if (token !== null) this.cursor.style.left = `${this.x(token + 0.5)}px`;
  }
}

/** Round values from low to high, about so many. */
function ticks(low, high, about) {
  const step = roundStep((high - low) / about || 1);
  const values = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) values.push(v);
  return values;
}

class Chart {
  constructor(root, view, height) {
    this.root = root;
    this.view = view;
    this.height = height;
    this.axis = new Axis(root, view);
    this.svg = this.axis.plot.insertBefore(svg("svg", { "aria-hidden": "true" }), this.axis.overlay);
    this.axis.setHeight(height);
    this.axis.plot.addEventListener("pointermove", (event) => this.say(this.readAt(this.axis.tokenAt(event.clientX))));
    this.axis.plot.addEventListener("pointerleave", () => this.say(""));
    for (const what of ["reading", "theme"]) view.on(what, () => this.draw());
    onResize(root, () => this.draw());
  }

  draw() {
    const width = this.axis.width;
    if (width < 10) return;
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", this.height);
    this.svg.replaceChildren(...this.shapes(width));
  }

  say(text) {
    this.root.querySelector(".says").textContent = text;
  }

  /** The vertical axis, and horizontal lines at round values. @param below pixels kept free under the plot. */
  frame(low, high, shown, below = 0) {
    const y = (v) => this.height - 20 - below - ((v - low) / (high - low || 1)) * (this.height - 30 - below);
    const shapes = ticks(low, high, 4).flatMap((v) => [
      svg("line", { class: v === 0 ? "zero" : "grid", x1: 0, x2: this.axis.width, y1: y(v), y2: y(v) }),
      svg("text", { class: "tick", x: -6, y: y(v) + 4, "text-anchor": "end" }, shown(v)),
    ]);
    const most = Math.max(2, Math.floor(this.axis.width / 90));
    for (const token of ticks(0, this.axis.length, most).filter(Number.isInteger)) {
      const x = this.axis.x(token);
      if (x > this.axis.width + 1) continue;
      const anchor = token === 0 ? "start" : x > this.axis.width - 20 ? "end" : "middle";
      shapes.push(svg("text", { class: "tick", x, y: this.height - 3, "text-anchor": anchor }, count(token)));
    }
    return { y, shapes };
  }
}

const pathOf = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Labels at the ends of lines, moved apart where they would cover each other. */
function apart(labels, distance, low, high) {
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + distance);
  for (let i = labels.length - 1, limit = high; i >= 0; i--, limit = labels[i + 1].y - distance) {
    labels[i].y = Math.max(low, Math.min(labels[i].y, limit));
  }
  return labels;
}

/** How far the inner weights have come, a line for each layer. */
class DriftChart extends Chart {
  shapes(width) {
    const { reading } = this.view;
    const points = reading.drift;
    const layers = reading.about.layers;
    const high = Math.max(0.01, ...points.map((point) => Math.max(...point.layers)));
    const { y, shapes } = this.frame(0, high, (v) => `${figure(100 * v)} %`);
    const { depth } = colorsOf(this.root);
    const labels = [];
    for (let layer = 0; layer < layers; layer++) {
      const color = `rgb(${between(depth, layers > 1 ? layer / (layers - 1) : 1).join(" ")})`;
      const line = points.map((point) => [this.axis.x(point.at), y(point.layers[layer])]);
      shapes.push(svg("path", { class: "line", d: pathOf(line), style: `stroke: ${color}` }));
      labels.push({ layer, y: line.at(-1)[1], value: points.at(-1).layers[layer] });
    }
    for (const { layer, y: at } of apart(this.chosen(labels), 13, 8, this.height - 18)) {
      shapes.push(svg("text", { class: "label", x: width + 5, y: at + 4 }, `layer ${layer}`));
    }
    return shapes;
  }

  /** All layers, or of many the first, the last, and those that came furthest and least far. */
  chosen(labels) {
    if (labels.length <= 8) return labels;
    const sorted = [...labels].sort((a, b) => a.value - b.value);
    return [...new Set([labels[0], labels.at(-1), sorted[0], sorted.at(-1)])];
  }

  readAt(token) {
    const { drift } = this.view.reading;
    const point = drift.reduce((a, b) => (Math.abs(b.at - token) < Math.abs(a.at - token) ? b : a));
    const layers = point.layers.map((v, layer) => ({ v, layer }));
    const shown = layers.length <= 6 ? layers : layers.sort((a, b) => b.v - a.v).slice(0, 4);
    return `after ${count(point.at)} tokens: ${shown.map(({ v, layer }) => `layer ${layer} ${figure(100 * v)} %`).join(", ")}`;
  }
}

const STRIP = 46; // pixels of the bars under the lines

/** What a token costs, with the state carried and with the state forgotten again and again. */
class LossChart extends Chart {
  means() {
    const { reading } = this.view;
    const { surprisal } = reading.measures;
    const n = reading.length;
    const bins = Math.max(1, Math.min(40, Math.floor(n / 64)));
    return Array.from({ length: bins }, (_, bin) => {
      const [from, to] = [Math.floor((bin * n) / bins), Math.floor(((bin + 1) * n) / bins)];
      const known = Math.min(to, reading.reset.length);
      const reset = reading.reset.mean(from, known);
      return { from, to, carried: surprisal.mean(from, to), reset, gain: reset - surprisal.mean(from, known) };
    }).filter(({ carried }) => !Number.isNaN(carried));
  }

  shapes(width) {
    const means = (this.bins = this.means());
    if (!means.length) return this.frame(0, 1, figure).shapes;
    const all = means.flatMap(({ carried, reset }) => [carried, reset]).filter((v) => !Number.isNaN(v));
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const room = Math.max(0.05, 0.1 * (high - low));
    const compares = means.some(({ gain }) => !Number.isNaN(gain));
    const strip = compares ? STRIP + 14 : 0;
    const { y, shapes } = this.frame(Math.max(0, low - room), high + room, (v) => figure(v), strip);
    if (compares) shapes.push(...this.bars(means));
    const middle = ({ from, to }) => this.axis.x((from + to) / 2);
    const line = (key) => means.filter((m) => !Number.isNaN(m[key])).map((m) => [middle(m), y(m[key])]);
    const [carried, reset] = [line("carried"), line("reset")];
    if (reset.length > 1) {
      const there = means.filter((m) => !Number.isNaN(m.reset)).map((m) => [middle(m), y(m.carried)]);
      shapes.push(svg("path", { class: "gap", d: `${pathOf(there)}${pathOf(reset.reverse()).replace("M", "L")}Z` }));
      shapes.push(svg("path", { class: "line reset", d: pathOf(reset.reverse()) }));
    }
    shapes.push(svg("path", { class: "line carried", d: pathOf(carried) }));
    const labels = [{ text: "carried", y: carried.at(-1)[1] }];
    if (reset.length > 1) labels.push({ text: "reset", y: reset.at(-1)[1] });
    for (const { text, y: at } of apart(labels, 13, 8, this.height - 24 - strip)) {
      shapes.push(svg("text", { class: `label ${text}`, x: width + 5, y: at + 4 }, text));
    }
    return shapes;
  }

  /** What remembering saves in each part of the text: a bar up; where it costs, a hollow bar down. */
  bars(means) {
    const known = means.filter(({ gain }) => !Number.isNaN(gain));
    const most = Math.max(0.01, ...known.map(({ gain }) => Math.abs(gain)));
    const lowest = Math.min(0, ...known.map(({ gain }) => gain));
    const highest = Math.max(0, ...known.map(({ gain }) => gain));
    const scale = (STRIP - 4) / (highest - lowest || most);
    const zero = this.height - 22 + lowest * scale;
    const shapes = known.map(({ from, to, gain }) => svg("rect", {
      class: gain < 0 ? "saving costs" : "saving",
      x: this.axis.x(from) + 0.5,
      width: Math.max(1, this.axis.x(to) - this.axis.x(from) - 1),
      y: gain < 0 ? zero : zero - gain * scale,
      height: Math.abs(gain) * scale,
    }));
    shapes.push(svg("line", { class: "zero", x1: 0, x2: this.axis.width, y1: zero, y2: zero }));
    shapes.push(svg("text", { class: "tick", x: -6, y: zero - highest * scale + 8, "text-anchor": "end" }, figure(highest, 2)));
    shapes.push(svg("text", { class: "tick", x: -6, y: zero + 4, "text-anchor": "end" }, highest * scale > 16 ? "0" : ""));
    shapes.push(svg("text", { class: "label", x: this.axis.width + 5, y: zero - (highest * scale) / 2 + 4 }, "saved"));
    return shapes;
  }

  readAt(token) {
    const bin = this.bins?.find(({ from, to }) => from <= token && token < to);
    if (!bin) return "";
    const place = `tokens ${count(bin.from)}–${count(bin.to - 1)}: carried ${figure(bin.carried)}`;
    return Number.isNaN(bin.reset) ? place : `${place}, reset ${figure(bin.reset)}, saved ${figure(bin.gain)}`;
  }
}
