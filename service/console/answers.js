// What the models answered: the rank of what comes next, cosines, what both found, passages, times.

import { el, readout } from "./dom.js";
import { NONE, cosine as degree, minus, ms, signed, whole } from "./format.js";
import { cosine, mean, unit } from "./vectors.js";

export const K = 10;
const COUNTED = 5; // R@5
const FAIR = 20;
const CRITERION = [["hit", COUNTED, "in the first five, so R@5 counts it as found"], ["warn", FAIR, "not in the first five, so R@5 counts it as missed"]];
const ordinal = (rank) => `${whole(rank)}${{ one: "st", two: "nd", few: "rd", other: "th" }[new Intl.PluralRules("en", { type: "ordinal" }).select(rank)]}`;
const judge = (rank) => CRITERION.find(([, most]) => rank && rank <= most) ?? ["miss", Infinity, "far from the first five: R@5 counts it as missed"];

export const badge = (key) => el("span", { class: `badge of-${key}`, "aria-hidden": "true" }, key.toUpperCase());

// Return the name of what answered.
export function nameOf({ found: { model, served_by: by, reranked } }) {
  if (!model) return "Nearest passages";
  return by === "retriever" ? `Towers${reranked ? " and reranker" : ""}` : model;
}

const version = ({ found: { version: id, corpus_version: corpus, served_by: by, fallback_reason: reason } }) =>
  `${by ? `${by}, ` : ""}${id ?? corpus}${reason ? `; the first in order did not answer: ${reason}` : ""}`;

// Return the panel of one answer: where the true next passage stands among what was found.
export function rankPanel(answer, next, depth, among) {
  const { rank } = answer;
  const [state, , words] = judge(rank);
  const head = who(answer);
  if (!next) return el("div", { class: "panel" }, head, readout("True next passage", NONE, "The article ends here: nothing comes next."));
  const value = rank ? ordinal(rank) : `not in the first ${depth}`;
  return el("div", { class: "panel" }, head, readout("True next passage", value, `of ${among}: ${words}`, state), strip(rank, state));
}

// Return the panel of one answer to a text, after which nothing comes that could be compared: the best of what was found.
export function bestPanel(answer) {
  const [best] = answer.found.results;
  return el("div", { class: "panel" }, who(answer), best ? readout("First passage", best.title || "untitled", `passage ${best.position + 1}, score ${degree(best.score)}`) : readout("First passage", NONE, "No passage matches."));
}

const who = (answer) => el("p", { class: "who" }, badge(answer.key), el("strong", {}, nameOf(answer)), el("span", { class: "quiet" }, version(answer)));

// The first ten places as cells, the first five framed, the true one filled.
function strip(rank, state) {
  const cell = (place) => el("span", { class: `cell${place + 1 === rank ? ` ${state}` : ""}${place < COUNTED ? " counted" : ""}` }, `${place + 1}`);
  return el("p", { class: "strip", "aria-hidden": "true" }, Array.from({ length: K }, (_, place) => cell(place)), rank > K ? el("span", { class: `cell ${state}` }, `${rank}`) : null);
}

// The cosines to the true next vector: of each prediction, and of what needs no net.
export function closeness(answers, { context, next }) {
  if (!next) return null;
  const vectors = context.map((chunk) => chunk.floats);
  const predicted = answers.filter(({ vector }) => vector);
  const needNone = [["last passage read", vectors.at(-1)], ["mean of what was read", mean(vectors)]];
  const rows = [...predicted.map((one) => [one.key, nameOf(one), one.vector]), ...needNone.map(([name, vector]) => ["", name, vector])];
  const lines = rows.map(([key, name, vector]) => {
    const value = cosine(vector, next.floats);
    return [el("dt", {}, key && badge(key), name), el("dd", {}, bar([[`fill of-${key}`, Math.max(value, 0)], ["gap", 1 - Math.max(value, 0)]]), degree(value))];
  });
  const none = predicted.length ? null : el("p", { class: "small" }, "Towers search; they predict no vector.");
  return el("div", { class: "panel" }, el("h3", { class: "name" }, "Cosine to the true next"), el("dl", { class: "bars" }, lines.flat()), none);
}

// What two answers have in common.
export function agreement([one, other], next) {
  const ids = answers(one);
  const common = answers(other).filter((id) => ids.includes(id)).length;
  const facts = [[`${common} of ${Math.max(ids.length, answers(other).length)}`, "found by both"], [ids[0] === answers(other)[0] ? "the same" : "different", "first passage"]];
  if (one.vector && other.vector) facts.push([degree(cosine(one.vector, other.vector)), "cosine between the predictions"]);
  if (next && one.vector && other.vector) facts.push([signed(cosine(one.vector, next.floats) - cosine(other.vector, next.floats)), "cosine to the true next, A less B"]);
  if (next) facts.push([difference(one.rank, other.rank), "rank of the true next"]);
  return el("div", { class: "panel" }, el("h3", { class: "name" }, "Do they agree?"), el("dl", { class: "facts" }, facts.map(([value, name]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
}

const answers = ({ found }) => found.results.slice(0, K).map(({ id }) => id);

function difference(one, other) {
  if (!one && !other) return "found by neither";
  if (!one || !other) return `found by ${one ? "A" : "B"} only`;
  if (one === other) return "equal";
  const more = Math.abs(one - other);
  return `${one < other ? "A" : "B"} by ${more} ${more === 1 ? "place" : "places"}`;
}

export const passage = ({ position, text }, ...marks) =>
  el("li", {}, el("p", { class: "where" }, position === undefined ? "" : `passage ${position + 1}`, marks), el("p", {}, text ?? "(the corpus has no text)"));

export function truth(next) {
  if (!next) return el("li", { class: "truth" }, el("p", { class: "where" }, "The article ends here."));
  const node = passage(next, el("span", { class: "mark" }, "what comes next"));
  node.classList.add("truth");
  return node;
}

// Return the list of what one answer found.
export function hits({ found }, next) {
  const list = found.results.slice(0, K).map((result, rank) => hit(result, rank, next));
  return el("ol", { class: "passages found" }, list.length ? list : el("li", { class: "quiet" }, "No passage matches."));
}

function hit({ id, score, rerank_score: second, title, position, text }, rank, next) {
  const isTrue = next?.id === id;
  const mark = isTrue ? el("span", { class: "mark" }, "true next") : null;
  const scores = `score ${degree(score)}${second === undefined ? "" : `, reranked ${minus(second.toFixed(2))}`}`;
  const where = el("p", { class: "where" }, el("span", { class: "rank" }, `${rank + 1}`), `${title}, passage ${position + 1}`, mark, el("span", { class: "score" }, scores));
  return el("li", { class: isTrue && "true" }, where, el("p", {}, text ?? "(the corpus has no text)"));
}

// How the service read a text.
export function readAs({ read_as: kind, chunks = [] }, length) {
  if (kind === "query") return "The text is short, so it is a question: the passages nearest to it are found, and no model predicts what follows.";
  return kind === "partial_context" ? `The text has ${chunks.length} chunks; a context has ${length}. The mean of the chunks stands for the others.` : "";
}

// How what was found is ordered.
export function order({ found, mmr }) {
  const varied = mmr ? ", varied" : "";
  if (!found.model) return `Nearest to the text${varied}; the score is the inner product with its vector.`;
  if (found.reranked) return `In the order of the reranker${varied}; the score is the towers' inner product.`;
  return found.served_by === "retriever" ? `In the order of the towers' inner product${varied}.` : `Nearest to the predicted vector${varied}; the score is the inner product with it.`;
}

// The time of every stage of one request.
export function stages(name, { body, timing }) {
  const timed = Array.from(timing.matchAll(/(\w+);dur=([\d.]+)/g), ([, stage, value]) => [stage, Number(value)]);
  const parts = timed.length ? timed : Object.entries(body.timing_ms);
  const sum = parts.reduce((all, [, value]) => all + value, 0);
  const rows = parts.map(([stage, value], place) => [el("dt", { class: `key s${place}` }, stage), el("dd", {}, ms(value))]);
  const stripes = bar(parts.map(([, value], place) => [`s${place}`, value]));
  return el("div", { class: "panel" }, readout(name, ms(sum), "on the server"), stripes, el("dl", { class: "stages" }, rows.flat()));
}

function bar(parts) {
  const sum = parts.reduce((all, [, share]) => all + share, 0) || 1;
  const pieces = parts.map(([kind, share]) => {
    const piece = el("span", { class: kind });
    piece.style.flexGrow = share / sum;
    return piece;
  });
  return el("div", { class: "bar", "aria-hidden": "true" }, pieces);
}

// Return the marks of the map: what was read, comes next, was predicted and was found.
export function marks(answers, context, next, plane, places) {
  const read = context.filter(({ floats }) => floats).map((chunk, at) => ({ ...chunk, ...plane.place(chunk.floats), kind: "read", label: `${at + 1}`, what: `Read, ${at + 1} of ${context.length}` }));
  const comes = next ? [{ ...next, ...plane.place(next.floats), kind: "next", label: "", what: "Comes next" }] : [];
  const predicted = answers.filter(({ vector }) => vector).map((one) => ({ ...plane.place(unit(one.vector)), kind: `predicted-${one.key}`, label: one.key.toUpperCase(), what: `Predicted by ${nameOf(one)}` }));
  return [...read, ...comes, ...predicted, ...found(answers, next, places)];
}

function found(answers, next, places) {
  const byId = new Map();
  for (const one of answers) {
    for (const [place, result] of one.found.results.slice(0, K).entries()) {
      const known = byId.get(result.id) ?? { ...result, ...coordinates(places.get(result.id)), finders: [], words: [] };
      known.finders.push(one.key);
      known.words.push(`${ordinal(place + 1)} of ${one.key.toUpperCase()}`);
      byId.set(result.id, known);
    }
  }
  const named = ({ finders, words, ...result }) => ({ ...result, kind: finders.length > 1 ? "found-both" : `found-${finders[0]}`, label: "", what: `Found: ${words.join(", ")}` });
  return [...byId.values()].filter(({ id }) => id !== next?.id).map(named);
}

const coordinates = ({ x, y }) => ({ x, y });
