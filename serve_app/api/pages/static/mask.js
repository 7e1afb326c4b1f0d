// The part of a picture to redraw, painted on it with a pointer or from the keyboard. Strokes are kept as lines, in
// shares of the picture's width: they can be taken back, and drawn at any size.

import { byId } from "./dom.js";

const SHOWN_PX = 512; // the width of what is painted on
const STEP = 1 / 50; // how far an arrow key moves the brush
const COLOUR = "#e8188c"; // unlike most of what is in pictures
const EDGE_PX = 4; // of white around it, for those that it is like

export class Mask {
  #strokes = []; // {width, points: [[x, y], ...]}
  #size = null; // of the picture
  #brush = null; // where the keyboard has it
  #isDown = false;

  constructor() {
    this.canvas = byId("mask-canvas");
    this.canvas.addEventListener("pointerdown", (event) => this.#press(event));
    this.canvas.addEventListener("pointermove", (event) => this.#isDown && this.#drag(event));
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (this.#isDown = false));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("focus", () => {
      if (this.canvas.matches(":focus-visible")) this.#brush ??= [0.5, this.#tallness / 2];
      this.#draw();
    });
    this.canvas.addEventListener("blur", () => this.#draw());
    byId("mask-undo").addEventListener("click", () => this.#undo());
    byId("mask-clear").addEventListener("click", () => (this.strokes = []));
    byId("mask-save").addEventListener("click", () => this.#save());
    byId("mask-open").addEventListener("click", () => this.#open(byId("mask").hidden));
  }

  get strokes() {
    return this.#strokes;
  }

  set strokes(strokes) {
    this.#strokes = [...strokes];
    this.#changed();
  }

  // Begins with a clean picture of `size`, or with none.
  use(size, address) {
    this.#size = size;
    this.#brush = null;
    if (size) {
      byId("mask-picture").src = address;
      this.canvas.width = SHOWN_PX;
      this.canvas.height = Math.max(1, Math.round((SHOWN_PX * size.height) / size.width));
    }
    this.#open(false);
    this.strokes = [];
  }

  // Says whether the base can redraw a part; where not, what was painted is gone. Returns whether anything was.
  allow(isPossible) {
    byId("mask-field").hidden = !isPossible || !this.#size;
    const isLost = !isPossible && this.#strokes.length > 0;
    if (isLost) this.strokes = [];
    return isLost;
  }

  // What a request takes: a picture of the same size, transparent where it is to be redrawn; null for nothing painted.
  async file() {
    if (!this.#strokes.length) return null;
    const { width, height } = this.#size;
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    trace(context, this.#strokes, width, COLOUR);
    return new File([await canvas.convertToBlob()], "mask.png", { type: "image/png" });
  }

  get #tallness() {
    return this.canvas.height / this.canvas.width;
  }

  #open(isOpen) {
    byId("mask").hidden = !isOpen;
    byId("mask-open").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) this.#draw();
  }

  #press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.#isDown = true;
    this.#brush = null;
    this.#begin(this.#place(event));
  }

  #drag(event) {
    const all = event.getCoalescedEvents?.() ?? [];
    for (const one of all.length ? all : [event]) this.#strokes.at(-1).points.push(this.#place(one));
    this.#draw();
  }

  #place({ clientX, clientY }) {
    const { left, top, width } = this.canvas.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / width];
  }

  #begin(point) {
    this.strokes = [...this.#strokes, { width: byId("brush").valueAsNumber / 100, points: [point] }];
  }

  // Arrow keys move the brush, painting with Shift; Space paints where it is.
  #key(event) {
    const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    const [x, y] = (this.#brush ??= [0.5, this.#tallness / 2]);
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.#undo();
    else if (event.key === " ") this.#begin([x, y]);
    else if (right || down) {
      this.#brush = [within(x + right * STEP, 1), within(y + down * STEP, this.#tallness)];
      if (event.shiftKey) {
        this.#begin([x, y]);
        this.#strokes.at(-1).points.push(this.#brush);
      }
    } else return;
    event.preventDefault();
    this.#draw();
  }

  #undo() {
    this.strokes = this.#strokes.slice(0, -1);
  }

  async #save() {
    const address = URL.createObjectURL(await this.file());
    Object.assign(document.createElement("a"), { href: address, download: "mask.png" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }

  #changed() {
    const isEmpty = !this.#strokes.length;
    for (const name of ["undo", "clear", "save"]) byId(`mask-${name}`).disabled = isEmpty;
    byId("mask-note").textContent = isEmpty ? "" : "Only the painted part is redrawn.";
    this.#draw();
  }

  #draw() {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    trace(context, this.#strokes, this.canvas.width, "white", EDGE_PX);
    trace(context, this.#strokes, this.canvas.width, COLOUR);
    if (!this.#brush || document.activeElement !== this.canvas) return;
    const [x, y] = this.#brush.map((share) => share * this.canvas.width);
    context.lineWidth = 3;
    context.strokeStyle = COLOUR;
    context.beginPath();
    context.arc(x, y, (byId("brush").valueAsNumber / 200) * this.canvas.width, 0, 2 * Math.PI);
    context.stroke();
  }
}

const within = (value, most) => Math.max(0, Math.min(most, value));

function trace(context, strokes, scale, colour, edge = 0) {
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = colour;
  for (const { width, points } of strokes) {
    context.lineWidth = width * scale + edge;
    context.beginPath();
    context.moveTo(points[0][0] * scale, points[0][1] * scale);
    // A hair further: a single point is a dot.
    for (const [x, y] of points) context.lineTo(x * scale + 0.01, y * scale);
    context.stroke();
  }
}
