// The text of a reading, shaded token by token. Only the lines in sight are in the document.

const MARGIN_LINES = 12; // kept above and below what is in sight

class TextPane {
  /** @param view what is shown; see main.js. @param side the index of its reading. */
  constructor(root, view, side) {
    this.root = root;
    this.view = view;
    this.side = side;
    this.space = root.appendChild(element("div", "space"));
    this.rows = this.space.appendChild(element("div", "rows"));
    this.shownRange = null;
    this.follows = false; // new text is kept in sight
    root.addEventListener("scroll", () => this.paint(), { passive: true });
    root.addEventListener("pointerover", (event) => this.hover(event.target));
    root.addEventListener("pointerleave", () => view.hover(null));
    root.addEventListener("click", (event) => {
      const token = tokenOf(event.target);
      if (token !== null) view.choose(this.side, token);
    });
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focus", () => view.focusSide(this.side));
    new ResizeObserver(() => this.layOut()).observe(root);
    view.on("measure", () => this.shade());
    view.on("token", () => this.mark());
  }

  get reading() {
    return this.view.readings[this.side];
  }

  layOut() {
    const style = getComputedStyle(this.rows);
    const width = this.rows.clientWidth - 2;
    if (width < 40) return;
    const top = this.firstInSight();
    const changed = !this.lines || this.lines.reading !== this.reading || this.lines.width !== width;
    if (!changed) return this.paint();
    const before = this.lines && this.lines.reading === this.reading ? this.lines.starts.array[top] : 0;
    this.lineHeight = parseFloat(style.lineHeight);
    this.lines = new Lines(this.reading, width, `${style.fontSize} ${style.fontFamily}`);
    this.resize();
    this.shade();
    this.root.scrollTop = this.lines.lineOf(before) * this.lineHeight;
    this.paint(true);
  }

  resize() {
    this.space.style.height = `${this.lines.length * this.lineHeight}px`;
  }

  /** Show what has been added to the reading. */
  extend() {
    if (!this.lines || this.lines.reading !== this.reading) return this.layOut();
    const atEnd = this.root.scrollTop + this.root.clientHeight > this.space.offsetHeight - 3 * this.lineHeight;
    this.lines.extend();
    this.resize();
    this.shade();
    if (atEnd || this.follows) this.root.scrollTop = this.space.offsetHeight;
    this.paint(true);
  }

  firstInSight() {
    return this.lineHeight ? Math.floor(this.root.scrollTop / this.lineHeight) : 0;
  }

  /** From the first token in sight to behind the last. */
  tokensInSight() {
    if (!this.lines) return [0, 0];
    const first = Math.min(this.firstInSight(), this.lines.length - 1);
    const last = Math.min(first + Math.ceil(this.root.clientHeight / this.lineHeight), this.lines.length);
    const to = last < this.lines.length ? this.lines.starts.array[last] : this.reading.length;
    return [this.lines.starts.array[first], to];
  }

  shade() {
    this.shades = new Shades(this.reading.measures[this.view.measure]);
    this.root.dataset.measure = this.view.measure;
    this.paint(true);
  }

  paint(again = false) {
    if (!this.lines) return;
    const sight = Math.ceil(this.root.clientHeight / this.lineHeight);
    const first = Math.max(0, this.firstInSight() - MARGIN_LINES);
    const last = Math.min(this.lines.length, this.firstInSight() + sight + MARGIN_LINES);
    if (!again && this.shownRange && this.shownRange[0] === first && this.shownRange[1] === last) {
      return this.view.scrolled(this.side);
    }
    this.shownRange = [first, last];
    this.rows.style.transform = `translateY(${first * this.lineHeight}px)`;
    this.rows.replaceChildren(...this.rowsBetween(first, last));
    this.mark();
    this.view.scrolled(this.side);
  }

  rowsBetween(first, last) {
    const { codes } = this.reading.measures[this.view.measure];
    const rows = [];
    for (let line = first; line < last; line++) {
      const row = element("div", "row");
      row.dir = "auto";
      for (const { token, text } of this.lines.parts(line)) {
        const span = element("span", `t s${this.shades.ofCode[codes[token]]}`);
        span.dataset.i = token;
        span.textContent = text;
        if (this.reading.names[token] !== undefined || /^↵+$/.test(text)) span.classList.add("bare");
        if (this.reading.isWritten(token)) row.classList.add("written");
        row.append(span);
      }
      rows.push(row);
    }
    return rows;
  }

  /** All of the text, for paper. */
  paintAll() {
    if (!this.lines) return;
    this.rows.style.transform = "none";
    this.rows.replaceChildren(...this.rowsBetween(0, this.lines.length));
    this.shownRange = null;
  }

  mark() {
    for (const span of this.rows.querySelectorAll(".chosen, .hovered, .passage")) {
      span.classList.remove("chosen", "hovered", "passage");
    }
    if (this.view.side !== this.side) return;
    const add = (token, name) => {
      for (const span of this.rows.querySelectorAll(`[data-i="${token}"]`)) span.classList.add(name);
    };
    if (this.view.passage) {
      const [from, to] = this.view.passage;
      for (const span of this.rows.querySelectorAll(".t")) {
        if (from <= span.dataset.i && span.dataset.i < to) span.classList.add("passage");
      }
    }
    if (this.view.chosen !== null) add(this.view.chosen, "chosen");
    if (this.view.hovered !== null) add(this.view.hovered, "hovered");
  }

  hover(target) {
    const token = tokenOf(target);
    if (token !== null) this.view.hover(token, this.side);
  }

  /** Bring a token into sight: in the upper third, or just so that it can be seen. */
  show(token, justSo = false) {
    if (!this.lines) return;
    const y = this.lines.lineOf(token) * this.lineHeight;
    const above = this.root.scrollTop;
    const below = above + this.root.clientHeight - 2 * this.lineHeight;
    if (!justSo) this.root.scrollTop = y - this.root.clientHeight / 3;
    else if (y < above) this.root.scrollTop = y;
    else if (y > below) this.root.scrollTop = y - this.root.clientHeight + 2 * this.lineHeight;
    this.paint();
  }

  key(event) {
    if (!this.lines || event.ctrlKey || event.metaKey || event.altKey) return;
    const token = this.view.side === this.side && this.view.chosen !== null ? this.view.chosen : this.tokensInSight()[0];
    const page = Math.max(1, Math.floor(this.root.clientHeight / this.lineHeight) - 2);
    const goes = {
      ArrowLeft: () => token - 1,
      ArrowRight: () => token + 1,
      ArrowUp: () => this.above(token, -1),
      ArrowDown: () => this.above(token, 1),
      PageUp: () => this.above(token, -page),
      PageDown: () => this.above(token, page),
      Home: () => 0,
      End: () => this.reading.length - 1,
    };
    if (!goes[event.key]) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(this.reading.length - 1, goes[event.key]()));
    this.view.choose(this.side, next);
    this.show(next, true);
  }

  /** The token some lines below, at about the same place of its line. */
  above(token, lines) {
    const line = this.lines.lineOf(token);
    const place = token - this.lines.starts.array[line];
    const other = Math.max(0, Math.min(this.lines.length - 1, line + lines));
    const start = this.lines.starts.array[other];
    const end = other + 1 < this.lines.length ? this.lines.starts.array[other + 1] : this.reading.length;
    return Math.max(start, Math.min(start + place, end - 1));
  }
}

function tokenOf(target) {
  const span = target.closest?.("[data-i]");
  return span ? Number(span.dataset.i) : null;
}

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
