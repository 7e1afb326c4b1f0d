// Before the first paint: the colours that the reader chose here earlier, else those of the system.
"use strict";

(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  const chosen = () => {
    try {
      return localStorage.getItem("loraplex.theme");
    } catch {
      return null; // storage is off: the system's colours, then
    }
  };

  const apply = () => {
    root.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
    document.getElementById("theme")?.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
  };

  const toggle = () => {
    const next = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      // What the system says anyway is not worth keeping: the page then follows the system again.
      if (next === (system.matches ? "dark" : "light")) localStorage.removeItem("loraplex.theme");
      else localStorage.setItem("loraplex.theme", next);
      apply();
    } catch {
      root.dataset.theme = next;
    }
  };

  apply();
  system.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme")?.addEventListener("click", toggle);
  });
})();
