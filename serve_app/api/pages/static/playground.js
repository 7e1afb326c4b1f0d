// Ties the page together: the form asks, the service draws, the gallery shows, the panel watches.

import { AdapterPictures } from "./adapter-pictures.js";
import { Composer } from "./composer.js";
import { byId, icon, plural } from "./dom.js";
import { Drawings } from "./drawings.js";
import { Gallery } from "./gallery.js";
import { Replicas } from "./replicas.js";
import { sentence, Service } from "./service.js";
import { curl, python } from "./snippets.js";

const service = new Service();
const composer = new Composer(new AdapterPictures(service));
const gallery = new Gallery();
const replicas = new Replicas(service);
const drawings = new Drawings(service, gallery, { again: reuse, startFrom, copy });

let asked = 0; // counts the questions for the adapters
let answered = 0; // the newest question whose answer is shown

async function loadCatalog() {
  const question = ++asked;
  try {
    const [bases, loras] = await Promise.all([service.list("v1/bases"), service.list("v1/loras")]);
    showAdapters(loras, question);
    // A canary draws for its base; who wants it alone calls it by its id.
    const originals = bases.filter((base) => !base.canary_of);
    composer.bases = originals;
    byId("summary").textContent = `${plural(originals.length, "base")}, ${plural(loras.length, "adapter")}`;
    lock(false);
    replicas.start();
  } catch (error) {
    complain(error);
  }
}

// Adapters come and go while the page is open: asked for again when the list is about to be used.
async function refreshAdapters() {
  const question = ++asked;
  const loras = await service.list("v1/loras").catch(() => null);
  if (loras) showAdapters(loras, question);
}

// An answer that comes after that to a later question is out of date.
function showAdapters(loras, question) {
  if (question < answered) return;
  answered = question;
  composer.adapters.picker.known = loras;
}

async function generate() {
  clearBanner();
  const request = await composer.request();
  if (!request) return;
  if (drawings.isFull) {
    say(`${plural(drawings.count, "drawing")} under way: wait for one, or cancel it`);
    return;
  }
  drawings.draw(request);
  reveal(byId("gallery").firstElementChild);
}

// The button that cancels is there while something is drawn; the focus does not go with it.
function showRunning() {
  const cancel = byId("cancel");
  cancel.querySelector("span").textContent = drawings.count > 1 ? "Cancel newest" : "Cancel";
  if (!drawings.count && document.activeElement === cancel) byId("generate").focus({ preventScroll: true });
  cancel.hidden = !drawings.count;
  replicas.start();
}

function reveal(element) {
  const box = element.getBoundingClientRect();
  if (box.top >= 0 && box.top < innerHeight - 120) return;
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "start", behavior: isStill ? "auto" : "smooth" });
}

function say(text) {
  if (text !== null && byId("status").textContent !== text) byId("status").textContent = text;
}

// Shows an error beside the field that it is about; returns whether there is one.
function blame(error) {
  if (error.status === 401) {
    lock(true, service.key ? "This key was not accepted." : "");
    return true;
  }
  const field = error.param ?? (composer.adapters.ids.some((id) => error.message.includes(id)) ? "loras" : null);
  return Boolean(field) && composer.blame(field, sentence(error));
}

function complain(error) {
  if (!blame(error)) byId("banner").replaceChildren(icon("alert"), sentence(error));
}

function clearBanner() {
  byId("banner").replaceChildren();
}

function lock(isLocked, note = "") {
  byId("key-form").hidden = !isLocked;
  byId("key-open").hidden = !isLocked && !service.key;
  // A browser that follows a link cannot show a key.
  byId("docs").hidden = isLocked || Boolean(service.key);
  byId("key-note").textContent = note || "Kept in this tab until it is closed.";
  byId("key-note").classList.toggle("wrong", Boolean(note));
  if (isLocked) {
    replicas.stop();
    byId("key").focus();
  }
}

async function startFrom(file) {
  await composer.picture.take(file);
  reveal(byId("drop"));
}

async function reuse(request) {
  await composer.fill(request);
  byId("prompt").focus();
}

async function copy(kind, request, button) {
  const where = { url: service.url("./"), hasKey: Boolean(service.key) };
  const label = button.querySelector("span");
  // Not what it says now: that may be the word about the copy before.
  const before = (button.dataset.label ??= label.textContent);
  try {
    await navigator.clipboard.writeText((kind === "curl" ? curl : python)(request, where));
    label.textContent = "Copied";
  } catch {
    label.textContent = "The browser forbids copying";
  }
  say(label.textContent);
  setTimeout(() => (label.textContent = before), 1500);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("cancel").addEventListener("click", () => drawings.cancel());
byId("adapter").addEventListener("focus", refreshAdapters);
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  service.key = byId("key").value.trim();
  byId("key").value = "";
  loadCatalog();
});
byId("key-forget").addEventListener("click", () => {
  service.key = "";
  loadCatalog();
});
byId("key-open").addEventListener("click", () => lock(byId("key-form").hidden));
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    drawings.cancel();
  }
});
drawings.addEventListener("changed", showRunning);
drawings.addEventListener("say", ({ detail }) => say(detail));
drawings.addEventListener("refused", (event) => {
  say("");
  if (blame(event.detail)) event.preventDefault();
});
composer.adapters.addEventListener("change", () => (replicas.wanted = composer.adapters.ids));
composer.addEventListener("say", ({ detail }) => say(detail));
replicas.addEventListener("locked", () => lock(true, service.key ? "This key was not accepted." : ""));

loadCatalog();
