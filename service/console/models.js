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
  return [ways, ...body, ...(one && HOLDERS[one.kind] ? [el("h4", {}, "Serve it"), snippet(promotion(one))] : []), matter];
}

// ---- aliases

function refusals() {
  const refused = Object.entries(known.aliases).filter(([, { refused: one }]) => one);
  byId("refused").replaceChildren(...refused.map(([alias, one]) => el("div", { class: "notice" },
    el("p", {}, el("strong", {}, alias), " points at ", el("code", {}, one.refused.id), ", which is refused:"),
    el("p", { class: "warning" }, one.refused.reason ?? "no reason is known"),
    el("p", {}, one.id && one.id !== one.refused.id ? ["It goes on serving ", el("code", {}, one.id), ". "] : ["It serves nothing. "], "The alias goes back with:"),
    snippet(`lvm rollback ${alias}`),
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
  versions("nets", nets, data, [
    ["Parameters", ({ parameters }) => (parameters ? whole(parameters) : NONE)],
  ]);
  versions("corpora", corpora, null, [
    ["Passages", ({ chunks }) => whole(chunks)],
    ["Articles", ({ articles }) => whole(articles)],
  ]);
}

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

// Fill a table of versions, best first; without `data`, each by the first data set on its card.
function versions(node, all, data, more) {
  const scoreOf = ({ scores = {} }) => scores[data ?? Object.keys(scores)[0]];
  const sorted = all.toSorted((one, other) => byScore(scoreOf(one), scoreOf(other)));
  const heads = [["Version"], ["R@5", true], ["Cosine", true], ["Best baseline", true], ["Margin", true], ["Latency", true], ...more.map(([head]) => [head, true]), ["Size", true], ["Date"], ["Promote"]];
  const rows = sorted.map((one, rank) => {
    const score = scoreOf(one);
    const isBest = rank === 0 && sorted.length > 1 && Number.isFinite(figure(score, "R@5"));
    if (one.error) return [naming(one), el("span", { class: "warning" }, one.error), ...heads.slice(2).map(() => NONE)];
    return [naming(one, isBest), recall(score?.["R@5"]), cosine(score?.cosine), cosine(best(score)), signed(score?.margin), ms(latency(one.id)), ...more.map(([, value]) => value(one)), bytes(one.bytes), one.date ?? NONE, promoter(one)];
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
  return known.aliases[holder]?.id === one.id ? el("span", { class: "quiet" }, `is ${holder}`) : copyButton(promotion(one), "Copy command");
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
  );
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
