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
function table(heads, rows, caption) {
  const t = el("table");
  if (caption) t.append(el("caption", caption));
  const head = t.createTHead().insertRow();
  heads.forEach((h, i) => {
    const th = el("th", h, rows.length && typeof rows[0][i] === "number" ? "n" : "");
    th.scope = "col";
    head.append(th);
  });
  const body = t.createTBody();
  for (const row of rows) {
    const tr = body.insertRow();
    for (const cell of row) tr.append(el("td", number(cell), typeof cell === "number" ? "n" : "text"));
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
