// The drawings under way: some at a time, each with a card, an end and an error of its own.

import { Card } from "./gallery.js";
import { ServiceError } from "./service.js";

const AT_ONCE = 4;

export class Drawings extends EventTarget {
  #running = new Map(); // card -> what cancels it, in the order in which they were asked for
  #latest = null; // the card of the last request

  // `actions` are what the buttons of finished cards do.
  constructor(service, gallery, actions) {
    super();
    this.service = service;
    this.gallery = gallery;
    this.actions = actions;
  }

  get count() {
    return this.#running.size;
  }

  get isFull() {
    return this.count >= AT_ONCE;
  }

  // Draws a request to its end. Tells `changed` when it begins and ends, and `say` with what is to be told of it.
  async draw(request) {
    const controller = new AbortController();
    const card = new Card(request, { ...this.actions, cancel: () => controller.abort(), remove: () => this.gallery.remove(card) });
    this.#latest = card;
    this.#running.set(card, controller);
    this.gallery.add(card);
    this.#tell("changed");
    try {
      for await (const event of this.service.draw(request, controller.signal)) this.#note(card, card.take(event));
      if (!card.isDone) throw new ServiceError("The connection ended before the image was done. Try again.");
      card.finish();
      this.#tell("say", request.fields.n > 1 ? `${request.fields.n} images are done` : "The image is done");
    } catch (error) {
      this.#end(card, error);
    } finally {
      this.#running.delete(card);
      this.#tell("changed");
    }
  }

  // Cancels the newest.
  cancel() {
    [...this.#running.values()].at(-1)?.abort();
  }

  // Says how the newest is coming on: several at once would talk over each other.
  #note(card, text) {
    if (text && card === this.#latest) this.#tell("say", text);
  }

  // The form shows an error if it is about one of its fields and these are still those of the request; else the card does.
  #end(card, error) {
    if (error.name === "AbortError") {
      this.gallery.remove(card);
      this.#tell("say", `Cancelled: ${card.said.textContent.toLowerCase()}`);
    } else if (card === this.#latest && !this.#tell("refused", error)) {
      this.gallery.remove(card);
    } else {
      card.fail(error);
      this.#tell("say", "");
    }
  }

  // Returns whether nobody took the event on.
  #tell(name, detail) {
    return this.dispatchEvent(new CustomEvent(name, { detail, cancelable: true }));
  }
}
