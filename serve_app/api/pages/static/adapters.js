// The adapters of the request: a searchable list of those that fit the base, and a row with a scale for each chosen.

import { byId, bytes, h, icon, modelName, plural } from "./dom.js";

const SHOWN = 50; // more than anybody scrolls through; typing narrows the list

export class Adapters extends EventTarget {
  #known = []; // rows of the catalog
  #chosen = new Map(); // id -> {row, scale}
  #base = null;
  #active = -1;

  constructor() {
    super();
    this.input = byId("adapter");
    this.list = byId("adapter-list");
    this.input.addEventListener("input", () => this.#open());
    this.input.addEventListener("focus", () => this.#open());
    this.input.addEventListener("click", () => this.#open());
    this.input.addEventListener("blur", () => this.#close());
    this.input.addEventListener("keydown", (event) => this.#key(event));
    // Before the input loses the focus, which would close the list under the pointer.
    this.list.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const option = event.target.closest("[role=option]");
      if (option) this.#take(option.dataset.id);
    });
  }

  // The catalog again. In a list that is open, what is under the pointer or what Enter takes stays where it is: what is
  // new comes below.
  set known(rows) {
    this.#known = rows;
    if (this.list.hidden) return;
    const shown = new Set(this.#options.map(({ dataset }) => dataset.id));
    this.#append(this.#matches().filter(({ id }) => !shown.has(id)));
  }

  // The adapters as a request names them.
  get value() {
    return [...this.#chosen].map(([id, { scale }]) => ({ id, scale: Number(scale.value) }));
  }

  get ids() {
    return [...this.#chosen.keys()];
  }

  // Changes the base; returns the ids of those that were made for another one, which are dropped.
  fit(base) {
    this.#base = base;
    const misfits = this.ids.filter((id) => {
      const row = this.#known.find((one) => one.id === id);
      return row && row.base_model !== base;
    });
    misfits.forEach((id) => this.remove(id));
    if (!this.list.hidden) this.#open();
    return misfits;
  }

  clear() {
    this.ids.forEach((id) => this.remove(id));
  }

  // What the chosen adapters set of the steps, by the names of a request.
  get defaults() {
    const all = this.ids.map((id) => this.#defaults(id));
    return all.find(({ scheduler }) => scheduler) ?? all.find((one) => sampling(one)) ?? {};
  }

  // A scale that is not given is the adapter's own.
  add(id, value = this.#defaults(id).scale ?? 1) {
    if (this.#chosen.has(id)) return;
    const row = this.#row(id, value);
    this.#chosen.set(id, row);
    byId("adapters").append(row.row);
    this.#changed();
  }

  remove(id) {
    this.#chosen.get(id)?.row.remove();
    this.#chosen.delete(id);
    this.#changed();
  }

  // Marks the adapters that a message names; returns whether there is one.
  blame(message) {
    let isAny = false;
    for (const [id, { row }] of this.#chosen) {
      const isNamed = message.includes(id);
      row.classList.toggle("blamed", isNamed);
      isAny ||= isNamed;
    }
    return isAny;
  }

  #row(id, value) {
    const slider = h("input", { type: "range", min: 0, max: 2, step: 0.05, value, "aria-label": `Scale of ${id}, slider` });
    const scale = h("input", { type: "number", step: 0.05, value, inputmode: "decimal", "aria-label": `Scale of ${id}` });
    slider.addEventListener("input", () => (scale.value = slider.value));
    scale.addEventListener("input", () => (slider.value = scale.value));
    const remove = h("button.plain.square", { type: "button", "aria-label": `Remove ${id}` }, icon("close"));
    remove.addEventListener("click", () => {
      this.remove(id);
      this.input.focus();
    });
    const { trigger_words: words, ...defaults } = this.#defaults(id);
    const set = sampling(defaults);
    const row = h(
      "li.adapter", { "data-id": id },
      h("div.adapter-head", {}, modelName(id), words && this.#trigger(words), remove),
      h("div.scale", {}, slider, scale),
      set ? h("span.hint", {}, `Sets ${set}`) : null,
    );
    return { row, scale };
  }

  #defaults(id) {
    return this.#known.find((one) => one.id === id)?.defaults ?? {};
  }

  // The words that the adapter wants in the prompt.
  #trigger(words) {
    const add = () => this.dispatchEvent(new CustomEvent("words", { detail: words }));
    return h("button.words", { type: "button", title: `Add “${words}” to the prompt`, onclick: add }, `+ ${words}`);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  #matches() {
    const words = this.input.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    return this.#known.filter(
      (row) =>
        (!this.#base || row.base_model === this.#base) &&
        !this.#chosen.has(row.id) &&
        words.every((word) => [row.id, ...(row.aliases ?? [])].some((name) => name.toLowerCase().includes(word))),
    );
  }

  #open() {
    const found = this.#matches();
    const typed = this.input.value.trim();
    const isNew = typed && !found.some((row) => row.id === typed) && !this.#chosen.has(typed);
    const own = option(typed, h("span.model", {}, `Use “${typed}”`), "by its id on the Hub or in a folder");
    this.list.replaceChildren();
    this.#append(found, isNew ? [own] : []);
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.#activate(typed ? 0 : -1);
    this.list.scrollIntoView({ block: "nearest" });
  }

  // Adds rows of the catalog below those that are shown, as many as there is room for, and `others` below them.
  #append(rows, others = []) {
    const room = Math.max(0, SHOWN - this.#options.length);
    const more = rows.length - room;
    this.list.querySelector(".note")?.remove();
    this.list.append(...rows.slice(0, room).map((row) => option(row.id, modelName(row.id), facts(row))), ...others);
    const options = this.#options;
    options.forEach((one, at) => (one.id = `adapter-option-${at}`));
    if (more > 0) this.list.append(note(`${more} more; type to narrow the list`));
    else if (!options.length) this.list.append(note("No further adapters for this base"));
  }

  #close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.#activate(-1);
  }

  #take(id) {
    this.input.value = "";
    this.add(id);
    this.#close();
  }

  get #options() {
    return [...this.list.querySelectorAll("[role=option]")];
  }

  #activate(index) {
    const options = this.#options;
    this.#active = options.length ? Math.max(-1, Math.min(index, options.length - 1)) : -1;
    options.forEach((one, at) => one.setAttribute("aria-selected", String(at === this.#active)));
    const active = this.list.hidden ? undefined : options[this.#active];
    if (active) this.input.setAttribute("aria-activedescendant", active.id);
    else this.input.removeAttribute("aria-activedescendant");
    active?.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey) return;
    const isOpen = !this.list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!isOpen) this.#open();
      this.#activate(this.#active + (event.key === "ArrowDown" ? 1 : -1));
    } else if (event.key === "Enter") {
      event.preventDefault(); // never the whole form
      const option = isOpen && this.#options[this.#active];
      if (option) this.#take(option.dataset.id);
    } else if (event.key === "Escape" && isOpen) {
      event.stopPropagation(); // this closes the list, and cancels nothing
      this.#close();
    }
  }
}

const option = (id, name, note) =>
  h("li.option", { role: "option", "aria-selected": "false", "data-id": id }, name, h("span.hint", {}, note));

const note = (text) => h("li.note", { role: "presentation" }, text);

// What an adapter sets of the steps, in words; empty for nothing.
function sampling({ num_inference_steps: steps, timesteps, sigmas, guidance_scale: guidance, scheduler }) {
  const count = steps ?? timesteps?.length ?? sigmas?.length;
  return [
    count && plural(count, "step"), guidance != null && `guidance ${guidance}`, scheduler && `scheduler ${scheduler}`,
  ].filter(Boolean).join(", ");
}

function facts(row) {
  const held = row.resident?.length ? `held by ${plural(row.resident.length, "replica")}` : null;
  const size = row.size_bytes ? bytes(row.size_bytes) : null;
  return [row.rank ? `rank ${row.rank}` : null, size, held].filter(Boolean).join(" · ");
}
