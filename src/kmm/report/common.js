/* The run, and what every part of the page uses. */
const run = JSON.parse(document.getElementById("run").textContent);
const $ = (id) => document.getElementById(id);
const LETTERS = { DMA: "A", DMA32: "3", Normal: "N", Movable: "M", Device: "D", several: "+", none: "" };
const ZONES = ["DMA", "DMA32", "Normal", "Movable", "Device", "several"];
const moments = run.moments, steps = run.steps;

function el(tag, text, cls) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const count = (n) => Number(n).toLocaleString("en-US");
const number = (n) => (typeof n === "number" ? count(n) : String(n));
const kind = (cell) => (typeof cell === "number" || MEASURE.test(cell) ? "n" : "text");
/* How many lines a folded one stands for. */
const folded = (text) => Number((/\((\d+) lines\)$/.exec(text) || [0, 1])[1]);
const lines = (list) => list.reduce((sum, l) => sum + folded(l), 0);
function size(bytes) {
  for (const [unit, of] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20]])
    if (bytes >= of) return `${+(bytes / of).toFixed(2)} ${unit}`;
  return `${bytes / 1024} KiB`;
}
function span(ns) {
  if (ns >= 1e9) return `${(ns / 1e9).toFixed(3)} s`;
  return ns >= 1e6 ? `${(ns / 1e6).toFixed(3)} ms` : `${(ns / 1e3).toFixed(3)} µs`;
}
const length = (s) => (s.calls.length || s.calls_left_out || s.end_ns > s.start_ns ? span(s.end_ns - s.start_ns) : "none recorded");
const address = (block) => "0x" + (BigInt(block) * BigInt(run.block_size)).toString(16);
/* A measure stays on one line. */
const MEASURE = /^([\d.,]+ (s|ms|µs|[KMGT]iB)|none recorded)$/;
function table(label, heads, rows) {
  const t = el("table");
  t.setAttribute("aria-label", label);
  const head = t.createTHead().insertRow();
  heads.forEach((h, i) => {
    const th = el("th", h, rows.length && kind(rows[0][i]) === "n" ? "n" : "");
    th.scope = "col";
    head.append(th);
  });
  const body = t.createTBody();
  for (const row of rows) {
    const tr = body.insertRow();
    for (const cell of row) tr.append(el("td", number(cell), kind(cell)));
  }
  return t;
}
/* What is long is built when it is unfolded. */
function lazily(details, build) {
  let built = false;
  details.addEventListener("toggle", () => {
    if (details.open && !built) { built = true; build(); }
  });
}
/* What can be scrolled can be reached by keyboard. */
function reachable() {
  for (const e of document.querySelectorAll(".scroll, .chart, pre"))
    if (e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight) e.tabIndex = 0;
    else e.removeAttribute("tabindex");
}
