// Numbers as people read them, always with their unit.

const missing = (value) => value === null || value === undefined || Number.isNaN(value);
const fixed = (value) => {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
};

export const NONE = "–";
export const minus = (text) => text.replace("-", "\u2212");
export const quantity = (value, unit) => (missing(value) ? NONE : `${minus(Math.abs(value) < 5e-4 ? "0" : fixed(value))}${unit && "\u00a0"}${unit}`);
export const ms = (value) => quantity(value, "ms");
export const rate = (value) => quantity(value, "/s");
export function bytes(count) {
  const [size, unit] = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]].find(([least]) => count >= least) ?? [1, "B"];
  return quantity(missing(count) ? null : count / size, unit);
}
export const recall = (share) => (missing(share) ? NONE : share.toFixed(3));
export const percent = (share) => quantity(missing(share) ? null : share * 100, "%");
export const whole = (value) => (missing(value) ? NONE : Math.round(value).toLocaleString("en"));
export const cosine = (value) => (missing(value) ? NONE : minus(value.toFixed(4)));
export const signed = (value) => (missing(value) ? NONE : (value >= 0 ? "+" : "") + minus(value.toFixed(4)));
export const time = (iso) => iso.replace("T", " ").replace(/(\.\d+)?(\+00:00|Z)$/, " UTC");

export function ago(iso, now = Date.now()) {
  const seconds = Math.max(0, (now - Date.parse(iso)) / 1000);
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([least]) => seconds >= least) ?? [1, "s"];
  return `${Math.floor(seconds / size)} ${unit} ago`;
}
