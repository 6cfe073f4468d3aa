"use strict";
// Pointing at a token, here or in the phase diagram, fills one box and marks both; pointing at a time line reads off
// every line at that update. Text from the run goes through textContent alone.
const box = document.getElementById("box");

function place(x, y) {
  box.style.display = "block";
  const left = x + 16 + box.offsetWidth > innerWidth ? Math.max(4, x - 16 - box.offsetWidth) : x + 16;
  const top = y + 18 + box.offsetHeight > innerHeight ? Math.max(4, y - 14 - box.offsetHeight) : y + 18;
  box.style.left = left + "px";
  box.style.top = top + "px";
}

function hide() {
  box.style.display = "none";
  for (const one of document.querySelectorAll(".lit")) one.classList.remove("lit");
}

function show(token, x, y) {
  hide();
  const section = token.closest("section");
  const labels = section.querySelector(".heat").dataset.labels.split("|");
  const name = document.createElement("b");
  name.textContent = token.dataset.t;
  const table = document.createElement("table");
  token.dataset.d.split("|").forEach((value, row) => {
    const line = table.insertRow();
    line.insertCell().textContent = labels[row];
    line.insertCell().textContent = value;
  });
  box.replaceChildren(name, table);
  for (const one of section.querySelectorAll(`[data-k="${token.dataset.k}"]`)) one.classList.add("lit");
  place(x, y);
}

for (const kind of ["pointermove", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    const token = event.target.closest("[data-k]");
    if (token) show(token, event.clientX, event.clientY);
    else if (box.style.display === "block") hide();
  });
}
document.addEventListener("scroll", hide, { passive: true });

function short(value) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2).replace("+", "") : String(+value.toPrecision(4));
  return text.replaceAll("-", "−").replace("Infinity", "∞");
}

for (const group of document.querySelectorAll(".panels")) {
  const [low, high, left, right] = group.dataset.x.split(" ").map(Number);
  const lines = [...group.querySelectorAll(".series[data-s]")].map((line) => ({
    output: line.querySelector("output"),
    steps: line.dataset.s.split(" ").map(Number),
    values: line.dataset.v.split(" ").map((text) => (text === "-" ? NaN : text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text))),
  }));
  const hairs = group.querySelectorAll(".hair");
  const read = (update) => {
    for (const line of lines) {
      let best = 0;
      line.steps.forEach((step, place) => {
        if (Math.abs(step - update) < Math.abs(line.steps[best] - update)) best = place;
      });
      const value = line.values[best];
      line.output.textContent = `${Number.isNaN(value) ? "–" : short(value)} at ${line.steps[best]}`;
    }
  };
  group.addEventListener("pointermove", (event) => {
    const drawing = event.target.closest("figure > svg");
    if (!drawing) return;
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    const share = Math.min(1, Math.max(0, (point.x - left) / (right - left)));
    const update = Math.round(low + share * (high - low));
    const x = left + ((update - low) / (high - low)) * (right - left);
    for (const hair of hairs) hair.setAttribute("transform", `translate(${x + 9} 0)`);
    read(update);
  });
  group.addEventListener("pointerleave", () => {
    for (const hair of hairs) hair.removeAttribute("transform");
    for (const line of lines) line.output.textContent = "";
  });
}
