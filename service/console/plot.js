// Plots: lines over time, and bars over sizes. Axes with units, a legend with the last values, the values under the pointer, words for those who do not see it.

import { el, svg } from "./dom.js";
import { minus, quantity } from "./format.js";

const HEIGHT = 190;
const STYLES = 12; // colours and dashes that console.css tells apart
const SPACE = { top: 10, right: 12, bottom: 24, left: 56 };
const SPANS = [[60, 15], [300, 60], [900, 300], [3600, 900]]; // seconds seen, seconds between two marks
const MOST_DECADES = 5;
const STEPS = { ArrowLeft: -1, ArrowRight: 1 };
let charts = 0;

// Return ticks from 0, or from below it, to at least `most`, at steps of 1, 2 or 5.
export function ticks(least, most, count = 4) {
  const raw = (most - least || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const [from, to] = [Math.floor(least / step), Math.ceil(most / step - 1e-9) || 1];
  return Array.from({ length: to - from + 1 }, (_, place) => (from + place) * step);
}

// Return the powers of ten from below `least`, above 0, to above `most`: not all of them if they are many, and 2 and 5 times them if they are few.
export function powers(least, most) {
  const [from, to] = [Math.floor(Math.log10(least) + 1e-9), Math.ceil(Math.log10(most) - 1e-9)];
  const end = Math.max(to, from + 1);
  const step = Math.ceil((end - from) / MOST_DECADES);
  const whole = Array.from({ length: Math.ceil((end - from) / step) + 1 }, (_, place) => 10 ** (from + place * step));
  return end - from > 2 ? whole : whole.flatMap((power, place) => (place < whole.length - 1 ? [power, 2 * power, 5 * power] : [power]));
}

// Return {marks, share}: the marks of an axis, and where on it a value lies, from 0 to 1; null if a log scale has no place for it.
function axisOf(values, most, isLog) {
  if (most === null && values.length) return linear(ticks(Math.min(...values), Math.max(...values)));
  const positive = values.filter((value) => value > 0);
  if (!isLog || !positive.length || values.some((value) => value < 0)) {
    return linear(ticks(Math.min(0, ...values), Math.max(most, ...values) || 1));
  }
  const marks = powers(Math.min(...positive), Math.max(...positive));
  const [low, high] = [Math.log10(marks[0]), Math.log10(marks.at(-1))];
  return { marks, share: (value) => (value > 0 ? (Math.log10(value) - low) / (high - low) : null) };
}

const linear = (marks) => ({ marks, share: (value) => (value - marks[0]) / (marks.at(-1) - marks[0]) });

// A figure with a canvas, a legend, and a box with the values at one stop of the x axis, which pointer or arrow keys choose.
class Chart {
  constructor(title, unit) {
    [this.title, this.unit, this.id] = [title, unit, `chart-${charts++}`];
    [this.stops, this.chosen] = [[], null];
    this.caption = el("figcaption", { id: `${this.id}-t` }, title);
    this.tip = el("div", { class: "tip", "aria-live": "polite", hidden: true });
    this.picture = el("div", {});
    this.canvas = el("div", { class: "canvas", tabindex: "0", role: "group", "aria-labelledby": `${this.id}-t`, ...this.#listeners() }, this.picture, this.tip);
    this.legend = el("ul", { class: "legend" });
    this.element = el("figure", { class: "plot" }, this.caption, this.canvas, this.legend);
  }

  #listeners() {
    const point = ({ clientX }) => this.#choose(this.#nearest(clientX - this.canvas.getBoundingClientRect().left));
    return { pointermove: point, pointerdown: point, pointerleave: () => this.#choose(null), blur: () => this.#choose(null), keydown: (event) => this.#press(event) };
  }

  #press(event) {
    const step = event.key === "Escape" ? null : STEPS[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const place = this.#placeOfChosen();
    this.#choose(step === null ? null : (this.stops.at(place === null ? -1 : Math.min(Math.max(place + step, 0), this.stops.length - 1)) ?? null));
  }

  #nearest = (x) => this.stops.reduce((best, stop) => (best === null || Math.abs(stop.x - x) < Math.abs(best.x - x) ? stop : best), null);

  #placeOfChosen() {
    const place = this.stops.findIndex(({ key }) => key === this.chosen);
    return place < 0 ? null : place;
  }

  #choose(stop) {
    this.chosen = stop?.key ?? null;
    this.tell();
  }

  // Show the values at the chosen stop.
  tell() {
    const stop = this.stops[this.#placeOfChosen()];
    this.tip.hidden = !stop;
    this.picture.querySelector(".cursor")?.setAttribute("visibility", stop ? "visible" : "hidden");
    if (!stop) return;
    for (const end of ["x1", "x2"]) this.picture.querySelector(".cursor")?.setAttribute(end, stop.x);
    const line = ([name, value, style]) => el("li", {}, el("span", { class: `key s${style % STYLES}` }, name), el("span", {}, quantity(value, this.unit)));
    this.tip.replaceChildren(el("p", {}, stop.words), el("ul", {}, stop.values().map(line)));
    const width = this.canvas.clientWidth;
    const isRight = stop.x > width / 2;
    this.tip.style.left = isRight ? "auto" : `${stop.x + 10}px`;
    this.tip.style.right = isRight ? `${width - stop.x + 10}px` : "auto";
  }

  // Put a picture of `nodes` in place, `words` as its description.
  show(width, words, ...nodes) {
    const cursor = svg("line", { class: "cursor", y1: SPACE.top, y2: HEIGHT - SPACE.bottom, visibility: "hidden" });
    const named = { role: "img", "aria-labelledby": `${this.id}-t ${this.id}-d`, width, height: HEIGHT };
    this.picture.replaceChildren(svg("svg", named, svg("desc", { id: `${this.id}-d` }, words), nodes.flat(), cursor));
    this.tell();
  }

  levels(marks, y, width) {
    return marks.flatMap((mark) => [
      svg("line", { class: mark ? "grid" : "axis", x1: SPACE.left, x2: width - SPACE.right, y1: y(mark), y2: y(mark) }),
      svg("text", { class: "level", x: SPACE.left - 6, y: y(mark) + 4 }, minus(`${Number(mark.toPrecision(3))}${this.unit && " "}${this.unit}`)),
    ]);
  }
}

const down = (share) => HEIGHT - SPACE.bottom - share * (HEIGHT - SPACE.top - SPACE.bottom);

export class Plot extends Chart {
  // `unit` stands behind every number, `most` is where the axis ends at least, null if it fits the values; each of `limits` is drawn as a line.
  constructor(title, unit, most = 0, limits = []) {
    super(title, unit);
    [this.most, this.limits] = [most, limits];
  }

  // Draw series of {name, points: [[seconds, value or null], ...], style: a number, or that of its place} of the last `seconds` up to `now`; all have the same times.
  draw(series, { now, seconds, isLog }) {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const [span, step] = spanOf(series, now, seconds);
    const values = series.flatMap(({ points }) => points.flatMap(([, value]) => value ?? []));
    const { marks, share } = axisOf([...values, ...this.limits], this.most, isLog && !this.limits.length);
    const x = (at) => SPACE.left + (1 - (now - at) / span) * (width - SPACE.left - SPACE.right);
    const y = (value) => (share(value) === null ? null : down(share(value)));
    const lines = series.map(({ points, style }, place) => this.#line(points, style ?? place, x, y));
    const bounds = this.limits.map((limit) => svg("line", { class: "limit", x1: SPACE.left, x2: width - SPACE.right, y1: y(limit), y2: y(limit) }));
    this.stops = stopsOf(series, x, now);
    this.show(width, this.#describe(series), this.levels(marks, y, width), this.#times(x, now, span, step, width < 400 ? 2 : 1), bounds, lines);
    this.legend.replaceChildren(...series.map((one, place) => this.#key(one, place)), ...(bounds.length ? [this.#limitKey()] : []));
  }

  #times(x, now, span, step, every) {
    const named = (ago) => (ago === 0 ? "now" : step < 60 ? `\u2212${ago} s` : `\u2212${ago / 60} min`);
    const mark = (ago) => svg("text", { class: ago === span ? "first" : ago ? "ago" : "now", x: x(now - ago), y: HEIGHT - 6 }, named(ago));
    return Array.from({ length: span / step + 1 }, (_, place) => place * step).filter((ago) => (ago / step) % every === 0).map(mark);
  }

  // A line breaks where a value is missing; a value alone is a dot.
  #line(points, place, x, y) {
    let pen = "M";
    const path = points.map(([at, value]) => {
      const height = value === null ? null : y(value);
      if (height === null) return (pen = "M"), "";
      const step = `${pen}${x(at).toFixed(1)} ${height.toFixed(1)}${pen === "M" ? "h.01" : ""}`;
      pen = "L";
      return step;
    });
    return svg("path", { class: `line s${place % STYLES}`, d: path.join("") });
  }

  #key({ name, points, style }, place) {
    return el("li", {}, swatch(`line s${(style ?? place) % STYLES}`), el("span", {}, name), el("span", { class: "now" }, this.#last(points)));
  }

  #limitKey() {
    return el("li", {}, swatch("limit"), el("span", {}, "limit"), el("span", { class: "now" }, this.limits.map((limit) => quantity(limit, this.unit)).join(", ")));
  }

  #last(points) {
    return quantity(points.at(-1)?.[1], this.unit);
  }

  #describe(series) {
    return series.map(({ name, points }) => `${name}: now ${this.#last(points)}`).join("; ") || "nothing yet";
  }
}

export class Bars extends Chart {
  // Draw series of {name, values: a share of 100 or null for each of `names`}, as groups of bars.
  draw(series, names) {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const { marks, share } = axisOf(series.flatMap(({ values }) => values), 100, false);
    const y = (value) => down(share(value));
    const room = (width - SPACE.left - SPACE.right) / names.length;
    const thick = Math.min(28, (room * 0.7) / series.length);
    const x = (place) => SPACE.left + (place + 0.5) * room;
    const bar = (value, place, one) => svg("rect", { class: `block s${one % STYLES}`, x: x(place) + (one - series.length / 2) * thick, width: thick - 1, y: y(value), height: Math.max(0, y(0) - y(value)) });
    const bars = series.flatMap(({ values }, one) => values.map((value, place) => bar(value, place, one)));
    const labels = names.map((name, place) => svg("text", { class: "ago", x: x(place), y: HEIGHT - 6 }, name));
    this.stops = names.map((name, place) => ({ key: name, x: x(place), words: `${name} ${name === "1" ? "row" : "rows"}`, values: () => series.map((one, style) => [one.name, one.values[place], style]) }));
    const words = series.map((one) => `${one.name}: ${one.values.map((value, place) => `${names[place]} rows ${quantity(value, this.unit)}`).join(", ")}`).join("; ");
    this.show(width, words, this.levels(marks, y, width), labels, bars);
    this.legend.replaceChildren(...series.map((one, place) => el("li", {}, el("span", { class: `key s${place % STYLES}` }, one.name), el("span", { class: "now" }, one.remark))));
  }
}

// Return the shortest span that holds every point, at most `seconds`, and the seconds between two of its marks.
function spanOf(series, now, seconds) {
  const age = now - Math.min(now, ...series.flatMap(({ points }) => points.slice(0, 1).map(([at]) => at)));
  return SPANS.find(([span]) => span >= Math.min(age, seconds)) ?? SPANS.at(-1);
}

function stopsOf(series, x, now) {
  const points = series[0]?.points ?? [];
  return points.map(([at], place) => ({ key: at, x: x(at), words: ago(now - at), values: () => series.map((one, order) => [one.name, one.points[place][1], one.style ?? order]) }));
}

function ago(seconds) {
  if (seconds < 1) return "now";
  return seconds < 120 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`;
}

const swatch = (style) => svg("svg", { width: 22, height: 8, "aria-hidden": "true" }, svg("path", { class: style, d: "M0 4H22" }));
