// Drift: how far the inputs of late are from the training data, beside the limit of each figure.

import { NONE, minus } from "./format.js";
import { select } from "./prometheus.js";

export const FIGURES = {
  norm: "Length of the vectors",
  neighbour_cosine: "Cosine of consecutive vectors",
  alignment: "Alignment with the training data",
};

// Return every figure as {engine, figure, value, limit, used}; `used` is the share of the limit, above 1 beyond it.
export function drifts(samples) {
  const limits = new Map(select(samples, "lvm_input_drift_limit").map(({ labels, value }) => [labels.figure, value]));
  return select(samples, "lvm_input_drift").map(({ labels: { engine, figure }, value }) => {
    const limit = limits.get(figure) ?? null;
    return { engine, figure, value, limit, used: limit === null ? 0 : shareOf(value, limit) };
  });
}

// A limit below 0 is for values below 0 only; any other is for both directions.
const shareOf = (value, limit) => (limit < 0 ? Math.max(0, value / limit) : Math.abs(value) / limit);

// Return the figure that is nearest to its limit or furthest beyond it, null if none is known yet.
export const worst = (known) => known.reduce((most, one) => (most === null || one.used > most.used ? one : most), null);

export const deviations = (value) => (value === null || value === undefined ? NONE : `${minus(value.toFixed(Math.abs(value) >= 100 ? 0 : 1))}\u00a0\u03c3`);

// Return a limit in words: one above 0 holds in both directions.
export const bound = (limit) => (limit > 0 ? `\u00b1${deviations(limit)}` : deviations(limit));

// Return what a figure says in words, and its state.
export function describe(one) {
  if (!one) return { words: "no drift yet", state: null, why: "Drift is known after some 50 inputs." };
  const value = deviations(one.value);
  const of = `${FIGURES[one.figure] ?? one.figure} of the inputs of ${one.engine}: ${value} from the training data`;
  if (one.limit === null) return { words: `drift ${value}`, state: null, why: `${of}.` };
  const [side, state] = one.used > 1 ? ["beyond", "miss"] : ["within", "hit"];
  return { words: `drift ${value} of ${bound(one.limit)}`, state, why: `${of}; ${side} the limit of ${bound(one.limit)}.` };
}
