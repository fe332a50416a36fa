// A plot of lines over time: axes with units, a legend with the last values, words for those who do not see it.

import { el, svg } from "./dom.js";
import { minus, quantity } from "./format.js";

const HEIGHT = 190;
const STYLES = 12; // colours and dashes that console.css tells apart
const SPACE = { top: 10, right: 12, bottom: 24, left: 56 };
export const SPAN_S = 300;
const SPANS = [[60, 15], [120, 30], [SPAN_S, 60]]; // seconds seen, seconds between two marks
let plots = 0;

// Return ticks from 0, or from below it, to at least `most`, at steps of 1, 2 or 5.
export function ticks(least, most, count = 4) {
  const raw = (most - least || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const [from, to] = [Math.floor(least / step), Math.ceil(most / step - 1e-9) || 1];
  return Array.from({ length: to - from + 1 }, (_, place) => (from + place) * step);
}

// Return the shortest span that holds every point, and the seconds between two of its marks.
function spanOf(series, now) {
  const age = now - Math.min(now, ...series.flatMap(({ points }) => points.slice(0, 1).map(([at]) => at)));
  return SPANS.find(([seconds]) => seconds >= age) ?? SPANS.at(-1);
}

export class Plot {
  // `unit` stands behind every number, `most` is where the axis ends at least.
  constructor(title, unit, most = 0) {
    [this.unit, this.most, this.id] = [unit, most, `plot-${plots++}`];
    [this.canvas, this.legend] = [el("div", { class: "canvas" }), el("ul", { class: "legend" })];
    this.title = title;
    this.element = el("figure", { class: "plot" }, el("figcaption", {}, title), this.canvas, this.legend);
  }

  // Draw series of {name, points: [[seconds, value or null], ...]} up to `now`, at most the last SPAN_S seconds.
  draw(series, now) {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const [span, step] = spanOf(series, now);
    const seen = series.map(({ points }) => points.filter(([at]) => at >= now - span));
    const all = seen.flat().map(([, value]) => value).filter((value) => value !== null);
    const marks = ticks(Math.min(0, ...all), Math.max(this.most, ...all) || 1);
    const x = (at) => SPACE.left + (1 - (now - at) / span) * (width - SPACE.left - SPACE.right);
    const [low, high] = [marks[0], marks.at(-1)];
    const y = (value) => SPACE.top + ((high - value) / (high - low)) * (HEIGHT - SPACE.top - SPACE.bottom);
    const lines = seen.map((points, place) => this.#line(points, place, x, y));
    const words = [svg("title", { id: `${this.id}-t` }, this.title), svg("desc", { id: `${this.id}-d` }, this.#describe(series))];
    const named = { role: "img", "aria-labelledby": `${this.id}-t ${this.id}-d`, width, height: HEIGHT };
    const empty = svg("text", { class: "empty", x: (SPACE.left + width) / 2, y: HEIGHT / 2 }, "nothing to plot yet");
    const content = all.length ? lines : [empty];
    this.canvas.replaceChildren(svg("svg", named, words, this.#axes(marks, x, y, width), this.#times(x, now, step, width < 400 ? 2 : 1), content));
    this.legend.replaceChildren(...series.map((one, place) => this.#key(one, place)));
  }

  #axes(marks, x, y, width) {
    return marks.flatMap((mark) => [
      svg("line", { class: mark ? "grid" : "axis", x1: SPACE.left, x2: width - SPACE.right, y1: y(mark), y2: y(mark) }),
      svg("text", { class: "level", x: SPACE.left - 6, y: y(mark) + 4 }, minus(`${Number(mark.toPrecision(3))}${this.unit && " "}${this.unit}`)),
    ]);
  }

  #times(x, now, step, every) {
    const named = (ago) => (ago === 0 ? "now" : step < 60 ? `\u2212${ago} s` : `\u2212${ago / 60} min`);
    const mark = (ago) => svg("text", { class: ago ? "ago" : "now", x: x(now - ago), y: HEIGHT - 6 }, named(ago));
    return [0, 1, 2, 3, 4].filter((place) => place % every === 0 && (place < 4 || step === 60)).map((place) => mark(place * step));
  }

  // A line breaks where a value is missing; a value alone is a dot.
  #line(points, place, x, y) {
    let pen = "M";
    const path = points.map(([at, value]) => {
      if (value === null) return (pen = "M"), "";
      const step = `${pen}${x(at).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h.01" : ""}`;
      pen = "L";
      return step;
    });
    return svg("path", { class: `line s${place % STYLES}`, d: path.join("") });
  }

  #key({ name, points }, place) {
    const swatch = svg("svg", { width: 22, height: 8, "aria-hidden": "true" }, svg("path", { class: `line s${place % STYLES}`, d: "M0 4H22" }));
    return el("li", {}, swatch, el("span", {}, name), el("span", { class: "now" }, this.#last(points)));
  }

  #last(points) {
    return quantity(points.at(-1)?.[1], this.unit);
  }

  #describe(series) {
    return series.map(({ name, points }) => `${name}: now ${this.#last(points)}`).join("; ") || "nothing yet";
  }
}
