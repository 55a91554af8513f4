"use strict";
// Filters, arrow keys along the words of an answer, and open sections in print. The page reads well without.
(() => {
  const filters = document.getElementById("filters");
  if (filters) {
    const [sequence, outcome, count] = ["sequence", "outcome", "count"].map((id) => document.getElementById(id));
    const clips = [...document.querySelectorAll("#clips > article")];
    const apply = () => {
      let shown = 0;
      for (const clip of clips) {
        const fits = (!sequence.value || clip.dataset.s === sequence.value)
          && (!outcome.value || clip.dataset.o.split(" ").includes(outcome.value));
        clip.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${clips.length} clips`;
    };
    filters.addEventListener("input", apply);
    filters.addEventListener("submit", (event) => event.preventDefault());
    filters.hidden = false;
    apply();
  }

  // One stop of the Tab key for an answer; the arrow keys go from word to word.
  for (const words of document.querySelectorAll(".words")) {
    const all = [...words.querySelectorAll("b")];
    all.forEach((word) => { word.tabIndex = -1; });
    words.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1 };
      if (!(event.key in steps) || !all.length) return;
      event.preventDefault();
      const at = all.indexOf(document.activeElement);
      const next = at < 0 ? 0 : Math.min(Math.max(at + steps[event.key], 0), all.length - 1);
      all[next].focus();
    });
  }

  const sections = [...document.querySelectorAll("details")];
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = sections.filter((section) => !section.open && !section.classList.contains("tree"));
    closed.forEach((section) => { section.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((section) => { section.open = false; }));
})();
