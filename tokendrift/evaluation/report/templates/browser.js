"use strict";
const browser = document.getElementById("browser");
const place = browser.querySelector("output");
const count = Number(browser.dataset.count);
const columns = [...browser.querySelectorAll("ol.samples")].map((list) => [...list.children]);
let shown = 0;

function show(number) {
  shown = Math.min(Math.max(number, 0), count - 1);
  for (const column of columns) {
    column.forEach((item, index) => { item.hidden = index !== shown; });
  }
  place.textContent = `Sample ${shown + 1} of ${count}`;
}

const moves = {
  first: () => 0, previous: () => shown - 1, next: () => shown + 1, last: () => count - 1,
};
const keys = { Home: "first", ArrowLeft: "previous", ArrowRight: "next", End: "last" };

browser.addEventListener("click", (event) => {
  const move = event.target.dataset.move;
  if (move) show(moves[move]());
});
browser.addEventListener("keydown", (event) => {
  const move = keys[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(moves[move]());
});
browser.classList.add("single");
show(0);
