// Numbers in one byte each, and arrays that grow.

const MU = 1000;
const LARGEST = 254;
const NOTHING = 255; // the code of a value that is not there

/** The bytes of base64 text. */
function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

const floatsOf = (base64) => new Float32Array(bytesOf(base64).buffer);
const shortsOf = (base64) => new Uint16Array(bytesOf(base64).buffer);

/** A typed array with room to grow. */
class Growing {
  constructor(array) {
    this.array = array;
    this.length = array.length;
  }

  push(value) {
    this.reserve(this.length + 1);
    this.array[this.length++] = value;
  }

  reserve(length) {
    if (length <= this.array.length) return;
    const larger = new this.array.constructor(Math.max(length, 2 * this.array.length, 64));
    larger.set(this.array);
    this.array = larger;
  }
}

/** Values as codes: code = 254 log(1 + MU v / high) / log(1 + MU). */
class Values {
  constructor(high = 1, codes = new Uint8Array(0)) {
    this.growing = new Growing(codes);
    this.setHigh(high);
  }

  setHigh(high) {
    this.high = high;
    this.table = Float64Array.from({ length: 256 }, (_, code) =>
      code === NOTHING ? NaN : (high * Math.expm1((code * Math.log1p(MU)) / LARGEST)) / MU);
    this.changed();
  }

  changed() {
    this.counts = null;
  }

  get length() {
    return this.growing.length;
  }

  get codes() {
    return this.growing.array;
  }

  at(i) {
    return this.table[this.codes[i]];
  }

  encode(value) {
    if (Number.isNaN(value)) return NOTHING;
    if (value > this.high) this.raise(value);
    return Math.round((LARGEST * Math.log1p((MU * value) / this.high)) / Math.log1p(MU));
  }

  /** Make room for a value above the largest: all codes are written again. */
  raise(value) {
    const before = this.table;
    this.setHigh(2 * value);
    const again = Uint8Array.from(before, (v) => (Number.isNaN(v) ? NOTHING : this.encode(v)));
    for (let i = 0; i < this.length; i++) this.codes[i] = again[this.codes[i]];
  }

  push(value) {
    const code = this.encode(value);
    this.growing.push(code);
    this.changed();
  }

  set(i, value) {
    const code = this.encode(value);
    while (this.length <= i) this.growing.push(0);
    this.codes[i] = code;
    this.changed();
  }

  /** The value below which a share of all lie. */
  quantile(share) {
    if (!this.counts) {
      this.counts = new Uint32Array(256);
      for (let i = 0; i < this.length; i++) this.counts[this.codes[i]]++;
    }
    const known = this.length - this.counts[NOTHING];
    let below = 0;
    for (let code = 0; code < NOTHING; code++) {
      below += this.counts[code];
      if (below > share * known) return this.table[code];
    }
    return known ? this.table[LARGEST] : 0;
  }

  mean(from = 0, to = this.length) {
    let sum = 0;
    let count = 0;
    for (let i = from; i < to; i++) {
      const value = this.at(i);
      if (!Number.isNaN(value)) {
        sum += value;
        count++;
      }
    }
    return count ? sum / count : NaN;
  }
}

/** How values become one of LEVELS shades. Outliers take the last one. */
const LEVELS = 8;

class Shades {
  constructor(values) {
    const high = values.quantile(0.985);
    const low = values.quantile(0.02);
    this.low = low < 0.15 * high ? 0 : low;
    this.step = roundStep((high - this.low) / LEVELS || 1);
    this.low = Math.floor(this.low / this.step) * this.step;
    this.ofCode = Uint8Array.from(values.table, (v) => (Number.isNaN(v) ? 0 : this.level(v)));
  }

  level(value) {
    return Math.max(0, Math.min(LEVELS - 1, Math.floor((value - this.low) / this.step)));
  }

  /** Where a shade begins. */
  from(level) {
    return this.low + level * this.step;
  }
}

/** The nearest of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten. */
function roundStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  const nearest = [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].reduce((a, b) =>
    Math.abs(b * power - step) < Math.abs(a * power - step) ? b : a);
  return nearest * power;
}

/** A number as a person reads it. */
function figure(value, digits = 3) {
  if (value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) >= 10 ** digits) return count(Math.round(value));
  if (Math.abs(value) < 1e-3) return value.toExponential(1).replace("-", "−");
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

/** A whole number with thin spaces: 38 836. */
const count = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, "\u202f");
