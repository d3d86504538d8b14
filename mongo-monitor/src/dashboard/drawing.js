// What is in one chart: how its lines look, its axes and its lines.

import { SHAPES, svg } from "./elements.js";
import { MINUTES, format, isNumber } from "./format.js";

const TONES = 8;
const DASHES = ["", "7 3", "2 2.5", "9 3 2 3", "4 4", "12 3 2 3 2 3"];
const TOKENS = ["circle", "square", "triangle", "diamond", "cross", "plus", "down", "star"];

// Asked for once for all charts: each time it is asked for, the browser lays out what has changed.
let rootSize = 14;
const rem = (number) => number * rootSize;
export const measure = () => (rootSize = parseFloat(getComputedStyle(document.documentElement).fontSize));

// ---------------------------------------------------------------- What lines look like

// The tone of a line and the marks on it tell the member, the dashes tell the series; a line of one member alone, or of the only series,
// is told by tone and dashes. Of more members than can be told apart those with the highest peaks stand out, and the others are thin.
// Gives the lines, and their members and series in the order of the legend.
export function dress(told, hosts, span) {
  const inOrder = (values, order) => [...new Set(values)].sort((a, b) => order.indexOf(a) - order.indexOf(b));
  let members = inOrder(told.map((line) => line.member), hosts);
  const series = [...new Set(told.map((line) => line.series ?? null))];
  const lines = told.map(({ member, series, points }) => (
    { member, series: series ?? null, points: (points ?? []).filter(([time]) => time >= -span && time <= 0) }
  ));
  const isMany = members.length > TONES;
  if (isMany) {
    const peaks = new Map();
    for (const { member, points } of lines) {
      const peak = points.reduce((peak, [, value]) => (isNumber(value) ? Math.max(peak, value) : peak), peaks.get(member) ?? -1);
      peaks.set(member, peak);
    }
    members = members.sort((a, b) => peaks.get(b) - peaks.get(a));
  }
  const dressed = lines.map((line) => {
    const [of, nth] = [members.indexOf(line.member), series.indexOf(line.series)];
    const index = isMany ? of : Math.max(0, hosts.indexOf(line.member));
    const tone = members.length === 1 ? nth : index;
    return {
      ...line, of,
      isOther: isMany && of >= TONES - 2,
      tone: tone % TONES,
      dash: dashOf(members.length > 1 && series.length === 1 ? index : nth),
      token: members.length > 1 ? TOKENS[index % TOKENS.length] : null,
    };
  });
  return { lines: dressed, members, series };
}
export const dashOf = (nth) => DASHES[nth % DASHES.length];

// A short one is of a member, whose series have the dashes.
export function swatch(line, isShort = false) {
  const tone = line.isOther ? "other" : `t${line.tone}`;
  const [width, height] = [rem(isShort ? 1.2 : 1.9), rem(0.4)];
  const stroke = svg("line", {
    class: `line ${line.isOther ? "other" : ""}`, x1: 0, x2: width, y1: height, y2: height,
    "stroke-dasharray": isShort ? null : dashes(line.dash) || null,
  });
  const mark = line.token && !line.isOther ? token(line.token, width / 2, height) : null;
  return svg("svg", { class: `swatch ${tone} ${isShort ? "short" : ""}`, "aria-hidden": "true" }, stroke, mark);
}
const dashes = (dash) => dash && dash.split(" ").map((length) => (length * rem(1 / 14)).toFixed(1)).join(" ");
function token(name, x, y) {
  const place = `${(x - rem(0.26)).toFixed(1)} ${(y - rem(0.26)).toFixed(1)}`;
  return svg("path", { class: "token", d: SHAPES[name], transform: `translate(${place}) scale(${(rem(0.52) / 16).toFixed(3)})` });
}

// ---------------------------------------------------------------- Axes and lines

const LONG_STEPS = [30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 172800];
// Round ticks from zero to above the greatest value: three or four steps at most.
function ticks(unit, greatest) {
  const isBytes = unit === "bytes" || unit === "bytes_per_second";
  let step;
  if (!(greatest > 0)) step = { bytes: 1024, bytes_per_second: 1024, ratio: 0.5, seconds: 0.001 }[unit] ?? 1;
  else if (isBytes) step = 2 ** Math.max(0, Math.ceil(Math.log2(greatest / 4)));
  else if (unit === "seconds" && greatest > 100) {
    step = LONG_STEPS.find((step) => step >= greatest / 4) ?? 86400 * Math.ceil(greatest / 4 / 86400);
  } else {
    const power = 10 ** Math.floor(Math.log10(greatest / 4));
    step = [1, 2, 5, 10].find((factor) => factor * power >= greatest / 4 * 0.999) * power;
    if (unit === "count") step = Math.max(1, step);
  }
  const steps = Math.max(2, Math.ceil(greatest / step - 1e-9) || 0);
  return Array.from({ length: steps + 1 }, (_, i) => i * step);
}

const text = (x, y, anchor, label) => svg("text", { x: x.toFixed(1), y: y.toFixed(1), "text-anchor": anchor }, label);

// Three steps, so that all charts are measured before any is changed again.
export function layOut(chart) {
  chart.isEmpty = !chart.lines.some(({ points }) => points.some(([, value]) => isNumber(value)));
  chart.empty.hidden = !chart.isEmpty;
  chart.plot.hidden = chart.legend.hidden = chart.isEmpty;
}
export function measureChart(chart) {
  const { plot, legend } = chart;
  [chart.all, chart.height] = [plot.clientWidth, plot.clientHeight];
  // What scrolls must be within reach of the keyboard.
  if (legend.scrollHeight > legend.clientHeight + 1 || legend.scrollWidth > legend.clientWidth + 1) legend.tabIndex = 0;
  else legend.removeAttribute("tabindex");
}
// Draws so many seconds before a time, which is in milliseconds since 1970.
export function drawChart(chart, at, span) {
  const { all, height } = chart;
  if (chart.isEmpty || !all) return;
  const em = rem(0.78);
  let greatest = 0;
  for (const { points } of chart.lines) for (const [, value] of points) if (value > greatest) greatest = value;
  const marks = ticks(chart.unit, greatest);
  const labels = marks.map((mark) => format(chart.unit, mark));
  chart.left = Math.max(...labels.map((label) => label.length)) * em * 0.58 + em * 0.6;
  chart.width = all - chart.left - em * 0.5;
  const [top, bottom] = [em * 0.5, height - em * 1.6];
  const x = (time) => chart.left + (time / span + 1) * chart.width;
  const y = (value) => bottom - (Math.max(0, value) / marks.at(-1)) * (bottom - top);
  const rules = marks.flatMap((mark, i) => [
    svg("line", { class: "grid", x1: chart.left, x2: chart.left + chart.width, y1: y(mark).toFixed(1), y2: y(mark).toFixed(1) }),
    text(chart.left - em * 0.4, y(mark) + em * 0.35, "end", labels[i]),
  ]);
  const times = clockTimes(at, span).flatMap((time) => {
    const here = x((time - at) / 1000);
    const isInside = here > chart.left + em && here < all - em;
    return [
      svg("line", { class: "grid", x1: here.toFixed(1), x2: here.toFixed(1), y1: top, y2: bottom }),
      ...(isInside ? [text(here, height - em * 0.3, "middle", MINUTES.format(time))] : []),
    ];
  });
  chart.cursor = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  chart.x = x;
  chart.svg.replaceChildren(...rules, ...times, ...drawLines(chart.lines, x, y), chart.cursor);
}

// Times of the clock that are round where the reader is.
function clockTimes(at, span) {
  const step = [60, 300, 900, 3600, 7200, 21600, 43200].find((step) => step >= span / 5) ?? 86400;
  const zone = new Date(at).getTimezoneOffset() * 60e3;
  const last = Math.floor((at - zone) / 1000 / step) * step * 1000 + zone;
  const times = [];
  for (let time = last; time > at - span * 1000; time -= step * 1000) times.push(time);
  return times;
}

function drawLines(lines, x, y) {
  const parts = [];
  // Those that do not stand out share a path: hundreds of elements would be slow.
  const others = new Map();
  for (const line of lines.filter((line) => line.isOther)) {
    others.set(line.dash, (others.get(line.dash) ?? "") + trace(line.points, x, y).join(""));
  }
  for (const [dash, d] of others) parts.push(svg("path", { class: "line other", d, "stroke-dasharray": dashes(dash) || null }));
  for (const line of lines.filter((line) => !line.isOther)) {
    const [path, lone] = trace(line.points, x, y);
    const known = line.points.filter(([, value]) => isNumber(value));
    // Marks at places that differ from line to line, so that they do not hide each other.
    const places = line.token ? [0.15, 0.5, 0.85].map((part) => known[Math.floor((part + line.of * 0.04) * known.length)]) : [];
    parts.push(svg("g", { class: `t${line.tone}`, "data-member": line.member, "data-series": line.series },
      svg("path", { class: "line", d: path, "stroke-dasharray": dashes(line.dash) || null }),
      svg("path", { class: "lone", d: lone }),
      ...places.filter(Boolean).map(([time, value]) => token(line.token, x(time), y(value)))));
  }
  return parts;
}

// The path of a line that is broken where nothing was read, and that of readings between two gaps, which would be invisible as lines.
function trace(points, x, y) {
  let [path, lone] = ["", ""];
  points.forEach(([time, value], i) => {
    if (!isNumber(value)) return;
    const before = isNumber(points[i - 1]?.[1]);
    const place = `${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
    if (!before && !isNumber(points[i + 1]?.[1])) lone += `M${place}h.01`;
    else path += `${before ? "L" : "M"}${place}`;
  });
  return [path, lone];
}
