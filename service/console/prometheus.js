// Prometheus' text format, and what its counters and histograms say of a stretch of time.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const unescape = (text) => text.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
const number = (text) => ({ "+Inf": Infinity, "-Inf": -Infinity })[text] ?? Number(text);

// Return the samples by name, each {labels, value}.
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries(Array.from((match[2] ?? "").matchAll(LABEL), ([, name, value]) => [name, unescape(value)]));
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: number(match[3]) });
  }
  return samples;
}

const fits = (labels, wanted) => Object.entries(wanted).every(([name, value]) => labels[name] === value);

export const select = (samples, name, wanted = {}) => (samples.get(name) ?? []).filter(({ labels }) => fits(labels, wanted));

// Return the sum of the samples that fit, null where there is none.
export function total(samples, name, wanted = {}) {
  const found = select(samples, name, wanted);
  return found.length ? found.reduce((sum, { value }) => sum + value, 0) : null;
}

export const values = (samples, name, label) => [...new Set(select(samples, name).map(({ labels }) => labels[label]))];

// Return the sum of the histograms that fit, {edges, counts, count, sum}, counts cumulative; null where there is none.
export function histogram(samples, name, wanted = {}) {
  const sums = new Map();
  for (const { labels, value } of select(samples, `${name}_bucket`, wanted)) sums.set(number(labels.le), (sums.get(number(labels.le)) ?? 0) + value);
  if (!sums.size) return null;
  const edges = [...sums.keys()].sort((one, other) => one - other);
  const counts = edges.map((edge) => sums.get(edge));
  return { edges, counts, count: counts.at(-1), sum: total(samples, `${name}_sum`, wanted) };
}

// Return what came between two scrapes; a counter that fell was reset, and begins at 0.
export function between(later, earlier) {
  if (!later || !earlier || later.count < earlier.count) return later;
  const counts = later.counts.map((count, place) => count - earlier.counts[place]);
  return { edges: later.edges, counts, count: later.count - earlier.count, sum: later.sum - earlier.sum };
}

export const rise = (later, earlier) => (later === null ? null : later < (earlier ?? 0) ? later : later - (earlier ?? 0));

// Return the quantile by interpolation within its bucket, as histogram_quantile does; null of nothing.
export function quantile(share, found) {
  if (!found || !found.count) return null;
  const rank = share * found.count;
  const place = found.counts.findIndex((count) => count >= rank);
  if (found.edges[place] === Infinity) return found.edges[place - 1] ?? null;
  const [low, below] = place ? [found.edges[place - 1], found.counts[place - 1]] : [Math.min(0, found.edges[0]), 0];
  const inside = found.counts[place] - below;
  return inside ? low + (found.edges[place] - low) * ((rank - below) / inside) : low;
}
