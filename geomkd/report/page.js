"use strict";
// ---- tables: each column sorts, by click and by keyboard; what is missing stays last ----
const said = document.getElementById("said");
const text = (row, column) => row.cells[column].textContent.trim();

function compare(a, b) {
  if (a === "–" || b === "–" || !a || !b) return null;
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function sort(table, head) {
  const column = head.cellIndex, body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const blank = (row) => ["", "–"].includes(text(row, column));
  const rows = [...body.rows].sort((a, b) => {
    if (blank(a) || blank(b)) return blank(a) - blank(b);
    return compare(text(a, column), text(b, column)) * (down ? -1 : 1);
  });
  body.append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  said.textContent = `Sorted by ${head.textContent}, ${down ? "falling" : "rising"}`;
}

for (const table of document.querySelectorAll("table")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
}

for (const name of document.querySelectorAll("tbody th")) { // long ones break behind their dots
  const parts = name.textContent.split(/(?<=\.)/);
  name.replaceChildren(...parts.flatMap((part) => [part, document.createElement("wbr")]));
}

// ---- curves: a point tells its value; one stop of the tab key a curve, arrows go along it ----
const tip = document.getElementById("tip");
let told = null; // the point whose value is shown

function show(point) {
  told = point;
  tip.textContent = point.getAttribute("aria-label");
  tip.hidden = false;
  const at = point.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = at.left + (at.width - own.width) / 2;
  const above = at.top - own.height - 6;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - own.width - 8))}px`;
  tip.style.top = `${above < 4 ? at.bottom + 6 : above}px`;
}

const hide = () => { told = null; tip.hidden = true; };

function go(point, next) {
  if (!next) return;
  point.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}

for (const curve of document.querySelectorAll(".curve")) {
  const points = [...curve.querySelectorAll(".point")];
  points.forEach((point, i) => {
    const title = point.querySelector("title"); // which browsers show of their own, but late
    point.setAttribute("aria-label", title.textContent);
    title.remove();
    point.setAttribute("tabindex", i ? "-1" : "0");
    for (const event of ["pointerenter", "focus"]) point.addEventListener(event, () => show(point));
    for (const event of ["pointerleave", "blur"]) point.addEventListener(event, hide);
    point.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: points.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      go(point, points[to]);
    });
  });
}
addEventListener("scroll", () => told && show(told), { capture: true, passive: true });
