"use strict";
// The state of the page is in its address (#q=…&task=…&sort=<table>:<column>:<ascending|descending>), so that a view can be sent to others.
const form = document.getElementById("filter");
const NAMES = ["q", "task", "model", "protocol"];
const filtered = [...document.querySelectorAll("[data-task]")];
const words = new Map();
let sorted = "";

function textOf(element) {
  if (!words.has(element)) words.set(element, element.textContent.toLowerCase());
  return words.get(element);
}

function filter() {
  const wanted = NAMES.slice(1).map((name) => [name, form.elements[name].value]).filter(([, value]) => value);
  const query = form.elements.q.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const element of filtered) {
    const told = wanted.every(([name, value]) => element.dataset[name] === value);
    element.hidden = !(told && query.every((word) => textOf(element).includes(word)));
  }
  for (const table of document.querySelectorAll("table")) {
    const rows = [...table.tBodies[0].rows];
    const shown = rows.filter((row) => !row.hidden).length;
    const box = table.closest("details") || table.closest("section");
    const count = box.querySelector(":scope > summary .count, :scope > .counted .count");
    if (count) count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  }
  const board = document.getElementById("leaderboard")?.querySelector("tbody");
  const all = board ? [...board.rows] : [];
  form.querySelector("output").textContent = `${all.filter((row) => !row.hidden).length} of ${all.length} runs with scores`;
}

function sort(table, column, direction) {
  const sign = direction === "descending" ? -1 : 1;
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const missing = (value) => value === "–" || value === "";
  const order = [...table.tBodies[0].rows].map((row) => [key(row), row]).sort(([a], [b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b); // what is missing stands last, either way
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  });
  table.tBodies[0].append(...order.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((head, i) => head.setAttribute("aria-sort", i === column ? direction : "none"));
  sorted = `${table.id.replace("table-", "")}:${column}:${direction}`;
}

function remember() {
  const state = new URLSearchParams();
  for (const name of NAMES) if (form.elements[name].value) state.set(name, form.elements[name].value);
  if (sorted) state.set("sort", sorted);
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of NAMES) form.elements[name].value = state.get(name) || "";
  const [id, column, direction] = (state.get("sort") || "").split(":");
  const table = document.getElementById(`table-${id}`);
  if (table && table.tHead.rows[0].cells[Number(column)]) {
    sort(table, Number(column), direction === "descending" ? "descending" : "ascending");
  }
  filter();
}

document.addEventListener("click", (event) => {
  const head = event.target.closest("thead th");
  if (!head) return;
  const table = head.closest("table");
  const numbers = [...table.tBodies[0].rows].some((row) => row.cells[head.cellIndex].dataset.v !== undefined);
  const first = numbers ? "descending" : "ascending";
  const turned = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  sort(table, head.cellIndex, head.getAttribute("aria-sort") === "none" ? first : turned);
  remember();
});
form.addEventListener("input", () => { filter(); remember(); });
form.addEventListener("reset", () => setTimeout(() => { filter(); remember(); }));
form.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", () => { if (location.hash.includes("=")) recall(); });
recall();
