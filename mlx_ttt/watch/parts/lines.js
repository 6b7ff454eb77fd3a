// Breaks a text into lines of one height, so that any part of a book can be shown without the rest.

const SHOWN_INSTEAD = new Map([["\t", "    "], ["\r", "␍"], ["\u2028", "␤"], ["\u2029", "␤"]]);
const CONTROL = /[\u0000-\u0009\u000b-\u001f\u007f\u2028\u2029]/g;
const NO_TEXT = "·"; // what is shown of a token that is no text

/** A token's text as it is shown. Control characters would be invisible, or change the layout. */
function shown(text) {
  if (text === "") return NO_TEXT;
  return text.replace(CONTROL, (c) => SHOWN_INSTEAD.get(c) ?? String.fromCharCode(0x2400 + (c.charCodeAt(0) & 0x7f)));
}

/** The parts of a token: what ends the line and what begins the next. */
function partsOf(text) {
  if (!text.includes("\n")) return { head: shown(text), breaks: 0, tail: "" };
  const first = text.indexOf("\n");
  const last = text.lastIndexOf("\n");
  const breaks = text.split("\n").length - 1;
  const tail = text.slice(last + 1);
  return { head: (first ? shown(text.slice(0, first)) : "") + "↵".repeat(breaks), breaks, tail: tail && shown(tail) };
}

class Lines {
  /** @param font CSS font, as the lines are shown. */
  constructor(reading, width, font) {
    this.reading = reading;
    this.width = width;
    this.context = document.createElement("canvas").getContext("2d");
    this.context.font = font;
    this.context.fontKerning = "none"; // tokens are measured one by one
    this.widths = new Map();
    this.starts = new Growing(new Uint32Array(0)); // the first token of each line
    this.tails = new Growing(new Uint8Array(0)); // 1: of that token, only what follows its line break
    this.extend();
  }

  get length() {
    return this.starts.length;
  }

  measure(text) {
    let width = this.widths.get(text);
    if (width === undefined) this.widths.set(text, (width = this.context.measureText(text).width));
    return width;
  }

  begin(token, tail = 0) {
    this.starts.push(token);
    this.tails.push(tail);
  }

  /** Break what has been added to the reading. The last line may have room, so it is broken again. */
  extend() {
    let i = 0;
    if (this.length) {
      // Back to a line that begins with a whole token: its width is known.
      while (this.length > 1 && this.tails.array[this.length - 1]) this.starts.length = --this.tails.length;
      this.starts.length = --this.tails.length;
      i = this.starts.array[this.length];
    }
    let x = 0;
    let opportunity = -1; // the last token of this line that a new line may begin with
    let lineStart = i;
    if (i < this.reading.length || !this.length) this.begin(i);
    while (i < this.reading.length) {
      const text = this.reading.textOf(i);
      const { head, breaks, tail } = partsOf(text);
      const width = this.measure(head);
      if (text.startsWith(" ")) opportunity = i;
      const isVisible = head !== "↵".repeat(breaks) || !breaks; // a line break alone may stand in the margin
      if (x + width > this.width && i > lineStart && isVisible) {
        i = opportunity > lineStart ? opportunity : i;
        this.begin(i);
        [x, lineStart, opportunity] = [0, i, -1];
        continue;
      }
      x += width;
      i++;
      if (!breaks) continue;
      for (let blank = 1; blank < breaks; blank++) this.begin(tail ? i - 1 : i, tail ? 2 : 0);
      if (tail) this.begin(i - 1, 1);
      else this.begin(i);
      [x, lineStart, opportunity] = [tail ? this.measure(tail) : 0, i, -1];
    }
  }

  /** The line on which a token begins, or on which the rest of it stands. */
  lineOf(token) {
    let [low, high] = [0, this.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts.array[middle] <= token) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** What a line shows: tokens with their text. */
  parts(line) {
    const first = this.starts.array[line];
    const isLast = line + 1 >= this.length;
    const next = isLast ? this.reading.length : this.starts.array[line + 1];
    const nextIsTail = !isLast && this.tails.array[line + 1];
    if (this.tails.array[line] === 2) return []; // a blank line inside of a token
    const end = nextIsTail ? next + 1 : next; // the next line's first token begins on this one
    const parts = [];
    for (let i = first; i < end; i++) {
      const { head, tail } = partsOf(this.reading.textOf(i));
      parts.push({ token: i, text: i === first && this.tails.array[line] === 1 ? tail : head });
    }
    return parts;
  }
}
