/* What moves the page: the slider, the choices, the window. */
const slider = $("slider");
let view = null;
function show() {
  const k = Number(slider.value), n = moments[k].step;
  go(k);
  const text = n ? `${n} of ${steps.length}${steps[n - 1].error ? " (refused)" : ""}: ${steps[n - 1].text}` : "0: as booted";
  $("now").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  /* A button that went off under the focus would lose it. */
  $("back").setAttribute("aria-disabled", k === 0);
  $("on").setAttribute("aria-disabled", k === moments.length - 1);
  const found = ranges();
  drawMap(); drawLegend(found); drawRanges(); drawStep(k); sayPicked(); reachable();
  if (view) view.signal("now", n).runAsync();
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
  $("steps").append(table("All steps", ["Step", "What", "Result", "Uevents", "Log lines", "Virtual time"],
    steps.map((s, i) => [i + 1, s.text, s.error ? `refused: ${s.error}` : s.output.split("\n")[0] || "done", lines(s.uevents), lines(s.log), length(s)])));
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
    soon = setTimeout(() => { if (window.innerWidth !== width) { width = window.innerWidth; drawMap(); reachable(); for (const id of seen) draw(id); } }, 200);
  });
  document.addEventListener("toggle", () => requestAnimationFrame(reachable), true);
  /* Paper is light; a chart that is not drawn anew in time keeps its own ground. */
  window.addEventListener("beforeprint", () => { document.documentElement.dataset.theme = "light"; colours(); show(); });
  window.addEventListener("afterprint", theme);
  for (const id of Object.keys(charts)) watcher.observe($(id));
  document.documentElement.dataset.ready = "yes";
}
start();
