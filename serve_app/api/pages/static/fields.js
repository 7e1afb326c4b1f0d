// The fields of the form as values, and how they are bounded.

import { byId } from "./dom.js";

// Chooses an option, or the first where there is none of that value.
export function choose(id, value) {
  byId(id).value = value ?? "";
  if (byId(id).selectedIndex < 0) byId(id).selectedIndex = 0;
}

export const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

export function link(slider, input) {
  slider.addEventListener("input", () => (input.value = slider.value));
  input.addEventListener("input", () => (slider.value = input.value));
}

export function bound(id, min, max, hint) {
  byId(id).min = min ?? "";
  byId(id).max = max ?? "";
  if (hint) byId(hint).textContent = !max ? "" : min > 1 ? `${min}–${max}` : `≤${max}`;
}

// Whether a base redraws pictures by a strength; those that edit by instruction do not.
export function takesStrength(base) {
  return !base?.tasks || "image" in base.tasks || !("edit" in base.tasks);
}

// Whether a base can redraw a part of a picture.
export const takesMask = (base) => !base?.tasks || "inpaint" in base.tasks;

// The size nearest to a picture's that the base draws: its shape, in multiples of what its sides must be.
export function fitted({ width, height }, { min_side = 8, max_side = Infinity, max_pixels = Infinity, side_multiple = 8 }) {
  const scale = Math.min(1, max_side / Math.max(width, height), Math.sqrt(max_pixels / (width * height)));
  const [least, step] = [Math.ceil(min_side / side_multiple), side_multiple];
  const side = (pixels) => Math.max(least, Math.floor((pixels * scale) / step)) * step;
  return [side(width), side(height)];
}
