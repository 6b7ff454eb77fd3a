// The token at hand: its figures, the heads that learned most from it, and all heads in its mini-batch.

class Inspector {
  constructor(root, view) {
    this.root = root;
    this.view = view;
    this.means = new WeakMap();
    this.grid = new HeadGrid(root.querySelector("canvas"), view);
    view.on("token", () => this.show());
    view.on("reading", () => this.show());
    view.on("theme", () => this.show());
    onResize(root, () => this.show());
  }

  show() {
    const { reading, token } = this.view;
    const isEmpty = token === null || token >= reading.length;
    this.root.classList.toggle("empty", isEmpty);
    if (isEmpty) return;
    const name = reading.names[token];
    const quoted = this.root.querySelector(".quoted");
    quoted.textContent = name ?? reading.textOf(token).replaceAll("\n", "↵");
    quoted.classList.toggle("name", name !== undefined);
    const before = reading.textBetween(Math.max(0, token - 12), token).slice(-28);
    const after = reading.textBetween(Math.min(token + 1, reading.length), Math.min(token + 13, reading.length));
    this.root.querySelector(".before").textContent = before.replaceAll("\n", "↵");
    this.root.querySelector(".after").textContent = after.slice(0, 28).replaceAll("\n", "↵");
    const place = `token ${count(token)} of ${count(reading.length)}`;
    this.root.querySelector(".place").textContent = reading.isWritten(token) ? `${place}, written by the model` : place;
    for (const [key, { unit }] of Object.entries(MEASURES)) {
      const values = reading.measures[key];
      const cell = this.root.querySelector(`[data-figure="${key}"]`);
      cell.querySelector("b").textContent = figure(values.at(token));
      cell.querySelector("small").textContent = `${unit} ${this.beside(values, token)}`.trim();
      cell.classList.toggle("current", key === this.view.measure);
    }
    this.showHeads(reading, token);
    const column = reading.columnOf(token);
    const from = column * reading.width;
    const to = Math.min(from + reading.width, reading.length);
    const what = reading.width === reading.about.miniBatch ? "Its mini-batch" : "Its mini-batches";
    this.root.querySelector(".mini-batch").textContent = `${what}, ${count(from)}–${count(to - 1)}, by head`;
    this.grid.show(reading, column, reading.strongestOf(token));
  }

  /** A value beside the mean. */
  beside(values, token) {
    const times = values.at(token) / this.meanOf(values);
    return Number.isNaN(times) ? "" : `${figure(times, 2)}× mean`;
  }

  /** Of all tokens; computed again when there are more. */
  meanOf(values) {
    const kept = this.means.get(values);
    if (kept?.length === values.length) return kept.mean;
    const mean = values.mean();
    this.means.set(values, { length: values.length, mean });
    return mean;
  }

  showHeads(reading, token) {
    const heads = reading.strongestOf(token);
    const largest = heads[0]?.norm || 1;
    const rows = heads.map(({ layer, head, norm }) => {
      const row = element("li");
      row.append(element("span", "head", `layer ${layer}, head ${head}`));
      const bar = row.appendChild(element("span", "bar"));
      bar.appendChild(element("i")).style.width = `${(100 * norm) / largest}%`;
      row.append(element("span", "norm", figure(norm)));
      return row;
    });
    this.root.querySelector(".heads").replaceChildren(...rows);
  }
}

/** Layers x heads of one column. */
class HeadGrid {
  constructor(canvas, view) {
    this.canvas = canvas;
    this.view = view;
  }

  show(reading, column, strongest) {
    const { layers, heads } = reading.about;
    const width = this.canvas.parentElement.clientWidth;
    if (!width || !reading.columns.length) return;
    const left = 52;
    const cellWidth = Math.min(40, (width - left) / heads);
    const cellHeight = Math.max(6, Math.min(18, 150 / layers));
    const context = prepared(this.canvas, width, layers * cellHeight + 22);
    context.translate(0, 4); // room for the first label
    const heat = heatOf(reading.columns);
    const colors = colorsOf(this.canvas);
    context.font = colors.font;
    context.textBaseline = "middle";
    for (let layer = 0; layer < layers; layer++) {
      if (layers * 11 < layers * cellHeight || layer % Math.ceil(12 / cellHeight) === 0) {
        context.fillStyle = colors.muted;
        context.textAlign = "right";
        context.fillText(`layer ${layer}`, left - 6, (layer + 0.5) * cellHeight);
      }
      for (let head = 0; head < heads; head++) {
        const place = column * reading.allHeads + layer * heads + head;
        context.fillStyle = heat.css(reading.columns.codes[place] ?? 0);
        context.fillRect(left + head * cellWidth, layer * cellHeight, cellWidth - 1, cellHeight - 1);
      }
    }
    context.textAlign = "center";
    const every = Math.ceil(26 / cellWidth);
    for (let head = 0; head < heads; head += every) {
      context.fillStyle = colors.muted;
      context.fillText(head ? String(head) : "head 0", left + (head + 0.5) * cellWidth, layers * cellHeight + 9);
    }
    strongest.forEach(({ layer, head }, place) => {
      context.strokeStyle = colors.ink;
      context.lineWidth = place ? 1 : 2;
      context.strokeRect(left + head * cellWidth, layer * cellHeight, cellWidth - 1, cellHeight - 1);
    });
  }
}
