// Live: what /metrics says of the last minutes, drawn.

import * as address from "./address.js";
import { get } from "./api.js";
import { snippet } from "./copy.js";
import { byId, el, notify, readout, table } from "./dom.js";
import { FIGURES, bound, describe, deviations, drifts, worst } from "./drift.js";
import { NONE, bytes, cosine, ms, percent, quantity, rate, whole } from "./format.js";
import { groupOf } from "./outcomes.js";
import { Bars, Plot } from "./plot.js";
import { quantile, select, total, values } from "./prometheus.js";
import { history } from "./telemetry.js";

const MINUTES = [1, 5, 15, 60];
const GROUPS = { answered: "Answered", rejected: "Rejected input", overload: "Overload", failed: "Failed", cancelled: "Cancelled" };
const BREAKER = { 0: "closed", 0.5: "half-open", 1: "open" };
const PERCENTILES = [["p50", 0.5], ["p95", 0.95], ["p99", 0.99]];
const STAGES = ["decode", "embed", "queue", "infer", "search", "rerank", "encode"];
const BASELINES = [["persistence", "last vector", 6], ["mean", "mean", 5], ["weighted_mean", "weighted mean", 2]]; // with the style of their lines
const MINUTE_S = 59.5; // of which a live score is the mean: a few seconds hold too few contexts
const FEWEST = 10; // answers that a share is shown of
const MB = 2 ** 20;
const charts = new Map();
let latest = null; // samples
let models = null; // of /models, for the command in an idle view

// Listen to the controls.
export function start() {
  byId("window").addEventListener("change", ({ target }) => (address.set({ window: target.value === "5" ? null : target.value }), show()));
  byId("log").addEventListener("change", ({ target }) => (address.set({ scale: target.checked ? "log" : null }), show()));
  addEventListener("resize", show);
  for (const [place, box] of [...byId("charts").children].entries()) {
    box.open = place < 1 || !matchMedia("(max-width: 40rem)").matches;
    box.addEventListener("toggle", show);
  }
}

// Take what a scrape said, or why there is none, and show it if Live is seen.
export function take(samples, error) {
  latest = samples ?? latest;
  if (byId("live").hidden) return;
  const last = history.scrapes.at(-1);
  notify("live-notice", error ? `${error.message}${last ? ` The last reading is ${whole(Date.now() / 1000 - last.at)} s old.` : ""}` : "");
  show();
}

// Show what is known.
export function show() {
  if (byId("live").hidden) return;
  const chosen = address.values();
  const minutes = MINUTES.find((one) => `${one}` === chosen.get("window")) ?? 5;
  const isLog = chosen.get("scale") === "log";
  byId("window").querySelector(`[value="${minutes}"]`).checked = true;
  byId("log").checked = isLog;
  if (!latest || !history.scrapes.length) return;
  const view = { seconds: minutes * 60, isLog, now: history.scrapes.at(-1).at, stretches: history.stretches(minutes * 60), minutes: () => history.stretches(minutes * 60, MINUTE_S), whole: history.whole(minutes * 60), routes: values(latest, "lvm_in_flight_requests", "route") };
  const isIdle = !(requests(view.whole, view.routes) > 0);
  for (const id of ["readouts", "charts"]) byId(id).hidden = isIdle;
  byId("idle").hidden = !isIdle;
  if (isIdle) idle(view);
  else busy(view);
  serving(view);
}

function busy(view) {
  summary(view);
  for (const [id, wanted] of Object.entries(sections(view))) section(id, wanted, view);
  scores(view);
  const engines = view.whole.history.labels("lvm_batch_rows_count", "engine");
  distribution(engines.map((engine) => [engine, view.whole.histogram("lvm_batch_rows", { engine })]).filter(([, found]) => found?.count));
}

// ---- nothing to see

function idle(view) {
  const seen = view.whole.seconds;
  const words = seen < 2 ? "No request has been seen yet." : `No request has come in the last ${seen < 100 ? `${whole(seen)} s` : `${whole(seen / 60)} min`}.`;
  byId("idle-words").textContent = `${words} This makes some, and so does Try it:`;
  if (byId("idle-command").childElementCount) return;
  byId("idle-command").replaceChildren(el("p", { class: "quiet" }, "reading /models"));
  get("models").then((found) => (models = found), () => null).finally(() => byId("idle-command").replaceChildren(snippet(command())));
}

// Return a command that makes traffic with what is loaded: a question in text, else a context of zeros.
function command() {
  const known = models?.aliases ?? {};
  const url = new URL(".", location.href).href.replace(/[#?].*$/, "");
  const token = sessionStorage.getItem("lvm-token") ? ' -H "Authorization: Bearer $LVM_TOKEN"' : "";
  const ask = (route, type, data) => `for i in $(seq 200); do ${data[0]}curl -s -o /dev/null ${url}${route}${token} -H 'Content-Type: ${type}' ${data[1]}; done`;
  if (known.retriever && models.encoder?.name && !models.encoder.missing) return ask("retrieve", "application/json", ["", `-d '{"text": "Do hares dig burrows?"}'`]);
  const { context_length: length, dim } = models?.versions?.find(({ id }) => id === known.primary?.id) ?? {};
  return ask("predict", "application/octet-stream", [`head -c ${4 * (length ?? 5) * (dim ?? 384)} /dev/zero | `, "--data-binary @-"]);
}

// ---- figures

const share = (part, all, scale = 1) => (all ? (scale * part) / all : null);
const outcomesOf = (stretch) => stretch.history.labels("lvm_requests_total", "outcome");

// Return how many requests of inference routes ended in a group of outcomes, or in any.
function requests(stretch, routes, group = null) {
  if (!stretch.seconds) return null;
  const wanted = outcomesOf(stretch).filter((outcome) => group === null || groupOf(outcome) === group);
  return routes.reduce((sum, route) => sum + wanted.reduce((more, outcome) => more + (stretch.rise("lvm_requests_total", { route, outcome }) ?? 0), 0), 0);
}

const percentile = (stretch, part, name, wanted) => {
  const seconds = quantile(part, stretch.histogram(name, wanted));
  return seconds === null ? null : seconds * 1e3;
};
const latency = (stretch, part, route, stage = "total") => percentile(stretch, part, "lvm_request_seconds", { route, stage });

function summary({ stretches, whole: all, routes }) {
  const now = stretches.at(-1);
  const [count, fallback] = [requests(now, routes), routes.reduce((sum, route) => sum + (now.rise("lvm_requests_total", { route, outcome: "fallback" }) ?? 0), 0)];
  const part = (group) => percent(share(requests(now, routes, group), count));
  const hurts = (group) => (requests(now, routes, group) > 0 ? "miss" : null);
  const timed = (route, stage, name) => (latency(all, 0.5, route, stage) === null ? [] : [readout(`p99 of ${name}`, ms(latency(now, 0.99, route, stage)), `p50 ${ms(latency(now, 0.5, route, stage))}`)]);
  const open = select(latest, "lvm_breaker_open").filter(({ value }) => value);
  const drift = worst(drifts(latest));
  const told = describe(drift);
  byId("readouts").replaceChildren(
    readout("Requests", rate(count === null ? null : count / now.seconds), `${whole(now.level("lvm_in_flight_requests"))} in flight`),
    ...["/predict", "/retrieve"].flatMap((route) => [...timed(route, "total", route), ...timed(route, "total_text", `${route}, text`)]),
    readout("Rejected input", part("rejected"), "4xx: mistakes of callers"),
    readout("Overload", part("overload"), "429 and 503: told to come later", hurts("overload")),
    readout("Failed", part("failed"), "other 5xx, or a lost worker", hurts("failed")),
    readout("By a fallback", percent(share(fallback, requests(now, routes, "answered"))), "of the answers", fallback ? "miss" : null),
    readout("Room taken", percent(share(now.level("lvm_in_flight_rows"), now.level("lvm_limit_rows"))), `${whole(now.level("lvm_in_flight_rows"))} of ${whole(now.level("lvm_limit_rows"))} rows`),
    readout("Drift", deviations(drift?.value), drift ? `${drift.engine}; limit ${bound(drift.limit)}` : told.why, told.state),
    readout("Breakers", open.length ? open.map(({ labels, value }) => `${labels.engine} ${BREAKER[value]}`).join(", ") : "closed", "of all engines", open.length ? "miss" : null),
    readout("Memory", bytes(now.level("process_resident_memory_bytes")), "of all processes"),
    readout("Cores busy", quantity(now.rate("process_cpu_seconds_total"), ""), "of all processes"),
  );
}

// ---- plots

// Return the plots of each section, as {title, unit, most, limits, isSlow: whether a point is the mean of a minute, series: [[name, its value in a stretch]]}.
function sections(view) {
  return { traffic: traffic(view), latency: latencies(view), quality: quality(view), inputs: inputs(view), queue: queue(view), process: processes() };
}

function traffic({ whole: all, routes }) {
  const groups = Object.keys(GROUPS).filter((group) => requests(all, routes, group) > 0);
  const outcomes = (route) => outcomesOf(all).filter((outcome) => all.rise("lvm_requests_total", { route, outcome }) > 0);
  const flow = (group) => routes.flatMap((route) => outcomes(route).filter((outcome) => groupOf(outcome) === group).map((outcome) => [`${route} ${outcome}`, (one) => one.rate("lvm_requests_total", { route, outcome })]));
  return [
    { title: "Requests by how they ended", unit: "/s", most: 1, series: groups.map((group) => [GROUPS[group].toLowerCase(), (one) => share(requests(one, routes, group), one.seconds), Object.keys(GROUPS).indexOf(group)]) },
    { title: "Answered, by route", unit: "/s", most: 1, series: flow("answered") },
    { title: "Rejected input (4xx), by reason", unit: "/s", most: 1, series: flow("rejected") },
    { title: "Overload (429, 503), by reason", unit: "/s", most: 1, series: flow("overload") },
    { title: "Failed (other 5xx, lost), by reason", unit: "/s", most: 1, series: flow("failed") },
    { title: "Answered by a fallback", unit: "%", most: 1, series: outcomes("/predict").includes("fallback") || routes.some((route) => outcomes(route).includes("fallback")) ? [["share", (one) => share(routes.reduce((sum, route) => sum + (one.rise("lvm_requests_total", { route, outcome: "fallback" }) ?? 0), 0), requests(one, routes, "answered"), 100)]] : [] },
  ];
}

function latencies({ whole: all, routes }) {
  const isSeen = (name, wanted) => all.rise(name, wanted) > 0;
  const lines = (name, wanted) => PERCENTILES.map(([words, part]) => [words, (one) => percentile(one, part, name, wanted)]);
  const ofRoutes = routes.flatMap((route) => [["total", ""], ["total_text", ", text"]].flatMap(([stage, words]) =>
    isSeen("lvm_request_seconds_count", { route, stage }) ? [{ title: `Latency of ${route}${words}`, unit: "ms", most: 0.1, series: lines("lvm_request_seconds", { route, stage }) }] : []));
  const stages = (route) => STAGES.filter((stage) => isSeen("lvm_request_seconds_count", { route, stage })).map((stage) => [stage, (one) => one.mean("lvm_request_seconds", { route, stage }, 1e3)]);
  const ofStages = routes.map((route) => ({ title: `Time of ${route} by stage, mean`, unit: "ms", most: 0.1, series: stages(route) }));
  const names = new Map(select(latest, "lvm_model_info").map(({ labels: { alias, model } }) => [alias, `${alias} (${model})`]));
  const ofModels = all.history.labels("lvm_batch_seconds_count", "engine").filter((engine) => isSeen("lvm_batch_seconds_count", { engine }))
    .map((engine) => ({ title: `Time in the model: ${names.get(engine) ?? engine}`, unit: "ms", most: 0.1, series: lines("lvm_batch_seconds", { engine }) }));
  return [...ofRoutes, ...ofStages, ...ofModels];
}

function queue({ whole: all }) {
  const engines = all.history.labels("lvm_batch_rows_count", "engine").filter((engine) => all.rise("lvm_batch_rows_count", { engine }) > 0);
  return [
    { title: "Rows in a batch, mean", unit: "", most: 1, series: engines.map((engine) => [engine, (one) => one.mean("lvm_batch_rows", { engine })]) },
    { title: "Rows waiting or running", unit: "", most: 1, series: engines.map((engine) => [engine, (one) => one.level("lvm_queue_rows", { engine })]) },
    { title: "Rows in flight, and how many may be", unit: "", most: 1, series: [["in flight", (one) => one.level("lvm_in_flight_rows")], ["limit", (one) => one.level("lvm_limit_rows")]] },
  ];
}

function inputs() {
  const known = drifts(latest);
  const limitsOf = (limit) => (limit === null ? [] : limit < 0 ? [limit] : [limit, -limit]);
  return Object.entries(FIGURES).map(([figure, words]) => {
    const mine = known.filter((one) => one.figure === figure);
    const series = mine.map(({ engine }) => [engine, (one) => one.level("lvm_input_drift", { engine, figure })]);
    return { title: words, unit: "\u03c3", most: 1, limits: limitsOf(mine[0]?.limit ?? null), series };
  });
}

// The predictions whose true next vector arrived: of each alias by version, beside the baselines and the card.
function quality({ whole: all }) {
  const { history } = all;
  const aliases = history.labels("lvm_live_distance_count", "alias");
  const byAlias = aliases.map((alias) => ({ title: `Cosine to the true next vector: ${alias}`, unit: "", most: null, isSlow: true, series: scored(all, alias) }));
  const searched = history.labels("lvm_live_rank_bucket", "query").filter((query) => all.rise("lvm_live_rank_bucket", { query, le: "+Inf" }) >= FEWEST);
  const recallOf = (query) => (one) => share(one.rise("lvm_live_rank_bucket", { query, le: "5.0" }), one.rise("lvm_live_rank_bucket", { query, le: "+Inf" }));
  const known = history.labels("lvm_live_coverage", "alias").filter((alias) => all.level("lvm_live_coverage", { alias }) > 0);
  return [
    ...byAlias,
    { title: "R@5 of /retrieve: passages that came next", unit: "", most: 1, isSlow: true, series: searched.map((query) => [query.split("/")[0], recallOf(query)]) },
    { title: "Predictions whose true next vector arrived", unit: "%", most: 100, series: known.map((alias) => [alias, (one) => share(one.level("lvm_live_coverage", { alias }), 1, 100)]) },
  ];
}

function scored(all, alias) {
  const line = (name, wanted, style) => [name, cosineOf({ alias, ...wanted }), style];
  const authors = authorsOf(all, alias);
  const versions = authors.map(({ name, ...author }, place) => line(name, { ...author, predictor: "net" }, [0, 3, 7][place % 3]));
  const baselines = BASELINES.map(([predictor, name, style]) => line(name, { predictor }, style));
  return [...versions, ...baselines, ["card", (one) => one.level("lvm_card_cosine", { alias }), 4]];
}

// Return the versions that were scored in this window, {model, version, name}, the last the one that serves.
function authorsOf(all, alias) {
  const wanted = { alias, predictor: "net" };
  const keys = all.history.find("lvm_live_distance_count", wanted).map((place) => all.history.keys[place][1]);
  const seen = keys.filter(({ model, version }) => all.rise("lvm_live_distance_count", { ...wanted, model, version }) > 0);
  const isAlone = ({ model }) => seen.filter((other) => other.model === model).length === 1;
  return seen.map(({ model, version }) => ({ model, version, name: isAlone({ model }) ? model : `${model}/${version}` }));
}

const cosineOf = (wanted) => (one) => {
  const distance = one.mean("lvm_live_distance", wanted);
  return distance === null ? null : 1 - distance;
};

// Compare what each version scored in this window.
function scores({ whole: all }) {
  const rows = all.history.labels("lvm_live_distance_count", "alias").flatMap((alias) => authorsOf(all, alias).map(({ model, version }) => {
    const wanted = { alias, model, version };
    const [net, ...known] = ["net", ...BASELINES.map(([predictor]) => predictor)].map((predictor) => cosineOf({ ...wanted, predictor })(all));
    const name = el("a", { href: address.link("models", { card: `${model}/${version}` }) }, el("code", {}, `${model}/${version}`));
    return [alias, name, whole(all.rise("lvm_live_distance_count", { ...wanted, predictor: "net" })), el("strong", {}, cosine(net)), cosine(total(latest, "lvm_card_cosine", wanted)), ...known.map(cosine)];
  }));
  byId("scores").parentElement.hidden = !rows.length;
  table(byId("scores"), [["Alias"], ["Version"], ["Contexts", true], ["Cosine", true], ["Card", true], ...BASELINES.map(([, name]) => [capital(name), true])], rows, "");
}

const capital = (words) => words[0].toUpperCase() + words.slice(1);

const processes = () => [
  { title: "Memory of all processes", unit: "MiB", most: 1, series: [["resident", (one) => share(one.level("process_resident_memory_bytes"), MB)]] },
  { title: "Cores that all processes keep busy", unit: "", most: 0.1, series: [["busy", (one) => one.rate("process_cpu_seconds_total")]] },
];

// Draw the plots of a section that have something to show; without any, hide the section.
function section(id, wanted, view) {
  const drawn = wanted.map((one) => ({ ...one, series: one.series.map(([name, value, style]) => ({ name, style, points: (one.isSlow ? view.minutes() : view.stretches).map((each) => [each.at, each.once(`${one.title} ${name}`, value)]) })) }))
    .filter(({ series }) => series.some(({ points }) => points.some(([, value]) => value !== null)));
  byId(id).hidden = !drawn.length;
  const made = drawn.map((one) => chart(id, one.title, () => new Plot(one.title, one.unit, one.most, one.limits)));
  place(id, made);
  if (!byId(id).open) return;
  for (const [at, plot] of made.entries()) plot.draw(drawn[at].series, view);
}

function chart(id, title, make) {
  const key = `${id} ${title}`;
  if (!charts.has(key)) charts.set(key, make());
  return charts.get(key);
}

// Put charts into a section, and leave those alone that are there: a focus or a pointer may be on them.
function place(id, made) {
  const [box, wanted] = [byId(id).querySelector(".plots"), made.map(({ element }) => element)];
  const present = [...box.children].filter((child) => child.dataset.kept === undefined);
  if (present.length === wanted.length && present.every((child, at) => child === wanted[at])) return;
  for (const child of present) if (!wanted.includes(child)) child.remove();
  box.prepend(...wanted);
}

// Draw how many rows batches had, of each engine as shares of its batches.
function distribution(found) {
  const bars = chart("queue", "distribution", () => new Bars("Rows in a batch: share of the batches in this window", "%"));
  bars.element.dataset.kept = "";
  if (!bars.element.isConnected) byId("queue").querySelector(".plots").append(bars.element);
  bars.element.hidden = !found.length;
  if (!found.length) return;
  const counts = found.map(([, { counts: sums }]) => sums.map((sum, at) => sum - (sums[at - 1] ?? 0)));
  const { edges } = found[0][1];
  const last = Math.max(3, ...counts.map((each) => each.findLastIndex((count) => count > 0)));
  const names = edges.slice(0, last + 1).map((edge, at) => range(edges[at - 1] ?? 0, edge));
  const series = found.map(([name, { count, sum }], one) => ({ name, values: counts[one].slice(0, last + 1).map((part) => share(part, count, 100)), remark: `${whole(count)} batches, mean ${quantity(sum / count, "")}` }));
  bars.draw(series, names);
}

function range(below, edge) {
  if (edge === Infinity) return `> ${below}`;
  return edge - below <= 1 ? `${edge}` : `${below + 1}\u2013${edge}`;
}

// ---- what serves

function serving({ whole: all }) {
  const known = drifts(latest);
  const rows = select(latest, "lvm_model_info").map(({ labels: { alias, model, version, runtime } }) => {
    const breaker = total(latest, "lvm_breaker_open", { engine: alias });
    const refused = ["refused", "failed"].reduce((sum, outcome) => sum + (total(latest, "lvm_reloads_total", { alias, outcome }) ?? 0), 0);
    const drift = worst(known.filter(({ engine }) => engine === alias));
    const [middle, high] = [0.5, 0.99].map((part) => ms(percentile(all, part, "lvm_batch_seconds", { engine: alias })));
    const far = drift ? el("span", { class: drift.used > 1 ? "warning" : "good", title: describe(drift).why }, deviations(drift.value)) : NONE;
    const name = el("a", { href: address.link("models", { card: `${model}/${version}` }) }, el("code", {}, `${model}/${version}`));
    return [alias, name, runtime, el("span", { class: breaker ? "warning" : null }, BREAKER[breaker] ?? NONE), whole(refused), middle, high, far];
  });
  const heads = [["Alias"], ["Version"], ["Runtime"], ["Breaker"], ["Reloads refused", true], ["Model p50", true], ["Model p99", true], ["Furthest drift", true]];
  table(byId("serving"), heads, rows, "No version is loaded.");
}
