// The side panel: which replica holds which adapters, as it is now.

import { byId, h, modelName, plural } from "./dom.js";

const PERIOD_MS = 2000;
const STATES = { STARTING: "starting", SILENT: "does not answer" };
const SHOWN = 16; // adapters of one replica; a full one holds hundreds

export class Replicas extends EventTarget {
  #service;
  #timer = null;
  #run = 0; // counts the starts, so that an answer to an earlier one ends there
  #wanted = new Set();
  #rows = null;
  #shown = "";

  constructor(service) {
    super();
    this.#service = service;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  // Asks now and then every two seconds, as long as the page can be seen.
  start() {
    this.stop();
    if (!document.hidden) this.#poll();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#run += 1;
  }

  // The adapters of the form, which stand out among those that are held.
  set wanted(ids) {
    this.#wanted = new Set(ids);
    if (this.#rows) this.#show(this.#rows);
  }

  async #poll() {
    const run = this.#run;
    try {
      const rows = await this.#service.list("v1/replicas");
      if (run !== this.#run) return;
      this.#rows = rows;
      this.#show(rows);
    } catch (error) {
      if (run !== this.#run) return;
      if (error.status === 401) {
        this.dispatchEvent(new Event("locked"));
        return;
      }
      this.#replace([h("p.quiet", {}, `No word of the replicas. ${error.message}`)]);
    }
    this.#timer = setTimeout(() => this.#poll(), PERIOD_MS);
  }

  #show(rows) {
    if (!rows.length) {
      this.#replace([h("p.quiet", {}, "No replica runs. The next request starts one.")]);
      return;
    }
    const bases = [...new Set(rows.map((row) => row.base_model))].sort();
    this.#replace(
      bases.map((base) =>
        h(
          "section.base", { "aria-label": base },
          h("h3", {}, modelName(base)),
          ...rows.filter((row) => row.base_model === base).map((row) => this.#replica(row)),
        ),
      ),
    );
  }

  // Only what has changed is drawn again: a selection or a tooltip survives.
  #replace(children) {
    const made = h("div", {}, ...children);
    if (made.innerHTML === this.#shown) return;
    this.#shown = made.innerHTML;
    byId("replicas").replaceChildren(...made.childNodes);
  }

  #replica({ id, state, device, waiting = 0, running = 0, applied = [], adapters = [], backlog_s: backlog }) {
    const isUp = state === "RUNNING";
    const work = [running && `${running} running`, waiting && `${waiting} waiting`].filter(Boolean).join(", ");
    const ahead = backlog >= 0.05 ? `, about ${backlog.toFixed(1)} s of work` : "";
    return h(
      `div.replica.${isUp ? "up" : "starting"}${running ? ".busy" : ""}`, {},
      h("p.replica-head", {}, h("span.lamp"), h("code", {}, id), h("span.hardware", {}, device ?? "")),
      h("p.work", {}, isUp ? (work ? work + ahead : "idle") : STATES[state] ?? state),
      this.#held(applied, adapters),
    );
  }

  #held(applied, adapters) {
    const scales = new Map(applied.map(({ id, scale }) => [id, scale]));
    const tiers = new Map(adapters.map(({ id, tier }) => [id, tier]));
    for (const id of scales.keys()) tiers.set(id, "applied");
    const order = ["applied", "device", "host"];
    const held = [...tiers].sort((a, b) => order.indexOf(a[1]) - order.indexOf(b[1]) || a[0].localeCompare(b[0]));
    if (!held.length) return h("p.quiet", {}, "holds no adapter yet");
    const chips = held.slice(0, SHOWN).map(([id, tier]) => {
      const wanted = this.#wanted.has(id) ? ".wanted" : "";
      return h(`li.chip.${tier}${wanted}`, { title: `${id}: ${tier}` }, `${id.split("/").pop()}${amount(scales.get(id))}`);
    });
    const more = held.length - SHOWN;
    return h("ul.chips", { "aria-label": plural(held.length, "adapter") }, ...chips, more > 0 && h("li.quiet", {}, `and ${more} more`));
  }
}

// How strongly an adapter is applied, where that is not simply 1.
function amount(scale) {
  if (scale === undefined || scale === 1) return "";
  return typeof scale === "number" ? ` × ${scale}` : ` × ${scale.denoiser} / ${scale.text_encoder}`;
}
