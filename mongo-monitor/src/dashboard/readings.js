// What was read: of each member, of each line of a chart, and how old it is.

import { isNumber } from "./format.js";

// ---------------------------------------------------------------- Points of a line

export const stepOf = (points) => (points.length > 1 ? (points.at(-1)[0] - points[0][0]) / (points.length - 1) : 15);
// The newest value of a line, unless it is so old that it says nothing about now.
export function latest(points) {
  const point = points.findLast(([, value]) => isNumber(value));
  return point && -point[0] <= Math.max(45, 2 * stepOf(points)) ? point[1] : null;
}
// The position of the point that is nearest to a time.
export function nearest(points, time) {
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < time) low = middle;
    else high = middle;
  }
  return Math.abs(points[high][0] - time) < Math.abs(points[low][0] - time) ? high : low;
}
export function valueAt({ points }, time) {
  if (!points.length) return null;
  const [at, value] = points[nearest(points, time)];
  return Math.abs(at - time) <= stepOf(points) ? value : null;
}

// ---------------------------------------------------------------- How old it is

// How often the monitor samples, in seconds; null if it does not say.
export const intervalOf = (data) => (isNumber(data?.interval_seconds) && data.interval_seconds > 0 ? data.interval_seconds : null);

// How long before the answer the newest reading was taken, in seconds. `view.at` is no help: it is when the answer was put together.
export function youngest(data) {
  const collectors = data.view.members.flatMap((member) => member.collectors ?? []);
  const ages = collectors.map((collector) => collector.age_seconds).filter(isNumber);
  return ages.length ? Math.min(...ages) : 0;
}

// How old a reading may be and still count as of now. If the monitor does not say how often it samples, the charts tell how far apart
// readings are.
export function limit(data) {
  const interval = intervalOf(data);
  if (interval !== null) return Math.max(3 * interval + 5, 15);
  const line = (data.charts ?? []).flatMap((chart) => chart.lines ?? []).find(({ points }) => points?.length > 1);
  return Math.max(45, line ? 3 * stepOf(line.points) : 0);
}

// ---------------------------------------------------------------- Members

const matches = (reading, name, labels) =>
  reading.name === name && Object.entries(labels).every(([label, value]) => reading.labels?.[label] === value);
function reading(member, name, labels = {}) {
  const value = (member.readings ?? []).find((reading) => matches(reading, name, labels))?.value;
  return isNumber(value) ? value : null;
}

// What is shown of each member, in the order of hosts.
export function facts(data) {
  const members = [...data.view.members].sort((a, b) => a.host.localeCompare(b.host, "en", { numeric: true }));
  const lags = new Map();
  for (const { name, labels, value } of members.flatMap((member) => member.readings ?? [])) {
    if (name === "mongodb_replica_lag_seconds" && isNumber(value)) lags.set(labels?.member, value);
  }
  const latencies = (data.charts ?? []).find((chart) => chart.id === "latency")?.lines ?? [];
  return members.map((member) => {
    const readings = member.readings ?? [];
    const up = reading(member, "mongodb_up");
    // Of a member that does not answer there may still be readings from before: they are not of now.
    const read = (name, labels) => (up === 1 ? reading(member, name, labels) : null);
    const info = up === 1 ? readings.find((reading) => reading.name === "mongodb_instance_info")?.labels ?? {} : {};
    const held = readings.find((reading) => reading.name === "mongodb_member_state" && reading.value > 0)?.labels?.state;
    const alone = info.process?.startsWith("mongos") ? "MONGOS" : info.version && !info.set ? "STANDALONE" : "UNKNOWN";
    const rates = (data.over_range?.[member.host] ?? [])
      .filter((series) => series.name === "mongodb_operations_total" && isNumber(series.rate));
    const latency = (series) => {
      const line = latencies.find((line) => line.member === member.host && line.series === series);
      return up === 1 && line ? latest(line.points) : null;
    };
    const share = (kind) => {
      const [part, all] = [read("mongodb_cache_bytes", { kind }), read("mongodb_cache_bytes", { kind: "max" })];
      return part !== null && all > 0 ? part / all : null;
    };
    return {
      host: member.host, up, info, collectors: member.collectors ?? [], slow: member.slow_operations ?? [],
      state: up === 0 ? "DOWN" : up === null ? "UNKNOWN" : held ?? alone,
      lag: lags.get(member.host) ?? null,
      operations: up === 1 && rates.length ? rates.reduce((sum, series) => sum + series.rate, 0) : null,
      reads: latency("reads"), writes: latency("writes"),
      connections: read("mongodb_connections", { state: "current" }),
      used: share("used"), dirty: share("dirty"),
      tickets: ["read", "write"].map((op) => read("mongodb_tickets", { op, state: "out" })),
      memory: read("mongodb_memory_bytes", { kind: "resident" }),
      oplog: read("mongodb_oplog_window_seconds"), uptime: read("mongodb_uptime_seconds"),
    };
  });
}
