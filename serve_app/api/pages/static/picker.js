// The adapters to choose from: cards with a picture, found by words and by base. The focus stays in the input.

import { byId, bytes, h, modelName, plural } from "./dom.js";

const SHOWN = 50; // more than anybody scrolls through; typing narrows the list

export class Picker extends EventTarget {
  #known = []; // rows of the catalog
  #active = -1;

  // `isChosen` says of an id whether it is chosen already, and so not offered.
  constructor(pictures, isChosen) {
    super();
    this.pictures = pictures;
    this.isChosen = isChosen;
    this.input = byId("adapter");
    this.list = byId("adapter-list");
    this.base = byId("adapter-base");
    this.input.addEventListener("input", () => this.#open());
    this.input.addEventListener("focus", () => this.#open());
    this.input.addEventListener("click", () => this.#open());
    this.input.addEventListener("blur", () => this.#close());
    this.input.addEventListener("keydown", (event) => this.#key(event));
    this.base.addEventListener("change", () => this.list.hidden || this.#open());
    // Before the input loses the focus, which would close the list under the pointer.
    this.list.addEventListener("mousedown", (event) => event.preventDefault());
    this.list.addEventListener("click", (event) => {
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

  row(id) {
    return this.#known.find((one) => one.id === id);
  }

  // Offers the bases to filter by.
  set bases(ids) {
    const before = this.base.value;
    this.base.replaceChildren(...ids.map((id) => h("option", { value: id }, id)), h("option", { value: "" }, "any base"));
    this.base.value = before;
  }

  // Shows those that were made for a base.
  fit(base) {
    this.base.value = base;
    if (!this.list.hidden) this.#open();
  }

  #matches() {
    const words = this.input.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    return this.#known.filter(
      (row) =>
        (!this.base.value || row.base_model === this.base.value) &&
        !this.isChosen(row.id) &&
        words.every((word) => [row.id, ...(row.aliases ?? [])].some((name) => name.toLowerCase().includes(word))),
    );
  }

  #open() {
    const found = this.#matches();
    const typed = this.input.value.trim();
    const isNew = typed && !found.some((row) => row.id === typed) && !this.isChosen(typed);
    const own = option(typed, h("span.model", {}, `Use “${typed}”`), h("span.hint", {}, "by its id on the Hub or in a folder"));
    own.classList.add("whole");
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
    this.list.append(...rows.slice(0, room).map((row) => this.#card(row)), ...others);
    const options = this.#options;
    options.forEach((one, at) => (one.id = `adapter-option-${at}`));
    if (more > 0) this.list.append(note(`${more} more; type to narrow the list`));
    else if (!options.length) this.list.append(note("No further adapters for this base"));
  }

  #card(row) {
    const told = [
      !this.base.value && `for ${row.base_model}`,
      row.rank && `rank ${row.rank}`,
      row.size_bytes && bytes(row.size_bytes),
      row.resident?.length && `held by ${plural(row.resident.length, "replica")}`,
    ];
    const facts = h("span.hint", {}, told.filter(Boolean).join(" · "));
    return option(row.id, this.pictures.frame(row), modelName(row.id), facts);
  }

  #close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.#activate(-1);
    this.pictures.rest();
  }

  #take(id) {
    this.input.value = "";
    this.#close();
    this.dispatchEvent(new CustomEvent("take", { detail: id }));
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

const option = (id, ...parts) => h("li.option", { role: "option", "aria-selected": "false", "data-id": id }, ...parts);

const note = (text) => h("li.note", { role: "presentation" }, text);
