// What the model read and what it learned: one Reading for each text on the page.

const MEASURES = {
  surprisal: { name: "Surprisal", unit: "nats", says: "how unexpected the token was for the model" },
  write: { name: "Write norm", unit: "", says: "how much the token changes the inner weights" },
  loss: { name: "Inner loss", unit: "", says: "how badly the inner models knew the token before they learned it" },
};
const STRONGEST = 3;
const NO_HEAD = 0xffff;
const PASSAGE_TOKENS = 32;

class Reading {
  /** @param about what the page says of the model: layers, heads, miniBatch. */
  constructor(about) {
    this.about = about;
    this.allHeads = about.layers * about.heads;
    this.width = about.miniBatch; // tokens of a column
    this.text = "";
    this.starts = new Growing(new Uint32Array(0)); // where each token begins in the text
    this.names = {}; // of tokens that show no text
    this.measures = { surprisal: new Values(), write: new Values(), loss: new Values() };
    this.strongest = new Growing(new Uint16Array(0));
    this.strongestNorm = new Values();
    this.columns = new Values();
    this.drift = [{ at: 0, layers: new Array(about.layers).fill(0) }];
    this.reset = new Values();
    this.resetEvery = about.resetEvery ?? 0;
    this.written = []; // where the model began to write and where it stopped, in turns
  }

  /** The reading of a page, from its data. */
  static ofPage(about, arrays) {
    const reading = new Reading(about);
    const values = (name) => new Values(about.highs[name], bytesOf(arrays[name]));
    const lengths = shortsOf(arrays.lengths);
    const starts = new Uint32Array(lengths.length);
    for (let i = 1; i < lengths.length; i++) starts[i] = starts[i - 1] + lengths[i - 1];
    const points = floatsOf(arrays.drift);
    return Object.assign(reading, {
      width: about.width,
      text: about.text,
      starts: new Growing(starts),
      names: about.names,
      measures: { surprisal: values("surprisal"), write: values("write"), loss: values("loss") },
      strongest: new Growing(shortsOf(arrays.strongest)),
      strongestNorm: values("strongestNorm"),
      columns: values("columns"),
      drift: about.driftAt.map((at, p) => (
        { at, layers: [...points.subarray(p * about.layers, (p + 1) * about.layers)] })),
      reset: values("reset"),
    });
  }

  get length() {
    return this.starts.length;
  }

  textOf(i) {
    const end = i + 1 < this.length ? this.starts.array[i + 1] : this.text.length;
    return this.text.slice(this.starts.array[i], end);
  }

  textBetween(from, to) {
    return this.text.slice(this.starts.array[from], to < this.length ? this.starts.array[to] : this.text.length);
  }

  /** The token that holds a character of the text. */
  tokenAt(character) {
    let [low, high] = [0, this.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts.array[middle] <= character) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  columnOf(i) {
    return Math.floor(i / this.width);
  }

  get columnCount() {
    return this.allHeads ? Math.ceil(this.columns.length / this.allHeads) : 0;
  }

  /** The heads that learned most from a token. */
  strongestOf(i) {
    const heads = [];
    for (let place = i * STRONGEST; place < (i + 1) * STRONGEST; place++) {
      const head = this.strongest.array[place];
      if (head !== NO_HEAD) heads.push({ ...this.headNamed(head), norm: this.strongestNorm.at(place) });
    }
    return heads;
  }

  headNamed(index) {
    return { index, layer: Math.floor(index / this.about.heads), head: index % this.about.heads };
  }

  isWritten(i) {
    return this.written.some(([from, to]) => from <= i && i < (to ?? Infinity));
  }

  /** More tokens, as the server reports them. */
  append(event) {
    for (const text of event.texts) {
      this.starts.push(this.text.length);
      this.text += text;
    }
    Object.assign(this.names, event.names);
    for (const name of Object.keys(MEASURES)) for (const v of floatsOf(event[name])) this.measures[name].push(v);
    for (const head of shortsOf(event.strongest)) this.strongest.push(head);
    for (const v of floatsOf(event.strongestNorm)) this.strongestNorm.push(v);
    floatsOf(event.columns).forEach((v, j) => this.columns.set(event.column * this.allHeads + j, v));
    if (event.drift) this.drift.push(event.drift);
    for (const v of floatsOf(event.reset)) this.reset.push(v);
    const before = this.length - event.texts.length;
    const last = this.written.at(-1);
    if (!event.written || !event.texts.length) return;
    if (last && last[1] === before) last[1] = this.length;
    else this.written.push([before, this.length]);
  }

  /** The passages from which the model learned most, none of them in another, the first one first. */
  passages(most = 10) {
    const norms = this.measures.write;
    const size = Math.min(PASSAGE_TOKENS, this.length);
    const candidates = [];
    const stride = Math.max(1, size >> 2);
    for (let from = 0; from + size <= this.length; from += stride) {
      let sum = 0;
      for (let i = from; i < from + size; i++) sum += norms.at(i);
      candidates.push({ from, to: from + size, norm: sum / size });
    }
    candidates.sort((a, b) => b.norm - a.norm);
    const chosen = [];
    for (const passage of candidates) {
      if (chosen.length === most) break;
      if (chosen.every((other) => passage.to <= other.from || other.to <= passage.from)) chosen.push(passage);
    }
    return chosen;
  }
}
