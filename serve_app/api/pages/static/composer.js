// The form: what to draw, with bounds and defaults from the base, and an error beside the field that it is about.

import { Adapters } from "./adapters.js";
import { byId, h, plural } from "./dom.js";
import { examplesFor } from "./examples.js";
import { bound, choose, fitted, link, number, takesMask, takesStrength } from "./fields.js";
import { Mask } from "./mask.js";
import { Picture } from "./picture.js";

const RANDOM_SEEDS = 2 ** 32;

export class Composer extends EventTarget {
  #bases = [];

  constructor(pictures) {
    super();
    this.adapters = new Adapters(pictures);
    this.picture = new Picture();
    this.mask = new Mask();
    this.form = byId("composer");
    byId("base").addEventListener("change", () => this.#useBase());
    byId("seed-random").addEventListener("click", () => {
      byId("seed").value = "";
      byId("seed").focus();
    });
    link(byId("strength-slider"), byId("strength"));
    this.adapters.addEventListener("change", () => this.#useAdapters());
    this.adapters.addEventListener("base", ({ detail }) => {
      byId("base").value = detail;
      this.#useBase();
    });
    this.adapters.addEventListener("words", ({ detail }) => this.#addWords(detail));
    this.picture.addEventListener("change", ({ detail }) => this.#usePicture(detail));
    this.picture.addEventListener("settings", ({ detail }) => this.#useSettings(detail));
    this.picture.addEventListener("refused", ({ detail }) => this.blame("image", detail));
    this.form.addEventListener("input", (event) => this.#forgive(event.target.closest(".field")));
  }

  // Fills the form from the catalog; what the user has set stays.
  set bases(rows) {
    const before = byId("base").value;
    this.#bases = rows;
    byId("base").replaceChildren(...rows.map(({ id }) => h("option", { value: id }, id)));
    this.adapters.picker.bases = rows.map(({ id }) => id);
    if (rows.some(({ id }) => id === before)) {
      byId("base").value = before;
      return;
    }
    byId("base").value = (rows.find((row) => row.is_default) ?? rows[0])?.id ?? "";
    this.#useBase();
  }

  get base() {
    return this.#bases.find(({ id }) => id === byId("base").value);
  }

  // What to ask for, {fields, picture, mask, strokes}; null where a field cannot be read, which then says so.
  async request() {
    this.forgiveAll();
    const prompt = byId("prompt").value;
    const seed = byId("seed").value.trim();
    const unread = [...this.form.querySelectorAll("input[type=number]")].find((input) => input.validity.badInput);
    if (!prompt.trim() && !this.picture.file) this.blame("prompt", "Say what to draw, or take an example.");
    else if (unread) this.blame(unread.closest(".field").dataset.param, "This must be a number.");
    else if (/\D/.test(seed)) this.blame("seed", "A seed is a whole number, or nothing for a random one.");
    else {
      const [picture, strokes] = [this.picture.file, this.mask.strokes];
      return { fields: this.#fields(prompt, seed), picture, strokes, mask: await this.mask.file() };
    }
    return null;
  }

  #fields(prompt, seed) {
    const negative = byId("negative").value.trim();
    const [width, height] = [byId("width").value, byId("height").value];
    const count = number("count") ?? 1;
    seed ||= Math.floor(Math.random() * RANDOM_SEEDS);
    const fields = {
      model: byId("base").value,
      prompt,
      negative_prompt: negative || null,
      size: width && height ? `${width}x${height}` : null,
      n: count === 1 ? null : count,
      num_inference_steps: number("steps"),
      guidance_scale: number("guidance"),
      // A large one as text: numbers of JavaScript lose its last digits.
      seed: Number.isSafeInteger(Number(seed)) ? Number(seed) : seed,
      scheduler: byId("scheduler").value || null,
      prompt_syntax: byId("syntax").value || null,
      strength: this.picture.file && takesStrength(this.base) ? number("strength") : null,
      loras: this.adapters.ids.length ? this.adapters.value : null,
    };
    return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
  }

  // Fills the form with an earlier request.
  async fill({ fields, picture = null, strokes = [] }) {
    this.forgiveAll();
    await this.picture.take(picture);
    if (this.#bases.some(({ id }) => id === fields.model) && byId("base").value !== fields.model) {
      byId("base").value = fields.model;
      this.#useBase();
    }
    this.mask.strokes = strokes;
    // Before the steps, which they may empty.
    this.adapters.clear();
    for (const { id, scale } of fields.loras ?? []) this.adapters.add(id, scale);
    byId("prompt").value = fields.prompt ?? "";
    byId("negative").value = fields.negative_prompt ?? "";
    byId("seed").value = fields.seed ?? "";
    choose("scheduler", fields.scheduler);
    choose("syntax", fields.prompt_syntax);
    byId("count").value = fields.n ?? 1;
    if (fields.num_inference_steps) byId("steps").value = fields.num_inference_steps;
    if (fields.guidance_scale != null) byId("guidance").value = fields.guidance_scale;
    if (fields.size) [byId("width").value, byId("height").value] = fields.size.split("x");
    if (fields.strength) byId("strength").value = byId("strength-slider").value = fields.strength;
  }

  // Fills the form with what a picture tells of itself, instead of starting from it.
  async #useSettings({ options, ...fields }) {
    await this.fill({ fields });
    byId("prompt").focus();
    const left = Object.keys(options).join(", ");
    this.#say(`The form has the settings of the picture${left && `, except ${left}`}.`);
  }

  #useBase() {
    const { id, defaults = {}, limits = {}, schedulers = [], prompt_syntaxes: syntaxes } = this.base ?? {};
    for (const [field, value] of [
      ["width", defaults.width], ["height", defaults.height], ["steps", defaults.steps],
      ["guidance", defaults.guidance_scale], ["strength", defaults.strength], ["strength-slider", defaults.strength],
    ]) byId(field).value = value ?? "";
    bound("width", limits.min_side, limits.max_side, "size-range");
    bound("height", limits.min_side, limits.max_side);
    bound("steps", 1, limits.max_steps, "steps-range");
    bound("guidance", 0, limits.max_guidance_scale, "guidance-range");
    bound("count", 1, limits.max_images, "count-range");
    byId("scheduler").replaceChildren(
      h("option", { value: "" }, "default"),
      ...schedulers.map((name) => h("option", { value: name }, name.replace(/Scheduler$/, ""))),
    );
    const syntax = byId("syntax").value;
    byId("syntax").replaceChildren(
      h("option", { value: "" }, "default"),
      ...(syntaxes ?? []).map((name) => h("option", { value: name }, name)),
    );
    choose("syntax", syntax);
    byId("syntax-field").hidden = (syntaxes ?? []).length < 2;
    const dropped = this.adapters.fit(id);
    this.#showExamples();
    if (this.mask.allow(takesMask(this.base))) this.#say("Took out the mask: this base redraws whole pictures.");
    if (dropped.length) this.#say(`Took out ${plural(dropped.length, "adapter")} made for another base.`);
    this.dispatchEvent(new Event("base"));
  }

  // Empties what the chosen adapters set, so that the service takes their values, and shows these in its place.
  #useAdapters() {
    const { defaults = {} } = this.base ?? {};
    const { num_inference_steps: steps, timesteps, sigmas, guidance_scale: guidance, scheduler } = this.adapters.defaults;
    byId("scheduler").options[0].textContent = scheduler ? `default: ${scheduler}` : "default";
    for (const [field, own, bases] of [
      ["steps", steps ?? timesteps?.length ?? sigmas?.length, defaults.steps],
      ["guidance", guidance, defaults.guidance_scale],
    ]) {
      const input = byId(field);
      const wasSet = input.placeholder !== "";
      input.placeholder = own ?? "";
      if (own != null && !wasSet) input.value = "";
      else if (own == null && wasSet && input.value === "") input.value = bases ?? "";
    }
  }

  #showExamples() {
    const chips = examplesFor(this.base?.id).map((example) =>
      h("li", {}, h("button.chip", { type: "button", onclick: () => this.#useExample(example) }, example.label)),
    );
    byId("examples").replaceChildren(...chips);
  }

  #useExample({ prompt, adapters = [] }) {
    byId("prompt").value = prompt;
    this.adapters.clear();
    for (const { id, scale } of adapters) this.adapters.add(id, scale);
    this.forgiveAll();
    byId("prompt").focus();
  }

  #usePicture(size) {
    byId("strength-field").hidden = !size || !takesStrength(this.base);
    this.mask.use(size, byId("chosen-picture").src);
    this.mask.allow(takesMask(this.base));
    this.#forgive(byId("picture").closest(".field"));
    if (size) [byId("width").value, byId("height").value] = fitted(size, this.base?.limits ?? {});
  }

  #addWords(words) {
    const prompt = byId("prompt");
    if (!prompt.value.includes(words)) prompt.value = [words, prompt.value.trim()].filter(Boolean).join(", ");
  }

  #say(text) {
    this.dispatchEvent(new CustomEvent("say", { detail: text }));
  }

  // Shows a message beside the field that a request knows as `param`; returns whether there is one such.
  blame(param, message) {
    const name = String(param).split(/[.[]/)[0].replace(/^lora$/, "loras");
    const field = this.form.querySelector(`.field[data-param="${CSS.escape(name)}"]`);
    if (!field) return false;
    this.#forgive(field);
    if (name === "loras") this.adapters.blame(message);
    const id = `error-${name}`;
    // People know a field by its label, not by its name in a request.
    const label = field.querySelector("label, .label").firstChild.textContent.trim();
    field.append(h("p.field-error", { id }, message.replace(`'${param}'`, label)));
    field.classList.add("wrong");
    const inputs = [...field.querySelectorAll("input, textarea, select")];
    inputs.forEach((input) => {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", id);
    });
    inputs[0]?.focus();
    return true;
  }

  forgiveAll() {
    this.form.querySelectorAll(".field.wrong").forEach((field) => this.#forgive(field));
    this.adapters.blame("");
  }

  #forgive(field) {
    if (!field?.classList.contains("wrong")) return;
    field.classList.remove("wrong");
    field.querySelector(".field-error").remove();
    field.querySelectorAll("[aria-invalid]").forEach((input) => {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    });
  }
}
