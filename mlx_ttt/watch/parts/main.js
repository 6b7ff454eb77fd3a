// The page: what is shown now, and who is told when that changes.

class View {
  constructor(readings) {
    this.readings = readings;
    this.side = 0; // of two texts, the one that the figures are of
    this.measure = "surprisal";
    this.hovered = null;
    this.chosen = null;
    this.passage = null; // from which token to behind which, where a link led
    this.inSight = [0, 0];
    this.panes = [];
    this.listeners = {};
  }

  get reading() {
    return this.readings[this.side];
  }

  /** The token whose figures are shown. */
  get token() {
    return this.hovered ?? this.chosen;
  }

  on(what, listener) {
    (this.listeners[what] ??= []).push(listener);
  }

  tell(what) {
    for (const listener of this.listeners[what] ?? []) listener();
  }

  setMeasure(measure) {
    this.measure = measure;
    this.tell("measure");
    this.tell("token");
  }

  focusSide(side) {
    if (side === this.side) return;
    this.side = side;
    [this.hovered, this.chosen, this.passage] = [null, null, null];
    this.inSight = this.panes[side].tokensInSight();
    this.tell("reading");
    this.tell("token");
  }

  hover(token, side = this.side) {
    if (token !== null) this.focusSide(side);
    if (token === this.hovered) return;
    this.hovered = token;
    this.tell("token");
  }

  choose(side, token) {
    this.focusSide(side);
    this.chosen = token;
    this.hovered = null;
    this.tell("token");
  }

  goTo(token, passage = null) {
    this.passage = passage;
    this.choose(this.side, token);
    this.panes[this.side].show(token);
    this.tell("token");
  }

  scrolled(side) {
    if (side !== this.side) return;
    this.inSight = this.panes[side].tokensInSight();
    this.tell("sight");
  }
}

const find = (selector) => document.querySelector(selector);

/** The switch between measures, and what its shades mean. */
function showMeasures(view) {
  const group = find(".measures");
  for (const [key, { name, says }] of Object.entries(MEASURES)) {
    const label = group.appendChild(element("label"));
    const input = label.appendChild(element("input"));
    Object.assign(input, { type: "radio", name: "measure", value: key, checked: key === view.measure });
    input.addEventListener("change", () => view.setMeasure(key));
    label.append(name);
    label.title = says;
  }
  const legend = find(".legend");
  const show = () => {
    const { unit, says } = MEASURES[view.measure];
    const shades = new Shades(view.reading.measures[view.measure]);
    legend.dataset.measure = view.measure;
    legend.replaceChildren(...Array.from({ length: LEVELS }, (_, level) => {
      const last = level === LEVELS - 1 ? "+" : "";
      return element("span", `t s${level}`, `${figure(shades.from(level), 2)}${last}`);
    }));
    find(".says-measure").textContent = unit ? `${says}, in ${unit}` : says;
  };
  view.on("measure", show);
  view.on("reading", show);
  show();
}

function showSummary(view) {
  const show = () => {
    const { about } = view.reading;
    find(".tokens").textContent = count(view.reading.length);
    find(".mean-surprisal").textContent = figure(view.reading.measures.surprisal.mean());
    const drift = view.reading.drift.at(-1).layers;
    const most = Math.max(...drift);
    find(".most-drift").textContent = `${figure(100 * most)} %`;
    find(".most-drift-layer").textContent = most ? `of its start weights: layer ${drift.indexOf(most)} moved most` : "";
    const gain = find(".gain");
    const { reset, measures } = view.reading;
    const known = reset.length > 1;
    // A page has the exact figure: the difference of rounded numbers is rounded more.
    const saved = !known ? NaN : about.gain ?? reset.mean() - measures.surprisal.mean(0, reset.length);
    gain.textContent = figure(saved, 2);
    const half = about.gainHalfWidth;
    const every = `a token, beside forgetting every ${count(view.reading.resetEvery)}`;
    find(".gain-says").textContent = !known ? "too short to compare with forgetting"
      : `${half ? `± ${figure(half, 2)} ` : ""}nats ${every}`;
    find(".loss .says-reset").textContent = known ? `reset: the state is forgotten every ${count(view.reading.resetEvery)} tokens` : "";
  };
  view.on("reading", show);
  show();
}

/** Links such as #t120 and #t120-152. */
function followLinks(view) {
  const follow = () => {
    const link = /^#t(\d+)(?:-(\d+))?$/.exec(location.hash);
    if (!link) return;
    const from = Math.min(Number(link[1]), view.reading.length - 1);
    if (from >= 0) view.goTo(from, link[2] ? [from, Number(link[2])] : null);
  };
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#t']");
    if (link && link.hash === location.hash) follow(); // a second click changes nothing, but should lead there again
  });
  follow();
}

/** Find in the text: a browser's own search sees only what is in sight. */
function findInText(view) {
  const input = find(".find input");
  const says = find(".find output");
  const next = (back) => {
    const { reading } = view;
    const wanted = input.value.toLowerCase();
    if (!wanted) return void (says.textContent = "");
    const text = reading.text.toLowerCase();
    const here = view.chosen === null ? (back ? text.length : -1) : reading.starts.array[view.chosen];
    let at = back ? text.lastIndexOf(wanted, here - 1) : text.indexOf(wanted, here + 1);
    if (here <= 0 && back) at = text.lastIndexOf(wanted);
    if (at < 0) at = back ? text.lastIndexOf(wanted) : text.indexOf(wanted);
    says.textContent = at < 0 ? "not found" : "";
    if (at >= 0) view.goTo(reading.tokenAt(at), [reading.tokenAt(at), reading.tokenAt(at + wanted.length - 1) + 1]);
  };
  find(".find").addEventListener("submit", (event) => {
    event.preventDefault();
    next(false);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.shiftKey) {
      event.preventDefault();
      next(true);
    }
    if (event.key === "Escape") view.panes[view.side].root.focus();
  });
}

function listenToKeys(view, passages) {
  const keys = {
    1: () => find("input[value=surprisal]").click(),
    2: () => find("input[value=write]").click(),
    3: () => find("input[value=loss]").click(),
    n: () => passages.step(1),
    p: () => passages.step(-1),
    t: () => view.panes[view.side].root.focus(),
    "/": () => find(".find input").focus(),
    "?": () => find(".help").toggleAttribute("open"),
  };
  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("textarea, select, input:not([type=radio]):not([type=range])");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
}

/** Follows the system, until somebody chooses. */
function chooseTheme(view) {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  find(".theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    root.dataset.theme = isDark ? "light" : "dark";
    view.tell("theme");
  });
  dark.addEventListener("change", () => view.tell("theme"));
}

const PRINTED_TOKENS = 20000; // a longer text is printed as far as it is in sight

function preparePrint(view) {
  addEventListener("beforeprint", () => {
    for (const pane of view.panes) if (pane.reading.length <= PRINTED_TOKENS) pane.paintAll();
  });
  addEventListener("afterprint", () => view.panes.forEach((pane) => pane.paint(true)));
}

function start() {
  const about = JSON.parse(find("#about").textContent);
  const arrays = {};
  for (const block of document.querySelectorAll("script[data-array]")) {
    arrays[block.dataset.array] = block.textContent;
    block.remove();
  }
  const readings = about.live ? [new Reading(about), new Reading(about)] : [Reading.ofPage(about, arrays)];
  const view = new View(readings);
  view.panes = [...document.querySelectorAll(".pane .text")].slice(0, readings.length)
    .map((root, side) => new TextPane(root, view, side));
  showMeasures(view);
  showSummary(view);
  new Inspector(find(".inspector"), view);
  new HeatMap(find(".map"), view);
  new DriftChart(find(".drift"), view, 190);
  new LossChart(find(".loss"), view, 240);
  const passages = new Passages(find(".passages"), view);
  findInText(view);
  listenToKeys(view, passages);
  chooseTheme(view);
  preparePrint(view);
  for (const pane of view.panes) pane.layOut();
  if (about.live) view.live = new Live(view);
  view.tell("reading");
  followLinks(view);
  document.documentElement.dataset.ready = "yes";
}

start();
