// The dashboard of mongo-monitor: asks `api/dashboard` every few seconds and draws what it says.

import { drawCharts, release } from "./charts.js";
import { SHAPES, byId, el, morphChildren, say, shape } from "./elements.js";
import { duration, plural, shortNames, timeOf, when } from "./format.js";
import { facts, intervalOf, limit, youngest } from "./readings.js";
import { drawAlerts, drawEvents, drawHealth, drawMembers, drawSlow, drawUnread } from "./sections.js";

const EVERY_SECONDS = 5;
const EVERY_SECONDS_MOST = 30;
const DEADLINE_MS = 10000;
const SILENCE_SECONDS = 20;
const RANGES = [300, 900, 3600, 21600];

// What is known. `seen` is when, by this browser's clock, `data` was first there: the clocks of browser and monitor need not agree.
let data = null;
let seen = 0;
let failure = null;
let paused = false;
const asked = Number(new URLSearchParams(location.search).get("range"));
let range = RANGES.includes(asked) ? asked : 900;
let only = ""; // The member whose charts are shown; all if empty.
let round = 0;
let timer = 0;
let aborter = null;
// What is shown, which until the next answer is not what is asked for.
const span = () => data?.range_seconds ?? range;
// There is nothing new to hear more often than the monitor samples.
const every = () => Math.min(EVERY_SECONDS_MOST, Math.max(EVERY_SECONDS, intervalOf(data) ?? 0));

// ---------------------------------------------------------------- Asking

async function refresh() {
  clearTimeout(timer);
  aborter?.abort();
  aborter = new AbortController();
  const [mine, mineAborter, began] = [(round += 1), aborter, Date.now()];
  const deadline = setTimeout(() => mineAborter.abort(), DEADLINE_MS);
  try {
    const options = { cache: "no-store", signal: mineAborter.signal };
    const response = await fetch(`api/dashboard?range=${range}`, options).catch(explain("the monitor cannot be reached"));
    if (!response.ok) throw new Error(`the monitor answers with status ${response.status}`);
    const answer = await response.json().catch(explain("the answer is not the JSON of a monitor"));
    if (mine !== round) return;
    if (!Array.isArray(answer?.view?.members)) throw new Error("the answer is not of a monitor");
    // An answer that some cache gives again is not newer than it was.
    if (!data || when(answer.view.at) !== when(data.view.at)) seen = began;
    data = answer;
    failure = null;
    draw();
    beat();
  } catch (error) {
    if (mine !== round) return;
    failure = error.name === "AbortError" ? `no answer within ${DEADLINE_MS / 1000} seconds` : error.message;
    console.warn("dashboard:", error);
  } finally {
    clearTimeout(deadline);
    if (mine === round) {
      if (!paused) timer = setTimeout(refresh, Math.max(1000, every() * 1000 - (Date.now() - began)));
      tell();
    }
  }
}
const explain = (message) => (error) => {
  throw error.name === "AbortError" ? error : new Error(message, { cause: error });
};
function beat() {
  const mark = byId("pulse-mark");
  mark.classList.remove("beat");
  void mark.offsetWidth; // Without reading this the animation would not begin anew.
  mark.classList.add("beat");
}

function draw() {
  const members = facts(data);
  const names = shortNames(members.map((member) => member.host));
  byId("main").hidden = false;
  drawHealth(data.health ?? {}, members, names);
  drawAlerts(data);
  drawMembers(members, names, span());
  drawPick(members);
  drawCharts(data, members, names, only, span());
  drawSlow(members, names);
  drawEvents(data);
  drawUnread(members);
  const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
  say("footer", `Times are those of this browser’s time zone, ${timeZone}. Asked again every ${every()} seconds.`);
}
function drawPick(members) {
  const hosts = members.map((member) => member.host);
  if (!hosts.includes(only)) only = "";
  byId("pick").hidden = hosts.length < 2;
  const options = hosts.map((host) => el("option", { value: host }, host));
  morphChildren(byId("member"), [el("option", { value: "" }, "all members"), ...options]);
  byId("member").value = only;
}

// ---------------------------------------------------------------- How old it is

// How long ago the newest reading was taken, in seconds.
const age = () => Math.max(0, (Date.now() - seen) / 1000) + youngest(data);
function stateNow() {
  if (paused) return "paused";
  if (failure) return "failed";
  if (!data) return "stale";
  // Who does not know how often there is something new to hear can only suspect silence.
  const isSilent = intervalOf(data) === null && Date.now() - seen > SILENCE_SECONDS * 1000;
  return isSilent || age() > limit(data) ? "stale" : "live";
}

const MARKS = { healthy: "circle", degraded: "triangle", down: "octagon" };
const COLOURS = { healthy: "#1a9a5c", degraded: "#d98e00", down: "#d3303f" };

// Says how old things are. Runs every second, so that a page that hears nothing says so by itself.
function tell() {
  const state = stateNow();
  const old = data ? duration(Math.round(age())) : "";
  const at = data ? timeOf(when(data.view.at)) : "";
  document.body.dataset.state = state;
  const shown = `What is shown is of ${at}, read ${old} ago.`;
  const notice = {
    live: "",
    paused: data ? `Paused. ${shown}` : "Paused, before there was an answer.",
    failed: data ? `Not current: ${failure}. ${shown}` : `Nothing to show: ${failure}. Asking again every ${every()} seconds.`,
    stale: data ? `Not current: the newest that has been read is ${old} old.` : "",
  }[state];
  byId("notice").hidden = !notice;
  say("notice", notice);
  say("pulse-text", data ? `${state} · ${at} · read ${old} ago` : failure ? "failed" : "waiting for the first answer");
  const health = data?.health ?? {};
  const status = health.status ?? "unknown";
  const isLive = state === "live";
  // Of the past: the word stays, but says so and has no colour.
  byId("health").dataset.health = isLive ? status : "unknown";
  say("health-word", data ? (isLive ? status : `was ${status}`) : "unknown");
  const mark = isLive ? MARKS[status] ?? "ring" : "ring";
  morphChildren(byId("health-mark"), [shape(mark)]);
  const title = `${isLive ? status : state} – MongoDB ${byId("set").textContent}`.trim();
  if (document.title !== title) document.title = title;
  setIcon(mark, isLive ? COLOURS[status] ?? "#808080" : "#808080");
  // Spoken when it changes only. Warnings come and go, and are not worth an interruption.
  const primary = health.primary ? `Primary is ${health.primary}.` : "No primary.";
  if (isLive) say("announcer", `MongoDB is ${status}. ${plural(health.critical ?? 0, "critical alert")}. ${primary}`);
  else if (state === "failed" || (state === "stale" && data)) say("announcer", "The dashboard is not current.");
}
function setIcon(mark, colour) {
  const path = `<path fill="${colour}" d="${SHAPES[mark]}"/>`;
  const image = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">${path}</svg>`;
  const icon = `data:image/svg+xml,${encodeURIComponent(image)}`;
  const link = document.querySelector('link[rel="icon"]');
  if (link.href !== icon) link.href = icon;
}

// ---------------------------------------------------------------- Controls

// A browser may refuse to store anything.
function stored(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(`mongo-monitor.${name}`, value);
    return localStorage.getItem(`mongo-monitor.${name}`);
  } catch {
    return null;
  }
}
const THEMES = ["auto", "light", "dark"];
let theme = THEMES.includes(stored("theme")) ? stored("theme") : "auto";
function wear() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  say("theme", `Theme: ${theme}`);
}
byId("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  stored("theme", theme);
  wear();
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  say("pause", paused ? "Resume" : "Pause");
  byId("pause").classList.toggle("on", paused);
  if (paused) {
    clearTimeout(timer);
    round += 1; // What is still under way is not shown.
    tell();
  } else refresh();
});

byId("ranges").addEventListener("change", (event) => {
  range = Number(event.target.value);
  release();
  // In the address, so that a wall screen can be given one.
  const address = new URL(location);
  address.searchParams.set("range", range);
  history.replaceState(null, "", address);
  refresh(); // Also while paused: who asks for another range wants to see it.
});
byId("member").addEventListener("change", (event) => {
  only = event.target.value;
  if (data) draw();
});

document.querySelector(`#ranges input[value="${range}"]`).checked = true;
wear();
setInterval(tell, 1000);
refresh();
