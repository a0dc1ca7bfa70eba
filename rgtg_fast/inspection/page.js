"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("panel");
  const number = (v, digits = 3) => (v === null ? "–" : (v < 0 ? "−" : "+") + Math.abs(v).toFixed(digits));
  const shown = (s) => s.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  let on = null;

  function add(parent, name, text, className) {
    const made = parent.appendChild(document.createElement(name));
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function show(token) {
    if (!token || token === on) return;
    if (on) on.classList.remove("on");
    on = token;
    on.classList.add("on");
    const text = token.closest(".text");
    const [row, column] = text.dataset.at.split(",").map(Number);
    const at = [...text.querySelectorAll("i")].indexOf(token);
    const [reward, gain, kl, taken, candidates] = data[row][column][at];
    panel.replaceChildren();
    panel.hidden = false;
    const line = add(panel, "p");
    add(line, "strong", `“${shown(taken < 0 ? token.textContent : candidates[taken][0])}”`);
    line.append(` token ${at}: reward ${number(reward)} (${number(gain)} against the mean), KL ${kl === null ? "–" : kl.toFixed(3)} nats`);
    if (!candidates.length) return;
    const table = add(panel, "table");
    const head = add(add(table, "thead"), "tr");
    for (const name of ["", "candidate", "log π", "reward", "q"]) add(head, "th", name);
    const body = add(table, "tbody");
    candidates.forEach(([word, logprob, r, q], i) => {
      const line = add(body, "tr", undefined, i === taken ? "taken" : "");
      add(line, "td", i === taken ? "▶" : "");
      add(line, "td", shown(word));
      add(line, "td", logprob === null ? "−∞" : number(logprob));
      add(line, "td", number(r));
      const cell = add(line, "td", q === null ? "–" : q.toFixed(3) + " ");
      if (q !== null) {
        const bar = add(cell, "meter");
        bar.value = q;
      }
    });
  }

  function hide() {
    if (on) on.classList.remove("on");
    on = null;
    panel.hidden = true;
  }

  document.querySelector(".keys").hidden = false;
  document.querySelector("main").addEventListener("pointerover", (event) => {
    if (event.target.tagName === "I") show(event.target);
  });
  document.querySelector("main").addEventListener("click", (event) => {
    if (event.target.tagName === "I") show(event.target);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const text = document.activeElement && document.activeElement.closest(".text");
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!text || move === undefined) return;
    event.preventDefault();
    const tokens = [...text.querySelectorAll("i")];
    const at = on && on.closest(".text") === text ? tokens.indexOf(on) + move : 0;
    show(tokens[Math.max(0, Math.min(tokens.length - 1, at))]);
    on.scrollIntoView({ block: "center", behavior: "instant" });
  });
})();
