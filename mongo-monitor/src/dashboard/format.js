// How numbers, times and names are written.

export const NONE = "–";
export const NBSP = "\u00a0";

// ---------------------------------------------------------------- Numbers

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const significant = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const plural = (number, word) => `${number}${NBSP}${word}${number === 1 ? "" : "s"}`;
export function count(value) {
  const size = Math.abs(value);
  if (size < 100) return significant.format(value);
  if (size < 9999.5) return whole.format(value);
  const power = Math.min(4, Math.floor(Math.log10(size) / 3 + 1e-9));
  return significant.format(value / 1000 ** power) + ["", "k", "M", "G", "T"][power];
}
function bytes(value) {
  const power = Math.abs(value) < 1 ? 0 : Math.min(5, Math.floor(Math.log2(Math.abs(value)) / 10 + 1e-9));
  return `${significant.format(value / 1024 ** power)}${NBSP}${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][power]}`;
}
const ratio = (value) => `${significant.format(value * 100)}${NBSP}%`;
// Short times with a fraction, long ones in two units.
export function duration(seconds) {
  const size = Math.abs(seconds);
  if (size === 0) return `0${NBSP}s`;
  if (size < 0.9995e-3) return `${significant.format(seconds * 1e6)}${NBSP}µs`;
  if (size < 0.9995) return `${significant.format(seconds * 1e3)}${NBSP}ms`;
  if (size < 59.95) return `${significant.format(seconds)}${NBSP}s`;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, length]) => Math.round(size) >= length);
  const [[unit, length], [smaller, part]] = [units[first], units[first + 1] ?? ["s", 1]];
  const parts = Math.round(size / part);
  const [large, small] = [Math.floor(parts / (length / part)), parts % (length / part)];
  // Below nothing is the validity of a certificate that is no longer valid.
  return `${seconds < 0 ? "-" : ""}${large}${NBSP}${unit}${small ? `${NBSP}${small}${NBSP}${smaller}` : ""}`;
}
const FORMATS = { per_second: count, count, seconds: duration, bytes, bytes_per_second: bytes, ratio };
export const UNITS = { per_second: "per second", bytes_per_second: "per second" };
export const format = (unit, value) => (isNumber(value) ? (FORMATS[unit] ?? count)(value) : NONE);

const DURATIONS = ["latency", "lag", "window", "headroom", "checkpoint", "certificate", "operation", "age", "blind"];
const PARTS = ["cache", "connections", "disk", "memory", "health"];
// What an alert is at. It comes without a unit, so the words of its rule's name have to tell. Whole words: `queued_operations` is how many,
// not for how long, and `page_faults` has no age. `connections_rejected` is so many a second, and not a part of anything.
export function alertValue(rule, value) {
  const words = String(rule).split(/[^A-Za-z0-9]+/);
  if (words.some((word) => DURATIONS.includes(word))) return duration(value);
  const isPart = words.some((word) => PARTS.includes(word)) && !words.includes("rejected");
  return isPart && value >= 0 && value <= 1.5 ? ratio(value) : count(value);
}

// ---------------------------------------------------------------- Times

// A date as BSON writes it into JSON, in milliseconds since 1970; NaN if it is none.
export function when(date) {
  if (typeof date === "number") return date;
  if (typeof date === "string") return Date.parse(date);
  if (date && typeof date === "object") return "$numberLong" in date ? Number(date.$numberLong) : when(date.$date);
  return NaN;
}
const clock = (options) => new Intl.DateTimeFormat("en-GB", { hourCycle: "h23", ...options });
export const SECONDS = clock({ hour: "2-digit", minute: "2-digit", second: "2-digit" });
export const MINUTES = clock({ hour: "2-digit", minute: "2-digit" });
export const DAY = clock({ day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
export const timeOf = (at) => (Number.isFinite(at) ? SECONDS.format(at) : NONE);

// ---------------------------------------------------------------- Names

// The shortest beginning of all hosts that tells them apart: in `a.shop.svc:27017` mostly all but `a` says nothing.
export function shortNames(hosts) {
  const kinds = [(host) => (/^[\d.:[]/.test(host) ? host : host.split(/[.:]/)[0]), (host) => host.replace(/:\d+$/, "")];
  const kind = hosts.length > 1 && kinds.find((kind) => new Set(hosts.map(kind)).size === hosts.length);
  return new Map(hosts.map((host) => [host, kind ? kind(host) : host]));
}
