"use strict";
// The λ explorer. Every text is inserted as textContent, never as markup.
(() => {
  const el = (id) => document.getElementById(id);
  const sweeps = JSON.parse(el("x-data").textContent);
  const kinds = { empty: "empty", loop: "loop", role_header: "leaked role header" };
  const models = ["base", "steered", "tuned"];
  let sweep, searched, shown, current, strength;

  const print = (value) => String(value).replace("-", "−");
  const answer = (prompt, model) =>
    model === "steered" ? prompt.steered[strength] : prompt[model];
  const marks = (text) => [
    ...(text.refusal ? ["refusal"] : []),
    ...(text.degenerate ? ["degenerate: " + (kinds[text.degenerate] || text.degenerate)] : []),
  ];

  function open(stage) {
    sweep = sweeps[stage];
    searched = sweep.prompts.map((prompt) =>
      [prompt.prompt, prompt.reference || "", prompt.base.text, prompt.tuned.text,
        ...prompt.steered.map((text) => text.text)].join("\n").toLowerCase());
    strength = 0;
    sweep.strengths.forEach((value, i) => {
      if (Math.abs(value - 1) < Math.abs(sweep.strengths[strength] - 1)) strength = i;
    });
    el("x-slider").max = sweep.strengths.length - 1;
    el("x-slider").value = strength;
    el("x-least").textContent = print(sweep.strengths[0]);
    el("x-most").textContent = print(sweep.strengths[sweep.strengths.length - 1]);
    el("x-source").textContent = sweep.source ? `Source: ${sweep.source}.` : "";
    current = 0;
    filter();
  }

  function filter() {
    const words = el("x-search").value.trim().toLowerCase();
    shown = searched.flatMap((text, i) => (text.includes(words) ? [i] : []));
    el("x-found").textContent = words
      ? `${shown.length} of ${searched.length} prompts hold it, in the prompt or in a text at any λ.`
      : `${searched.length} prompts.`;
    if (!shown.includes(current)) current = shown.length ? shown[0] : -1;
    el("x-list").replaceChildren(...shown.map((i) => {
      const option = document.createElement("option");
      option.value = i;
      option.dir = "auto";
      return option;
    }));
    show();
  }

  function show() {
    const value = print(sweep.strengths[strength]);
    const sign = sweep.sign < 0 ? "−" : "+";
    el("x-slider").setAttribute("aria-valuetext", `λ = ${value}`);
    el("x-lambda").textContent = `λ = ${value}`;
    el("x-how").textContent = `${sweep.start} ${sign} ${value} × v* at ${sweep.site}`;
    const steered = sweep.prompts.map((prompt) => prompt.steered[strength]);
    el("x-counts").textContent =
      `At λ = ${value}, of ${steered.length} steered texts: ` +
      `${steered.filter((text) => text.refusal).length} refusals, ` +
      `${steered.filter((text) => text.degenerate).length} degenerate.`;
    for (const option of el("x-list").options) {
      const prompt = sweep.prompts[option.value];
      const words = prompt.prompt.replace(/\s+/g, " ");
      option.textContent = [
        `${Number(option.value) + 1}.`,
        ...marks(prompt.steered[strength]).map((mark) => `[${mark}]`),
        words.length > 70 ? words.slice(0, 70) + "…" : words,
      ].join(" ");
      option.selected = Number(option.value) === current;
    }
    el("x-texts").hidden = current < 0;
    if (current < 0) return;
    const prompt = sweep.prompts[current];
    el("x-place").textContent = `${current + 1} of ${sweep.prompts.length}`;
    el("x-prompt").textContent = prompt.prompt;
    el("x-reference").textContent = prompt.reference || "";
    el("x-has-reference").hidden = !prompt.reference;
    for (const model of models) {
      const text = answer(prompt, model);
      el(`x-${model}`).textContent = text.text;
      el(`x-${model}-marks`).replaceChildren(...marks(text).map((words) => {
        const mark = document.createElement("span");
        mark.className = "mark";
        mark.textContent = words;
        return mark;
      }));
    }
  }

  function step(by) {
    if (!shown.length) return;
    current = shown[(shown.indexOf(current) + by + shown.length) % shown.length];
    show();
  }

  el("x-slider").addEventListener("input", () => {
    strength = Number(el("x-slider").value);
    show();
  });
  el("x-search").addEventListener("input", filter);
  el("x-list").addEventListener("change", () => {
    current = Number(el("x-list").value);
    show();
  });
  el("x-sweep").addEventListener("change", () => open(el("x-sweep").value));
  el("x-previous").addEventListener("click", () => step(-1));
  el("x-next").addEventListener("click", () => step(1));
  el("x-app").addEventListener("keydown", (event) => {
    const typing = ["x-search", "x-list", "x-sweep"].includes(event.target.id);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "n") step(1);
    if (event.key === "p") step(-1);
  });
  el("x-app").hidden = false;
  open(el("x-sweep").value);
})();
