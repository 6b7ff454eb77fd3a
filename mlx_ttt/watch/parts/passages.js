// The ten passages from which the model learned most, as links into the text.

class Passages {
  constructor(root, view) {
    this.list = root.querySelector("ol");
    this.view = view;
    view.on("reading", () => this.show());
  }

  show() {
    const { reading } = this.view;
    this.found = reading.passages();
    const largest = this.found[0]?.norm || 1;
    this.list.replaceChildren(...this.found.map(({ from, to, norm }) => {
      const item = element("li");
      const link = item.appendChild(element("a"));
      link.href = `#t${from}-${to}`;
      link.append(element("q", "", this.quote(from, to)));
      const facts = link.appendChild(element("span", "facts"));
      const bar = facts.appendChild(element("span", "bar"));
      bar.appendChild(element("i")).style.width = `${(100 * norm) / largest}%`;
      facts.append(`tokens ${count(from)}–${count(to - 1)}, ${figure(norm)} a token`);
      return item;
    }));
  }

  /** A passage on one line, with dots where it begins or ends within a word. */
  quote(from, to) {
    const { reading } = this.view;
    const isWithin = (token) => /[\p{L}\p{N}]{2}/u.test(
      reading.textBetween(token - 1, token).slice(-1) + reading.textBetween(token, token + 1).slice(0, 1));
    const text = reading.textBetween(from, to).trim().replace(/\s*\n\s*/g, " / ");
    return `${from > 0 && isWithin(from) ? "…" : ""}${text}${to < reading.length && isWithin(to) ? "…" : ""}`;
  }

  /** The next passage in the order of the list, or the one before. */
  step(by) {
    const found = this.found ?? [];
    if (!found.length) return;
    const now = found.findIndex(({ from }) => this.view.passage?.[0] === from);
    const next = now < 0 ? (by > 0 ? 0 : found.length - 1) : (now + by + found.length) % found.length;
    location.hash = `#t${found[next].from}-${found[next].to}`;
  }
}
