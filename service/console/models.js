// Models: aliases, versions and their cards, the shadow, the ledger.

import * as address from "./address.js";
import { call, get } from "./api.js";
import { copyButton, snippet } from "./copy.js";
import { byId, el, notify, readout, table } from "./dom.js";
import { NONE, ago, bytes, cosine, ms, percent, recall, signed, time, whole } from "./format.js";
import { render } from "./markdown.js";
import { histogram, parse, quantile, select } from "./prometheus.js";

const PAGE = 20;
const HOLDERS = { net: "primary", corpus: "retriever" }; // the alias that a version of a kind is usually promoted to
const COHERENCES = [["", "all"], ["low", "of low coherence"], ["middle", "of middle coherence"], ["high", "of high coherence"]];
let moves = [];
let known = null; // {aliases, versions} of /models
let samples = new Map();
let reading = null; // of both
let shown = ""; // the id of the card that is seen

const guard = (action) => (...given) => action(...given).catch((error) => notify("models-notice", error.message));

// Listen to the controls.
export function start() {
  byId("older").addEventListener("click", guard(older));
  byId("scored").addEventListener("change", ({ target }) => (address.set({ data: target.selectedIndex ? target.value : null }), catalogue()));
  addEventListener("keydown", ({ key }) => key === "Escape" && !byId("card").hidden && !byId("models").hidden && address.open("models", { card: null }));
}

export const load = guard(async () => {
  const before = shown;
  reading = read();
  const card = turn();
  await reading;
  notify("models-notice");
  byId("catalogue").hidden = Boolean(shown);
  refusals();
  aliases();
  catalogue();
  shadow();
  moves = [];
  await Promise.all([older(), card]);
  if (before && !shown) byId("catalogue").querySelector(`[data-card="${CSS.escape(before)}"]`)?.focus();
});

async function read() {
  const [models, metrics] = await Promise.all([get("models"), call("metrics").then((response) => response.text())]);
  [known, samples] = [models, parse(metrics)];
}

// ---- a card or the catalogue, as the address says

async function turn() {
  const id = address.values().get("card") ?? "";
  const before = shown;
  shown = id;
  byId("catalogue").hidden = Boolean(id) || !known;
  byId("card").hidden = !id;
  if (id && id !== before) await card(id);
}

async function card(id) {
  const back = el("a", { href: address.link("models", { card: null }) }, "\u2190 All models");
  byId("card").setAttribute("aria-label", `Card of ${id}`);
  byId("card").replaceChildren(el("p", { class: "where" }, back), el("p", { class: "quiet" }, `Reading the card of ${id}`));
  scrollTo(0, 0);
  byId("card").focus({ preventScroll: true });
  const asked = call(`models/${id.split("/").map(encodeURIComponent).join("/")}/card`).then((response) => response.text(), (error) => {
    if (error.status !== 404) throw error;
    return null;
  });
  const [text] = await Promise.all([asked, reading]);
  if (shown !== id) return;
  byId("card").replaceChildren(el("p", { class: "where" }, back), ...(text === null ? [el("p", {}, "There is no version ", el("code", {}, id), " in this registry.")] : page(id, text)));
}

function page(id, text) {
  const { front, body } = render(text);
  const matter = el("details", {}, el("summary", {}, "Front matter"), el("pre", { tabindex: "0" }, front));
  const one = known?.versions.find((version) => version.id === id);
  const ways = el("p", { class: "ways" }, el("code", {}, id), marks(id), copyButton(() => location.href, "Copy link"));
  return [ways, ...live(id), ...body, ...(one && HOLDERS[one.kind] ? [el("h4", {}, "Serve it"), snippet(promotion(one))] : []), matter];
}

// Say what a version scored since the service started.
function live(id) {
  const scores = scoresOf(id).map(({ alias, pairs, cosine: mean, interval: [low, high], baselines }) => {
    const [name, most] = Object.entries(baselines).reduce((one, other) => (other[1] > one[1] ? other : one));
    return el("p", {}, `As ${alias}, on live traffic: cosine `, el("strong", {}, cosine(mean)), `, 95 % interval ${cosine(low)} to ${cosine(high)}, on ${whole(pairs)} contexts. The best baseline, ${name.replaceAll("_", " ")}: ${cosine(most)}.`);
  });
  const ranks = ranksOf(id).map(({ query, pairs, MRR, "R@5": share }) => el("p", {}, `On live traffic, queries by `, el("code", {}, query), ": R@5 ", el("strong", {}, recall(share)), `, MRR ${recall(MRR)}, on ${whole(pairs)} passages that came next.`));
  return [...scores, ...ranks];
}

const mostPairs = (one, other) => other.pairs - one.pairs;
const scoresOf = (id) => (known?.live?.versions ?? []).filter((one) => one.id === id).sort(mostPairs);
const ranksOf = (id) => (known?.live?.retrieval ?? []).filter((one) => one.id === id).sort(mostPairs);

// ---- aliases

function refusals() {
  const refused = Object.entries(known.aliases).filter(([, { refused: one }]) => one);
  byId("refused").replaceChildren(...refused.map(([alias, one]) => el("div", { class: "notice" },
    el("p", {}, el("strong", {}, alias), " points at ", el("code", {}, one.refused.id), ", which is refused:"),
    el("p", { class: "warning" }, one.refused.reason ?? "no reason is known"),
    el("p", {}, one.id ? ["It goes on serving ", el("code", {}, one.id), ". The alias goes back with:"] : "It serves nothing. Promote another version, or remove the alias with:"),
    snippet(one.id ? `lvm rollback ${alias}` : `lvm unset ${alias} --force --why "cannot be served"`),
  )));
}

function aliases() {
  const state = ({ refused, warning }) => {
    const words = [refused && `refused ${refused.id}`, warning].filter(Boolean);
    return words.length ? el("span", { class: "warning" }, words.join("; ")) : el("span", { class: "good" }, "none");
  };
  const rows = Object.entries(known.aliases).map(([alias, one]) => [
    el("strong", {}, alias),
    one.id ? opener(one.id) : NONE,
    el("time", { datetime: one.since, title: time(one.since) }, ago(one.since)),
    one.runtime,
    one.breaker && el("span", { class: one.breaker === "closed" ? null : "warning" }, one.breaker),
    state(one),
  ]);
  table(byId("aliases"), [["Alias"], ["Serves"], ["Since"], ["Runtime"], ["Breaker"], ["Refused or warned"]], rows, "No alias is set.");
}

// ---- versions

const figure = (score, name) => score?.[name] ?? -Infinity;
const byScore = (one, other) => figure(other, "R@5") - figure(one, "R@5") || figure(other, "cosine") - figure(one, "cosine");

function catalogue() {
  const ofKind = (...kinds) => known.versions.filter(({ kind }) => kinds.includes(kind ?? "net"));
  const [nets, corpora] = [known.versions.filter(({ kind }) => kind !== "corpus"), ofKind("corpus")];
  const data = choices(nets);
  versions("nets", nets, data, ["Live cosine", ({ id }) => liveCosine(scoresOf(id)[0])], [
    ["Parameters", ({ parameters }) => (parameters ? whole(parameters) : NONE)],
  ]);
  versions("corpora", corpora, null, ["Live R@5", ({ id }) => liveRecall(ranksOf(id)[0])], [
    ["Passages", ({ chunks }) => whole(chunks)],
    ["Articles", ({ articles }) => whole(articles)],
  ]);
}

const counted = (value, remark) => el("span", {}, value, el("span", { class: "remark" }, remark));
const liveCosine = (found) => (found ? counted(cosine(found.cosine), `\u00b1${cosine((found.interval[1] - found.interval[0]) / 2)} of ${whole(found.pairs)}`) : NONE);
const liveRecall = (found) => (found ? counted(recall(found["R@5"]), `of ${whole(found.pairs)}`) : NONE);

// Fill the choice of data sets, the one that most versions have first; return the chosen one.
function choices(nets) {
  const all = nets.flatMap(({ scores }) => Object.keys(scores ?? {}));
  const names = [...new Set(all)].sort((one, other) => all.filter((each) => each === other).length - all.filter((each) => each === one).length);
  const asked = address.values().get("data");
  const chosen = names.includes(asked) ? asked : (names[0] ?? null);
  byId("scored").replaceChildren(...names.map((name) => el("option", { value: name, selected: name === chosen }, name)));
  byId("scored").parentElement.hidden = names.length < 2;
  return chosen;
}

// Fill a table of versions, best first; without `data`, each by the first data set on its card. Columns are [head, its value].
function versions(node, all, data, live, more) {
  const scoreOf = ({ scores = {} }) => scores[data ?? Object.keys(scores)[0]];
  const hasLive = all.some((one) => live[1](one) !== NONE);
  const sorted = all.toSorted((one, other) => byScore(scoreOf(one), scoreOf(other)));
  const heads = [["Version"], ["R@5", true], ["Cosine", true], ...(hasLive ? [[live[0], true]] : []), ["Best baseline", true], ["Margin", true], ["Latency", true], ...more.map(([head]) => [head, true]), ["Size", true], ["Date"], ["Promote"]];
  const rows = sorted.map((one, rank) => {
    const score = scoreOf(one);
    const isBest = rank === 0 && sorted.length > 1 && Number.isFinite(figure(score, "R@5"));
    if (one.error) return [naming(one), el("span", { class: "warning" }, one.error), ...heads.slice(2).map(() => NONE)];
    return [naming(one, isBest), recall(score?.["R@5"]), cosine(score?.cosine), ...(hasLive ? [live[1](one)] : []), cosine(best(score)), signed(score?.margin), ms(latency(one.id)), ...more.map(([, value]) => value(one)), bytes(one.bytes), one.date ?? NONE, promoter(one)];
  });
  table(byId(node), heads, rows, "None.");
}

const best = (score) => (Object.keys(score?.baselines ?? {}).length ? Math.max(...Object.values(score.baselines)) : null);

function naming(one, isBest = false) {
  const what = one.error ? "" : [one.architecture || one.kind.replace("_", "-"), `${one.context_length} \u00d7 ${one.dim}`].join(", ");
  return el("span", { class: "version" }, opener(one.id), isBest ? el("span", { class: "mark best" }, "best R@5") : null, marks(one.id), el("span", { class: "remark" }, what));
}

const marks = (id) => Object.entries(known?.aliases ?? {}).filter(([, one]) => one.id === id).map(([alias]) => el("span", { class: "mark" }, alias));

const opener = (id) => el("a", { href: address.link("models", { card: id }), "data-card": id, "aria-label": `Card of ${id}` }, el("code", {}, id));

// Return the median milliseconds of a batch in the model of a version that is loaded, null of any other.
function latency(id) {
  const served = Object.entries(known.aliases).filter(([, one]) => one.id === id);
  const found = served.map(([alias]) => quantile(0.5, histogram(samples, "lvm_batch_seconds", { engine: alias }))).filter((one) => one !== null);
  return found.length ? Math.min(...found) * 1e3 : null;
}

const promotion = ({ id, kind }) => `lvm promote ${HOLDERS[kind]} ${id}`;

function promoter(one) {
  const holder = HOLDERS[one.kind];
  if (!holder) return NONE;
  return known.aliases[holder]?.id === one.id ? el("span", { class: "quiet" }, "serves") : copyButton(promotion(one), "Copy");
}

// ---- shadow and ledger

function shadow() {
  const { candidate } = known.aliases;
  const named = (outcome) => select(samples, "lvm_shadow_total", { outcome })[0]?.value ?? 0;
  const [near, overlap, extra] = ["cosine", "overlap", "extra_seconds"].map((name) => histogram(samples, `lvm_shadow_${name}`));
  const average = (found) => (found?.count ? found.sum / found.count : null);
  if (!candidate && !named("compared")) {
    byId("shadow").replaceChildren(el("p", { class: "quiet" }, "No version is aliased candidate, so nothing is compared: ", el("code", {}, "lvm promote candidate VERSION"), " begins it."));
    return;
  }
  const slower = average(extra);
  byId("shadow").replaceChildren(
    el("div", { class: "readouts" },
      readout("Candidate", candidate?.id.split("/")[0] ?? NONE, candidate?.id.split("/")[1] ?? "no longer set"),
      readout("Compared", whole(named("compared")), `${whole(named("skipped"))} skipped, ${whole(named("failed"))} failed`),
      readout("Cosine to the answer given", cosine(average(near)), `mean; a tenth below ${cosine(quantile(0.1, near))}`),
      readout("Passages both find", percent(average(overlap)), "of the first 10"),
      readout("Takes longer by", ms(slower === null ? null : slower * 1e3), "mean, alone in a batch"),
    ),
    nearer(candidate, known.aliases.primary),
  );
}

// Return how much nearer to the true next vectors the candidate is than the primary, by the coherence of the context.
function nearer(candidate, primary) {
  const of = { model: candidate?.id.split("/")[0], version: candidate?.id.split("/")[1], against: primary?.id };
  const levels = COHERENCES.map(([coherence, words]) => [words, differenceOf({ ...of, ...(coherence && { coherence }) })]).filter(([, found]) => found?.pairs);
  if (!levels.length) return el("p", { class: "small" }, "Which of the two is nearer to the true next vectors is known as soon as later contexts of the same readers show them.");
  const rows = levels.map(([words, { pairs, mean, half }]) => {
    const state = mean - half > 0 ? ["good", "candidate is nearer"] : mean + half < 0 ? ["warning", "candidate is farther"] : ["quiet", "not decided"];
    return [words, whole(pairs), signed(mean), `${signed(mean - half)} to ${signed(mean + half)}`, el("span", { class: state[0] }, state[1])];
  });
  const node = el("table");
  table(node, [["Contexts"], ["Pairs", true], ["Nearer to the true next by", true], ["95 % interval", true], ["Verdict"]], rows, "");
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Differences of the cosines to the true next vector" }, node);
}

// Return {pairs, mean, half the 95 % interval} of a histogram of differences, each bucket by its middle; null of none.
function differenceOf(wanted) {
  const found = histogram(samples, "lvm_shadow_difference", wanted);
  if (!found?.count) return null;
  const { edges, counts, count: pairs, sum } = found;
  const mean = sum / pairs;
  const squares = edges.map((edge, place) => {
    const below = edges[place - 1] ?? edge;
    const middle = edge === Infinity ? below : (below + edge) / 2;
    return (counts[place] - (counts[place - 1] ?? 0)) * (middle - mean) ** 2;
  }).reduce((all, one) => all + one, 0);
  return { pairs, mean, half: 1.96 * Math.sqrt(squares / Math.max(pairs - 1, 1) / pairs) };
}

async function older() {
  const page = await get(`ledger?offset=${moves.length}&limit=${PAGE}`);
  moves.push(...page.moves);
  if (page.skipped) notify("models-notice", `Left out: ${page.skipped} lines of the ledger that are no moves.`);
  const rows = moves.map(({ time: at, who, alias, action, before, after, why, overrode }) => [
    el("time", { datetime: at }, time(at)), who, alias, el("span", { class: action === "rollback" ? "warning" : null }, action), before ? opener(before) : NONE, after ? opener(after) : NONE,
    overrode?.length ? el("span", {}, why, el("span", { class: "warning" }, ` over: ${overrode.join("; ")}`)) : why || NONE,
  ]);
  table(byId("ledger"), [["Time"], ["Who"], ["Alias"], ["Move"], ["From"], ["To"], ["Why"]], rows, "No alias was ever moved.");
  byId("older").hidden = moves.length >= page.total;
}
