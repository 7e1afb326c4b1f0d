// The picture to start from: chosen, dropped anywhere on the page, or pasted.

import { byId } from "./dom.js";
import { settingsIn } from "./infotext.js";

export class Picture extends EventTarget {
  #file = null;
  #settings = null;

  constructor() {
    super();
    const input = byId("picture");
    input.addEventListener("change", () => input.files.length && this.take(input.files[0]));
    byId("chosen-remove").addEventListener("click", () => {
      this.take(null);
      input.focus();
    });
    byId("chosen-settings").addEventListener("click", () =>
      this.dispatchEvent(new CustomEvent("settings", { detail: this.#settings })),
    );
    addEventListener("paste", (event) => this.#offer(event, event.clipboardData));
    addEventListener("drop", (event) => this.#offer(event, event.dataTransfer));
    addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      byId("drop").classList.add("over");
    });
    for (const end of ["drop", "dragleave", "dragend"]) {
      addEventListener(end, () => byId("drop").classList.remove("over"));
    }
  }

  get file() {
    return this.#file;
  }

  // Takes a picture, or none; tells `change` with its size in pixels, and later `settings` if those in it are asked for.
  async take(file) {
    const size = file && (await sizeOf(file));
    if (file && !size) {
      this.dispatchEvent(new CustomEvent("refused", { detail: `${file.name} is not a picture that can be read` }));
      return;
    }
    const settings = file && (await settingsIn(file));
    this.#file = file;
    this.#show();
    byId("chosen-settings").hidden = !settings;
    this.#settings = settings;
    this.dispatchEvent(new CustomEvent("change", { detail: size }));
  }

  #offer(event, offered) {
    const file = [...(offered?.files ?? [])].find((one) => one.type.startsWith("image/")) ?? offered?.files?.[0];
    if (!file) return;
    event.preventDefault();
    this.take(file);
  }

  #show() {
    const image = byId("chosen-picture");
    if (image.src) URL.revokeObjectURL(image.src);
    image.removeAttribute("src");
    if (this.#file) image.src = URL.createObjectURL(this.#file);
    else byId("picture").value = "";
    byId("chosen-name").textContent = this.#file?.name ?? "";
    byId("chosen").hidden = !this.#file;
    byId("drop").classList.toggle("filled", Boolean(this.#file));
  }
}

async function sizeOf(file) {
  try {
    const { width, height } = await createImageBitmap(file);
    return { width, height };
  } catch {
    return null;
  }
}
