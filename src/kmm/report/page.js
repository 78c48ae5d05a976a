"use strict";
(() => {
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
    const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
    paint = { zone: {}, node: {}, state: { online: css("--z2"), "going-offline": css("--z3"), offline: css("--z5") } };
    ZONES.forEach((z, i) => { paint.zone[z] = css(`--z${i}`); });
    paint.zone.none = css("--z5");
    const some = dark ? ["#e8ebef", "#e58fd0", "#f5e14a", "#7cc8ff", "#7fe0b0", "#ffa98f"] : ["#16191d", "#9b2c86", "#c79a00", "#00598f", "#00664b", "#a03512"];
    paint.nodeOf = (n) => some[(parseInt(n, 10) || 0) % some.length];
    for (const v of ["cell", "hatch", "letter", "accent", "ink", "line"]) paint[v] = css(`--${v}`);
  }
  function fillOf([state, zone, node]) {
    if (mode === "node") return paint.nodeOf(node);
    return mode === "state" ? paint.state[state] || paint.hatch : paint.zone[zone] || paint.hatch;
  }
  function drawCell(g, x, y, c, code, isPicked) {
    const s = c - (c > 8 ? 2 : 1);
    if (code < 0) {
      g.strokeStyle = paint.line;
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
        if (e.offsetX / cell < s.across && i < s.end - s.first) pick(s, s.first + i);
      });
      s.canvas.addEventListener("keydown", (e) => {
        const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -s.across, ArrowDown: s.across }[e.key];
        if (!move) return;
        e.preventDefault();
        const from = picked >= s.first && picked < s.end ? picked + move : s.first;
        pick(s, Math.min(Math.max(from, s.first), s.end - 1));
      });
      box.append(s.canvas);
      grid.append(box);
    }
  }
  function pick(segment, block) {
    if (block === picked) return;
    picked = block;
    const code = codes[place(block)];
    const [state, zone, node] = code < 0 ? [] : run.legend[code];
    $("picked").textContent = `memory${block} at ${address(block)}: ` +
      (code < 0 ? "not there" : `${state}, ${zone === "none" ? "no zone" : zone === "several" ? "several zones" : "zone " + zone}, node ${node}`);
    drawMap();
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
    $("ranges").querySelector("div").replaceChildren(table(["Blocks", "From", "State", "Zone", "Node", "Number", "Size"], rows));
  }

  /* What a step said. */
  function drawStep(k) {
    const box = $("step");
    box.replaceChildren();
    const first = k > 0 ? moments[k - 1].step + 1 : 0;
    if (k === 0) { box.append(el("p", "Nothing yet: the machine as it booted.")); return; }
    for (let n = first; n <= moments[k].step && n < first + 20; n += 1) {
      const s = steps[n - 1];
      box.append(el("p", `Step ${n}: ${s.text}`, "mono"));
      if (s.error) box.append(el("p", `refused: ${s.error}`, "refused"));
      else if (s.output) box.append(el("pre", s.output));
      else box.append(el("p", "done", "hint"));
      const lines = [...s.uevents.map((l) => `uevent ${l}`), ...s.log.map((l) => `kernel ${l}`)];
      if (lines.length) box.append(el("pre", lines.join("\n")));
    }
  }

  const slider = $("slider");
  let view = null;
  function show() {
    const k = Number(slider.value), n = moments[k].step;
    go(k);
    const text = n ? `${n} of ${steps.length}: ${steps[n - 1].text}${steps[n - 1].error ? " (refused)" : ""}` : "0: as booted";
    $("now").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    $("back").disabled = k === 0;
    $("on").disabled = k === moments.length - 1;
    const found = ranges();
    drawMap(); drawLegend(found); drawRanges(); drawStep(k);
    if (view) view.signal("now", n).runAsync();
  }

  /* Charts, drawn by Vega-Lite when they come into sight. */
  const zones = [...new Set(moments.flatMap((m) => Object.keys(m.zones)))];
  const MARKS = ["free", "high", "low", "min"];
  const EVERY = Math.max(1, ...moments.slice(1).map((m, i) => m.step - moments[i].step));
  function config() {
    const ink = css("--ink"), soft = css("--soft"), line = css("--line");
    return {
      background: "transparent", font: "system-ui, DejaVu Sans, sans-serif", view: { stroke: line },
      axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line },
      legend: { labelColor: ink, titleColor: soft }, header: { labelColor: ink, titleColor: soft }, title: { color: ink },
    };
  }
  /* The charting library is only run once there is something to draw. */
  const embed = (id, spec, label) => {
    if (!window.vegaEmbed) {
      const library = el("script", $("library").textContent);
      document.head.append(library);
    }
    const whole = { config: config(), description: label, ...spec };
    return window.vegaEmbed(`#${id}`, whole, { mode: "vega-lite", actions: false, renderer: "canvas" });
  };
  const room = (id, less) => Math.max(180, $(id).clientWidth - less);
  const apart = Math.ceil(Math.max(1, steps.length) / 10);
  const ticks = [...Array(Math.floor(steps.length / apart) + 1).keys()].map((i) => i * apart);
  const X = { field: "step", type: "quantitative", title: "step", axis: { values: ticks, format: "d" }, scale: { domain: [0, Math.max(1, steps.length)], nice: false } };
  const charts = {
    async marks() {
      const zone = $("zone").value, values = [];
      for (const m of moments) if (m.zones[zone]) for (const which of MARKS) values.push({ step: m.step, which, pages: m.zones[zone][which], shown: Math.max(1, m.zones[zone][which]) });
      const scale = { domain: MARKS, range: MARKS.map((w) => css(`--${w}`)) };
      const done = await embed("marks", {
        width: room("marks", 190), height: 220, params: [{ name: "now", value: moments[Number(slider.value)].step }],
        layer: [
          { data: { values }, mark: { type: "line", interpolate: "step-after", strokeWidth: 2.5, point: moments.length < 60 ? { size: 30 } : false },
            encoding: { x: X, y: { field: "shown", title: "pages", type: "quantitative", scale: { type: "log" }, axis: { format: "~s", tickCount: 5, gridOpacity: 0.5 } },
              color: { field: "which", type: "nominal", scale, title: "pages", legend: { symbolType: "stroke", symbolSize: 500, symbolStrokeWidth: 2.5 } },
              strokeDash: { field: "which", type: "nominal", scale: { domain: MARKS, range: [[1, 0], [8, 3], [5, 4], [2, 3]] }, title: "pages" },
              tooltip: [{ field: "step" }, { field: "which" }, { field: "pages", format: "," }] } },
          { data: { values: [{}] }, transform: [{ calculate: "now", as: "step" }], mark: { type: "rule", color: css("--accent"), strokeWidth: 1.5 }, encoding: { x: X } },
        ],
      }, `Free pages of ${zone} and its watermarks by step; the table below has the numbers`);
      view = done.view;
    },
    async heat() {
      const zone = $("zone").value, values = [], types = new Set();
      for (const m of moments) for (const mt of Object.keys((m.zones[zone] || { blocks: {} }).blocks)) types.add(mt);
      for (const m of moments) if (m.zones[zone]) for (const mt of types)
        (m.zones[zone].blocks[mt] || new Array(11).fill(0)).forEach((n, order) => {
          if (n) values.push({ step: m.step - EVERY / 2, to: m.step + EVERY / 2, at: m.step, mt, order, n });
        });
      const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
      await embed("heat", {
        data: { values },
        facet: { row: { field: "mt", type: "nominal", title: null, header: { labelAngle: 0, labelAnchor: "start", labelOrient: "top" } } },
        spec: { width: room("heat", 170), height: 150, mark: { type: "rect" },
          encoding: { x: { ...X, field: "step", scale: { domain: [-EVERY / 2, steps.length + EVERY / 2], nice: false } }, x2: { field: "to" },
            y: { field: "order", type: "ordinal", sort: "descending", scale: { domain: [...Array(11).keys()] } },
            color: { field: "n", type: "quantitative", scale: { type: "symlog", range: dark ? ["#31527a", "#56b4e9", "#f5f9ff"] : ["#bcd7ee", "#3182bd", "#08306b"] }, title: "free blocks" },
            tooltip: [{ field: "at", title: "step" }, { field: "mt", title: "migratetype" }, { field: "order" }, { field: "n", title: "free blocks", format: "," }] } },
      }, `Free blocks of ${zone} by step, order and migratetype; the table below has the numbers`);
    },
    async counts() {
      const lines = (text) => { const m = /\((\d+) lines\)$/.exec(text); return m ? Number(m[1]) : 1; };
      const values = steps.flatMap((s, i) => [["uevents", s.uevents], ["log lines", s.log]].map(([kind, list]) => (
        { step: i + 1, kind, n: list.reduce((sum, l) => sum + lines(l), 0) }))).filter((v) => v.n);
      await embed("counts", {
        data: { values }, width: room("counts", 190), height: 90,
        mark: { type: "bar", width: Math.max(1, Math.min(40, (0.7 * room("counts", 190)) / (steps.length + 1))) },
        encoding: { x: { ...X, scale: { domain: [0, steps.length + 1], nice: false } },
          y: { field: "n", type: "quantitative", title: "lines", stack: true },
          color: { field: "kind", type: "nominal", title: null, scale: { domain: ["uevents", "log lines"], range: [css("--z1"), css("--z3")] } },
          tooltip: [{ field: "step" }, { field: "kind" }, { field: "n", title: "lines", format: "," }] },
      }, "Uevents and log lines by step; the list below has them");
    },
  };
  const seen = new Set();
  const draw = (id) => charts[id]().catch((e) => { $(id).textContent = `This chart could not be drawn: ${e.message}`; console.error(e); });
  const watcher = new IntersectionObserver((entries) => {
    for (const e of entries) if (e.isIntersecting && !seen.has(e.target.id)) { seen.add(e.target.id); draw(e.target.id); }
  }, { rootMargin: "200px" });

  /* Tables. */
  lazily($("marks-table"), () => {
    const rows = moments.flatMap((m) => Object.entries(m.zones).map(([zone, z]) => [m.step, zone, z.free, z.min, z.low, z.high, z.present, z.managed]));
    $("marks-table").querySelector("div").replaceChildren(table(["Step", "Zone", "Free", "Min", "Low", "High", "Present", "Managed"], rows));
  });
  lazily($("heat-table"), () => {
    const rows = moments.flatMap((m) => Object.entries(m.zones).flatMap(([zone, z]) => Object.entries(z.blocks).map(([mt, n]) => [m.step, zone, mt, ...n])));
    $("heat-table").querySelector("div").replaceChildren(table(["Step", "Zone", "Migratetype", ...[...Array(11).keys()].map((o) => `Order ${o}`)], rows));
  });
  $("ranges").addEventListener("toggle", () => { rangesOpen = $("ranges").open; drawRanges(); });
  function offline() {
    const rows = steps.flatMap((s, i) => s.offline.map((o) => [
      i + 1, o.blocks > 1 ? `memory${o.first} to ${o.first + o.blocks - 1}` : `memory${o.first}`,
      o.error ? `refused: ${o.error}` : "offline",
      Object.entries(o.counts).map(([fate, n]) => `${count(n)} ${fate === "stays" ? "stayed" : fate}`).join(", "),
      o.error ? [o.reason, o.blocked === null || o.blocked === undefined ? "" : `pfn 0x${o.blocked.toString(16)}`, o.by].filter(Boolean).join("; ") : ""]));
    $("offline").replaceChildren(rows.length ? table(["Step", "Blocks", "Result", "Pages", "What it stumbled over"], rows) : el("p", "No block was asked to go offline.", "hint"));
  }
  function events() {
    const kind = $("kind").value, words = $("filter").value.toLowerCase(), rows = [];
    let all = 0;
    steps.forEach((s, i) => {
      for (const [k, list] of [["uevent", s.uevents], ["kernel", s.log]]) for (const line of list) {
        all += 1;
        if ((!kind || kind === k) && line.toLowerCase().includes(words)) rows.push([i + 1, span(s.start_ns), k, line]);
      }
    });
    const most = 2000;
    $("matches").textContent = `${count(rows.length)} of ${count(all)}` + (rows.length > most ? `, the first ${count(most)} shown` : "");
    $("events").replaceChildren(table(["Step", "From", "Kind", "Line"], rows.slice(0, most)));
  }
  function callNode([name, times, ns, pages, error, inside]) {
    const words = [el("span", `${name}()${times > 1 ? " ×" + count(times) : ""} `), el("span", `${span(ns)}${pages ? ", " + count(pages) + " pages" : ""}`, "ns")];
    if (error) words.push(el("span", ` ${error}`, "refused"));
    const box = el(inside.length ? "details" : "div", undefined, inside.length ? "" : "leaf");
    if (inside.length) {
      const head = el("summary");
      head.append(...words);
      box.append(head);
      lazily(box, () => box.append(...inside.map(callNode)));
    } else box.append(...words);
    return box;
  }
  function calls() {
    const box = el("div", undefined, "tree");
    steps.forEach((s, i) => {
      if (!s.calls.length && !s.calls_left_out) return;
      const d = el("details"), head = el("summary", `step ${i + 1}: ${s.text} `);
      head.append(el("span", span(s.end_ns - s.start_ns), "ns"));
      d.append(head);
      lazily(d, () => d.append(...(s.calls_left_out ? [el("p", `${count(s.calls_left_out)} calls, left out of a report of this length`, "hint")] : s.calls.map(callNode))));
      box.append(d);
    });
    $("calls").replaceChildren(box.children.length ? box : el("p", "No calls were recorded.", "hint"));
  }

  function theme() {
    const t = $("theme").value;
    if (t) document.documentElement.dataset.theme = t; else delete document.documentElement.dataset.theme;
    colours(); show();
    for (const id of seen) draw(id);
  }
  function start() {
    slider.max = String(moments.length - 1);
    for (const z of zones) $("zone").append(new Option(z, z));
    const largest = zones.map((z) => [Math.max(...moments.map((m) => (m.zones[z] || { present: 0 }).present)), z]).sort((a, b) => b[0] - a[0]);
    if (largest.length) $("zone").value = largest[0][1];
    const refused = steps.filter((s) => s.error).length, last = steps.length ? steps[steps.length - 1].end_ns : 0;
    $("summary").textContent = `${count(steps.length)} steps, ${count(refused)} refused, ${span(last)} of virtual time; blocks of ${size(run.block_size)}` +
      (EVERY > 1 ? `; numbers of every ${EVERY}th step` : "");
    buildGrid(); colours(); show(); offline(); events(); calls();
    $("steps").append(table(["Step", "What", "Result", "Virtual time"], steps.map((s, i) => [i + 1, s.text, s.error ? `refused: ${s.error}` : s.output.split("\n")[0] || "done", length(s)])));
    slider.addEventListener("input", show);
    $("back").addEventListener("click", () => { slider.stepDown(); show(); });
    $("on").addEventListener("click", () => { slider.stepUp(); show(); });
    $("mode").addEventListener("change", () => { mode = $("mode").value; show(); });
    $("theme").addEventListener("change", theme);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
    $("zone").addEventListener("change", () => { for (const id of ["marks", "heat"]) if (seen.has(id)) draw(id); });
    $("kind").addEventListener("change", events);
    $("filter").addEventListener("input", events);
    let soon = 0, width = window.innerWidth;
    window.addEventListener("resize", () => {
      clearTimeout(soon);
      soon = setTimeout(() => { if (window.innerWidth !== width) { width = window.innerWidth; drawMap(); for (const id of seen) draw(id); } }, 200);
    });
    for (const id of Object.keys(charts)) watcher.observe($(id));
    document.documentElement.dataset.ready = "yes";
  }
  start();
})();
