// Try it: an article and a place in it, or a text, in; what the service expects next, beside what comes, out.

import { call, get } from "./api.js";
import { byId, el, notify, readout } from "./dom.js";
import { NONE, cosine as degree, ms, signed } from "./format.js";
import { base64, cosine, floats, mean } from "./vectors.js";

const K = 10;
const PAUSE_MS = 120;
const RERANKED = "In the order of the reranker; the score is the towers' inner product.";
const SCORED = "In the order of the score: the inner product with the prediction.";
const NEAREST = "The text is shorter than a context, so nothing is predicted: these passages lie nearest to it.";
const form = byId("try-form");
const { search, article: choice, at: slider, model: maker, text } = form.elements;
let article = null;
let running = new AbortController();
let timer = 0;
let missing = ""; // what reading text would take

const later = (action) => {
  clearTimeout(timer);
  timer = setTimeout(action, PAUSE_MS);
};
const guard = (action) => (...given) => action(...given).catch((error) => error.name === "AbortError" || fail(error));
const isText = () => form.elements.source.value === "text";

function fail(error) {
  notify("try-notice", error.message);
  clear();
}

function clear() {
  for (const id of ["measured", "context", "found"]) byId(id).replaceChildren();
  notify("order");
}

// Listen to the controls.
export function start() {
  search.addEventListener("input", () => later(guard(list)));
  choice.addEventListener("change", guard(open));
  slider.addEventListener("input", () => (place(), later(guard(run))));
  maker.addEventListener("change", guard(run));
  form.addEventListener("change", ({ target }) => target.name === "source" && guard(turn)());
  form.addEventListener("submit", (event) => (event.preventDefault(), guard(run)()));
  for (const [id, step] of [["back", -1], ["on", 1]]) byId(id).addEventListener("click", () => move(step));
}

// Fill the choices, and show the first article.
export const load = guard(async () => {
  const { aliases, encoder } = await get("models");
  const nets = Object.entries(aliases).filter(([alias]) => alias === "primary" || alias.startsWith("fallback"));
  const options = nets.map(([alias, { id }]) => el("option", { value: alias }, `${alias}: ${id.split("/")[0]}`));
  const own = aliases.retriever ? "retriever: its own towers, else primary" : "primary";
  maker.replaceChildren(el("option", { value: "" }, own), ...options);
  missing = encoder?.name && !encoder.missing ? "" : (encoder?.missing ?? "it has no encoder");
  text.disabled = form.querySelector("[type=submit]").disabled = Boolean(missing);
  await list();
});

async function list() {
  const { articles, total } = await get(`articles?limit=500&search=${encodeURIComponent(search.value)}`);
  const more = total > articles.length ? [el("option", { disabled: true }, `and ${total - articles.length} more: find them by title`)] : [];
  const options = articles.map(({ article, title, chunks }) => el("option", { value: article }, `${title} (${chunks} passages)`));
  choice.replaceChildren(...(options.length ? options : [el("option", { disabled: true }, "no such title")]), ...more);
  if (articles.length && !isText()) await open();
}

async function open() {
  article = await get(`articles/${choice.value}`);
  slider.max = Math.max(0, article.chunks.length - article.context_length);
  slider.value = 0;
  place();
  await run();
}

async function turn() {
  byId("from-article").hidden = isText();
  byId("from-text").hidden = !isText();
  running.abort();
  clear();
  if (!isText()) return run();
  notify("try-notice", missing && `This service reads vectors, not text: ${missing}. Articles of the corpus need no encoder.`);
  return undefined;
}

function move(step) {
  slider.value = Number(slider.value) + step;
  place();
  later(guard(run));
}

function place() {
  const [first, length] = [Number(slider.value), article.context_length];
  const words = `passages ${first + 1} to ${first + length} of ${article.chunks.length}`;
  byId("place").textContent = words;
  slider.setAttribute("aria-valuetext", words);
}

// Ask for both answers, and show them; an earlier question that still runs is given up.
async function run() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const known = isText() ? null : reading();
  if (isText() ? !text.value.trim() || text.disabled : !known) return;
  const input = { ...(known ? { context: base64(known.context.map(({ floats }) => floats)) } : { text: text.value }) };
  if (maker.value) input.model = maker.value;
  const began = performance.now();
  const found = await post("retrieve", { ...input, k: K }, signal);
  const isQuery = found.body.read_as === "query"; // a text shorter than a context: nothing can be predicted
  const predicted = isQuery ? null : await post("predict", { ...input, encoding: "base64" }, signal);
  notify("try-notice");
  show(known, found, predicted, performance.now() - began);
}

// Return what is read, {context, next}, of the article; null where it is too short for one context.
function reading() {
  const [first, length] = [Number(slider.value), article?.context_length];
  if (!article || article.chunks.length < length) {
    fail(new Error("This article has fewer passages than one context."));
    return null;
  }
  const chunks = article.chunks.slice(first, first + length + 1).map((chunk) => ({ ...chunk, floats: floats(chunk.vector) }));
  return { context: chunks.slice(0, length), next: chunks[length] ?? null };
}

async function post(path, body, signal) {
  const response = await call(path, { body, signal });
  return { body: await response.json(), timing: response.headers.get("Server-Timing") ?? "" };
}

function show(known, found, predicted, took) {
  const next = known?.next ?? null;
  const context = known ? known.context : (found.body.chunks ?? [text.value]).map((chunk) => ({ text: chunk }));
  byId("context").replaceChildren(...context.map((chunk) => passage(chunk)), ...(known ? [truth(next)] : []));
  notify("order", predicted ? (found.body.reranked ? RERANKED : SCORED) : NEAREST);
  byId("found").replaceChildren(...found.body.results.map((result, rank) => hit(result, rank, next)));
  byId("measured").replaceChildren(
    ...(known ? [rankOf(next, found.body.results), closeness(known, predicted.body)] : []),
    stages("Passages", found, `on the server; ${predicted ? "both answers" : "the answer"} took ${ms(took)} to this page`),
    ...(predicted ? [stages("Vector", predicted, "on the server")] : []),
  );
}

const rankOf = (next, results) => {
  const rank = next ? results.findIndex(({ id }) => id === next.id) + 1 : 0;
  const words = `of ${results.length} passages`;
  if (!next) return readout("True next passage", NONE, "The article ends here: nothing comes next.");
  if (!rank) return readout("True next passage", `not in the first ${results.length}`, "It was looked for in the whole corpus.", "miss");
  return readout("True next passage", `rank ${rank}`, words, "hit");
};

const passage = ({ position, text: words }, label = "") =>
  el("li", {}, el("p", { class: "where" }, position === undefined ? "" : `passage ${position + 1}`, label), el("p", {}, words ?? "(the corpus has no text)"));

function truth(next) {
  if (!next) return el("li", { class: "truth" }, el("p", { class: "where" }, "The article ends here."));
  const node = passage(next, el("span", { class: "mark" }, "what comes next"));
  node.classList.add("truth");
  return node;
}

function hit({ id, score, title, position, text: words }, rank, next) {
  const isTrue = next?.id === id;
  const mark = isTrue ? el("span", { class: "mark" }, "true next") : null;
  const where = el("p", { class: "where" }, el("span", { class: "rank" }, `${rank + 1}`), `${title}, passage ${position + 1}`, mark, el("span", { class: "score" }, `score ${degree(score)}`));
  return el("li", { class: isTrue && "true" }, where, el("p", {}, words ?? "(the corpus has no text)"));
}

// The cosines to the true next vector: of the prediction, and of what needs no net.
function closeness({ context, next }, { vector }) {
  if (!next) return readout("Cosine to the true next", NONE, "Nothing comes next.");
  const vectors = context.map((chunk) => chunk.floats);
  const [predicted, last, middle] = [floats(vector), vectors.at(-1), mean(vectors)].map((one) => cosine(one, next.floats));
  const rows = [["prediction", predicted], ["persistence (last passage)", last], ["mean of the context", middle]];
  const bars = rows.map(([name, value], row) => [el("dt", {}, name), el("dd", {}, bar([[row ? "rest" : "s0", Math.max(value, 0)], ["gap", 1 - Math.max(value, 0)]]), degree(value))]);
  return panel("Cosine to the true next", degree(predicted), `${signed(predicted - last)} beside persistence`, el("dl", { class: "bars" }, bars.flat()));
}

function stages(name, { body, timing }, remark) {
  const told = Array.from(timing.matchAll(/(\w+);dur=([\d.]+)/g), ([, stage, value]) => [stage, Number(value)]);
  const parts = told.length ? told : Object.entries(body.timing_ms);
  const sum = parts.reduce((all, [, value]) => all + value, 0);
  const rows = parts.map(([stage, value], place) => [el("dt", { class: `key s${place}` }, stage), el("dd", {}, ms(value))]);
  const list = el("dl", { class: "stages" }, rows.flat());
  return panel(`${name} in`, ms(sum), remark, author(body), bar(parts.map(([, value], place) => [`s${place}`, value])), list);
}

function author({ model, version, served_by: by, fallback_reason: reason, reranked, corpus }) {
  if (!model) return el("p", { class: "author" }, `searched in ${corpus}; no net was asked`);
  const why = reason ? `, as the first engine did not answer: ${reason}` : "";
  return el("p", { class: "author" }, el("strong", {}, model), ` ${version}`, el("br"), `served by ${by}${why}${reranked ? ", reranked" : ""}`);
}

const panel = (name, value, remark, ...more) => {
  const node = readout(name, value, remark);
  return el("div", { class: "panel" }, node, more);
};

function bar(parts) {
  const sum = parts.reduce((all, [, share]) => all + share, 0) || 1;
  const pieces = parts.map(([kind, share]) => {
    const piece = el("span", { class: kind });
    piece.style.flexGrow = share / sum;
    return piece;
  });
  return el("div", { class: "bar", "aria-hidden": "true" }, pieces);
}
