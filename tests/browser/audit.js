// What WCAG 2.2 AA asks and a browser can measure: contrast of text (1.4.3) and of fields (1.4.11), names of controls
// (4.1.2), and a focus that can be seen (2.4.7). Each function returns the offenders, as words for a test's message.

function channels(colour) {
  const [red, green, blue, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
  return { rgb: [red, green, blue], alpha };
}

function over(top, below) {
  return top.rgb.map((value, index) => value * top.alpha + below[index] * (1 - top.alpha));
}

function background(element) {
  if (!element) return [255, 255, 255];
  const own = channels(getComputedStyle(element).backgroundColor);
  return own.alpha === 1 ? own.rgb : over(own, background(element.parentElement));
}

function luminance(rgb) {
  const [red, green, blue] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function ratio(one, other) {
  const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}

function shown(element) {
  return element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.getClientRects().length > 0;
}

function wanted(style) {
  const size = parseFloat(style.fontSize);
  return size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
}

function faintText() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const faint = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !shown(element)) continue;
    const style = getComputedStyle(element);
    const below = background(element);
    const found = ratio(over(channels(style.color), below), below);
    if (found < wanted(style)) faint.push(`${walker.currentNode.data.trim().slice(0, 30)}: ${found.toFixed(2)}`);
  }
  for (const input of document.querySelectorAll("input[placeholder], textarea[placeholder]")) {
    const below = background(input);
    const found = ratio(channels(getComputedStyle(input, "::placeholder").color).rgb, below);
    if (shown(input) && found < 4.5) faint.push(`placeholder ${input.placeholder}: ${found.toFixed(2)}`);
  }
  return faint;
}

function faintFields() {
  const fields = [...document.querySelectorAll("input:not([type=range], [type=file]), textarea, select, button.outline, .drop")];
  return fields.filter(shown).flatMap((field) => {
    const found = ratio(channels(getComputedStyle(field).borderTopColor).rgb, background(field.parentElement));
    return found < 3 ? [`${field.id || field.textContent}: ${found.toFixed(2)}`] : [];
  });
}

function nameless() {
  const controls = [...document.querySelectorAll("input, textarea, select, button, a[href], img, progress")];
  const named = (one) =>
    one.labels?.length || one.getAttribute("aria-label") || one.getAttribute("alt") || one.textContent.trim();
  return controls.filter((one) => shown(one) && !one.closest("[aria-hidden=true]") && !named(one)).map((one) => one.outerHTML.slice(0, 80));
}

function focusRing() {
  const style = getComputedStyle(document.activeElement);
  const holder = document.activeElement.closest(".drop");
  const ring = holder && document.activeElement.id === "picture" ? getComputedStyle(holder) : style;
  const isSeen = ring.outlineStyle !== "none" && parseFloat(ring.outlineWidth) >= 2;
  return { name: document.activeElement.id || document.activeElement.textContent.trim(), isSeen };
}
