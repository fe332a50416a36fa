// The map: a sample of the corpus on a plane, and on it what was read, predicted and found.

import { get } from "./api.js";
import { el, svg } from "./dom.js";
import { percent } from "./format.js";
import { floats, project } from "./vectors.js";

const EDGE = 28;
const NEAR = 16; // pixels between a pointer and what it points at
const R = 9; // radius of a numbered mark
const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

export class Plane {
  // `body` is that of /articles/map.
  constructor(body) {
    Object.assign(this, { version: body.corpus_version, passages: body.passages, dim: body.dim, total: body.total, explained: body.explained });
    this.mean = floats(body.mean);
    this.axes = [0, 1].map((axis) => floats(body.axes).subarray(axis * body.dim, (axis + 1) * body.dim));
    this.known = new Map(body.passages.map((passage) => [passage.id, passage]));
  }

  static async load(signal) {
    return new Plane(await get("articles/map", { signal }));
  }

  place(vector) {
    const [x, y] = project(vector, this);
    return { x, y };
  }

  // Return where passages lie, by id; asks for those that the sample does not have.
  async places(ids, signal) {
    const missing = ids.filter((id) => !this.known.has(id));
    if (missing.length) {
      const { passages } = await get(`articles/map?ids=${encodeURIComponent(JSON.stringify(missing))}`, { signal });
      for (const passage of passages) this.known.set(passage.id, passage);
    }
    return new Map(ids.map((id) => [id, this.known.get(id)]));
  }
}

export class PlaneMap {
  // Draws into `box`; `open` is called with a passage that is chosen.
  constructor(box, open) {
    Object.assign(this, { box, open, plane: null, marks: [], isClose: true, pointed: null });
    this.tip = el("div", { class: "map-tip", role: "status", hidden: true });
    this.canvas = el("div", { class: "field-of-points" });
    box.append(this.canvas, this.tip);
    box.addEventListener("pointermove", (event) => this.#point(event));
    box.addEventListener("pointerdown", (event) => this.#point(event));
    box.addEventListener("pointerleave", () => this.#show(null));
    box.addEventListener("blur", () => this.#show(null));
    box.addEventListener("keydown", (event) => this.#press(event));
    new ResizeObserver(() => this.#draw()).observe(box);
  }

  // Show `marks`: {x, y, kind, label, what, title, position, article, text}; lines join those of kind "read".
  show(plane, marks) {
    Object.assign(this, { plane, marks });
    this.#show(null);
    this.#draw();
  }

  zoom(isClose) {
    this.isClose = isClose;
    this.#draw();
  }

  #scale() {
    const near = this.marks.length ? this.marks : this.plane.passages;
    const seen = this.isClose ? near : [...this.plane.passages, ...this.marks];
    const [xs, ys] = [seen.map(({ x }) => x), seen.map(({ y }) => y)];
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const { width, height } = this;
    const size = Math.min((width - 2 * EDGE) / (right - left || 1), (height - 2 * EDGE) / (high - low || 1));
    this.at = ({ x, y }) => [width / 2 + (x - (left + right) / 2) * size, height / 2 - (y - (low + high) / 2) * size];
  }

  #draw() {
    [this.width, this.height] = [this.box.clientWidth, this.box.clientHeight];
    if (!this.plane || !this.width) return;
    this.#scale();
    const dots = this.plane.passages.map((passage) => this.at(passage).map((value) => value.toFixed(1)).join(" "));
    const cloud = svg("path", { class: "cloud", d: dots.map((dot) => `M${dot}h0`).join("") });
    const named = { width: this.width, height: this.height, "aria-hidden": "true" };
    this.ring = svg("circle", { class: "pointed", r: R + 3, visibility: "hidden" });
    const found = (mark) => mark.kind.startsWith("found");
    const marks = [...this.marks.filter(found), ...this.marks.filter((mark) => !found(mark))];
    this.canvas.replaceChildren(svg("svg", named, cloud, this.#lines(), marks.map((mark) => this.#mark(mark)), this.ring));
  }

  // The way of what was read, and from its end to what comes next and to what was predicted.
  #lines() {
    const read = this.marks.filter(({ kind }) => kind === "read");
    if (!read.length) return [];
    const way = svg("path", { class: "way", d: `M${read.map((mark) => this.at(mark).join(" ")).join("L")}` });
    const ends = this.marks.filter(({ kind }) => kind === "next" || kind.startsWith("predicted"));
    const from = this.at(read.at(-1)).join(" ");
    return [ends.map((end) => svg("path", { class: `way to-${end.kind}`, d: `M${from}L${this.at(end).join(" ")}` })), way].flat();
  }

  #mark(mark) {
    const [x, y] = this.at(mark);
    const shape = {
      read: () => svg("circle", { cx: x, cy: y, r: R }),
      next: () => svg("circle", { cx: x, cy: y, r: R + 2 }),
      "predicted-a": () => svg("path", { d: `M${x} ${y - 12}l12 12l-12 12l-12 -12z` }),
      "predicted-b": () => svg("path", { d: `M${x} ${y - 12}l12 12l-12 12l-12 -12z` }),
    }[mark.kind] ?? (() => svg("circle", { cx: x, cy: y, r: 4.5 }));
    return svg("g", { class: `mark-${mark.kind}` }, shape(), mark.label && svg("text", { x, y: y + 4 }, mark.label));
  }

  #point(event) {
    if (!this.plane || event.target.closest(".map-tip")) return;
    const frame = this.box.getBoundingClientRect();
    const [px, py] = [event.clientX - frame.left, event.clientY - frame.top];
    this.#show(this.#nearest(this.marks, px, py, NEAR) ?? this.#nearest(this.plane.passages, px, py, NEAR / 2));
  }

  #nearest(points, px, py, reach) {
    let [best, least] = [null, reach];
    for (const point of points) {
      const [x, y] = this.at(point);
      const far = Math.hypot(x - px, y - py);
      if (far < least) [best, least] = [point, far];
    }
    return best;
  }

  #press(event) {
    const step = KEYS[event.key];
    if (event.key === "Escape") this.#show(null);
    if (event.key === "Enter" && event.target === this.box && this.pointed) this.#choose(this.pointed);
    if (!step || !this.marks.length) return;
    event.preventDefault();
    const place = this.marks.indexOf(this.pointed);
    this.#show(this.marks.at(place < 0 && step < 0 ? -1 : (place + step) % this.marks.length));
  }

  #choose(point) {
    if (point.article !== undefined) this.open(point);
  }

  // Show what a point is, beside it; null shows nothing.
  #show(point) {
    if (point === this.pointed) return;
    this.pointed = point;
    this.tip.hidden = !point;
    this.ring?.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return;
    const [x, y] = this.at(point);
    this.ring.setAttribute("cx", x);
    this.ring.setAttribute("cy", y);
    const where = point.article === undefined ? null : `${point.title}, passage ${point.position + 1}`;
    const read = el("button", { type: "button", class: "link", click: () => this.#choose(point) }, "Read from here");
    this.tip.replaceChildren(...[
      point.what && el("strong", {}, point.what),
      where && el("p", { class: "where" }, where),
      point.text && el("p", {}, point.text.length > 160 ? `${point.text.slice(0, 159)}\u2026` : point.text),
      where && read,
    ].filter(Boolean));
    this.#move(x, y);
  }

  #move(x, y) {
    const [width, height] = [this.tip.offsetWidth, this.tip.offsetHeight];
    const left = x + R + 6 + width < this.width ? x + R + 6 : x - R - 6 - width;
    const fits = (value, most) => Math.max(4, Math.min(value, most));
    this.tip.style.left = `${fits(left, this.width - width - 4)}px`;
    this.tip.style.top = `${fits(y - height / 2, this.height - height - 4)}px`;
  }
}

// Return what the map can and cannot show, in words.
export function caption({ explained, passages, total, dim }) {
  const share = percent(explained[0] + explained[1]);
  const shown = passages.length < total ? `${passages.length.toLocaleString("en")} of ${total.toLocaleString("en")} passages` : `All ${total.toLocaleString("en")} passages`;
  return `${shown}, seen along the two directions, of ${dim}, in which they differ most. These hold ${share} of the variance: passages that are near here need not be alike.`;
}
