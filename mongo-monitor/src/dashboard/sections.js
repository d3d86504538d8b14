// The sections of the page but for the charts, drawn from an answer of the monitor.

import { byId, el, morphChildren, say, shape } from "./elements.js";
import { DAY, NBSP, NONE, SECONDS, alertValue, count, duration, format, isNumber, when } from "./format.js";

const STATE_SHAPES = {
  PRIMARY: "star", SECONDARY: "circle", ARBITER: "diamond", STANDALONE: "square", MONGOS: "square", DOWN: "cross", UNKNOWN: "ring",
};

function timeElement(at, now) {
  if (!Number.isFinite(at)) return NONE;
  const isRecent = Math.abs(now - at) < 12 * 3600e3;
  return el("time", { datetime: new Date(at).toISOString() }, (isRecent ? SECONDS : DAY).format(at));
}
// A list whose end is folded away if it is long.
function folded(items, shown, className) {
  const list = (part) => el("ul", { class: className }, ...part);
  if (items.length <= shown) return [list(items)];
  return [list(items.slice(0, shown)), el("details", {}, el("summary", {}, `${items.length - shown} more`), list(items.slice(shown)))];
}
// May go on in the next line before each dot and colon.
const breakable = (host) => host.split(/(?=[.:])/).flatMap((part) => [el("wbr"), part]);

// ---------------------------------------------------------------- Health

export function drawHealth(health, members, names) {
  const sets = [...new Set(members.map((member) => member.info.set).filter(Boolean))];
  if (sets.length) say("set", sets.join(", "));
  const small = (text) => el("small", {}, text);
  const part = (number, mark, tone, word) =>
    el("span", { class: `nowrap ${number ? tone : "quiet"}` },
      number ? shape(mark) : null, number ? NBSP : null, `${number}`, small(`${NBSP}${word}`));
  morphChildren(byId("health-alerts"), [
    part(health.critical ?? 0, "octagon", "bad", "critical"),
    part(health.warnings ?? 0, "triangle", "warn", health.warnings === 1 ? "warning" : "warnings"),
  ]);
  morphChildren(byId("health-members"), [
    el("span", {}, `${health.members_up ?? NONE}`, small(` of ${health.members ?? members.length}`)),
  ]);
  morphChildren(byId("health-primary"), [
    health.primary
      ? el("span", { title: health.primary }, names.get(health.primary) ?? health.primary)
      : el("span", { class: "bad" }, "none"),
  ]);
  const rates = members.map((member) => member.operations).filter(isNumber);
  say("health-operations", rates.length ? count(rates.reduce((sum, rate) => sum + rate, 0)) : NONE);
  const isWorse = (member, worst) => isNumber(member.lag) && !(worst?.lag >= member.lag);
  const last = members.reduce((worst, member) => (isWorse(member, worst) ? member : worst), null);
  morphChildren(byId("health-lag"), [
    el("span", {}, last ? duration(last.lag) : NONE, last && last.lag > 0 ? small(` ${names.get(last.host)}`) : null),
  ]);
}

// ---------------------------------------------------------------- Alerts

export function drawAlerts(data) {
  const now = when(data.view.at);
  const rank = (alert) => (alert.phase === "firing" ? 0 : 4) + (alert.severity === "critical" ? 0 : 2) + (alert.muted ? 1 : 0);
  const alerts = [...(data.alerts ?? [])].sort((a, b) => rank(a) - rank(b) || when(b.since) - when(a.since));
  const items = alerts.map((alert) => alertItem(alert, now));
  const calm = () => el("p", { class: "panel calm" }, shape("circle", "ok"), " No alerts.");
  morphChildren(byId("alerts"), items.length ? folded(items, 12, "list") : [calm()]);
}
function alertItem(alert, now) {
  const isCritical = alert.severity === "critical";
  const labels = Object.entries(alert.labels ?? {}).map(([name, value]) => `${name}=${value}`).join(", ");
  const value = isNumber(alert.value) ? ` at ${alertValue(alert.rule, alert.value)}` : "";
  const badge = `${alert.severity}${alert.phase === "firing" ? "" : `, ${alert.phase}`}`;
  const since = when(alert.since);
  const attributes = {
    class: `panel item ${alert.phase} ${alert.muted ? "muted" : ""}`,
    "data-alert": alert.id,
    "data-tone": alert.muted ? null : isCritical ? "bad" : "warn",
  };
  return el("li", attributes,
    shape(isCritical ? "octagon" : "triangle"),
    el("div", {},
      el("p", {}, el("span", { class: "badge" }, badge), " ", el("b", {}, alert.rule), value, labels ? ` (${labels})` : ""),
      el("p", {}, alert.member ? `${alert.member}: ` : "", alert.summary ?? ""),
      el("p", { class: "when" },
        `for ${duration(Math.round(Math.max(0, (now - since) / 1000)))}, since `, timeElement(since, now),
        alert.has_data === false ? " · nothing to look at now" : ""),
      alert.muted ? el("p", { class: "when" }, `Muted: ${alert.muted}`) : null));
}

// ---------------------------------------------------------------- Tables

// Roles are spelled out because a table that is shown as cards loses those that it has by itself.
const cell = (label, className, content) => el("td", { role: "cell", class: className || null, "data-label": label }, content);
const headCell = ([label, className]) => el("th", { role: "columnheader", scope: "col", class: className || null }, label);
const table = (labels, rows) => [
  el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...labels.map(headCell))),
  el("tbody", { role: "rowgroup" }, ...rows),
];

const COLUMNS = [
  ["State", "", (m) => stateElement(m.state)],
  ["Up", "", (m) => (m.up === null ? NONE : m.up === 1 ? "up" : el("b", { class: "bad" }, "down"))],
  ["Lag", "number", (m) => format("seconds", m.lag)],
  ["Operations/s", "number", (m) => format("count", m.operations)],
  ["Read latency", "number", (m) => format("seconds", m.reads)],
  ["Write latency", "number", (m) => format("seconds", m.writes)],
  ["Connections", "number", (m) => format("count", m.connections)],
  ["Cache used", "number", (m) => meter(m.used)],
  ["Cache dirty", "number", (m) => meter(m.dirty)],
  ["Tickets r/w", "number", (m) => (m.tickets.some(isNumber) ? m.tickets.map((tickets) => format("count", tickets)).join(" / ") : NONE)],
  ["Memory", "number", (m) => format("bytes", m.memory)],
  ["Oplog window", "number", (m) => format("seconds", m.oplog)],
  ["Uptime", "number", (m) => format("seconds", m.uptime)],
  ["Version", "", (m) => m.info.version ?? NONE],
];
function stateElement(state) {
  const tone = state === "DOWN" ? "bad" : state === "PRIMARY" ? "ok" : STATE_SHAPES[state] ? "" : "warn";
  return el("span", { class: `state ${tone}` }, shape(STATE_SHAPES[state] ?? "triangle"), state);
}
function meter(part) {
  if (!isNumber(part)) return NONE;
  const element = el("div", { class: "meter" }, format("ratio", part));
  element.style.setProperty("--part", `${Math.min(100, part * 100).toFixed(1)}%`);
  return element;
}
export function drawMembers(members, names, span) {
  const rows = members.map((member) => {
    const name = names.get(member.host);
    const rest = name === member.host ? null : el("small", {}, breakable(member.host.slice(name.length)));
    const attributes = { role: "row", "data-host": member.host, "data-member-state": member.state, title: member.host };
    const cells = COLUMNS.map(([label, className, content]) => cell(label, className, content(member)));
    return el("tr", attributes, el("th", { role: "rowheader", scope: "row" }, [el("b", {}, name), rest]), ...cells);
  });
  byId("members").classList.toggle("dense", members.length > 10);
  morphChildren(byId("members"), table([["Host", ""], ...COLUMNS], rows));
  const mean = `Operations/s are a mean over the last ${duration(span)}; all else is what was read last.`;
  say("members-note", `${mean} Tickets are those in use, for reads and writes.`);
}

export function drawSlow(members, names) {
  const slow = members
    .flatMap((member) => member.slow.map((operation) => ({ ...operation, host: member.host })))
    .sort((a, b) => b.running_seconds - a.running_seconds);
  if (!slow.length) {
    return morphChildren(byId("slow"), [el("p", { class: "panel calm" }, "No operation has been under way for long.")]);
  }
  const rows = slow.map((operation) => {
    const text = (label, value) => cell(label, "", value || NONE);
    const waits = operation.waits_for_lock ? el("div", { class: "warn" }, shape("triangle"), " waits for a lock") : null;
    return el("tr", { role: "row" },
      cell("Running", "time nowrap", format("seconds", operation.running_seconds)),
      cell("Operation", "", [operation.op ?? NONE, waits]),
      text("Member", names.get(operation.host)), text("Namespace", operation.namespace), text("Application", operation.application),
      text("Plan", operation.plan), text("Client", operation.client),
      cell("Command", "broad", el("code", {}, JSON.stringify(operation.command ?? {}))));
  });
  const labels = ["Running", "Operation", "Member", "Namespace", "Application", "Plan", "Client", "Command"].map((label) => [label, ""]);
  const attributes = { class: "cards slow", role: "table", "aria-labelledby": "slow-title" };
  morphChildren(byId("slow"), [el("div", { class: "panel scroll" }, el("table", attributes, ...table(labels, rows)))]);
}

// ---------------------------------------------------------------- Events and failures

// What each kind of event looks like, and what lasted for its `down_seconds`.
const EVENTS = {
  server_down: ["cross", "bad"],
  server_up: ["circle", "ok", "was down for"],
  no_primary: ["octagon", "bad"],
  new_primary: ["star", "ok", "nobody took writes for"],
  no_writable_server: ["octagon", "bad"],
  writable_server: ["star", "ok", "nobody took writes for"],
  flapping: ["triangle", "warn"],
  majority_at_risk: ["triangle", "warn"],
};
export function drawEvents(data) {
  const now = when(data.view.at);
  const events = [...(data.events ?? [])].sort((a, b) => when(b.at) - when(a.at));
  if (!events.length) return morphChildren(byId("events"), [el("p", { class: "panel calm" }, "No failover events.")]);
  const items = events.map((event) => {
    const [mark, tone, lasted] = EVENTS[event.kind] ?? ["diamond", null];
    // A primary that follows another at once comes with nothing.
    const took = lasted && isNumber(event.down_seconds) && event.down_seconds > 0 ? ` · ${lasted} ${duration(event.down_seconds)}` : "";
    const kind = String(event.kind ?? "").replaceAll("_", " ");
    return el("li", { class: "item", "data-event": event.kind, "data-tone": tone },
      shape(mark),
      el("div", {},
        el("p", {}, el("b", {}, kind), " ", el("span", { class: "when" }, timeElement(when(event.at), now), took)),
        el("p", {}, event.summary ?? "")));
  });
  morphChildren(byId("events"), [el("div", { class: "panel events" }, ...folded(items, 12, ""))]);
}

export function drawUnread(members) {
  const failed = members.flatMap(({ host, collectors }) => collectors.filter(({ failure }) => failure).map((of) => ({ ...of, host })));
  const items = failed.map(({ host, name, failure, age_seconds: age }) => el("li", { class: "item", "data-tone": "warn" },
    shape("triangle"),
    el("div", {},
      el("p", {}, el("b", {}, host), ` · ${name}`),
      el("p", {}, failure),
      el("p", { class: "when" }, isNumber(age) ? `read last ${duration(Math.round(age))} ago` : "never read"))));
  const calm = () => el("p", { class: "panel calm" }, shape("circle", "ok"), " Everything that was asked for was read.");
  morphChildren(byId("unread"), [items.length ? el("div", { class: "panel events" }, ...folded(items, 12, "")) : calm()]);
}
