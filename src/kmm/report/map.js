/* The physical address map, its legend and its table. */
/* The map: segments of blocks that there ever were, and the code of each, -1 for none. */
const spans = [];
for (const m of moments) for (const [first, n] of m.changed) spans.push([first, first + n]);
spans.sort((a, b) => a[0] - b[0]);
const segments = [];
for (const [first, end] of spans) {
  const last = segments[segments.length - 1];
  if (last && first <= last.end) last.end = Math.max(last.end, end);
  else segments.push({ first, end });
}
let total = 0;
for (const s of segments) { s.offset = total; total += s.end - s.first; }
const codes = new Int32Array(total).fill(-1);
const changed = new Uint8Array(total);
let at = -1;
function place(block) {
  let lo = 0, hi = segments.length - 1;
  while (lo < hi) {
    const mid = (lo + hi + 1) >> 1;
    if (segments[mid].first <= block) lo = mid; else hi = mid - 1;
  }
  return segments[lo].offset + block - segments[lo].first;
}
function go(to) {
  if (to < at) { codes.fill(-1); at = -1; }
  while (at < to) {
    at += 1;
    for (const [first, n, code] of moments[at].changed) codes.fill(code, place(first), place(first) + n);
  }
  changed.fill(0);
  if (to > 0) for (const [first, n] of moments[to].changed) changed.fill(1, place(first), place(first) + n);
}

const cell = total <= 96 ? 40 : total <= 600 ? 24 : total <= 2400 ? 15 : total <= 20000 ? 9 : 4;
let mode = "zone", picked = -1, paint = {};
function colours() {
  paint = { zone: {}, node: {}, state: { online: css("--z2"), "going-offline": css("--z3"), offline: css("--z5") } };
  ZONES.forEach((z, i) => { paint.zone[z] = css(`--z${i}`); });
  paint.zone.none = css("--z5");
  const some = [0, 1, 2, 3, 4, 5].map((i) => css(`--n${i}`));
  paint.nodeOf = (n) => some[(parseInt(n, 10) || 0) % some.length];
  for (const v of ["cell", "hatch", "letter", "accent", "ink"]) paint[v] = css(`--${v}`);
}
function fillOf([state, zone, node]) {
  if (mode === "node") return paint.nodeOf(node);
  return mode === "state" ? paint.state[state] || paint.hatch : paint.zone[zone] || paint.hatch;
}
function drawCell(g, x, y, c, code, isPicked) {
  const s = c - (c > 8 ? 2 : 1);
  if (code < 0) {
    g.strokeStyle = paint.hatch;
    g.strokeRect(x + 0.5, y + 0.5, s - 1, s - 1);
  } else {
    const what = run.legend[code], online = what[0] === "online";
    g.fillStyle = online ? fillOf(what) : paint.cell;
    g.fillRect(x, y, s, s);
    if (!online) {
      g.save(); g.beginPath(); g.rect(x, y, s, s); g.clip();
      g.strokeStyle = mode === "node" ? fillOf(what) : paint.hatch; g.lineWidth = c > 20 ? 2 : 1; g.beginPath();
      const gap = c > 20 ? 8 : 4;
      for (let d = -s; d < s; d += gap) {
        g.moveTo(x + d, y + s); g.lineTo(x + d + s, y);
        if (what[0] === "going-offline") { g.moveTo(x + d, y); g.lineTo(x + d + s, y + s); }
      }
      g.stroke(); g.restore();
    }
    if (c >= 9) { g.fillStyle = paint.nodeOf(what[2]); g.fillRect(x, y + s - (c > 20 ? 4 : 2), s, c > 20 ? 4 : 2); }
    const letter = mode === "zone" ? LETTERS[what[1]] : mode === "node" ? what[2].slice(0, 2) : "";
    if (c >= 15 && letter && online) {
      g.fillStyle = paint.letter; g.font = `600 ${Math.round(c * 0.45)}px sans-serif`;
      g.textAlign = "center"; g.textBaseline = "middle"; g.fillText(letter, x + s / 2, y + s / 2 - (c > 20 ? 1 : 0));
    }
  }
  if (isPicked) {
    g.strokeStyle = paint.ink; g.lineWidth = c > 8 ? 3 : 1;
    g.strokeRect(x + g.lineWidth / 2, y + g.lineWidth / 2, s - g.lineWidth, s - g.lineWidth);
  }
  g.lineWidth = 1;
}
/* What has changed is framed as a whole. */
function frame(g, s, n) {
  const is = (i) => i >= 0 && i < n && changed[s.offset + i];
  const w = cell > 20 ? 3 : 2;
  g.fillStyle = paint.accent;
  for (let i = 0; i < n; i += 1) {
    if (!is(i)) continue;
    const column = i % s.across, x = column * cell, y = Math.floor(i / s.across) * cell;
    if (column === 0 || !is(i - 1)) g.fillRect(x, y, w, cell);
    if (column === s.across - 1 || !is(i + 1)) g.fillRect(x + cell - w, y, w, cell);
    if (!is(i - s.across)) g.fillRect(x, y, cell, w);
    if (!is(i + s.across)) g.fillRect(x, y + cell - w, cell, w);
  }
}
function buildGrid() {
  const grid = $("grid");
  let before = -1;
  for (const s of segments) {
    if (before >= 0) grid.append(el("div", `no blocks for ${size((s.first - before) * run.block_size)}`, "hole"));
    before = s.end;
    const box = el("div", undefined, "segment");
    box.append(el("p", `${address(s.first)}  memory${s.first}${s.end - s.first > 1 ? " to memory" + (s.end - 1) : ""}, ${size((s.end - s.first) * run.block_size)}`));
    s.canvas = el("canvas");
    s.canvas.tabIndex = 0;
    s.canvas.setAttribute("role", "application");
    s.canvas.setAttribute("aria-roledescription", "map of memory blocks");
    s.canvas.setAttribute("aria-describedby", "picked");
    s.canvas.setAttribute("aria-label", `Memory blocks ${s.first} to ${s.end - 1}; arrow keys go from block to block, the tables below say the same`);
    s.canvas.addEventListener("mousemove", (e) => {
      const i = Math.floor(e.offsetX / cell) + Math.floor(e.offsetY / cell) * s.across;
      if (e.offsetX / cell < s.across && i < s.end - s.first) pick(s.first + i);
    });
    s.canvas.addEventListener("keydown", (e) => {
      const all = s.end - s.first;
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -s.across, ArrowDown: s.across, Home: -all, End: all }[e.key];
      if (!move) return;
      e.preventDefault();
      const from = picked >= s.first && picked < s.end ? picked + move : s.first;
      pick(Math.min(Math.max(from, s.first), s.end - 1));
    });
    box.append(s.canvas);
    grid.append(box);
  }
}
function pick(block) {
  if (block === picked) return;
  picked = block;
  sayPicked();
  drawMap();
}
function sayPicked() {
  if (picked < 0) return;
  const block = picked;
  const code = codes[place(block)];
  const [state, zone, node] = code < 0 ? [] : run.legend[code];
  $("picked").textContent = `memory${block} at ${address(block)}: ` +
    (code < 0 ? "not there" : `${state}, ${zone === "none" ? "no zone" : zone === "several" ? "several zones" : "zone " + zone}, node ${node}`);
}
function drawMap() {
  const width = $("grid").clientWidth, ratio = window.devicePixelRatio || 1;
  for (const s of segments) {
    const n = s.end - s.first;
    s.across = Math.max(1, Math.min(n, Math.floor(width / cell)));
    if (s.across >= 16) s.across -= s.across % 8;
    const w = s.across * cell, h = Math.ceil(n / s.across) * cell;
    if (s.canvas.width !== Math.round(w * ratio) || s.canvas.height !== Math.round(h * ratio)) {
      s.canvas.width = Math.round(w * ratio); s.canvas.height = Math.round(h * ratio);
      s.canvas.style.width = `${w}px`; s.canvas.style.height = `${h}px`;
    }
    const g = s.canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, w, h);
    for (let i = 0; i < n; i += 1)
      drawCell(g, (i % s.across) * cell, Math.floor(i / s.across) * cell, cell, codes[s.offset + i], s.first + i === picked);
    frame(g, s, n);
  }
}
function ranges() {
  const out = [];
  for (const s of segments) for (let b = s.first; b < s.end; b += 1) {
    const code = codes[s.offset + b - s.first], last = out[out.length - 1];
    if (last && last.code === code && last.end === b) last.end += 1;
    else out.push({ code, first: b, end: b + 1 });
  }
  return out.filter((r) => r.code >= 0);
}
function drawLegend(found) {
  const sums = new Map();
  for (const r of found) sums.set(r.code, (sums.get(r.code) || 0) + r.end - r.first);
  const body = $("legend").tBodies[0];
  body.replaceChildren();
  for (const [code, n] of [...sums].sort((a, b) => a[0] - b[0])) {
    const row = body.insertRow(), mark = el("canvas");
    mark.width = mark.height = 48; mark.style.width = mark.style.height = "24px"; mark.setAttribute("aria-hidden", "true");
    const g = mark.getContext("2d");
    g.setTransform(2, 0, 0, 2, 0, 0);
    drawCell(g, 0, 0, 24, code, false);
    row.insertCell().append(mark);
    for (const text of run.legend[code]) row.append(el("td", text));
    row.append(el("td", count(n), "n"), el("td", size(n * run.block_size), "n"));
  }
  if (!sums.size) body.insertRow().append(el("td", "none"));
}
let rangesOpen = false;
function drawRanges() {
  if (!rangesOpen) return;
  const rows = ranges().map((r) => [
    r.end - r.first > 1 ? `memory${r.first} to ${r.end - 1}` : `memory${r.first}`, address(r.first), ...run.legend[r.code], r.end - r.first, size((r.end - r.first) * run.block_size)]);
  $("ranges").querySelector("div").replaceChildren(table("The map", ["Blocks", "From", "State", "Zone", "Node", "Number", "Size"], rows));
}
$("ranges").addEventListener("toggle", () => { rangesOpen = $("ranges").open; drawRanges(); });
