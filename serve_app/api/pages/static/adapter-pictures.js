// The pictures of adapters, fetched once each when they come into view. What has none is drawn by the service, which
// keeps it: one after the other, and only while somebody looks.

import { h, icon } from "./dom.js";

export class AdapterPictures {
  #held = new Map(); // id and revision -> promise of an address, null where there is no picture
  #rows = new WeakMap(); // frame -> row of the catalog
  #round = 0; // counts up when nobody looks any more
  #turn = Promise.resolve(); // when the next may be drawn

  constructor(service) {
    this.service = service;
    this.observer = new IntersectionObserver((entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        this.observer.unobserve(target);
        this.#show(target);
      }
    });
  }

  // A frame that shows the picture of a row once it is seen; beside the name, which says it all to those who see none.
  frame(row) {
    const frame = h("span.thumb", { "aria-hidden": "true" }, icon("picture"));
    this.#rows.set(frame, row);
    this.observer.observe(frame);
    return frame;
  }

  // Leaves undrawn what is not begun.
  rest() {
    this.#round += 1;
  }

  async #show(frame) {
    const address = await this.#address(this.#rows.get(frame));
    if (address) frame.replaceChildren(h("img", { src: address, alt: "" }));
  }

  #address(row) {
    const key = `${row.id} ${row.revision}`;
    if (!this.#held.has(key)) this.#held.set(key, this.#fetched(row, key));
    return this.#held.get(key);
  }

  async #fetched(row, key) {
    try {
      const picture = await (row.has_picture ? this.service.picture(row.id) : this.#drawn(row));
      if (picture) return URL.createObjectURL(picture);
      this.#held.delete(key);
    } catch (error) {
      // It may come later, unless the service says that there is none.
      if (error.status !== 404) this.#held.delete(key);
    }
    return null;
  }

  #drawn(row) {
    const round = this.#round;
    const picture = this.#turn.then(() => (round === this.#round ? this.service.picture(row.id, { mayDraw: true }) : null));
    this.#turn = picture.catch(() => {});
    return picture;
  }
}
