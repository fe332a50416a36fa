// Try it: an article and a place in it, or a text, in; what two models expect next, beside what comes, out.
// The address holds what is tried: a control changes the address, and the view shows what the address names.

import * as address from "./address.js";
import * as answers from "./answers.js";
import { call, get, hasToken } from "./api.js";
import { copyButton } from "./copy.js";
import { byId, el, notify } from "./dom.js";
import { CONTEXT, QUESTION } from "./examples.js";
import { ms, percent, whole } from "./format.js";
import { Plane, PlaneMap, caption } from "./map.js";
import { curl, program } from "./snippets.js";
import { base64, cosine, floats } from "./vectors.js";

const { K } = answers;
const DEPTH = 100; // places among which the true next passage is looked for
const PAUSE_MS = 120;
const TRIED = 24; // windows of an article, of which an example is chosen
const TEXT = "lvm-text";
const narrow = matchMedia("(max-width: 60rem)"); // one column, as in try.css
const form = byId("try-form");
const { search, article: choice, at: slider, a: first, b: second, in: place, mmr, rerank, text } = form.elements;
const map = new PlaneMap(byId("map"), ({ article, position }) => go({ source: "", article, at: Math.max(0, position + 1 - state.length) }));
const state = { key: null, known: null, plane: null, article: null, length: 0, depth: DEPTH, requests: [] };
let running = new AbortController();
let timer = 0;

const later = (action) => {
  clearTimeout(timer);
  timer = setTimeout(action, PAUSE_MS);
};
const go = (changes) => address.open("try", changes);
const isText = () => form.elements.source.value === "text";

// Listen to the controls.
export function start() {
  search.addEventListener("input", () => later(() => handle(list)));
  choice.addEventListener("change", () => go({ article: choice.value, at: null }));
  slider.addEventListener("input", () => (places(), later(() => go({ at: slider.value }))));
  for (const [id, step] of [["back", -1], ["on", 1]]) byId(id).addEventListener("click", () => move(step));
  for (const control of [first, second, place, mmr]) control.addEventListener("change", () => go({ [control.name]: control.value }));
  rerank.addEventListener("change", () => go({ rerank: rerank.checked ? null : "0" }));
  for (const source of form.elements.source) source.addEventListener("change", () => go({ source: isText() ? "text" : null }));
  form.addEventListener("submit", (event) => (event.preventDefault(), submit()));
  byId("another").addEventListener("click", () => handle(another));
  byId("example-text").addEventListener("click", () => submit(CONTEXT));
  byId("example-question").addEventListener("click", () => submit(QUESTION));
  for (const near of form.elements.near) near.addEventListener("change", () => map.zoom(form.elements.near.value === "close"));
  const buttons = [["curl", curl], ["Python", program]].map(([name, make]) => copyButton(() => offer(make(state.requests, hasToken())), `Copy as ${name}`));
  byId("copies").replaceChildren(...buttons);
  byId("whole").addEventListener("change", ({ target }) => byId("lists").classList.toggle("briefly", !target.checked));
  text.value = sessionStorage.getItem(TEXT) ?? "";
  narrow.addEventListener("change", fold);
  byId("read").firstElementChild.addEventListener("click", (event) => narrow.matches || event.preventDefault());
  fold();
}

// What was read is folded if it would push what was found out of sight; beside it, it is always open.
function fold() {
  byId("read").open = !narrow.matches;
  byId("read").firstElementChild.tabIndex = narrow.matches ? 0 : -1;
}

// Forget what is shown, as with another token.
export const forget = () => Object.assign(state, { key: null, known: null, plane: null, article: null });

// Show what the address names, unless it is shown.
export function show() {
  const key = address.values().toString();
  if (key === state.key) return undefined;
  state.key = key;
  return handle(run);
}

// Run an action; say that it runs, and what it came to. A later action ends an earlier one.
async function handle(action) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  busy(true);
  try {
    await action(signal);
  } catch (error) {
    if (signal.aborted) return;
    fail(error);
  }
  if (running.signal === signal) busy(false);
}

function busy(isBusy) {
  byId("try-results").setAttribute("aria-busy", isBusy);
  if (isBusy) say("Working\u2026");
  else if (byId("try-status").textContent === "Working\u2026") say("");
}

const say = (words) => (byId("try-status").textContent = words);

// Say what failed beside the control that it concerns.
function fail(error) {
  state.key = null;
  const control = [["/model", "models"], ["/filter", "options"], ["/mmr", "options"], ["/rerank", "options"], ["/text", "text"]].find(([start]) => error.pointer?.startsWith(start))?.[1];
  const id = error.control ?? control;
  notify(id ? `${id}-note` : "try-notice", error.message);
  clear();
}

const at = (control, promise) => promise.catch((error) => {
  throw Object.assign(error, { control });
});

function clear() {
  byId("try-results").hidden = true;
  say("");
}

function unsay() {
  for (const id of ["try-notice", "search-note", "article-note", "models-note", "options-note", "text-note"]) notify(id);
}

// Show the article, or the text, that the address names.
async function run(signal) {
  unsay();
  const wanted = Object.fromEntries(address.values());
  if (!state.known && !(await begin(signal))) return undefined;
  form.elements.source.value = wanted.source === "text" ? "text" : "article";
  byId("from-article").hidden = isText();
  byId("from-text").hidden = !isText();
  byId("another").hidden = isText();
  setOptions(wanted);
  if (isText()) return readText(wanted, signal);
  return readArticle(wanted, signal);
}

// Ask what is served, once; returns whether there is anything to search.
async function begin(signal) {
  const known = await get("models", { signal });
  byId("try-controls").hidden = !known.aliases.retriever;
  if (!known.aliases.retriever) {
    notify("try-notice", "This service has no corpus to search: make one with lvm corpus, and serve it with lvm promote retriever NAME.");
    clear();
    return false;
  }
  const { encoder } = known;
  known.missing = encoder?.name && !encoder.missing ? "" : (encoder?.missing ?? "it has no encoder");
  known.nets = Object.entries(known.aliases).filter(([alias, { id }]) => id && (alias === "primary" || alias.startsWith("fallback")));
  const options = () => known.nets.map(([alias, { id }]) => el("option", { value: alias }, `${id.split("/")[0]} (${alias})`));
  first.replaceChildren(el("option", { value: "" }, "the default of /retrieve"), ...options());
  second.replaceChildren(...options(), el("option", { value: "none" }, "none"));
  byId("limits").replaceChildren(...criterion(known));
  for (const control of [text, byId("predict"), byId("example-text"), byId("example-question")]) control.disabled = Boolean(known.missing);
  state.known = known;
  await list(signal);
  return true;
}

// Fill the choice of articles with those whose title has the words; keep the article that is shown.
async function list(signal) {
  const words = search.value.trim();
  const found = await at("search", get(`articles?limit=500&search=${encodeURIComponent(words)}`, { signal }));
  const kept = state.article && !isText() ? `; ${state.article.title} is still shown` : "";
  notify("search-note", found.total ? "" : `No title contains \u201c${words}\u201d${kept}.`);
  if (!found.total) return;
  const more = found.total > found.articles.length ? [el("option", { disabled: true }, `and ${whole(found.total - found.articles.length)} more: find them by title`)] : [];
  choice.replaceChildren(...found.articles.map((one) => option(one)), ...more);
  state.titles = found.articles;
  if (words && state.known && state.article && !found.articles.some(({ article }) => article === state.article.article)) go({ article: found.articles[0].article, at: null });
  else if (state.article) choose(state.article);
}

const option = ({ article, title, chunks }) => el("option", { value: article }, `${title} (${chunks.length ?? chunks} passages)`);

function choose(article) {
  if (![...choice.options].some(({ value }) => value === `${article.article}`)) choice.prepend(option(article));
  choice.value = article.article;
}

function setOptions({ a = "", b = "", mmr: variety = "", rerank: isOn = "", in: within = "" }) {
  pick(first, a);
  if (b) pick(second, b);
  pick(mmr, variety);
  pick(place, within);
  rerank.checked = isOn !== "0";
  byId("options").open ||= Boolean(variety || within || isOn === "0");
}

// Choose a value, or the alias of a model of that name; a value that is none gets an option, and the service's answer.
function pick(control, value) {
  const alias = state.known.nets.find(([, { id }]) => id.split("/")[0] === value)?.[0];
  const chosen = alias ?? value;
  if (![...control.options].some((one) => one.value === chosen)) control.append(el("option", { value: chosen }, chosen.slice(0, 60)));
  control.value = chosen;
}

async function readArticle(wanted, signal) {
  const { article, at: from } = wanted.article ? wanted : await example(signal);
  if (`${state.article?.article}` !== `${article}`) state.article = await at("article", get(`articles/${encodeURIComponent(article)}`, { signal }));
  const { chunks, context_length: length, title } = state.article;
  for (const chunk of chunks) chunk.floats ??= floats(chunk.vector);
  state.length = length;
  choose(state.article);
  slider.max = Math.max(0, chunks.length - length);
  slider.value = Number.parseInt(from ?? (await interesting(state.article, signal)), 10) || 0;
  places();
  within(chunks);
  pick(place, wanted.in ?? "");
  address.set({ article, at: slider.value });
  state.key = address.values().toString();
  if (chunks.length < length) throw Object.assign(new Error(`${title} has ${chunks.length} passages; a context has ${length}.`), { control: "article" });
  const end = Number(slider.value) + length;
  const named = (chunk) => ({ ...chunk, title, article: state.article.article });
  await compare({ chunks: chunks.slice(0, end), context: chunks.slice(end - length, end).map(named), next: chunks[end] ? named(chunks[end]) : null }, signal);
}

function move(step) {
  slider.value = Number(slider.value) + step;
  places();
  later(() => go({ at: slider.value }));
}

function places() {
  const [from, { length }] = [Number(slider.value), state];
  const words = `passages ${from + 1} to ${from + length} of ${state.article?.chunks.length ?? 0}`;
  byId("place").textContent = words;
  slider.setAttribute("aria-valuetext", words);
}

// Offer to search within the article, or where a metadata field has a value that the article has.
function within(chunks) {
  const pairs = new Map(chunks.flatMap(({ metadata }) => Object.entries(metadata ?? {})).map((pair) => [JSON.stringify(pair), pair]));
  const fields = [...pairs].slice(0, 20).map(([value, [name, word]]) => el("option", { value }, `${name} is ${word}`));
  place.replaceChildren(el("option", { value: "" }, "the whole corpus"), el("option", { value: "article" }, "this article only"), ...fields);
}

function filterOf({ in: chosen }) {
  if (!chosen || isText()) return undefined;
  if (chosen === "article") return { article: state.article.article };
  try {
    const [name, value] = JSON.parse(chosen);
    return { [name]: value };
  } catch {
    return undefined;
  }
}

// Return an article to begin with: the first that is long enough to show something.
async function example() {
  const long = state.titles.find(({ chunks }) => chunks > 12) ?? state.titles[0];
  return { article: long.article };
}

async function another() {
  const { total } = await get("articles?limit=1");
  const { articles: found } = await get(`articles?limit=1&offset=${Math.floor(Math.random() * total)}`);
  search.value = "";
  go({ source: null, article: found[0].article, at: null });
}

// Return where to stop reading: what comes next is found, and is as unlike as can be to what was read last.
async function interesting({ chunks, context_length: length }, signal) {
  const starts = Array.from({ length: Math.min(TRIED, chunks.length - length) }, (_, start) => start);
  if (starts.length < 2) return 0;
  const contexts = starts.map((start) => base64(chunks.slice(start, start + length).map((chunk) => chunk.floats)));
  const results = await call("retrieve", { body: { contexts, k: 3 }, signal }).then((response) => response.json()).then((body) => body.results, () => null);
  if (!results) return 0;
  const good = starts.filter((start) => results[start].some(({ id }) => id === chunks[start + length].id));
  const likeness = (start) => cosine(chunks[start + length].floats, chunks[start + length - 1].floats);
  return good.sort((one, other) => likeness(one) - likeness(other))[0] ?? 0;
}

function submit(words) {
  if (words) text.value = words;
  sessionStorage.setItem(TEXT, text.value);
  form.elements.source.value = "text";
  state.key = null;
  go({ source: "text" });
}

async function readText(wanted, signal) {
  const { missing } = state.known;
  if (missing) {
    clear();
    return notify("text-note", `This service reads vectors, not text: ${missing}. Articles of the corpus need no encoder.`);
  }
  if (!text.value.trim()) return clear();
  state.article = null;
  return compare({ text: text.value }, signal);
}

// Ask both models, and show what they answer.
async function compare(known, signal) {
  const began = performance.now();
  const one = await ask("a", first.value, known, signal);
  const isQuery = one.found.read_as === "query";
  const fallback = state.known.nets.find(([alias]) => alias !== one.found.served_by)?.[0] ?? "none";
  const other = address.values().get("b") ? second.value : fallback;
  pick(second, other);
  first.options[0].textContent = first.value || isQuery ? "the default of /retrieve" : `default: ${answers.nameOf(one).toLowerCase()}`;
  const both = isQuery || other === "none" ? [one] : [one, await ask("b", other, known, signal)];
  state.requests = both.flatMap(({ requests }) => requests);
  const took = performance.now() - began;
  if (state.plane?.version !== one.found.corpus_version) state.plane = await Plane.load(signal);
  byId("try-results").hidden = false;
  render(known, both);
  say(`${both.length > 1 ? "Both models" : "The service"} answered in ${ms(took)}.`);
  await draw(known, both, signal);
}

// Return the answer of one model, `key` is a or b: what it found, and what it predicted if it is a net.
async function ask(key, model, { text: words, chunks, next }, signal) {
  const variety = mmr.value ? { mmr: Number(mmr.value) } : {};
  const range = chunks && [Math.max(0, chunks.length - lengthOf(model)), chunks.length];
  const input = words ? { text: words } : { context: base64(chunks.slice(...range).map((chunk) => chunk.floats)) };
  if (model) input.model = model;
  const filter = filterOf({ in: place.value });
  const options = { ...(filter ? { filter } : {}), ...variety, ...(rerank.checked || model ? {} : { rerank: false }) };
  const found = await deep({ ...input, ...options }, signal).catch((error) => {
    // a text that is shorter than a context is searched as it is: no model makes the query
    if (words && error.pointer === "/model") return ask(key, "", { text: words }, signal);
    throw Object.assign(error, error.status === 404 ? { control: "models" } : {});
  });
  if (found.key) return found;
  const isNet = found.body.model && found.body.served_by !== "retriever";
  const predicted = isNet ? await post("predict", { ...input, encoding: "base64" }, signal) : null;
  const sent = [{ path: "retrieve", body: { ...input, k: K, ...options } }, ...(predicted ? [{ path: "predict", body: input }] : [])];
  const rank = next ? found.body.results.findIndex(({ id }) => id === next.id) + 1 : 0;
  const requests = sent.map((one) => ({ ...one, read: range && { article: state.article.article, range } }));
  return { key, found: found.body, mmr: variety.mmr, rank, vector: predicted && floats(predicted.body.vector), timed: [found, predicted], requests };
}

// Search as deep as the service allows: its limit may be lower than ours.
async function deep(body, signal) {
  try {
    return await post("retrieve", { ...body, k: state.depth }, signal);
  } catch (error) {
    if (error.pointer !== "/k" || state.depth === K) throw error;
    state.depth = K;
    return deep(body, signal);
  }
}

async function post(path, body, signal) {
  const response = await call(path, { body, signal });
  return { body: await response.json(), timing: response.headers.get("Server-Timing") ?? "" };
}

// Return how many passages a model reads: the net's, else as many as a context of the corpus has.
function lengthOf(model) {
  const { id } = state.known.aliases[model] ?? {};
  return state.known.versions.find((version) => version.id === id)?.context_length ?? state.length;
}

function render({ context, text: words, next }, both) {
  const read = context ?? (both[0].found.chunks ?? [words]).map((chunk) => ({ text: chunk }));
  notify("read-as", context ? "" : answers.readAs(both[0].found, lengthOf("retriever")));
  byId("context").replaceChildren(...read.map((chunk) => answers.passage(chunk)), ...(context ? [answers.truth(next)] : []));
  const columns = both.map((one) => el("section", {}, el("h3", {}, answers.badge(one.key), answers.nameOf(one)), el("p", { class: "small" }, answers.order(one)), answers.hits(one, next)));
  byId("found").replaceChildren(...columns);
  const among = place.value && !isText() ? "the passages searched" : `${whole(state.plane.total)} passages`;
  const panels = context ? [...both.map((one) => answers.rankPanel(one, next, state.depth, among)), answers.closeness(both, { context, next })] : both.map(answers.bestPanel);
  if (both.length > 1) panels.push(answers.agreement(both, next));
  byId("measured").replaceChildren(...panels.filter(Boolean));
  byId("limits").hidden = !context;
  byId("reranked").hidden = !both.some(({ found }) => found.reranked) && rerank.checked;
  const timed = both.flatMap((one) => [["passages", one.timed[0]], ["vector", one.timed[1]]].filter(([, answer]) => answer).map(([what, answer]) => answers.stages(`${answers.nameOf(one)}: ${what}`, answer)));
  byId("times").replaceChildren(...timed);
  byId("code").hidden = true;
}

async function draw({ context, text: words, next }, both, signal) {
  const read = context ?? (await chunksOf(words, both[0].found.chunks, signal));
  const ids = both.flatMap(({ found }) => found.results.slice(0, K).map(({ id }) => id));
  const marks = answers.marks(both, read, next, state.plane, await state.plane.places(ids, signal));
  byId("map-caption").textContent = caption(state.plane);
  for (const item of byId("map-key").children) item.hidden = !marks.some(({ kind }) => item.dataset.kinds.split(" ").includes(kind));
  map.show(state.plane, marks);
}

// Return the chunks that were read of a text, with their vectors.
async function chunksOf(words, chunks, signal) {
  const { body } = await post("embed", { text: words, chunks: true, encoding: "base64" }, signal);
  return body.vectors.slice(-chunks.length).map((vector, place) => ({ text: chunks[place], floats: floats(vector) }));
}

// Return what R@5 means, and what it is for the models that are served.
function criterion({ nets, aliases, versions }) {
  const figures = [...nets, ["retriever", aliases.retriever]].map(([alias, { id }]) => {
    const scores = Object.entries(versions.find((version) => version.id === id)?.scores ?? {})[0];
    const share = scores?.[1]["R@5"];
    return share === undefined || share === null ? null : `${alias === "retriever" ? "the towers" : id.split("/")[0]} ${percent(share)}`;
  });
  const known = [...new Set(figures.filter(Boolean))];
  return [el("strong", {}, "R@5"), ` is the share of contexts whose true next passage is among the first five found.${known.length ? ` On held-out articles: ${known.join(", ")}.` : ""}`];
}

// Show the code that is copied.
function offer(code) {
  byId("code").textContent = code;
  byId("code").hidden = false;
  return code;
}
