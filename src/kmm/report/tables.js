/* What a step said, offlines, events and calls in words and numbers. */
function said(text) {
  const box = el("pre", text);
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "What was said");
  return box;
}
function drawStep(k) {
  const box = $("step");
  box.replaceChildren();
  const first = k > 0 ? moments[k - 1].step + 1 : 0;
  if (k === 0) { box.append(el("p", "Nothing yet: the machine as it booted.")); return; }
  for (let n = first; n <= moments[k].step && n < first + 20; n += 1) {
    const s = steps[n - 1];
    box.append(el("p", `Step ${n}: ${s.text}`, "mono"));
    if (s.error) box.append(el("p", `refused: ${s.error}`, "refused"));
    else if (s.output) box.append(said(s.output));
    else box.append(el("p", "done", "hint"));
    const told = [...s.uevents.map((l) => `uevent ${l}`), ...s.log.map((l) => `kernel ${l}`)];
    if (told.length) box.append(said(told.join("\n")));
  }
}

lazily($("marks-table"), () => {
  const rows = moments.flatMap((m) => Object.entries(m.zones).map(([zone, z]) => [m.step, zone, z.free, z.min, z.low, z.high, z.present, z.managed]));
  $("marks-table").querySelector("div").replaceChildren(table("Pages and watermarks", ["Step", "Zone", "Free", "Min", "Low", "High", "Present", "Managed"], rows));
});
lazily($("heat-table"), () => {
  const rows = moments.flatMap((m) => Object.entries(m.zones).flatMap(([zone, z]) => Object.entries(z.blocks).map(([mt, n]) => [m.step, zone, mt, ...n])));
  $("heat-table").querySelector("div").replaceChildren(table("Free blocks", ["Step", "Zone", "Migratetype", ...[...Array(11).keys()].map((o) => `Order ${o}`)], rows));
});

function offline() {
  const rows = steps.flatMap((s, i) => s.offline.map((o) => [
    i + 1, o.blocks > 1 ? `memory${o.first} to ${o.first + o.blocks - 1}` : `memory${o.first}`,
    o.error ? `refused: ${o.error}` : "offline",
    Object.entries(o.counts).map(([fate, n]) => `${count(n)} ${fate === "stays" ? "stayed" : fate}`).join(", "),
    o.error ? [o.reason, o.blocked === null || o.blocked === undefined ? "" : `pfn 0x${o.blocked.toString(16)}`, o.by].filter(Boolean).join("; ") : ""]));
  $("offline").replaceChildren(rows.length ? table("Offlined blocks", ["Step", "Blocks", "Result", "Pages", "What it stumbled over"], rows) : el("p", "No block was asked to go offline.", "hint"));
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
  $("events").replaceChildren(table("Uevents and kernel log", ["Step", "From", "Kind", "Line"], rows.slice(0, most)));
  reachable();
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
