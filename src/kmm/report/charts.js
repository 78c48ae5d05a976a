/* Charts, drawn by Vega-Lite when they come into sight. */
const zones = [...new Set(moments.flatMap((m) => Object.keys(m.zones)))];
const MARKS = ["free", "high", "low", "min"];
const EVERY = Math.max(1, ...moments.slice(1).map((m, i) => m.step - moments[i].step));
function config() {
  const ink = css("--ink"), soft = css("--soft"), line = css("--line");
  return {
    background: css("--card"), font: "system-ui, DejaVu Sans, sans-serif", view: { stroke: line },
    axis: { labelFontSize: 12, titleFontSize: 12, labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line },
    legend: { orient: narrow() ? "bottom" : "right", labelFontSize: 12, titleFontSize: 12, labelColor: ink, titleColor: soft }, header: { labelFontSize: 12, labelColor: ink, titleColor: soft }, title: { color: ink },
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
const narrow = () => document.documentElement.clientWidth < 640;
const room = (id, less) => Math.max(180, $(id).clientWidth - (narrow() ? 80 : less));
const apart = Math.ceil(Math.max(1, steps.length) / 10);
const ticks = [...Array(Math.floor(steps.length / apart) + 1).keys()].map((i) => i * apart);
const X = { field: "step", type: "quantitative", title: "step", axis: { values: ticks, format: "d" }, scale: { domain: [0, Math.max(1, steps.length)], nice: false } };
const charts = {
  async marks() {
    const zone = $("zone").value, values = [];
    /* Without a zone there is no line. */
    for (const m of moments) for (const which of MARKS) {
      const pages = m.zones[zone] ? m.zones[zone][which] : null;
      values.push({ step: m.step, which, pages, shown: pages === null ? null : Math.max(1, pages) });
    }
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
    const values = steps.flatMap((s, i) => [["uevents", s.uevents], ["log lines", s.log]].map(([kind, list]) => (
      { step: i + 1, kind, n: lines(list) }))).filter((v) => v.n);
    await embed("counts", {
      data: { values }, width: room("counts", 190), height: 90,
      mark: { type: "bar", width: Math.max(1, Math.min(40, (0.7 * room("counts", 190)) / (steps.length + 1))) },
      encoding: { x: { ...X, scale: { domain: [0, steps.length + 1], nice: false } },
        y: { field: "n", type: "quantitative", title: "lines", stack: true },
        color: { field: "kind", type: "nominal", title: null, scale: { domain: ["uevents", "log lines"], range: [css("--z1"), css("--z3")] } },
        tooltip: [{ field: "step" }, { field: "kind" }, { field: "n", title: "lines", format: "," }] },
    }, "Uevents and log lines by step; the table of all steps has the numbers");
  },
};
const seen = new Set();
const draw = (id) => charts[id]().then(reachable, (e) => { $(id).textContent = `This chart could not be drawn: ${e.message}`; console.error(e); });
const watcher = new IntersectionObserver((entries) => {
  for (const e of entries) if (e.isIntersecting && !seen.has(e.target.id)) { seen.add(e.target.id); draw(e.target.id); }
}, { rootMargin: "200px" });
