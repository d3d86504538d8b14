// The charts, their legends, and the cursor that they are read at.

import { dashOf, drawChart, dress, layOut, measure, measureChart, swatch } from "./drawing.js";
import { byId, el, svg } from "./elements.js";
import { NONE, UNITS, format, timeOf, when } from "./format.js";
import { latest, nearest, valueAt } from "./readings.js";

const charts = new Map();
let at = NaN; // When what is drawn was told, in milliseconds since 1970.
let span = 0; // How much before that is drawn, in seconds.
let cursor = null; // The time that all charts are read at, in milliseconds since 1970; now if null.

// Draws the charts of an answer, of one member only or of all.
export function drawCharts(data, members, names, only, seconds) {
  [at, span] = [when(data.view.at), seconds];
  measure();
  const hosts = members.map((member) => member.host);
  const wanted = data.charts ?? [];
  for (const [id, chart] of charts) {
    if (wanted.some((chart) => chart.id === id)) continue;
    sizes.unobserve(chart.plot);
    chart.root.remove();
    charts.delete(id);
  }
  wanted.forEach((told, i) => {
    if (!charts.has(told.id)) charts.set(told.id, makeChart(told.id));
    const chart = charts.get(told.id);
    if (byId("charts").children[i] !== chart.root) byId("charts").insertBefore(chart.root, byId("charts").children[i] ?? null);
    chart.unit = told.unit;
    chart.title.textContent = told.title ?? told.id;
    chart.unitText.textContent = UNITS[told.unit] ?? "";
    fill(chart, (told.lines ?? []).filter((line) => !only || line.member === only), hosts, names);
    layOut(chart);
  });
  for (const chart of charts.values()) measureChart(chart);
  for (const chart of charts.values()) drawChart(chart, at, span);
  if (cursor !== null && cursor < at - span * 1000) cursor = null;
  readOut();
}

const sizes = new ResizeObserver((entries) => {
  measure();
  for (const { target } of entries) {
    const chart = charts.get(target.parentElement?.dataset.chart);
    if (!chart) continue;
    measureChart(chart);
    drawChart(chart, at, span);
  }
  readOut();
});

function makeChart(id) {
  const chart = { id, lines: [], cells: [], key: null };
  chart.title = el("h3", { id: `chart-${id}` });
  chart.unitText = el("span", { class: "unit" });
  chart.at = el("span", { class: "at" });
  chart.svg = svg("svg", { "aria-hidden": "true" });
  // A slider is what screen readers know of things that arrow keys move through and that say where they are.
  const slider = { class: "plot", tabindex: "0", role: "slider", "aria-labelledby": `chart-${id}`, "aria-valuemax": "0" };
  chart.plot = el("div", slider, chart.svg);
  chart.legend = el("div", { class: "legend", role: "group", "aria-label": "Legend" });
  chart.empty = el("p", { class: "quiet" }, "nothing read");
  const caption = el("figcaption", {}, chart.title, chart.unitText, chart.at);
  chart.root = el("figure", { class: "chart panel", "data-chart": id }, caption, chart.empty, chart.plot, chart.legend);
  sizes.observe(chart.plot);
  listen(chart);
  return chart;
}

// ---------------------------------------------------------------- Legend

function fill(chart, told, hosts, names) {
  const { lines, members, series } = dress(told, hosts, span);
  chart.root.classList.toggle("broad", members.length > 1 && series.length > 3);
  chart.lines = lines;
  const key = JSON.stringify([members, series]);
  if (key === chart.key) return;
  chart.key = key;
  const { scrollTop } = chart.legend;
  makeLegend(chart, members, series, names);
  chart.legend.scrollTop = scrollTop;
}

// Members by series as a table, else as a list; the numbers in it are those at the cursor.
function makeLegend(chart, members, series, names) {
  chart.cells = [];
  const line = (member, series) => chart.lines.find((line) => line.member === member && line.series === series);
  const value = (tag, found) => {
    const element = el(tag, {}, NONE);
    if (found) chart.cells.push([element, found.member, found.series]);
    return element;
  };
  const nameOf = (member) => names.get(member) ?? member;
  if (members.length < 2 || series.length < 2) {
    const found = members.flatMap((member) => series.map((of) => line(member, of)).filter(Boolean));
    const name = (line) => (members.length > 1 || line.series === null ? nameOf(line.member) : line.series);
    const items = found.map((line) => el("li", { title: line.member }, swatch(line), el("span", {}, name(line)), value("b", line)));
    return chart.legend.replaceChildren(el("ul", {}, ...items));
  }
  const plain = (nth) => swatch({ dash: dashOf(nth) });
  const head = el("tr", {}, el("td", {}), ...series.map((of, i) => el("th", { scope: "col" }, plain(i), of ?? "")));
  const rows = members.map((member) => {
    const first = chart.lines.find((line) => line.member === member);
    const name = el("div", { class: "name" }, swatch(first, true), el("span", {}, nameOf(member)));
    return el("tr", {}, el("th", { scope: "row", title: member }, name), ...series.map((of) => value("td", line(member, of))));
  });
  chart.legend.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

// ---------------------------------------------------------------- Cursor

// The line whose times the cursor goes through.
const longest = (chart) => chart.lines.reduce((longest, { points }) => (points.length > longest.length ? points : longest), []);

function listen(chart) {
  const point = (event) => {
    const { left } = chart.plot.getBoundingClientRect();
    moveTo(chart, ((event.clientX - left - chart.left) / chart.width - 1) * span);
  };
  chart.plot.addEventListener("pointermove", point);
  chart.plot.addEventListener("pointerdown", point);
  // A finger that is lifted leaves what it has pointed at.
  chart.plot.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch" && document.activeElement !== chart.plot) release();
  });
  chart.plot.addEventListener("blur", release);
  chart.plot.addEventListener("keydown", (event) => {
    const points = longest(chart);
    const here = cursor === null ? points.length : nearest(points, (cursor - at) / 1000);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return release();
    if (!(event.key in steps) || !points.length || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    moveTo(chart, points[Math.max(0, Math.min(points.length - 1, here + steps[event.key]))][0]);
  });
}
document.addEventListener("pointerdown", (event) => {
  if (cursor !== null && !event.target.closest?.(".plot")) release();
});

let isDue = false;
function moveTo(chart, time) {
  const points = longest(chart);
  if (!points.length) return;
  cursor = at + points[nearest(points, time)][0] * 1000;
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    readOut();
  });
}
// Back to now.
export function release() {
  cursor = null;
  readOut();
}

// One cursor for all charts: what happened at the same time is read together.
function readOut() {
  const time = cursor === null ? null : (cursor - at) / 1000;
  const label = time === null ? "last read" : timeOf(cursor);
  for (const chart of charts.values()) {
    chart.at.textContent = chart.plot.hidden ? "" : label;
    if (chart.plot.hidden || !chart.x) continue;
    chart.cursor.setAttribute("visibility", time === null ? "hidden" : "visible");
    if (time !== null) ["x1", "x2"].forEach((name) => chart.cursor.setAttribute(name, chart.x(time).toFixed(1)));
    const lines = new Map(chart.lines.map((line) => [`${line.member} ${line.series}`, line]));
    const values = chart.cells.map(([element, member, series]) => {
      const line = lines.get(`${member} ${series}`);
      const text = format(chart.unit, !line ? null : time === null ? latest(line.points) : valueAt(line, time));
      if (element.textContent !== text) element.textContent = text;
      return `${member} ${series ?? ""} ${text}`;
    });
    chart.plot.setAttribute("aria-valuemin", -span);
    chart.plot.setAttribute("aria-valuenow", Math.round(time ?? 0));
    const spoken = values.slice(0, 8).join(", ") + (values.length > 8 ? `, and ${values.length - 8} more` : "");
    chart.plot.setAttribute("aria-valuetext", `${label}: ${spoken} ${chart.unitText.textContent}`.trim());
  }
}
