// The live page: what the server tells, and what it is asked for.

const REDRAWN = 250; // milliseconds between two drawings of the figures while text comes

class Live {
  constructor(view) {
    this.view = view;
    this.about = view.reading.about;
    this.sides = ["A", "B"];
    this.waiting = new Set(); // sides with text that is not shown yet
    this.drawnAt = 0;
    this.form = find(".prompt");
    this.told = find(".told");
    this.panes = this.sides.map((side) => find(`.pane[data-side=${side}]`));
    this.panes.forEach((pane, i) => this.steer(pane, this.sides[i]));
    this.prepareForm();
    this.listen();
  }

  listen() {
    const source = new EventSource("events");
    source.onmessage = ({ data }) => this.hear(JSON.parse(data));
    source.onopen = () => this.say("");
    source.onerror = () => this.say("The server does not answer. Is it still running?", true);
  }

  hear(event) {
    const side = this.sides.indexOf(event.side);
    const pane = this.panes[side];
    const kinds = {
      advance: () => this.advance(side, event),
      side: () => this.replace(side, event),
      states: () => this.showStates(event.states),
      named: () => (pane.querySelector(".state-name").textContent = event.name),
      learning: () => this.showLearning(pane, event.learning),
      busy: () => this.showBusy(event.busy),
      error: () => this.say(event.message, true),
    };
    kinds[event.kind]?.();
  }

  advance(side, event) {
    this.view.readings[side].append(event);
    this.waiting.add(side);
    this.redraw();
  }

  replace(side, event) {
    const reading = new Reading(this.about);
    event.history.forEach((one) => reading.append(one));
    this.view.readings[side] = reading;
    this.panes[side].querySelector(".state-name").textContent = event.name;
    this.showLearning(this.panes[side], event.learning);
    if (side === this.view.side) [this.view.hovered, this.view.chosen, this.view.passage] = [null, null, null];
    this.view.panes[side].layOut();
    this.view.tell("reading");
    this.view.tell("token");
  }

  /** The text at once; the figures now and then, since drawing them takes longer. */
  redraw() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => {
      this.asked = null;
      for (const side of this.waiting) this.view.panes[side].extend();
      this.waiting.clear();
      this.due ??= setTimeout(() => {
        this.due = null;
        this.drawnAt = performance.now();
        this.view.tell("reading");
      }, Math.max(0, this.drawnAt + REDRAWN - performance.now()));
    });
  }

  say(text, isError = false) {
    this.told.textContent = text;
    this.told.classList.toggle("error", isError);
  }

  async ask(what, body) {
    this.say("");
    try {
      const headers = { "Content-Type": "application/json" };
      const response = await fetch(what, { method: "POST", headers, body: JSON.stringify(body) });
      if (response.ok) return true;
      this.say((await response.json()).error, true);
    } catch (error) {
      this.say(`The server does not answer: ${error.message}`, true);
    }
    return false;
  }

  // ---- The prompt

  prepareForm() {
    const { form } = this;
    const text = form.querySelector("textarea");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(Number(form.querySelector(".max-tokens").value));
    });
    form.querySelector(".read").addEventListener("click", () => this.send(0));
    form.querySelector(".stop").addEventListener("click", () => this.ask("stop", {}));
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    const compare = form.querySelector(".compare input");
    compare.addEventListener("change", () => {
      document.body.classList.toggle("two", compare.checked);
      if (!compare.checked) this.view.focusSide(0);
      this.view.panes.forEach((pane) => pane.layOut());
    });
  }

  async send(tokens) {
    const text = this.form.querySelector("textarea");
    const sides = document.body.classList.contains("two") ? this.sides : ["A"];
    const temperature = Number(this.form.querySelector(".temperature").value);
    const seed = Math.floor(Math.random() * 2 ** 31);
    const wasBusy = this.form.classList.contains("busy");
    this.showBusy(true); // now, since the server's word may come after the end of a short turn
    for (const pane of this.view.panes) pane.follows = true;
    if (await this.ask("turn", { sides, text: text.value, tokens, temperature, seed })) text.value = "";
    else this.showBusy(wasBusy);
  }

  showBusy(busy) {
    this.form.classList.toggle("busy", busy);
    for (const name of ["write", "read"]) this.form.querySelector(`.${name}`).disabled = busy;
    this.form.querySelector(".stop").disabled = !busy;
    if (!busy) for (const pane of this.view.panes) pane.follows = false;
  }

  // ---- The states

  steer(pane, side) {
    const slider = pane.querySelector(".learning input");
    slider.addEventListener("input", () => this.showLearning(pane, Number(slider.value)));
    slider.addEventListener("change", () => this.ask("learning", { side, learning: Number(slider.value) }));
    pane.querySelector(".remember").addEventListener("click", () => this.ask("remember", { side }));
    const back = pane.querySelector(".back");
    back.addEventListener("change", () => {
      const state = /^\d+$/.test(back.value) ? Number(back.value) : back.value;
      back.value = "";
      this.ask("back", { side, state });
    });
    this.showStates([]);
  }

  showLearning(pane, learning) {
    pane.querySelector(".learning input").value = learning;
    pane.querySelector(".learning output").textContent = learning === 0 ? "off" : figure(learning, 2);
  }

  showStates(states) {
    this.panes.forEach((pane, i) => {
      const other = this.sides[1 - i];
      const options = [
        ["", "Go back to …"],
        ...states.map(({ id, name, tokens }) => [String(id), `${name} (${count(tokens)} tokens)`]),
        ["start", "start: nothing read"],
        [other, `what side ${other} is now`],
      ];
      pane.querySelector(".back").replaceChildren(...options.map(([value, text]) => {
        const option = element("option", "", text);
        option.value = value;
        return option;
      }));
    });
  }
}
