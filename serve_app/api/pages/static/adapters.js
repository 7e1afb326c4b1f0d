// The adapters of the request: a row with a scale for each that was chosen.

import { byId, h, icon, modelName, plural } from "./dom.js";
import { Picker } from "./picker.js";

export class Adapters extends EventTarget {
  #chosen = new Map(); // id -> {row, scale}
  #base = null;

  constructor(pictures) {
    super();
    this.pictures = pictures;
    this.picker = new Picker(pictures, (id) => this.#chosen.has(id));
    this.picker.addEventListener("take", ({ detail }) => this.#take(detail));
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
    const misfits = this.ids.filter((id) => this.#isForAnother(id));
    misfits.forEach((id) => this.remove(id));
    this.picker.fit(base);
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

  // Adds one from the list; where it was made for another base, that one is asked for first.
  #take(id) {
    if (this.#isForAnother(id)) this.dispatchEvent(new CustomEvent("base", { detail: this.picker.row(id).base_model }));
    this.add(id);
  }

  #isForAnother(id) {
    const row = this.picker.row(id);
    return row && row.base_model !== this.#base;
  }

  #row(id, value) {
    const slider = h("input", { type: "range", min: 0, max: 2, step: 0.05, value, "aria-label": `Scale of ${id}, slider` });
    const scale = h("input", { type: "number", step: 0.05, value, inputmode: "decimal", "aria-label": `Scale of ${id}` });
    slider.addEventListener("input", () => (scale.value = slider.value));
    scale.addEventListener("input", () => (slider.value = scale.value));
    const remove = h("button.plain.square", { type: "button", "aria-label": `Remove ${id}` }, icon("close"));
    remove.addEventListener("click", () => {
      this.remove(id);
      this.picker.input.focus();
    });
    const { trigger_words: words, ...defaults } = this.#defaults(id);
    const set = sampling(defaults);
    const known = this.picker.row(id);
    const row = h(
      "li.adapter", { "data-id": id },
      h("div.adapter-head", {}, known && this.pictures.frame(known), modelName(id), words && this.#trigger(words), remove),
      h("div.scale", {}, slider, scale),
      set ? h("span.hint", {}, `Sets ${set}`) : null,
    );
    return { row, scale };
  }

  #defaults(id) {
    return this.picker.row(id)?.defaults ?? {};
  }

  // The words that the adapter wants in the prompt.
  #trigger(words) {
    const add = () => this.dispatchEvent(new CustomEvent("words", { detail: words }));
    return h("button.words", { type: "button", title: `Add “${words}” to the prompt`, onclick: add }, `+ ${words}`);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

// What an adapter sets of the steps, in words; empty for nothing.
function sampling({ num_inference_steps: steps, timesteps, sigmas, guidance_scale: guidance, scheduler }) {
  const count = steps ?? timesteps?.length ?? sigmas?.length;
  return [
    count && plural(count, "step"), guidance != null && `guidance ${guidance}`, scheduler && `scheduler ${scheduler}`,
  ].filter(Boolean).join(", ");
}
