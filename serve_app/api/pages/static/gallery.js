// What is being drawn and what has been: one card for each request, the newest first.

import { byId, h, icon, milliseconds, modelName, plural } from "./dom.js";
import { sentence } from "./service.js";

const KEPT = 40; // cards; each holds its images in the browser's memory
const STAGES = ["queue", "fetch", "swap", "denoise", "decode"];

export class Card {
  #report = null;

  // `actions` are {cancel, again, startFrom, copy, remove}: what the card's buttons do.
  constructor(request, actions) {
    this.request = request;
    this.actions = actions;
    const count = request.fields.n ?? 1;
    this.frames = Array.from({ length: count }, () => h("div.frame"));
    this.captions = this.frames.map(() => h("figcaption"));
    this.prints = h(
      `div.prints${count > 1 ? ".many" : ""}`, {},
      ...this.frames.map((frame, index) => h("figure", {}, frame, this.captions[index])),
    );
    this.bar = h("progress", { "aria-label": "Steps done" });
    this.said = h("p.said", {}, "Sending");
    const cancel = h("button.outline", { type: "button", onclick: actions.cancel }, "Cancel");
    this.notes = h("div.notes", {}, ...this.#about(), h("div.progress", {}, this.said, this.bar), cancel);
    this.element = h("article.card.running", { "aria-busy": "true" }, this.prints, this.notes);
    this.#shape();
  }

  // Takes one event of the stream; returns what to say of it.
  take(event) {
    if (event.type.endsWith(".progress")) return this.#progress(event);
    if (event.type.endsWith(".starting")) return this.#starting(event);
    if (event.type.endsWith(".partial_image")) this.#print(event, "preview", "Preview");
    if (event.type.endsWith(".completed")) {
      this.#report = event.loraplex;
      this.#print(event, "done", this.request.fields.prompt || "The changed picture");
    }
    return null;
  }

  get isDone() {
    return this.#report !== null;
  }

  // Turns from the work into its record.
  finish() {
    this.element.classList.remove("running");
    this.element.removeAttribute("aria-busy");
    this.captions.forEach((caption, index) => caption.replaceChildren(...this.#caption(index)));
    this.notes.replaceChildren(...this.#about(), this.#facts(), ...this.#warnings(), timing(this.#report.timing_ms), this.#buttons());
  }

  // Turns from the work into what went wrong with it.
  fail(error) {
    this.element.classList.replace("running", "failed");
    this.element.removeAttribute("aria-busy");
    this.prints.remove();
    const again = button("again", "Use again", () => this.actions.again(this.request));
    const remove = button("close", "Remove", () => this.actions.remove());
    this.notes.replaceChildren(...this.#about(), h("div.banner", { role: "alert" }, icon("alert"), sentence(error)), h("div.buttons", {}, again, remove));
  }

  remove() {
    this.element.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
    this.element.remove();
  }

  #progress({ queue_position: position, step, steps }) {
    this.bar.max = steps;
    if (step > 0) this.bar.value = step;
    else this.bar.removeAttribute("value");
    const waiting = position === null ? "On its way to a replica" : `Waiting, ${plural(position, "request")} ahead`;
    const drawing = `Step ${step} of ${steps}${position > 0 ? ", set aside for shorter requests" : ""}`;
    this.said.textContent = step > 0 || position === 0 ? drawing : waiting;
    return this.said.textContent;
  }

  #starting({ state, expected_s: seconds }) {
    const told = seconds === null ? "The model starts" : `The model starts, ready in about ${plural(Math.max(1, Math.round(seconds)), "second")}`;
    this.said.textContent = state === "waiting" ? "The model waits for a free machine" : told;
    return this.said.textContent;
  }

  #print({ b64_json: text, image_index: index, output_format: format }, state, alt) {
    const frame = this.frames[index];
    const before = frame.querySelector("img");
    if (before) URL.revokeObjectURL(before.src);
    const blob = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: `image/${format}` });
    const image = before ?? h("img");
    image.className = state;
    image.alt = alt;
    image.src = URL.createObjectURL(blob);
    if (!before) frame.append(image);
    this.frames[index].blob = blob;
  }

  #shape() {
    const [width, height] = (this.request.fields.size ?? "1x1").split("x");
    for (const frame of this.frames) frame.style.aspectRatio = `${width} / ${height}`;
  }

  #about() {
    const { prompt, negative_prompt: negative, model, loras = [] } = this.request.fields;
    const tags = loras.map(({ id, scale }) => h("li.tag.adapter-tag", {}, modelName(id), h("span.amount", {}, `× ${scale}`)));
    return [
      h("h3.prompt", {}, prompt || "No prompt"),
      negative && h("p.hint", {}, `Without: ${negative}`),
      h("ul.tags", { "aria-label": "Base and adapters" }, h("li.tag", {}, modelName(model)), ...tags),
    ].filter(Boolean);
  }

  #facts() {
    const { size, num_inference_steps: steps, guidance_scale: guidance, strength, scheduler } = this.request.fields;
    const facts = [
      size?.replace("x", " × "),
      steps && plural(steps, "step"),
      guidance != null && `guidance ${guidance}`,
      strength && `strength ${strength}`,
      this.request.mask && "a part redrawn",
      scheduler?.replace(/Scheduler$/, ""),
    ];
    return h("p.facts", {}, facts.filter(Boolean).join(" · "));
  }

  #warnings() {
    return (this.#report.warnings ?? []).map((text) => h("p.warning", {}, icon("alert"), text));
  }

  #caption(index) {
    // The request's own, as the report's may have more digits than JSON keeps here.
    const seed = String(BigInt(this.request.fields.seed) + BigInt(index));
    const name = `${seed}.png`;
    const save = h("a.plain.square", { download: name, href: this.frames[index].querySelector("img").src, "aria-label": `Save the image of seed ${seed}`, title: "Save" }, icon("save"));
    const use = h("button.plain.square", { type: "button", "aria-label": `Start from the image of seed ${seed}`, title: "Start from this" }, icon("picture"));
    use.addEventListener("click", () => this.actions.startFrom(new File([this.frames[index].blob], name, { type: "image/png" })));
    return [h("span.seed", {}, "seed ", h("b", {}, seed)), h("span.tools", {}, save, use)];
  }

  #buttons() {
    return h(
      "div.buttons", {},
      button("copy", "Copy as curl", (made) => this.actions.copy("curl", this.request, made)),
      button("copy", "Copy as Python", (made) => this.actions.copy("python", this.request, made)),
      button("again", "Use again", () => this.actions.again(this.request)),
    );
  }
}

function button(name, label, action) {
  const made = h("button.outline.small", { type: "button" }, icon(name), h("span", {}, label));
  made.addEventListener("click", () => action(made));
  return made;
}

// Where the milliseconds went: a bar of the stages, and each one's share in numbers.
function timing(spent) {
  const all = [...STAGES.filter((name) => name in spent), ...Object.keys(spent).filter((name) => !STAGES.includes(name))];
  const names = all.filter((name) => name !== "suspended" || spent[name] > 0);  // seldom, and then worth a row
  const total = names.reduce((sum, name) => sum + spent[name], 0);
  const parts = names.map((name) => {
    const part = h(`span.part.${name}`);
    part.style.flexGrow = String(spent[name] / (total || 1));
    return part;
  });
  const rows = names.map((name) => h("div", {}, h("dt", {}, h(`span.dot.${name}`), name), h("dd", {}, milliseconds(spent[name]))));
  return h(
    "div.timing", {},
    h("div.spent", { "aria-hidden": "true" }, ...parts),
    h("dl", {}, ...rows, h("div.total", {}, h("dt", {}, "total"), h("dd", {}, milliseconds(total)))),
  );
}

export class Gallery {
  #cards = [];

  add(card) {
    this.#cards.unshift(card);
    byId("gallery").prepend(card.element);
    while (this.#cards.length > KEPT) this.#cards.pop().remove();
    this.#update();
  }

  remove(card) {
    this.#cards = this.#cards.filter((one) => one !== card);
    card.remove();
    this.#update();
  }

  #update() {
    byId("empty").hidden = this.#cards.length > 0;
  }
}
